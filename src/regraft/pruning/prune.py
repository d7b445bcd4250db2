"""Prune layer by layer: calibrate a layer, prune it, pass the pruned layer's outputs on.

    for each layer, first to last:
        run it on the calibration data, accumulating what the pruner needs of its linears
        prune: a mask or updated weights of each linear, stored at once
        "sequential": put them into the layer and run it again, for the next layer's inputs

A pruner by gradients takes one backward pass instead, from the last layer to the first. One that
reads no data needs no model: `edits_without_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from regraft import distributed
from regraft.models.architecture import Architecture, LayerArchitecture, LinearArchitecture
from regraft.models.checkpoint import Checkpoint
from regraft.models.checkpoint_copy import Edit
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.progress import Advance, expect
from regraft.pruning.base import (
    NO_STATISTIC,
    PRUNERS,
    GradientPruner,
    InputPruner,
    Note,
    Pruner,
    PruneSettings,
)
from regraft.pruning.gradients import BOTH_WAYS, layer_gradients
from regraft.pruning.inputs import Sums
from regraft.pruning.masks import Patterns
from regraft.pruning.results import LayerResults, PrunedWeight, edits_by_tensor


def prune_layers(
    settings: PruneSettings,
    dense: Source,
    layerwise: LayerwisePass,
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
        layerwise: The calibration data, before the first layer, encoded by the pruner's `encoders`.
            A resident model's weights are pruned in place.
        patterns: Sparsity or N:M of every weight that is to be pruned.
        results: Where the results go.
        advance: Called with the number of samples each time a layer has seen a batch: `passes` of
            them in all.
        note: Called with what the pruner has to say.

    Raises:
        RegraftError: inputs overflow, or a layer sees no data.
    """
    pruning = _Pruning(settings, dense, layerwise, patterns, results, advance, note)
    if settings.sequential:
        pruning.sequential()
    else:
        pruning.one_shot()


@dataclass(frozen=True)
class _Pruning:
    settings: PruneSettings
    dense: Source
    layerwise: LayerwisePass
    patterns: Patterns
    results: LayerResults
    advance: Advance
    note: Note

    @cached_property
    def pruner(self) -> Pruner:
        return PRUNERS.get(self.settings.method)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.layerwise.model.network.named_modules())

    def sequential(self) -> None:
        """Each layer on what the pruned layers before it put out."""
        pruner, layerwise = self.pruner, self.layerwise
        assert isinstance(pruner, InputPruner)
        for layer in self.dense.architecture.layers:
            linears = {li: self.modules[li.module] for li in layer.linears if li in self.patterns}
            with layerwise.model.layer(layer.index):
                pruned = self.results.load(layer)
                if pruned is None:
                    found = Sums()
                    for i, _ in layerwise.run(layer.index, found.observing(linears, pruner.add)):
                        self.advance(len(layerwise.batches[i].ids))
                    found.gather()
                    pruned = self.prune(layer, found)
                else:
                    expect(self.advance, -layerwise.samples)
                for linear, module in linears.items():
                    pruned[linear.key].put(linear.weight(module))
                if layer.index + 1 < layerwise.layers:
                    layerwise.advance(layer.index, self.advance)
                else:  # nobody reads the last layer's outputs
                    expect(self.advance, -layerwise.samples)

    def one_shot(self) -> None:
        """All layers on the dense model; where all are done already, nothing runs."""
        architecture = self.dense.architecture
        # Asked before the first layer, by one process: later one could see what another has
        # written meanwhile, and they would no longer do the same.
        left = [
            one
            for one in architecture.layers
            if not distributed.decided(partial(self.results.has, one))
        ]
        if not left:
            return
        scratch = self.results.folder / "states"
        for layer, found in each_layer(
            self.layerwise,
            architecture,
            self.pruner,
            self.patterns.__contains__,
            scratch,
            self.advance,
        ):
            if layer in left:
                self.prune(layer, found)
            found.sums.clear()  # gone before the next layer's are added up

    def prune(self, layer: LayerArchitecture, found: Sums) -> dict[str, PrunedWeight]:
        """Prune a layer and write the results, updated weights in the dtype they have on disk."""
        weights = {
            li: li.weight(self.modules[li.module]).to(self.layerwise.model.device)
            for li in layer.linears
            if li in self.patterns
        }
        unseen = {li: weights.pop(li) for li in unreached(weights, found)}
        if unseen:
            self.note(_of_unseen(layer, unseen))
        made = chain(
            self.pruner.prune(weights, found, self.patterns, self.settings, self.note),
            by_magnitude(unseen, self.patterns),
        )
        record = self.dense.checkpoint.record
        pruned = {li.key: one.rounded(record(li.tensor).torch_dtype) for li, one in made}
        if distributed.first():
            self.results.save(layer, pruned)
        distributed.barrier()
        return pruned


