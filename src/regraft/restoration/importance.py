"""HSR's set: weights chosen by their importance on harmful (D^s) and on harmless prompts (D^u).

    (top_q(I^s) AND top_pmax(I^u)) minus top_p(I^u)         Li et al. 2025, arXiv 2505.16104
    top_q(I^s) minus top_p(I^u)                             Wei et al. 2024, arXiv 2402.05162

The second is the first with p_max = 1. With a budget instead of q, weights are ranked by the
smallest q at which they enter the set, and the budget takes the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from regraft.models.architecture import Block, head_block
from regraft.models.load import Source
from regraft.pruning.base import PRUNERS, ScoreName
from regraft.pruning.masks import count_of, smallest
from regraft.pruning.statistics import ImportanceStatistics
from regraft.restoration.base import Between, Budgeted, Context, Method, Needs, Space
from regraft.restoration.ranking import Best, Ranking
from regraft.restoration.selection import (
    BlockOfHead,
    InHeads,
    Regions,
    inside,
    part_of,
    regions_of,
    ties_drawn,
)

RankingScope = Literal["row", "matrix", "head"]
Scorer = Callable[[slice], Tensor]
"""A slice of rows -> the importance of their weights, `[rows, in]` float32."""
Formula = Callable[[Tensor, Scorer, Scorer, Sequence[Block], "Band"], Tensor]
"""(restorable weights, I^s, I^u, regions of heads, thresholds) -> scores, as in `hsr_scores`."""
P_IS_KEPT = (
    "p, the share of weights left out because they matter for utility, is what pruning kept. Give "
    "--p (in a recipe p)"
)
_CHUNK = 2**22  # weights ranked at once with scope "row"


@dataclass(frozen=True)
class Band:
    """HSR's thresholds, as shares of the weights in each ranking scope.

    q: top share by I^s, 0 < q <= 1; p: share that pruning kept (1 - sparsity); p_max: outer bound
    by I^u, 0 <= p < p_max <= 1.
    """

    q: float
    p: float
    p_max: float
    scope: RankingScope = "row"


def hsr_scores(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Tensor:
    """Score of each weight that HSR restores: 1 minus the smallest q at which it enters the set.

    With q below 1 the weights with a finite score are HSR's set. With q = 1 the k highest scores
    are HSR's set for the q that selects k weights, up to ties. Peak memory is below 3 times the
    float32 matrix with scope "row", below 5 times with "head" and below 9 times with "matrix",
    which is sorted at once.

    `free` `[out, in]` bool marks the restorable weights, `safety` and `utility` give I^s and I^u,
    and `blocks` are the regions of the chosen heads in this matrix.

    Returns:
        `[out, in]` float32 in (0, 1]: the rank by I^s as a share of the scope (see `rank_share`);
        -inf where HSR restores nothing.
    """
    scores = torch.full(free.shape, -torch.inf, device=free.device)
    if not blocks:
        return scores
    rows, step = range(free.shape[0]), free.shape[0]
    if band.scope == "row":  # rows are independent: score only those of the heads, in chunks
        rows = range(min(b.row_start for b in blocks), max(b.row_stop for b in blocks))
        step = max(1, _CHUNK // free.shape[1])
    in_heads = inside(free.shape, blocks, free.device)
    for start in rows[::step]:
        part = slice(start, min(start + step, rows.stop))
        importance = utility(part)
        chosen = free[part] & in_heads[part]
        chosen &= top(importance, band.p_max, band.scope, blocks)  # AND top_pmax(I^u)
        chosen &= top(importance, band.p, band.scope, blocks).logical_not_()  # minus top_p(I^u)
        del importance  # free I^u before I^s is computed: halves the peak
        importance = safety(part)
        chosen &= top(importance, band.q, band.scope, blocks)  # AND top_q(I^s)
        share = rank_share(importance, band.scope, blocks)
        scores[part] = torch.where(chosen, share, -torch.inf)
    return scores


def top(score: Tensor, share: float, scope: RankingScope, blocks: Sequence[Block]) -> Tensor:
    """Mark the top `share` of scores: all but the floor((1 - share) * n) smallest of each scope.

    `score` is `[out, in]` float32, not negative. With scope "head" scores compete within each of
    `blocks`, the heads' regions, and the mask is False outside them.
    """
    if scope != "head":
        n = score.shape[1] if scope == "row" else score.numel()
        return smallest(score, count_of(1 - share, n), scope).logical_not_()
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    for block in blocks:
        part = part_of(score, block).contiguous()
        kept = ~smallest(part, count_of(1 - share, part.numel()), "matrix")
        part_of(mask, block).copy_(kept)
    return mask


def rank_share(score: Tensor, scope: RankingScope, blocks: Sequence[Block]) -> Tensor:
    """The rank of each score in its scope as a share: 1 for the highest, 1/n for the lowest.

    Ties rank by position; with scope "head" the share is 0 outside `blocks`. `[out, in]` float32,
    in which neighbouring ranks of more than 2^24 weights can be equal.
    """
    if scope == "row":
        return (_ranks(score) / score.shape[1]).float()
    if scope == "matrix":
        return (_ranks(score.reshape(1, -1)).view_as(score) / score.numel()).float()
    share = torch.zeros_like(score)
    for block in blocks:
        part = part_of(score, block)
        ranks = _ranks(part.reshape(1, -1)).view_as(part)
        part_of(share, block).copy_(ranks / part.numel())
    return share


def _ranks(rows: Tensor) -> Tensor:
    """Rank within each row, from 1 for the smallest to n for the largest. `[rows, n]` float64."""
    order = rows.argsort(dim=1, stable=True)
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)
    return torch.empty_like(rows, dtype=torch.float64).scatter_(1, order, count.expand_as(order))


def kept_share(dense: Tensor, free: Tensor) -> float:
    """HSR's p: the share of a matrix that pruning kept. Zeros of the dense model do not count."""
    nonzero = int(dense.count_nonzero())
    return (nonzero - int(free.count_nonzero())) / dense.numel()


