"""Prune layer by layer: calibrate a layer, prune it, pass the pruned layer's outputs on.

    for each layer, first to last:
        run it on the calibration data, accumulating what the pruner needs of its linears
        prune: a mask or updated weights of each linear, stored at once
        "sequential": put them into the layer and run it again, for the next layer's inputs

A pruner by gradients takes one backward pass instead, from the last layer to the first. One that
reads no data needs no model: `edits_without_data`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from regraft import distributed
from regraft.models.architecture import Architecture, LayerArchitecture, LinearArchitecture
from regraft.models.checkpoint import Checkpoint
from regraft.models.checkpoint_copy import Edit
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.progress import Advance
from regraft.pruning.base import (
    NO_STATISTIC,
    PRUNERS,
    GradientPruner,
    InputPruner,
    Note,
    PruneSettings,
)
from regraft.pruning.gradients import layer_gradients
from regraft.pruning.inputs import Known
from regraft.pruning.masks import Patterns
from regraft.pruning.results import LayerResults, PrunedWeight

Pruned = Iterable[tuple[LinearArchitecture, PrunedWeight]]


def prune_layers(
    settings: PruneSettings,
    dense: Source,
    walk: LayerwisePass,
    patterns: Patterns,
    results: LayerResults,
    *,
    advance: Advance = lambda _: None,
    note: Note = lambda _: None,
) -> None:
    """Prune the linears of the text decoder: write each layer's results.

    Layers whose results are already written are not pruned again, so that a killed run goes on;
    a pruner by gradients, which needs all layers before the last one's, begins again.

    Args:
        settings: Of a pruner that reads data.
        dense: The model; updated weights are rounded to the dtypes of its checkpoint.
        walk: The calibration data, before the first layer, encoded by the pruner's `encoders`. A
            resident model's weights are pruned in place.
        patterns: Sparsity or N:M of every weight that is to be pruned.
        results: Where the results go.
        advance: Called with the number of samples each time a layer has seen a batch: `passes` of
            them in all.
        note: Called with what the pruner has to say.

    Raises:
        RegraftError: inputs overflow, or a layer sees no data.
    """
    pruner = PRUNERS.get(settings.method)
    if isinstance(pruner, GradientPruner):
        if any(results.load(layer) is None for layer in dense.architecture.layers):
            _prune_by_gradients(pruner, settings, dense, walk, patterns, results, advance)
        return
    assert isinstance(pruner, InputPruner), f"{pruner.name} reads no data"
    modules = dict(walk.model.network.named_modules())
    for layer in dense.architecture.layers:
        linears = {li: modules[li.module] for li in layer.linears if li in patterns}
        with walk.model.layer(layer.index):
            pruned = results.load(layer)
            sums = pruner.accumulator()
            observed = sums.observing(linears)
            if not settings.sequential:
                walk.advance(layer.index, advance, observed)
            elif pruned is None:
                for i, _ in walk.run(layer.index, observed):
                    advance(len(walk.batches[i].ids))
            else:
                advance(_samples(walk))
            if pruned is None:
                sums.gather()
                weights = {linear: _weight(module) for linear, module in linears.items()}
                found = pruner.prune(weights, sums, patterns, settings, note)
                pruned = _save(results, layer, found, dense.checkpoint)
            if settings.sequential:
                for linear, module in linears.items():
                    pruned[linear.key].put(_weight(module))
                _advance(walk, layer, advance)


def _prune_by_gradients(
    pruner: GradientPruner,
    settings: PruneSettings,
    dense: Source,
    walk: LayerwisePass,
    patterns: Patterns,
    results: LayerResults,
    advance: Advance,
) -> None:
    modules = dict(walk.model.network.named_modules())
    backward = layer_gradients(
        walk,
        dense.architecture,
        results.folder / "states",
        patterns.__contains__,
        advance,
        add=pruner.accumulate,
    )
    for layer, values in backward:
        with walk.model.layer(layer.index):
            wanted = [linear for linear in layer.linears if linear in patterns]
            weights = {linear: _weight(modules[linear.module]) for linear in wanted}
            found = pruner.prune(weights, Known(values), patterns, settings)
            _save(results, layer, found, dense.checkpoint)


def passes(settings: PruneSettings) -> int:
    """How often each layer sees the calibration data: sequential pruning runs it pruned, too."""
    by_gradients = isinstance(PRUNERS.get(settings.method), GradientPruner)
    return 2 if by_gradients or settings.sequential else 1


def edits_without_data(settings: PruneSettings, patterns: Patterns) -> dict[str, Edit]:
    """For `write_edited`, of a pruner that reads no data: prune tensor by tensor, with no model."""
    pruner = PRUNERS.get(settings.method)

    def prune(linear: LinearArchitecture) -> Edit:
        def edit(weight: Tensor) -> Tensor:
            found = pruner.prune(
                {linear: weight}, Known({linear.key: NO_STATISTIC}), patterns, settings
            )
            (_, pruned), *_ = found
            return pruned.put(weight)

        return edit

    return {linear.tensor: prune(linear) for linear in patterns}


def zeros(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Number of prunable weights that are zero on disk; one tensor in memory at a time."""
    weights = (checkpoint.read(linear.tensor) for linear in architecture.linears)
    return sum(int((weight == 0).count_nonzero()) for weight in weights)


def _advance(walk: LayerwisePass, layer: LayerArchitecture, advance: Advance) -> None:
    if layer.index + 1 == walk.layers:  # nobody reads the last layer's outputs
        advance(_samples(walk))
        return
    walk.advance(layer.index, advance)


def _save(
    results: LayerResults, layer: LayerArchitecture, found: Pruned, checkpoint: Checkpoint
) -> dict[str, PrunedWeight]:
    """Write a layer's results, updated weights in the dtype that they have on disk."""
    pruned = {
        linear.key: one.rounded(checkpoint.record(linear.tensor).torch_dtype)
        for linear, one in found
    }
    if distributed.first():
        results.save(layer, pruned)
    distributed.barrier()
    return pruned


def _samples(walk: LayerwisePass) -> int:
    return sum(len(batch.ids) for batch in walk.batches)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
