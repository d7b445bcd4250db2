"""A dense checkpoint and its compressed version: whether they match, what can be restored.

A pair has one of two kinds, which `survey` finds out:

- "pruned": the zeros that pruning made can be restored. Kept weights are the dense ones, or were
  updated by the pruner (SparseGPT).
- "changed": compression changed nearly every weight, by quantisation or a merged fine-tune. Every
  weight that differs can be restored.
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
from regraft.models.architecture import LayerArchitecture, check_same_architecture
from regraft.models.checkpoint import FLOATS
from regraft.models.checkpoint_copy import check_all_weights
from regraft.models.layout import Tiling
from regraft.models.load import Source
from regraft.patch.format import Patch
from regraft.patch.groups import Grouping, common_grouping, grouping_of
from regraft.progress import SILENT, Advance, Progress

Kind = Literal["pruned", "changed"]
_NEARLY_ALL = 0.9  # share of tensors or weights that must equal the dense model's
_ALL = 0.99  # share of zeros among differing weights from which a pair is pruned in any case
_NO_ROUNDING = 1 / 8  # share of differing weights which are zeros that rounding cannot make
_NUMBER = re.compile(r"\.\d+\.")  # index of an expert in its name
_ROWS = 256  # rows sampled of each weight
_BLOCK = 32  # columns assumed to share a quantisation scale


def restorable(dense: Tensor, compressed: Tensor, kind: Kind = "pruned") -> Tensor:
    """Mask of the weights whose dense value can be restored. `[out, in]` bool.

    "pruned": the compressed value is 0, the dense one is not. "changed": they differ in the
    compressed dtype, which is the patch's, and the dense value is finite and not 0 in it (in a
    patch a new value of 0 means a weight that a swap prunes).
    """
    if kind == "pruned":
        return (compressed == 0) & (dense != 0)
    value = dense.to(compressed.dtype)
    return (value != compressed) & (value != 0) & value.isfinite()


def check_pair(dense: Source, compressed: Source) -> None:
    """Check that a compressed checkpoint can be realigned with a dense one.

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
    """What compression changed.

    Attributes:
        restorable: Number of restorable weights.
        kept: Number of prunable weights that are not 0 in the compressed model.
        grouping: Its N:M pattern, if it has one.
        same: Whether the weights that this kind of compression leaves alone equal the dense ones.
        kind: "pruned" or "changed".
    """

    restorable: int
    kept: int
    grouping: Grouping | None
    same: bool = True
    kind: Kind = "pruned"

    @property
    def doubt(self) -> str | None:
        """A warning if the compressed model seems to come from other dense weights, else None."""
        if self.same:
            return None
        what, done = "The pruned model's kept weights", "pruned"
        if self.kind == "changed":
            what, done = "Tensors that compression leaves as they are (embeddings, norms)", "made"
        return (
            f"{what} are not the dense model's: was it {done} from another fine-tune, or trained "
            "since? Restored values only fit weights that come from the same dense model."
        )

    @property
    def described(self) -> str:
        """Its kind and what that means: "pruned: 1,204 weights are zero that ..."."""
        if self.kind == "pruned":
            return f"pruned: {self.restorable:,} weights are zero that are not in the dense model"
        return (
            f"changed: {self.restorable:,} weights differ from the dense model's; any of them can "
            "be restored, and budgets count per 10,000 of them"
        )


