"""A dense checkpoint and the same network pruned: whether they fit, and what pruning took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.architecture import (
    FLOATS,
    LayerArchitecture,
    LinearArchitecture,
    check_same_architecture,
)
from regraft.models.load import Source
from regraft.patch.format import Patch, TensorPatch
from regraft.patch.groups import Grouping, common_grouping, grouping_of

_NEARLY_ALL = 0.9


def restorable(dense: Tensor, pruned: Tensor) -> Tensor:
    """Where a dense value can be restored: pruned is 0, dense is not. `[out, in]` bool."""
    return (pruned == 0) & (dense != 0)


def check_pair(dense: Source, pruned: Source) -> None:
    """Check that a pruned checkpoint can be realigned with this dense one.

    Raises:
        RegraftError: they are different models, a weight that is read is not finite, or nothing
            was pruned.
    """
    check_same_architecture(
        dense.architecture, pruned.architecture, (str(dense.folder), str(pruned.folder))
    )
    if not any((_read(pruned, linear) == 0).any() for linear in pruned.architecture.linears):
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
    for a, b in zip(dense.architecture.linears, pruned.architecture.linears, strict=True):
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
    prunable = {linear.tensor.removesuffix("weight") for linear in source.architecture.linears}
    return {
        name.removeprefix(source.architecture.prefix): name
        for name, record in source.checkpoint.tensors.items()
        if record.dtype in FLOATS and f"{name.rpartition('.')[0]}." not in prunable
    }


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the coarser of their dtypes."""
    dtype = max(a.dtype, b.dtype, key=lambda one: torch.finfo(one).eps)
    return a.to(dtype), b.to(dtype)


def _read(source: Source, linear: LinearArchitecture) -> Tensor:
    """One prunable weight, which must be finite."""
    weight = source.weight(linear)
    if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise RegraftError(
            f"{source.folder}: {linear.tensor} holds values that are NaN or infinite. Make or "
            "download the checkpoint again."
        )
    return weight


def _restored_in(tensor: TensorPatch, linear: LinearArchitecture) -> int:
    """How many weights of one linear, of all in a tensor, a patch restores."""
    if linear.stored is None:
        return tensor.restored
    here, _ = linear.stored.inside(tensor.positions, linear.shape)
    return int((tensor.before[here] == 0).count_nonzero())


def restored_by_module(
    patch: Patch, layers: Sequence[LayerArchitecture]
) -> dict[str, tuple[int, ...]]:
    """Restored weights per module and layer: "self_attn.q_proj" -> count in each layer."""
    names = dict.fromkeys(linear.name for layer in layers for linear in layer.linears)
    counts = {
        (linear.name, layer.index): _restored_in(patch.tensors[linear.tensor], linear)
        for layer in layers
        for linear in layer.linears
        if linear.tensor in patch.tensors
    }
    return {name: tuple(counts.get((name, layer.index), 0) for layer in layers) for name in names}
