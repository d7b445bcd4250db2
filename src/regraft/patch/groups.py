"""N:M groups of a pruned checkpoint, and which of them restored weights break."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.models.load import Source
from regraft.models.places import inside
from regraft.patch.format import Patch

_LARGEST = 64  # weights in a group
_FIRST = 64  # rows
_NEARLY_ALL = 0.95


@dataclass(frozen=True)
class Grouping:
    """At most `n` of every `m` consecutive inputs are kept, in all of `groups` groups."""

    n: int
    m: int
    groups: int

    @property
    def n_m(self) -> str:
        """ "2:4"."""
        return f"{self.n}:{self.m}"


def grouping_of(pruned: Tensor) -> Grouping | None:
    """The N:M pattern of one weight `[out, in]`: the smallest M from 2 to 64 that fits, if any.

    No group may hold more than N weights, N < M, and nearly all must hold N: pruning without a
    pattern may leave no full group of 64 either, but groups of all sizes. A whole row is no group,
    since pruning by rows leaves as many weights in each.
    """
    kept, columns = pruned != 0, pruned.shape[1]
    total = int(kept.count_nonzero())
    for m in range(2, min(_LARGEST, columns - 1) + 1):
        if columns % m:
            continue
        groups = kept.numel() // m
        for rows in (slice(_FIRST), slice(None)):  # a look at some rules out most
            n = int(_kept_in_groups(kept[rows], m).max())
            if n == m or total < _NEARLY_ALL * n * groups:
                break
        else:
            if n:
                return Grouping(n, m, groups)
    return None


def common_grouping(found: Iterable[Grouping | None]) -> Grouping | None:
    """The pattern that more than half of the pruned weights have, with their groups added up.

    Fewer would be chance: a small unstructured matrix may have no full group of some size.
    """
    found = list(found)
    patterns = Counter((one.n, one.m) for one in found if one is not None)
    for (n, m), count in patterns.most_common(1):
        if 2 * count > len(found):
            groups = sum(one.groups for one in found if one and (one.n, one.m) == (n, m))
            return Grouping(n, m, groups)
    return None


def violated_groups(pruned: Source, patch: Patch, n: int, m: int) -> int:
    """Number of N:M groups of the pruned checkpoint that hold more than N weights once patched.

    Of weights that have this pattern; those that were pruned otherwise have no groups to break.
    """
    violated = 0
    for linear in pruned.architecture.linears:
        if (tensor := patch.tensors.get(linear.tensor)) is None:
            continue
        here, positions = inside(tensor.positions, linear.stored, linear.shape)
        if not len(positions):
            continue
        before = pruned.weight(linear)
        grouping = grouping_of(before)
        if grouping is None or (grouping.n, grouping.m) != (n, m):
            continue
        kept = before != 0
        kept.view(-1)[positions] = tensor.values[here] != 0
        violated += int((_kept_in_groups(kept, m) > n).count_nonzero())
    return violated


def _kept_in_groups(kept: Tensor, m: int) -> Tensor:
    """`[out, in]` bool -> `[out * in / m]` uint8."""
    return kept.reshape(-1, m).view(torch.uint8).sum(dim=1, dtype=torch.uint8)
