"""From a dense and a pruned checkpoint to a patch, one weight in memory at a time.

No model is loaded, so a laptop will do for 7B. Which weights are restored is a `Rule`; everything
else (reading, regions of heads, dense values, digests) is the same for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.anatomy import (
    FLOATS,
    Block,
    LayerAnatomy,
    LinearAnatomy,
    check_same_anatomy,
)
from regraft.models.load import Source
from regraft.pruning.statistics import ImportanceStatistics
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

_NEARLY_ALL = 0.9
Rule = Callable[[LinearAnatomy, Tensor, Tensor, Sequence[Block]], Tensor]
"""(linear, dense weight, where a value can be restored, head regions) -> flat positions."""


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
        RegraftError: they are different models, a weight that is read is not finite, or nothing
            was pruned.
    """
    check_same_anatomy(dense.anatomy, pruned.anatomy, (str(dense.folder), str(pruned.folder)))
    if not any((_read(pruned, linear) == 0).any() for linear in pruned.anatomy.linears):
        raise RegraftError(
            f"{pruned.folder} has no zeros in its prunable weights: nothing was pruned, so there "
            "is nothing to restore. Give the dense checkpoint first and the pruned one second."
        )


@dataclass(frozen=True)
class Survey:
    """What pruning took: `restorable` weights, zero now and not before; its N:M pattern if any.

    `kept` are the weights that are not zero now; `same` says whether what pruning never changes
    is the dense model's.
    """

    restorable: int
    kept: int
    grouping: Grouping | None
    same: bool = True

    @property
    def doubt(self) -> str | None:
        """What the user should be told of the pair before weights of one go into the other."""
        if self.same:
            return None
        return (
            "The pruned model's kept weights are not the dense model's: is it pruned from another "
            "fine-tune, or was it trained since? Dense values fit only among the dense model's own."
        )


def survey(dense: Source, pruned: Source) -> Survey:
    """Look over every prunable weight of both checkpoints, one in memory at a time.

    Raises:
        RegraftError: a weight is NaN or infinite.
    """
    count, kept, groupings = 0, 0, []
    equal, compared = 0, 0
    for a, b in zip(dense.anatomy.linears, pruned.anatomy.linears, strict=True):
        before, after = _read(dense, a), _read(pruned, b)
        taken = int(restorable(before, after).count_nonzero())
        count += taken
        kept += int((after != 0).count_nonzero())
        if taken:
            groupings.append(grouping_of(after))
        first, left = _alike(before[:, 0], after[:, 0])  # SparseGPT changes later columns alone
        equal += int(((first == left) & (left != 0)).count_nonzero())
        compared += int((left != 0).count_nonzero())
    same = equal >= _NEARLY_ALL * compared and _same_besides(dense, pruned)
    return Survey(count, kept, common_grouping(groupings), same)


def _same_besides(dense: Source, pruned: Source) -> bool:
    """Whether nearly all tensors that are never pruned are the same, by a sample of each."""
    a, b = _never_pruned(dense), _never_pruned(pruned)
    same = [
        torch.equal(*_alike(dense.checkpoint.sample(a[name]), pruned.checkpoint.sample(b[name])))
        for name in a.keys() & b.keys()
    ]
    return sum(same) >= _NEARLY_ALL * len(same)


def _never_pruned(source: Source) -> dict[str, str]:
    """Name without the decoder's prefix -> name on disk; no biases, which some pruners correct."""
    prunable = {linear.tensor.removesuffix("weight") for linear in source.anatomy.linears}
    return {
        name.removeprefix(source.anatomy.prefix): name
        for name, record in source.checkpoint.tensors.items()
        if record.dtype in FLOATS and f"{name.rpartition('.')[0]}." not in prunable
    }


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the coarser of their dtypes."""
    dtype = max(a.dtype, b.dtype, key=lambda one: torch.finfo(one).eps)
    return a.to(dtype), b.to(dtype)


def _read(source: Source, linear: LinearAnatomy) -> Tensor:
    """One prunable weight, which must be finite."""
    weight = source.checkpoint.read(linear.tensor)
    if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise RegraftError(
            f"{source.folder}: {linear.tensor} holds values that are NaN or infinite. Make or "
            "download the checkpoint again."
        )
    return weight


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
    """Select the weights that are restored and take their dense values.

    Args:
        dense: The dense checkpoint.
        pruned: The same network pruned, by whomever; `pruned == 0 and dense != 0` is the mask.
        heads: (layer, head) to restore in.
        rule: Which weights of a matrix are restored.
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
                before, after = _read(dense, linear), _read(pruned, pruned_linear)
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
