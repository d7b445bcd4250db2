"""A dense checkpoint and the same network compressed: whether they fit, what can be restored.

A pair is of one of two kinds (`survey` says which, by `_NO_ROUNDING`):

- "pruned": what can be restored are the zeros that pruning made. The kept weights are the dense
  ones, or were updated by the pruner, as by SparseGPT.
- "changed": compression changed nearly every weight, as quantised and dequantised weights or a
  merged fine-tune. Every weight that differs can be restored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.architecture import (
    LayerArchitecture,
    check_same_architecture,
)
from regraft.models.checkpoint import FLOATS
from regraft.models.checkpoint_copy import check_all_weights
from regraft.models.load import Source
from regraft.models.places import inside
from regraft.patch.format import Patch
from regraft.patch.groups import Grouping, common_grouping, grouping_of
from regraft.progress import SILENT, Advance, Progress

Kind = Literal["pruned", "changed"]
_NEARLY_ALL = 0.9
_ALL = 0.99
_NO_ROUNDING = 1 / 8  # of the weights that differ: zeros that no rounding makes, if it is pruned
_NUMBER = re.compile(r"\.\d+\.")  # of an expert, in its name
_ROWS, _BLOCK = 256, 32  # of a weight that are looked at; columns that share quantisation's scale


def restorable(dense: Tensor, compressed: Tensor, kind: Kind = "pruned") -> Tensor:
    """Where a dense value can be restored. `[out, in]` bool.

    "pruned": compressed is 0, dense is not. "changed": they differ in the compressed dtype, which
    is the patch's, and dense is finite and not 0 in it: a patch makes a weight 0 only in a swap.
    """
    if kind == "pruned":
        return (compressed == 0) & (dense != 0)
    value = dense.to(compressed.dtype)
    return (value != compressed) & (value != 0) & value.isfinite()


def check_pair(dense: Source, compressed: Source) -> None:
    """Check that a compressed checkpoint can be realigned with this dense one.

    Raises:
        RegraftError: they are different models, or no weight differs.
    """
    architectures = dense.architecture, compressed.architecture
    check_same_architecture(*architectures, (str(dense.folder), str(compressed.folder)))
    for a, b in zip(*(one.linears for one in architectures), strict=True):
        before, after = dense.weight(a), compressed.weight(b)
        if (before.to(after.dtype) != after).any():
            return
    raise RegraftError(
        f"{compressed.folder} has the prunable weights of {dense.folder}: nothing was pruned or "
        "changed, so there is nothing to restore. Give the dense checkpoint first and the "
        "compressed one second."
    )


@dataclass(frozen=True)
class Survey:
    """What compression did: how many weights are `restorable`, its N:M pattern if it has one.

    `kept` are the weights that are not zero now; `same` says whether what this kind of compression
    never changes is the dense model's.
    """

    restorable: int
    kept: int
    grouping: Grouping | None
    same: bool = True
    kind: Kind = "pruned"

    @property
    def doubt(self) -> str | None:
        """What the user should be told of the pair before weights of one go into the other."""
        if self.same:
            return None
        what, done = "The pruned model's kept weights", "pruned"
        if self.kind == "changed":
            what, done = "Tensors that compression leaves as they are (embeddings, norms)", "made"
        return (
            f"{what} are not the dense model's: is it {done} from another fine-tune, or was it "
            "trained since? Dense values fit only among the dense model's own."
        )

    @property
    def described(self) -> str:
        """Its kind and what that means: "pruned: 1,204 weights are zero that ..."."""
        if self.kind == "pruned":
            return f"pruned: {self.restorable:,} weights are zero that are not in the dense model"
        return (
            f"changed: {self.restorable:,} weights are not the dense model's, so that any of them "
            "can be restored, and budgets count per 10,000 of them"
        )


def survey(dense: Source, compressed: Source, progress: Progress = SILENT) -> Survey:
    """Check all weights of both checkpoints, and compare the prunable ones, one at a time.

    Raises:
        RegraftError: a tensor of one is not finite, or they are in the wrong order.
    """
    both = dense, compressed
    total = sum(one.checkpoint.bytes for one in both)
    with progress.task("Checking all weights of both models", total, "bytes") as advance:
        for source in both:
            check_all_weights(source.checkpoint, source.unbounded, advance)
    total = dense.architecture.prunable
    with progress.task("Comparing their prunable weights", total, "weights") as advance:
        return _compared(dense, compressed, advance)


def _compared(dense: Source, compressed: Source, advance: Advance) -> Survey:
    counts = {"pruned": 0, "changed": 0}
    kept, found, groupings = 0, _Differences(), []
    equal, compared = 0, 0
    pairs = zip(dense.architecture.linears, compressed.architecture.linears, strict=True)
    for a, b in pairs:
        before, after = dense.weight(a), compressed.weight(b)
        taken = int(restorable(before, after).count_nonzero())
        counts["pruned"] += taken
        counts["changed"] += int(restorable(before, after, "changed").count_nonzero())
        kept += int((after != 0).count_nonzero())
        found.add(before, after)
        if taken:
            groupings.append(grouping_of(after))
        first, left = _alike(before[:, 0], after[:, 0])  # SparseGPT changes later columns alone
        equal += int(((first == left) & (left != 0)).count_nonzero())
        compared += int((left != 0).count_nonzero())
        advance(before.numel())
    if found.reversed:
        raise RegraftError(
            f"{dense.folder} is pruned where {compressed.folder} is not. Give the dense checkpoint "
            "first and the compressed one second."
        )
    same = _same_besides(dense, compressed)
    if found.pruned:
        same = same and equal >= _NEARLY_ALL * compared
        return Survey(counts["pruned"], kept, common_grouping(groupings), same)
    return Survey(counts["changed"], kept, None, same, "changed")


@dataclass
class _Differences:
    """The rule by which a pair is pruned or changed, over weights that are added up.

    Rounding to a grid makes zeros, too, but only of weights below half of its least level. A pair
    is pruned where an eighth of the weights that differ are zeros that no rounding makes, or where
    nothing differs but zeros. Measured on weights of a 0.5 B model this share is below 0.1 after
    rounding to 2 to 8 bits, with GPTQ's updates and without, and above 0.15 after SparseGPT from
    30 % on.
    """

    differing: int = 0
    zeros: int = 0
    by_pruning: int = 0
    missing: int = 0  # zeros of the dense model that no rounding makes

    @property
    def pruned(self) -> bool:
        """Whether the pair is pruned."""
        few = self.by_pruning < _NO_ROUNDING * self.differing
        return not few or self.zeros >= _ALL * self.differing

    @property
    def reversed(self) -> bool:
        """Whether the first of the pair is pruned and the second is not."""
        return not self.pruned and self.missing >= _NO_ROUNDING * self.differing

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Count in one weight, by some of its rows, `[out, in]`."""
        step = -(-len(dense) // _ROWS)
        before, after = _alike(dense[::step], compressed[::step])
        self.differing += int((before != after).count_nonzero())
        self.zeros += int(restorable(before, after).count_nonzero())
        self.by_pruning += int(_no_rounding(before, after).count_nonzero())
        self.missing += int(_no_rounding(after, before).count_nonzero())


def _no_rounding(dense: Tensor, compressed: Tensor) -> Tensor:
    """Zeros of weights that were above half of the least that is left. `[out, in]` bool.

    Of 32 columns of a row, which share a scale; of the row, where they are all zero.
    """
    left = compressed.abs().masked_fill(compressed == 0, torch.inf)
    least_of_row = left.amin(1, keepdim=True)
    found = []
    for part, values in zip(left.split(_BLOCK, 1), dense.abs().split(_BLOCK, 1), strict=True):
        least = part.amin(1, keepdim=True)
        least = torch.where(least.isinf(), least_of_row, least)
        least.masked_fill_(least.isinf(), 0)  # a row of zeros was pruned
        found.append(part.isinf() & (values > least / 2))
    return torch.cat(found, 1)


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
    tensors = {linear.tensor for linear in source.architecture.linears}
    owners = {tensor.removesuffix("weight") for tensor in tensors}
    return {
        name.removeprefix(source.architecture.prefix): name
        for name, record in source.checkpoint.tensors.items()
        if record.dtype in FLOATS
        and name not in tensors
        and f"{name.rpartition('.')[0]}." not in owners
    }


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the coarser of their dtypes."""
    dtype = max(a.dtype, b.dtype, key=lambda one: torch.finfo(one).eps)
    return a.to(dtype), b.to(dtype)


def is_changed(patch: Patch) -> bool:
    """Whether a patch is of a model of which compression changed every weight."""
    kind: Kind = patch.about.get("kind", "pruned")
    return kind == "changed"


def restored_by_module(
    patch: Patch, layers: Sequence[LayerArchitecture]
) -> dict[str, tuple[int, ...]]:
    """Restored weights per module and layer: "self_attn.q_proj" -> count in each layer.

    All experts of a layer are one: "mlp.experts.*.down_proj".
    """
    counts: Counter[tuple[str, int]] = Counter()
    names: dict[str, None] = {}
    for layer in layers:
        for linear in layer.linears:
            name = linear.name
            if linear.expert is not None:
                name = _NUMBER.sub(".*.", name)
            names[name] = None
            if (tensor := patch.tensors.get(linear.tensor)) is not None:
                here, _ = inside(tensor.positions, linear.stored, linear.shape)
                counts[name, layer.index] += int(tensor.values[here].count_nonzero())
    return {name: tuple(counts[name, layer.index] for layer in layers) for name in names}
