"""N:M groups of a pruned checkpoint, and which of them restored weights break."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.models.checkpoint import Checkpoint
from regraft.restoration.patch import Patch

SIZES = (4, 8, 16)
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
    """The N:M pattern of one weight `[out, in]`: the smallest M of 4, 8, 16 that fits, if any.

    No group may hold more than N weights, N < M, and nearly all must hold N: pruning without a
    pattern leaves few full groups of 16 too, but groups of all sizes.
    """
    kept = pruned != 0
    for m in SIZES:
        if pruned.shape[1] % m == 0 and not _any_full(kept, m):
            held = _kept_in_groups(kept, m)
            n = int(held.max())
            if n and int(kept.count_nonzero()) >= _NEARLY_ALL * n * len(held):
                return Grouping(n, m, len(held))
    return None


def common_grouping(found: Iterable[Grouping | None]) -> Grouping | None:
    """The pattern that more than half of the pruned weights have, with their groups added up.

    Fewer would be chance: a small unstructured matrix may have no full group of 16.
    """
    found = list(found)
    patterns = Counter((one.n, one.m) for one in found if one is not None)
    for (n, m), count in patterns.most_common(1):
        if 2 * count > len(found):
            groups = sum(one.groups for one in found if one and (one.n, one.m) == (n, m))
            return Grouping(n, m, groups)
    return None


def violated_groups(pruned: Checkpoint, patch: Patch, n: int, m: int) -> int:
    """Number of N:M groups of the pruned checkpoint that hold more than N weights once patched.

    Groups that held more before (of weights that were pruned otherwise) do not count.
    """
    violated = 0
    for name, tensor in patch.tensors.items():
        if tensor.shape[1] % m:
            continue
        kept = pruned.read(name) != 0
        before = _kept_in_groups(kept, m)
        kept.view(-1)[tensor.positions] = tensor.values != 0
        after = _kept_in_groups(kept, m)
        violated += int(((after > n) & (before <= n)).count_nonzero())
    return violated


def _any_full(kept: Tensor, m: int) -> bool:
    """Whether any M consecutive weights `[out, in]` bool are all kept."""
    full = kept.contiguous().view(torch.int32) == 0x01010101  # [out, in / 4]
    return bool(full.view(-1, m // 4).all(dim=1).any())


def _kept_in_groups(kept: Tensor, m: int) -> Tensor:
    """`[out, in]` bool -> `[out * in / m]` uint8."""
    return kept.reshape(-1, m).view(torch.uint8).sum(dim=1, dtype=torch.uint8)
