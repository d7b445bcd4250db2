"""HSR's selection as set operations on masks; pure tensor functions.

`S = (top_q(I^s) AND top_pmax(I^u)) minus top_p(I^u)`, inside the chosen heads, and only where the
pruned weight is 0 and the dense one is not (Li et al. 2025, section 3.3).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.architecture import (
    Architecture,
    Block,
    LayerArchitecture,
    LinearArchitecture,
    head_block,
)
from regraft.pruning.masks import count_of, smallest

RankingScope = Literal["row", "matrix", "head"]
Head = tuple[int, int]
Scorer = Callable[[slice], Tensor]
_CHUNK = 2**22
_TIE = 2.0**-30  # less than lies between two shares of rows of up to 2^15 inputs


@dataclass(frozen=True)
class Band:
    """HSR's thresholds as shares of the weights in each ranking scope.

    q: top share by safety importance; p: share kept by the pruner (1 - sparsity); p_max: outer
    bound by utility importance.
    """

    q: float
    p: float
    p_max: float
    scope: RankingScope = "row"

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise RegraftError(f"q is {self.q}; it must be above 0 and at most 1.")
        if not 0 <= self.p < self.p_max <= 1:
            raise RegraftError(
                f"p is {self.p} and p_max {self.p_max}; 0 <= p < p_max <= 1 is needed."
            )


def top(score: Tensor, share: float, scope: RankingScope, blocks: Sequence[Block]) -> Tensor:
    """Mark the top `share` of scores: all but the floor((1 - share) * n) smallest of each scope.

    Args:
        score: `[out, in]`, float32, not negative.
        share: In [0, 1].
        scope: Scores compete within their row, within the matrix, or within each of `blocks`.
        blocks: The heads' regions; for "head" the mask is False outside them.

    Returns:
        `[out, in]`, bool.
    """
    if scope != "head":
        n = score.shape[1] if scope == "row" else score.numel()
        return smallest(score, count_of(1 - share, n), scope).logical_not_()
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    for block in blocks:
        part = _part(score, block).contiguous()
        kept = ~smallest(part, count_of(1 - share, part.numel()), "matrix")
        _part(mask, block).copy_(kept)
    return mask


def kept_share(dense: Tensor, free: Tensor) -> float:
    """The share of a matrix that pruning kept, p of HSR; what was 0 before was not kept.

    Args:
        dense: The weight before, `[out, in]`.
        free: Where a value can be restored (`restorable`), `[out, in]` bool.
    """
    there = int((dense != 0).count_nonzero())
    return (there - int(free.count_nonzero())) / dense.numel()


def inside(shape: tuple[int, int], blocks: Sequence[Block], device: torch.device) -> Tensor:
    """True inside any of `blocks`, `[out, in]` bool."""
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for block in blocks:
        _part(mask, block).fill_(True)
    return mask


def hsr_scores(
    free: Tensor,
    safety: Scorer,
    utility: Scorer,
    blocks: Sequence[Block],
    band: Band,
) -> Tensor:
    """What HSR restores, by the share q at which each weight would come in, turned round.

    With q below 1 the weights with a score are HSR's set. With q left open, 1, the first k by
    score are its set with the q that selects k, up to weights that come in at the same q. Peak
    allocation is below three times the float32 matrix where rows are ranked, which goes part by
    part, below five times for heads and nine for the matrix, which is sorted at once.

    Args:
        free: Where a value can be restored, `[out, in]` bool.
        safety: Importance I^s of some rows, `[rows, in]` float32.
        utility: The same for I^u.
        blocks: Regions of the chosen heads in this matrix.
        band: p, p_max and the ranking scope; q bounds the score.

    Returns:
        `[out, in]` float32 in (0, 1], the share of weights in the scope that matter less or as
        much for safety; -inf where HSR restores nothing.
    """
    scores = torch.full(free.shape, -torch.inf, device=free.device)
    for rows, chosen, score in _restored(free, safety, utility, blocks, band):
        share = rank_share(score, band.scope, blocks)
        scores[rows] = torch.where(chosen, share, -torch.inf)
    return scores


def _restored(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(some rows, which of their weights HSR restores, their I^s), part by part."""
    if not blocks:
        return
    rows = _row_range(blocks) if band.scope == "row" else slice(0, free.shape[0])
    chosen = free & inside(tuple(free.shape), blocks, free.device)  # type: ignore[arg-type]
    step = free.shape[0] if band.scope != "row" else max(1, _CHUNK // free.shape[1])
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        score = utility(part)
        chosen[part] &= top(score, band.p_max, band.scope, blocks)
        chosen[part] &= top(score, band.p, band.scope, blocks).logical_not_()
        del score
        score = safety(part)
        chosen[part] &= top(score, band.q, band.scope, blocks)
        yield part, chosen[part], score


def rank_share(score: Tensor, scope: RankingScope, blocks: Sequence[Block]) -> Tensor:
    """The rank of each score in its scope as a share: 1 for the highest, 1/n for the lowest.

    Args:
        score: `[out, in]` float32.
        scope: As in `top`; outside of all blocks the share is 0 for "head".
        blocks: The heads' regions.

    Returns:
        `[out, in]` float32. Equal scores rank by position.
    """
    if scope == "row":
        return (_ranks(score) / score.shape[1]).float()
    if scope == "matrix":
        return (_ranks(score.reshape(1, -1)).view_as(score) / score.numel()).float()
    share = torch.zeros_like(score)
    for block in blocks:
        part = _part(score, block)
        ranks = _ranks(part.reshape(1, -1)).view_as(part)
        _part(share, block).copy_(ranks / part.numel())
    return share


def _ranks(rows: Tensor) -> Tensor:
    """1 for the smallest of each row to n for the largest, `[rows, n]` float64."""
    order = rows.argsort(dim=1, stable=True)
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)
    return torch.empty_like(rows, dtype=torch.float64).scatter_(1, order, count.expand_as(order))