def survey(dense: Source, compressed: Source, progress: Progress = SILENT) -> Survey:
    """Check all weights of both checkpoints, and compare the prunable ones, one at a time.

    Raises:
        RegraftError: a tensor is not finite, or the checkpoints are in the wrong order.
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
    pruned = changed = kept = equal = compared = 0
    differences, groupings = _Differences(), []
    pairs = zip(dense.architecture.linears, compressed.architecture.linears, strict=True)
    for a, b in pairs:
        before, after = dense.weight(a), compressed.weight(b)
        zeros = int(restorable(before, after).count_nonzero())
        pruned += zeros
        changed += int(restorable(before, after, "changed").count_nonzero())
        kept += int(after.count_nonzero())
        differences.add(before, after)
        if zeros:
            groupings.append(grouping_of(after))
        # SparseGPT updates weights, but never those of the first column.
        first, first_after = _same_dtype(before[:, 0], after[:, 0])
        equal += int(((first == first_after) & (first_after != 0)).count_nonzero())
        compared += int(first_after.count_nonzero())
        advance(before.numel())
    if differences.reversed:
        raise RegraftError(
            f"{dense.folder} is pruned where {compressed.folder} is not. Give the dense checkpoint "
            "first and the compressed one second."
        )
    same = _unprunable_same(dense, compressed)
    if differences.pruned:
        same = same and equal >= _NEARLY_ALL * compared
        return Survey(pruned, kept, common_grouping(groupings), same)
    return Survey(changed, kept, None, same, "changed")


@dataclass
class _Differences:
    """Running counts that decide whether a pair is "pruned" or "changed".

    Rounding to a grid makes zeros too, but only of weights below half of its lowest level. A pair
    is "pruned" if at least an eighth of the differing weights are zeros that rounding cannot make,
    or if nearly all differing weights are zeros. On a 0.5 B model that share is below 0.1 after
    rounding to 2 to 8 bits, with and without GPTQ's updates, and above 0.15 after SparseGPT at 30 %
    and more.
    """

    differing: int = 0
    zeros: int = 0
    by_pruning: int = 0  # zeros of the compressed model that rounding cannot make
    by_pruning_dense: int = 0  # such zeros of the model that is given as the dense one

    @property
    def pruned(self) -> bool:
        """Whether the pair is pruned."""
        enough = self.by_pruning >= _NO_ROUNDING * self.differing
        return enough or self.zeros >= _ALL * self.differing

    @property
    def reversed(self) -> bool:
        """Whether the first of the pair is pruned and the second is not."""
        return not self.pruned and self.by_pruning_dense >= _NO_ROUNDING * self.differing

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Add the counts of one weight `[out, in]`, from a sample of its rows."""
        step = -(-len(dense) // _ROWS)
        before, after = _same_dtype(dense[::step], compressed[::step])
        self.differing += int((before != after).count_nonzero())
        self.zeros += int(restorable(before, after).count_nonzero())
        self.by_pruning += int(_zeros_by_pruning(before, after).count_nonzero())
        self.by_pruning_dense += int(_zeros_by_pruning(after, before).count_nonzero())


def _zeros_by_pruning(dense: Tensor, compressed: Tensor) -> Tensor:
    """Zeros that rounding cannot make: of weights above half of the lowest level. `[out, in]` bool.

    The lowest level is the smallest nonzero magnitude among 32 columns of a row, which are assumed
    to share a scale, or of the whole row if these are all zero.
    """
    nonzero = compressed.abs().masked_fill(compressed == 0, torch.inf)
    lowest_of_row = nonzero.amin(1, keepdim=True)
    masks = []
    for part, values in zip(nonzero.split(_BLOCK, 1), dense.abs().split(_BLOCK, 1), strict=True):
        lowest = part.amin(1, keepdim=True)
        lowest = torch.where(lowest.isinf(), lowest_of_row, lowest)
        lowest.masked_fill_(lowest.isinf(), 0)  # the whole row is 0: it was pruned
        masks.append(part.isinf() & (values > lowest / 2))
    return torch.cat(masks, 1)


def _unprunable_same(dense: Source, compressed: Source) -> bool:
    """Whether nearly all tensors that are never pruned are equal, by a sample of each."""
    a, b = _never_pruned(dense), _never_pruned(compressed)
    same = [
        torch.equal(*_same_dtype(dense.checkpoint.sample(one), compressed.checkpoint.sample(other)))
        for one, other in {(a[name], b[name]) for name in a.keys() & b.keys()}
    ]
    return sum(same) >= _NEARLY_ALL * len(same)


def _never_pruned(source: Source) -> dict[str, str]:
    """Name on disk, and for a whole tensor also that in memory -> name on disk.

    Without biases, which some pruners correct.
    """
    records = source.checkpoint.tensors
    pruned = {linear.tensor for linear in source.architecture.linears}
    owners = {tensor.removesuffix("weight") for tensor in pruned}
    names = {
        name: name
        for name, record in records.items()
        if record.dtype in FLOATS
        and name not in pruned
        and f"{name.rpartition('.')[0]}." not in owners
    }
    return names | {
        name: piece.tensor
        for name, tiling in source.layout.items()
        if isinstance(tiling, Tiling)
        for piece in tiling.pieces
        if piece.tensor in names and records[piece.tensor].shape == tiling.shape
    }


def _same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in the coarser of their dtypes."""
    dtype = max(a.dtype, b.dtype, key=lambda one: torch.finfo(one).eps)
    return a.to(dtype), b.to(dtype)


def is_changed(patch: Patch) -> bool:
    """Whether a patch was made for a pair of kind "changed"."""
    kind: Kind = patch.about.get("kind", "pruned")
    return kind == "changed"


def restored_by_module(
    patch: Patch, layers: Sequence[LayerArchitecture]
) -> dict[str, tuple[int, ...]]:
    """Module name -> number of restored weights in each layer: "self_attn.q_proj" -> (3, 0, ...).

    All experts of a layer count as one module: "mlp.experts.*.down_proj".
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
                _, values = tensor.within(linear)
                counts[name, layer.index] += int(values.count_nonzero())
    return {name: tuple(counts[name, layer.index] for layer in layers) for name in names}
