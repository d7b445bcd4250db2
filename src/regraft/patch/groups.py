"""N:M groups of a pruned checkpoint: detecting the pattern, counting groups that a patch breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.models.load import Source
from regraft.patch.format import Patch

_LARGEST = 64  # largest M
_FIRST = 64  # rows of a first check that rules out most M
_NEARLY_ALL = 0.95  # share of the weights that an N:M pattern keeps which must be nonzero


@dataclass(frozen=True)
class Grouping:
    """An N:M pattern: at most `n` of every `m` consecutive inputs are kept, in `groups` groups."""

    n: int
    m: int
    groups: int

    @property
    def n_m(self) -> str:
        """ "2:4"."""
        return f"{self.n}:{self.m}"


def grouping_of(pruned: Tensor) -> Grouping | None:
    """The N:M pattern of one weight `[out, in]`: the smallest M from 2 to 64 that fits, if any.

    No group may keep more than N weights, N < M, and nearly all must keep N: unstructured pruning
    may leave no full group of 64 either, but its groups keep varying numbers. A whole row is no
    group, since pruning by row keeps the same number in each.
    """
    kept, columns = pruned != 0, pruned.shape[1]
    total = int(kept.count_nonzero())
    for m in range(2, min(_LARGEST, columns - 1) + 1):
        if columns % m:
            continue
        groups = kept.numel() // m
        for rows in (slice(_FIRST), slice(None)):
            n = int(_kept_in_groups(kept[rows], m).max())
            if n == m or total < _NEARLY_ALL * n * groups:
                break
        else:
            if n:
                return Grouping(n, m, groups)
    return None


def common_grouping(found: Iterable[Grouping | None]) -> Grouping | None:
    """The pattern of more than half of the pruned weights, with their groups added up.

    Fewer may be chance: a small unstructured matrix may happen to fit a pattern.
    """
    found = list(found)
    patterns = Counter((one.n, one.m) for one in found if one is not None)
    for (n, m), count in patterns.most_common(1):
        if 2 * count > len(found):
            groups = sum(one.groups for one in found if one and (one.n, one.m) == (n, m))
            return Grouping(n, m, groups)
    return None


def violated_groups(pruned: Source, patch: Patch, n: int, m: int) -> int:
    """Number of N:M groups that keep more than N weights once the patch is applied.

    Only weights that have this pattern in the pruned checkpoint count.
    """
    violated = 0
    for linear in pruned.architecture.linears:
        if (tensor := patch.tensors.get(linear.tensor)) is None:
            continue
        positions, values = tensor.within(linear)
        if not len(positions):
            continue
        before = pruned.weight(linear)
        grouping = grouping_of(before)
        if grouping is None or (grouping.n, grouping.m) != (n, m):
            continue
        kept = before != 0
        kept.view(-1)[positions] = values != 0
        violated += int((_kept_in_groups(kept, m) > n).count_nonzero())
    return violated


def _kept_in_groups(kept: Tensor, m: int) -> Tensor:
    """Number of kept weights per group: `[out, in]` bool -> `[out * in / m]` uint8."""
    return kept.reshape(-1, m).view(torch.uint8).sum(dim=1, dtype=torch.uint8)
