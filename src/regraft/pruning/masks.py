"""Sparsity patterns of weight matrices, and exact masks from scores in little memory.

Ties are broken by position: of equal scores the one with the lower flat index counts as smaller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture

Scope = Literal["row", "matrix"]
_CHUNK = 2**22  # scores handled at once
_COUNTED = 2**20  # scores counted at once: small enough for a processor's cache


@dataclass(frozen=True)
class Pattern:
    """How much of a weight matrix is pruned: `sparsity` of each scope, or all but n of every m."""

    sparsity: float
    scope: Scope = "row"
    n_m: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.n_m is not None:
            n, m = self.n_m
            if not 0 < n < m:
                raise RegraftError(
                    f"{n}:{m} is no N:M pattern: N must be at least 1 and less than M."
                )
        elif not 0 < self.sparsity < 1:
            raise RegraftError(f"The sparsity is {self.sparsity}; it must be between 0 and 1.")

    @classmethod
    def parse_n_m(cls, text: str) -> Pattern:
        """Parse a pattern such as "2:4"."""
        if not re.fullmatch("[0-9]{1,4}:[1-9][0-9]{0,3}", text):
            raise RegraftError(f"{text[:40]!r} is no N:M pattern; write it like 2:4.")
        n, m = map(int, text.split(":"))
        return cls(1 - n / m, n_m=(n, m))

    def fits(self, shape: tuple[int, int], name: str) -> None:
        """Raise unless a weight `[out, in]` can have this pattern."""
        if self.n_m is not None and shape[1] % self.n_m[1]:
            n, m = self.n_m
            raise RegraftError(
                f"{n}:{m} needs rows of a multiple of {m} weights; {name} has rows of {shape[1]}."
            )

    def mask(self, score: Tensor) -> Tensor:
        """Mark the weights to prune, `[out, in]` bool, by their importance `[out, in]`.

        These are the floor(sparsity * n) lowest scores of each row or of the matrix, or the M - N
        lowest of every M consecutive inputs.
        """
        if self.n_m is not None:
            n, m = self.n_m
            return smallest(score.reshape(-1, m), m - n).view(score.shape)
        n = score.shape[1] if self.scope == "row" else score.numel()
        return smallest(score, count_of(self.sparsity, n), self.scope)


Patterns = Mapping[LinearArchitecture, Pattern]


def assign_patterns(
    linears: Iterable[LinearArchitecture], pattern: Pattern, ignored: Sequence[str] = ()
) -> Patterns:
    """The pattern of every weight matrix that is to be pruned.

    `ignored` are globs over `LinearArchitecture.key` of weights that stay dense.

    Raises:
        RegraftError: a glob matches nothing, M does not divide a row, or nothing is left to prune.
    """
    linears = list(linears)
    for glob in ignored:
        if not any(fnmatchcase(linear.key, glob) for linear in linears):
            raise RegraftError(
                f"{glob!r} matches no prunable weight; they are named like "
                f"{linears[0].key} and {linears[-1].key}."
            )
    patterns = {
        linear: pattern
        for linear in linears
        if not any(fnmatchcase(linear.key, glob) for glob in ignored)
    }
    if not patterns:
        raise RegraftError("Every prunable weight is ignored: there is nothing to prune.")
    for linear in patterns:
        pattern.fits(linear.shape, linear.key)
    return patterns


def count_of(share: float, n: int) -> int:
    """floor(share * n), guarded against a product such as 0.29 * 100 = 28.999999999999996."""
    return int(round(share * n, 6))


def smallest(score: Tensor, count: int, scope: Scope = "row") -> Tensor:
    """Mark the `count` smallest scores of each row, or of the matrix. `[out, in]` bool.

    `score` is `[out, in]` float32, not negative and finite. Allocates at most about its size.
    """
    n = score.shape[1] if scope == "row" else score.numel()
    if not 0 < count < n:
        return torch.full(score.shape, count > 0, device=score.device)
    if scope == "matrix":
        return _smallest_of_all(score, count)
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    rows = max(1, _CHUNK // max(1, score.shape[1]))
    for start in range(0, len(score), rows):
        mask[start : start + rows] = _smallest_of_rows(score[start : start + rows], count)
    return mask


def _smallest_of_rows(score: Tensor, count: int) -> Tensor:
    threshold = torch.kthvalue(score, count, dim=1, keepdim=True).values
    below = score < threshold
    ties = score == threshold
    free = count - below.sum(dim=1, keepdim=True)
    return below | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= free))


def _smallest_of_all(score: Tensor, count: int) -> Tensor:
    flat = score.reshape(-1)
    threshold = kth_smallest(flat, count)
    mask = flat < threshold
    free = count - int(mask.count_nonzero())  # mask.sum() would copy the mask to int64
    for part, scores in zip(mask.split(_CHUNK), flat.split(_CHUNK), strict=True):
        if free == 0:
            break
        ties = (scores == threshold).nonzero().flatten()[:free]
        part[ties] = True
        free -= len(ties)
    return mask.view(score.shape)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest (k from 1) of `values`, exactly, in memory independent of n.

    Two passes of a radix select: bit patterns of non-negative floats sort like the floats, so a
    histogram of the upper 16 bits finds those of the result, and one of the lower 16 bits among
    the matching values finds the rest. On 3,584 x 18,944 scores (259 MiB) torch.kthvalue takes
    778 MiB and ten times as long.

    `values` are `[n]` float32, not negative, finite and contiguous. A float32 scalar tensor.
    """
    rank, found = k, 0
    for lower in (False, True):
        histogram = torch.zeros(2**16, dtype=torch.int64, device=values.device)
        for bits in values.view(torch.int32).split(_COUNTED):
            bits = bits & 0x7FFFFFFF  # -0.0 is 0
            upper = bits >> 16
            digits = bits[upper == found] & 0xFFFF if lower else upper
            histogram += torch.bincount(digits, minlength=2**16)
        cumulative = histogram.cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit - 1]) if digit else 0
        found = (found << 16) | digit
    return torch.tensor(found, dtype=torch.int32, device=values.device).view(torch.float32)
