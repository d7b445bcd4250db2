"""Prune layer by layer: calibrate a layer, prune it, pass its outputs to the next.

    for each layer, first to last:
        run it on the calibration data, accumulating the pruner's statistic of each linear
        prune each linear: a mask or updated weights, saved at once
        "sequential": put them into the layer and run it again, for the next layer's inputs

A gradient pruner takes one backward pass instead, from the last layer to the first. A pruner that
reads no data needs no model: see `edits_without_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from torch import Tensor

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


@dataclass(frozen=True)
class LayerPruning:
    """Prunes the linears of the text decoder and saves the results of each layer.

    Layers that already have saved results are not pruned again, so a killed run resumes; gradient
    pruners repeat the backward pass.

    Attributes:
        settings: Settings of a pruner that reads data.
        dense: The model; updated weights are rounded to the dtypes of its checkpoint.
        layerwise: The calibration data, encoded by the pruner's `encoders`, before the first layer.
            If the whole model is on the device, its weights are pruned in place.
        patterns: Sparsity or N:M of every weight that is to be pruned.
        advance: Called with the number of samples each time a layer has seen a batch; they add up
            to `passes` times samples times layers.
        note: Called with the pruner's messages for the user.
    """

    settings: PruneSettings
    dense: Source
    layerwise: LayerwisePass
    patterns: Patterns
    results: LayerResults
    advance: Advance = lambda _: None
    note: Note = lambda _: None

    @cached_property
    def pruner(self) -> Pruner:
        return PRUNERS.get(self.settings.method)

    def run(self) -> None:
        """Prune all layers.

        Raises:
            RegraftError: inputs overflow, or a layer sees no data.
        """
        if self.settings.sequential:
            self.sequential()
        else:
            self.one_shot()

    def sequential(self) -> None:
        """Calibrate each layer on the outputs of the pruned layers before it."""
        pruner, layerwise = self.pruner, self.layerwise
        assert isinstance(pruner, InputPruner)
        for layer in self.dense.architecture.layers:
            linears = layerwise.linears(layer, self.patterns.__contains__)
            with layerwise.model.layer(layer.index):
                pruned = self.results.load(layer)
                if pruned is None:
                    found = Sums()
                    observing = found.observing(linears, pruner.add)
                    layerwise.run_layer(layer.index, self.advance, observing, keep=False)
                    found.gather()
                    pruned = self.prune(layer, found)
                else:
                    expect(self.advance, -layerwise.samples)
                for linear, module in linears.items():
                    pruned[linear.key].put(linear.weight(module))
                if layer.index + 1 < layerwise.layers:
                    layerwise.run_layer(layer.index, self.advance)
                else:  # the last layer's outputs are not needed
                    expect(self.advance, -layerwise.samples)

    def one_shot(self) -> None:
        """Calibrate all layers on the dense model, unless every result is already saved."""
        architecture = self.dense.architecture
        missing = [one for one in architecture.layers if not self.results.has(one)]
        if not missing:
            return
        wanted, scratch = self.patterns.__contains__, self.results.folder / "states"
        for layer, found in each_layer(
            self.layerwise, architecture, self.pruner, wanted, scratch, self.advance
        ):
            if layer in missing:
                self.prune(layer, found)
            found.sums.clear()  # freed before the next layer's are accumulated

    def prune(self, layer: LayerArchitecture, found: Sums) -> dict[str, PrunedWeight]:
        """Prune a layer and save the results, updated weights in the checkpoint's dtype."""
        linears = self.layerwise.linears(layer, self.patterns.__contains__)
        device = self.layerwise.model.device
        weights = {li: li.weight(module).to(device) for li, module in linears.items()}
        unseen = {li: weights.pop(li) for li in linears if found.unseen(li)}
        if unseen:
            self.note(_unseen_experts(layer, unseen))
        results = chain(
            self.pruner.prune(weights, found, self.patterns, self.settings, self.note),
            by_magnitude(unseen, self.patterns),
        )
        record = self.dense.checkpoint.record
        pruned = {li.key: one.rounded(record(li.tensor).torch_dtype) for li, one in results}
        if distributed.first():
            self.results.save(layer, pruned)
        distributed.barrier()
        return pruned


def by_magnitude(
    weights: Mapping[LinearArchitecture, Tensor], patterns: Patterns
) -> Iterator[tuple[LinearArchitecture, PrunedWeight]]:
    """Prune experts by |W|, for those without statistics because no calibration token reached them.

    For inputs of equal size and no correlation Wanda's and SparseGPT's scores order weights by
    magnitude, and so does SNIP's for gradients of equal size.
    """
    for linear, weight in weights.items():
        yield linear, PrunedWeight(mask=patterns[linear].mask(weight.float().abs()))


def _unseen_experts(layer: LayerArchitecture, unseen: Iterable[LinearArchitecture]) -> str:
    experts = {li.name.rpartition(".")[0] for li in unseen}
    every = {li.name.rpartition(".")[0] for li in layer.linears if li.expert is not None}
    return (
        f"Layer {layer.index}: {len(experts)} of {len(every)} experts saw no calibration token; "
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
    """Accumulate the sums of a pruner that reads data, for each layer of the unchanged model.

    Args:
        layerwise: The labelled samples, before the first layer.
        wanted: Which linears are observed.
        scratch: A folder for layer inputs, used by gradient pruners.
        advance: Called with the number of samples each time a layer has seen a batch (as by
            `layer_gradients` for gradient pruners).

    Yields:
        (layer, its sums), from the first layer to the last, or from the last to the first for
        gradient pruners. The layer is on the device until the next one is asked for.
    """
    if isinstance(pruner, GradientPruner):
        for layer, values in layer_gradients(
            layerwise, architecture, scratch, wanted, advance, add=pruner.accumulate
        ):
            yield layer, Sums.known(values)
        return
    assert isinstance(pruner, InputPruner), f"{pruner.name} reads no data"
    for layer in architecture.layers:
        linears = layerwise.linears(layer, wanted)
        found = Sums()
        with layerwise.model.layer(layer.index):
            layerwise.run_layer(layer.index, advance, found.observing(linears, pruner.add))
            found.gather()
            yield layer, found


def passes(settings: PruneSettings) -> int:
    """Cost of each layer in forward passes; sequential pruning runs it once more when pruned."""
    if PRUNERS.get(settings.method).by_gradients:
        return BOTH_WAYS
    return 2 if settings.sequential else 1


def edits_without_data(settings: PruneSettings, patterns: Patterns) -> dict[str, Edit]:
    """Edits for `write_edited` by a pruner that reads no data: no model has to be loaded."""
    pruner = PRUNERS.get(settings.method)

    def edit(linear: LinearArchitecture, weight: Tensor) -> Tensor:
        no_data = Sums.known({linear.key: NO_STATISTIC})
        ((_, pruned),) = pruner.prune({linear: weight}, no_data, patterns, settings)
        return pruned.put(weight)

    return edits_by_tensor((linear, partial(edit, linear)) for linear in patterns)


def zeros(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Number of prunable weights that are zero on disk; one matrix in memory at a time."""
    weights = (checkpoint.matrix(li.tensor, li.stored, li.shape) for li in architecture.linears)
    return sum(int((weight == 0).count_nonzero()) for weight in weights)