def unreached(linears: Iterable[LinearArchitecture], found: Sums) -> list[LinearArchitecture]:
    """Those of experts to which the router sent no calibration token."""
    return [li for li in linears if li.expert is not None and not found.reached(li)]


def by_magnitude(
    weights: Mapping[LinearArchitecture, Tensor], patterns: Patterns
) -> Iterator[tuple[LinearArchitecture, PrunedWeight]]:
    """Prune experts that no calibration token reached: nothing is known of their inputs.

    Were all inputs equally large and independent, Wanda's and SparseGPT's scores would order
    weights by their size; so would SNIP's were all gradients.
    """
    for linear, weight in weights.items():
        yield linear, PrunedWeight(mask=patterns[linear].mask(weight.float().abs().contiguous()))


def _of_unseen(layer: LayerArchitecture, unseen: Iterable[LinearArchitecture]) -> str:
    named = {li.name.rpartition(".")[0] for li in unseen}
    every = {li.name.rpartition(".")[0] for li in layer.linears if li.expert is not None}
    return (
        f"Layer {layer.index}: {len(named)} of {len(every)} experts saw no calibration token; "
        "their weights are pruned by magnitude."
    )


def each_layer(
    layerwise: LayerwisePass,
    architecture: Architecture,
    pruner: Pruner,
    wanted: Callable[[LinearArchitecture], bool],
    scratch: Path,
    advance: Advance,
) -> Iterator[tuple[LayerArchitecture, Sums]]:
    """What a pruner accumulates of each layer, of the model as it is.

    Args:
        layerwise: The labelled samples, before the first layer.
        architecture: Of the model.
        pruner: One that reads data.
        wanted: Which linears are observed.
        scratch: A folder for layer inputs, where gradients are taken.
        advance: Called with the number of samples each time a layer has seen a batch (twice a
            layer for gradients).

    Yields:
        From the first layer to the last, each on the device until the next is asked for; for
        gradients from the last to the first.
    """
    if isinstance(pruner, GradientPruner):
        for layer, values in layer_gradients(
            layerwise, architecture, scratch, wanted, advance, add=pruner.accumulate
        ):
            yield layer, Sums.known(values)
        return
    assert isinstance(pruner, InputPruner), f"{pruner.name} reads no data"
    modules = dict(layerwise.model.network.named_modules())
    for layer in architecture.layers:
        linears = {li: modules[li.module] for li in layer.linears if wanted(li)}
        found = Sums()
        with layerwise.model.layer(layer.index):
            layerwise.advance(layer.index, advance, found.observing(linears, pruner.add))
            found.gather()
            yield layer, found


def passes(settings: PruneSettings) -> int:
    """What each layer costs, in forward passes: sequential pruning runs it pruned, too."""
    if PRUNERS.get(settings.method).by_gradients:
        return BOTH_WAYS
    return 2 if settings.sequential else 1


def edits_without_data(settings: PruneSettings, patterns: Patterns) -> dict[str, Edit]:
    """For `write_edited`, of a pruner that reads no data: prune tensor by tensor, with no model."""
    pruner = PRUNERS.get(settings.method)

    def prune(linear: LinearArchitecture) -> Edit:
        def edit(weight: Tensor) -> Tensor:
            nothing = Sums.known({linear.key: NO_STATISTIC})
            ((_, pruned),) = pruner.prune({linear: weight}, nothing, patterns, settings)
            return pruned.put(weight)

        return edit

    return edits_by_tensor((linear, prune(linear)) for linear in patterns)


def zeros(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Number of prunable weights that are zero on disk; one matrix in memory at a time."""
    weights = (checkpoint.matrix(li.tensor, li.stored, li.shape) for li in architecture.linears)
    return sum(int((weight == 0).count_nonzero()) for weight in weights)