def best_in_regions(
    context: Context,
    regions: Regions,
    band: Callable[[float], Band | None],
    name: str,
    formula: Formula,
) -> Best:
    """The best weights of the given regions by their importance on D^s and D^u.

    The seed of `context` breaks ties. `band` maps the share of a matrix that pruning kept to its
    thresholds, None to skip it. `name` is the pruner whose score is the importance, read only if
    `context` has no statistics.
    """
    none = ImportanceStatistics(name, {}, 0)
    saved = context.statistics
    on_safety, on_utility = (none, none) if saved is None else (saved.safety, saved.utility)
    best = Best(context.count)
    for one in context.matrices():
        if not (on_safety.reached(one.linear) and on_utility.reached(one.linear)):
            continue
        blocks = regions(one.linear)
        thresholds = band(kept_share(one.weight, one.free)) if blocks else None
        if thresholds is None:
            continue
        safety = on_safety.scorer(one.linear, one.weight)
        utility = on_utility.scorer(one.linear, one.weight)
        scores = formula(one.free, safety, utility, blocks, thresholds)
        best.add(one.index, ties_drawn(scores, context.seed, one.index))
    return best


class ImportanceSettings(Budgeted, InHeads):
    """Settings that choose weights within heads by their importance for safety and utility."""

    budget: float | None = Field(
        None, gt=0, lt=10_000, description="Restored weights per 10,000 pruned; replaces q."
    )
    score: ScoreName = Field("wanda", description="Pruner whose score ranks weights.")
    q: float = Field(0.5, gt=0, le=1, description="Top share on harmful prompts.")
    p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Top share on harmless prompts, left out; by default what pruning kept.",
    )

    @classmethod
    def has_default(cls, given: Mapping[str, Any]) -> bool:
        """Without a number, q decides."""
        return False

    @model_validator(mode="after")
    def _check_q(self) -> Self:
        if self.searchable and self.first_set("q"):
            raise ValueError("a budget or a count takes the place of `q`; leave one of them out")
        return self

    @property
    def only_pruned(self) -> str | None:
        return P_IS_KEPT if self.p is None else None

    def band(self, kept: float) -> Band | None:
        """Thresholds for a matrix of which pruning kept the share `kept`; None if p >= p_max."""
        p, (p_max, scope) = kept if self.p is None else self.p, self.bounds(kept)
        q = 1.0 if self.searchable else self.q  # with a budget the ranking decides
        return Band(q, p, p_max, scope) if p < p_max else None

    def bounds(self, kept: float) -> tuple[float, RankingScope]:
        """(p_max, ranking scope)."""
        raise NotImplementedError


class ByImportance(Method[ImportanceSettings]):
    """Ranks the weights of the chosen heads by a formula of I^s and I^u."""

    title: ClassVar[str]

    def __init__(self, formula: Formula, block: BlockOfHead = head_block) -> None:
        self._formula, self._block = formula, block

    def needs(self, settings: ImportanceSettings) -> Needs:
        """Head scores, and statistics of both kinds of prompts."""
        reads = PRUNERS.get(settings.score).reads_data
        return replace(settings.of_heads, statistics=settings.score if reads else None)

    def rank(self, settings: ImportanceSettings, context: Context) -> Ranking:
        """Rank the weights of the heads by the q at which each would be restored."""
        heads = settings.chosen(context.dense.architecture, context.heads)
        regions = regions_of(context.dense, heads, self._block)
        best = best_in_regions(context, regions, settings.band, settings.score, self._formula)
        return best.ranked(heads)

    def label(self, settings: ImportanceSettings) -> str:
        by = "" if settings.score == "wanda" else f" by {settings.score}"
        return f"{self.title}{by}, {settings.heads_label}"

    def space(self, settings: ImportanceSettings, dense: Source, kept: float) -> Space:
        """q, the subclass's own settings, the number of heads and their criterion.

        The order matters: the sampler draws values in it.
        """
        q: Space = {} if settings.searchable else {"q": Between(0.01, 1.0, log=True)}
        own = self.own_space(settings, kept)
        return q | own | settings.heads_space(dense.architecture)

    def own_space(self, settings: ImportanceSettings, kept: float) -> Space:
        """Search space of the subclass's own settings."""
        return {}
