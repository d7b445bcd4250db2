"""From a dense and a pruned checkpoint to a patch, one weight in memory at a time.

No model is loaded, so a laptop will do for 7B. Which weights come back is a `Rule`; everything
else (reading, regions of heads, dense values, digests) is the same for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.importance.statistics import ImportanceStatistics
from regraft.models.anatomy import Block, LayerAnatomy, LinearAnatomy, check_same_anatomy
from regraft.models.load import Source
from regraft.restoration.groups import Grouping, common_grouping, grouping_of
from regraft.restoration.patch import Patch, TensorPatch
from regraft.restoration.selection import (
    Band,
    Head,
    blocks_of,
    kept_share,
    restorable,
    select_all,
    select_hsr,
)

Rule = Callable[[LinearAnatomy, Tensor, Tensor, Sequence[Block]], Tensor]
"""(linear, dense weight, where a value can come back, head regions) -> flat positions."""


def hsr(
    band: Callable[[float], Band | None],
    safety: ImportanceStatistics,
    utility: ImportanceStatistics,
) -> Rule:
    """HSR's rule: safety-critical weights at the edge of what pruning kept.

    `band` gives the thresholds for a matrix from the share of its weights that pruning kept, or
    None where they leave nothing to take.
    """

    def rule(
        linear: LinearAnatomy, weight: Tensor, free: Tensor, blocks: Sequence[Block]
    ) -> Tensor:
        thresholds = band(kept_share(weight, free))
        if thresholds is None:
            return torch.empty(0, dtype=torch.int64)
        return select_hsr(
            free,
            safety.scorer(linear, weight),
            utility.scorer(linear, weight),
            blocks,
            thresholds,
        )

    return rule


def whole_heads(
    _linear: LinearAnatomy, _weight: Tensor, free: Tensor, blocks: Sequence[Block]
) -> Tensor:
    """HSR-a's rule: everything in the chosen heads."""
    return select_all(free, blocks)


def check_pair(dense: Source, pruned: Source) -> None:
    """Check that a pruned checkpoint can be realigned with this dense one.

    Raises:
        RegraftError: they are different models, or nothing was pruned.
    """
    check_same_anatomy(dense.anatomy, pruned.anatomy, (str(dense.folder), str(pruned.folder)))
    if not any((pruned.checkpoint.read(li.tensor) == 0).any() for li in pruned.anatomy.linears):
        raise RegraftError(
            f"{pruned.folder} has no zeros in its prunable weights: nothing was pruned, so there "
            "is nothing to restore. Give the dense checkpoint first and the pruned one second."
        )


@dataclass(frozen=True)
class Survey:
    """What pruning took: `restorable` weights, zero now and not before; its N:M pattern if any.

    `kept` are the weights that are not zero now.
    """

    restorable: int
    kept: int
    grouping: Grouping | None


def survey(dense: Source, pruned: Source) -> Survey:
    """Look over every prunable weight of both checkpoints, one in memory at a time."""
    count, kept, groupings = 0, 0, []
    for a, b in zip(dense.anatomy.linears, pruned.anatomy.linears, strict=True):
        before, after = dense.checkpoint.read(a.tensor), pruned.checkpoint.read(b.tensor)
        taken = int(restorable(before, after).count_nonzero())
        count += taken
        kept += int((after != 0).count_nonzero())
        if taken:
            groupings.append(grouping_of(after))
    return Survey(count, kept, common_grouping(groupings))


def realign(
    dense: Source,
    pruned: Source,
    heads: Iterable[Head],
    rule: Rule,
    *,
    about: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> Patch:
    """Select the weights that come back and take their dense values.

    Args:
        dense: The dense checkpoint.
        pruned: The same network pruned, by whomever; `pruned == 0 and dense != 0` is the mask.
        heads: (layer, head) to restore in.
        rule: Which weights of a matrix come back.
        about: Recorded in the patch.
        device: Where to rank; CPU by default.
        progress: Called with 1 after each layer.

    Returns:
        The patch, for the tensors as the pruned checkpoint names them and in its dtype.

    Raises:
        RegraftError: the checkpoints or statistics do not fit.
    """
    check_pair(dense, pruned)
    chosen: dict[int, list[int]] = {}
    for layer_index, head in heads:
        chosen.setdefault(layer_index, []).append(head)
    tensors = {}
    layers = zip(dense.anatomy.layers, pruned.anatomy.layers, strict=True)
    for layer, pruned_layer in layers:
        linears = zip(layer.linears, pruned_layer.linears, strict=True)
        for linear, pruned_linear in linears if layer.index in chosen else ():
            blocks = blocks_of(layer, linear, chosen[layer.index])
            if blocks:
                before = dense.checkpoint.read(linear.tensor)
                after = pruned.checkpoint.read(pruned_linear.tensor)
                patch = _graft(linear, before, after, blocks, rule, device)
                if len(patch.positions):
                    tensors[pruned_linear.tensor] = patch
        if progress is not None:
            progress(1)
    return Patch(tensors, dict(about or {}))


def restored_by_module(patch: Patch, layers: Sequence[LayerAnatomy]) -> dict[str, tuple[int, ...]]:
    """Restored weights per module and layer: "self_attn.q_proj" -> count in each layer."""
    names = dict.fromkeys(linear.name for layer in layers for linear in layer.linears)
    counts = {
        (linear.name, layer.index): patch.tensors[linear.tensor].restored
        for layer in layers
        for linear in layer.linears
        if linear.tensor in patch.tensors
    }
    return {name: tuple(counts.get((name, layer.index), 0) for layer in layers) for name in names}


def _graft(
    linear: LinearAnatomy,
    before: Tensor,
    after: Tensor,
    blocks: Sequence[Block],
    rule: Rule,
    device: torch.device | None,
) -> TensorPatch:
    weight = before.to(device or "cpu")
    free = restorable(weight, after.to(weight.device))
    positions = rule(linear, weight, free, blocks)
    values = before.reshape(-1)[positions].to(after.dtype)
    if not torch.isfinite(values).all():
        raise RegraftError(
            f"{linear.key}: some dense values do not fit into the pruned checkpoint's dtype "
            f"{after.dtype}. Give a dense checkpoint of that dtype."
        )
    representable = values != 0
    return TensorPatch.of(after, positions[representable], values[representable])
