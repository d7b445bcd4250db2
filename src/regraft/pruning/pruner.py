"""Prune layer by layer: calibrate a layer, prune it, pass the pruned layer's outputs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from regraft import ranks
from regraft.data.collate import Batch
from regraft.importance.observe import InputSums, observing, unused
from regraft.importance.safety_potential import AddedEnergy
from regraft.importance.score import score
from regraft.importance.snip import gradient_magnitudes
from regraft.importance.sparsegpt import DAMP, factors, second_moments
from regraft.importance.wanda import sum_of_squares
from regraft.models.anatomy import Anatomy, LayerAnatomy, LinearAnatomy
from regraft.models.checkpoint import Checkpoint
from regraft.models.checkpoint_copy import Edit
from regraft.models.walk import Walk
from regraft.pruning.masks import Pattern
from regraft.pruning.results import LayerResults, PrunedWeight
from regraft.pruning.sparsegpt import BLOCK, sparsegpt_prune

Order = Literal["sequential", "one-shot"]
PruneMethod = Literal["wanda", "sparsegpt", "snip", "magnitude", "safety-potential"]
Patterns = Mapping[LinearAnatomy, Pattern]


@dataclass(frozen=True)
class Pruner:
    """How to prune: the criterion, when layers are calibrated, and SparseGPT's settings.

    `order` "sequential" calibrates each layer on the outputs of the pruned layers before it (the
    procedure of Wanda and SparseGPT), "one-shot" calibrates all on the dense model, as SNIP and
    magnitude do anyway.
    """

    method: PruneMethod = "wanda"
    order: Order = "sequential"
    damp: float = DAMP
    block: int = BLOCK


def prune_layers(
    pruner: Pruner,
    walk: Walk,
    anatomy: Anatomy,
    checkpoint: Checkpoint,
    patterns: Patterns,
    results: LayerResults,
    *,
    progress: Callable[[int], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Prune the linears of the text decoder: write each layer's results.

    Layers whose results are already written are not pruned again, so that a killed run goes on;
    SNIP, which needs all layers before the last one's gradients, begins again.

    Args:
        pruner: The method; not "magnitude", which needs no data (`magnitude_edits`).
        walk: The calibration data, D^u of the paper, before the first layer; of "safety-potential"
            `PotentialBatch`es. A resident model's weights are pruned in place.
        anatomy: Of the model.
        checkpoint: The dense checkpoint; its dtypes are those that updated weights are rounded to.
        patterns: Sparsity or N:M of every weight that is to be pruned.
        results: Where the results go.
        progress: Called with the number of samples each time a layer has seen a batch: `passes` of
            them in all.
        note: Told of a damping that had to grow.

    Raises:
        RegraftError: inputs overflow, or a layer sees no data.
    """
    if pruner.method == "snip":
        if any(results.load(layer) is None for layer in anatomy.layers):
            _prune_by_gradients(walk, anatomy, patterns, results, progress)
        return
    modules = dict(walk.model.network.named_modules())
    for layer in anatomy.layers:
        linears = {li: modules[li.module] for li in layer.linears if li in patterns}
        with walk.model.layer(layer.index):
            pruned = results.load(layer)
            sums, around = _gathering(pruner, linears)
            if pruner.order == "one-shot":
                walk.advance(layer.index, progress, around)
            elif pruned is None:
                for i, _ in walk.run(layer.index, around):
                    progress(len(walk.batches[i].ids))
            else:
                progress(sum(len(batch.ids) for batch in walk.batches))
            if pruned is None:
                sums.gather()
                pruned = _prune_layer(pruner, linears, sums, checkpoint, patterns, note)
                _save(results, layer, pruned)
            if pruner.order == "sequential":
                for linear, module in linears.items():
                    pruned[linear.key].put(_weight(module))
                _advance(walk, layer, progress)


def passes(pruner: Pruner) -> int:
    """How often each layer sees the calibration data: sequential pruning runs it pruned, too."""
    return 2 if pruner.method == "snip" or pruner.order == "sequential" else 1


def magnitude_edits(patterns: Patterns) -> dict[str, Edit]:
    """For `write_edited`: zero the smallest weights, tensor by tensor; needs no model."""

    def prune(pattern: Pattern) -> Edit:
        return lambda weight: weight.masked_fill_(pattern.mask(score("magnitude", weight, None)), 0)

    return {linear.tensor: prune(pattern) for linear, pattern in patterns.items()}


def zeros(checkpoint: Checkpoint, anatomy: Anatomy) -> int:
    """Number of prunable weights that are zero on disk; one tensor in memory at a time."""
    weights = (checkpoint.read(linear.tensor) for linear in anatomy.linears)
    return sum(int((weight == 0).count_nonzero()) for weight in weights)


def _prune_by_gradients(
    walk: Walk,
    anatomy: Anatomy,
    patterns: Patterns,
    results: LayerResults,
    progress: Callable[[int], None],
) -> None:
    modules = dict(walk.model.network.named_modules())
    scratch = results.folder / "states"
    wanted = patterns.__contains__
    for layer, values in gradient_magnitudes(walk, anatomy, scratch, wanted, progress):
        pruned = {}
        with walk.model.layer(layer.index):
            for linear in filter(wanted, layer.linears):
                if linear.key not in values:
                    raise unused(linear)
                importance = score("snip", _weight(modules[linear.module]), values[linear.key])
                pruned[linear.key] = PrunedWeight(mask=patterns[linear].mask(importance))
        _save(results, layer, pruned)


def _gathering(
    pruner: Pruner, linears: Mapping[LinearAnatomy, nn.Module]
) -> tuple[InputSums | AddedEnergy, Callable[[Batch], AbstractContextManager[None]]]:
    """The statistic that a method needs, and contexts in which forward passes add to it."""
    if pruner.method == "safety-potential":
        added = AddedEnergy()
        return added, added.observing(linears)
    sums = InputSums(sum_of_squares if pruner.method == "wanda" else second_moments)
    return sums, observing(linears, sums)


def _prune_layer(
    pruner: Pruner,
    linears: Mapping[LinearAnatomy, nn.Module],
    sums: InputSums | AddedEnergy,
    checkpoint: Checkpoint,
    patterns: Patterns,
    note: Callable[[str], None],
) -> dict[str, PrunedWeight]:
    if pruner.method in ("wanda", "safety-potential"):  # both |W_ij| * sqrt(s_j)
        return {
            linear.key: PrunedWeight(
                mask=patterns[linear].mask(score("wanda", _weight(module), sums.of(linear)[0]))
            )
            for linear, module in linears.items()
        }
    assert isinstance(sums, InputSums)
    pruned = {}
    for linear, factor in factors(linears, sums, pruner.damp, note):
        weight = _weight(linears[linear])
        updated = sparsegpt_prune(weight, factor, patterns[linear], pruner.block)
        on_disk = checkpoint.record(linear.tensor).torch_dtype
        pruned[linear.key] = PrunedWeight(weight=updated.to(on_disk))
    return pruned


def _advance(walk: Walk, layer: LayerAnatomy, progress: Callable[[int], None]) -> None:
    if layer.index + 1 == walk.layers:
        progress(sum(len(batch.ids) for batch in walk.batches))
        return
    walk.advance(layer.index, progress)


def _save(results: LayerResults, layer: LayerAnatomy, pruned: Mapping[str, PrunedWeight]) -> None:
    if ranks.first():
        results.save(layer, pruned)
    ranks.barrier()


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