def random_scores(free: Tensor, seed: int, index: int) -> Tensor:
    """A control: a random order of all pruned weights of a matrix, `[out, in]` float32.

    The draw depends on `seed` and the matrix's `index` alone, not on the device.
    """
    scores = torch.rand(free.shape, generator=_of_matrix(seed, index)).to(free.device)
    return scores.masked_fill_(~free, -torch.inf)


def ties_drawn(scores: Tensor, seed: int, index: int) -> Tensor:
    """Scores among which equal ones have a random order, `[out, in]` float64.

    Shares of a row are few, and as many weights have one as there are rows: without a draw a budget
    that ends among them would go to the first layers and rows alone.

    Args:
        scores: Of `hsr_scores`.
        seed: Of the draw, which depends on nothing else but `index`.
        index: Of the matrix.
    """
    draw = torch.rand(scores.shape, generator=_of_matrix(seed, index), dtype=torch.float64)
    return scores.double() - _TIE * draw.to(scores.device)


def _of_matrix(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def everything(free: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The same score, 1, for every pruned weight of the regions; -inf elsewhere. `[out, in]`."""
    chosen = free & inside(tuple(free.shape), blocks, free.device)  # type: ignore[arg-type]
    return torch.full(free.shape, -torch.inf, device=free.device).masked_fill_(chosen, 1.0)


def blocks_of(
    layer: LayerArchitecture, linear: LinearArchitecture, heads: Sequence[int]
) -> list[Block]:
    """Regions of `heads` in one weight; query heads that share a key/value head give it once."""
    found = (head_block(layer, linear, head) for head in sorted(heads))
    return list(dict.fromkeys(block for block in found if block is not None))


def whole(linear: LinearArchitecture) -> Block:
    """The region that is all of a weight."""
    rows, columns = linear.shape
    return Block(0, rows, 0, columns)


def all_heads(architecture: Architecture) -> list[Head]:
    """Every (layer, head)."""
    return [(layer.index, head) for layer in architecture.layers for head in range(layer.heads)]


def random_heads(architecture: Architecture, count: int, seed: int) -> list[Head]:
    """A control: `count` heads drawn without replacement.

    Raises:
        RegraftError: the model has fewer heads.
    """
    heads = all_heads(architecture)
    if not 0 < count <= len(heads):
        raise RegraftError(f"top_heads is {count}; the model has 1 to {len(heads)} heads.")
    return sorted(random.Random(seed).sample(heads, count))


def _row_range(blocks: Sequence[Block]) -> slice:
    return slice(min(b.row_start for b in blocks), max(b.row_stop for b in blocks))


def _part(matrix: Tensor, block: Block) -> Tensor:
    return matrix[block.row_start : block.row_stop, block.col_start : block.col_stop]
