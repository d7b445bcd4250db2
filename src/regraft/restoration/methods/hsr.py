"""Hierarchical Safety Realignment (Li et al. 2025, arXiv 2505.16104, section 3).

    heads <- the h heads without which answers to harmful prompts change most (Ships)
    for each of their query, key, value and output weights W:
        I^s, I^u <- importance of W on harmful and on harmless prompts (Wanda)
        restore (top_q(I^s) AND top_pmax(I^u)) minus top_p(I^u), where pruning took a weight

p is the share that pruning kept, so that what is restored matters for safety and lies just beyond
what pruning kept for utility. With a budget q is left open: weights are ranked by the q at which
they would come in, and the first of them restored. HSR-a restores all of the heads instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from regraft.errors import RegraftError
from regraft.heads.score import Criterion, HeadScores
from regraft.models.architecture import Block, LinearArchitecture
from regraft.models.load import Source
from regraft.pruning.base import PRUNERS, ScoreName
from regraft.pruning.statistics import ImportanceStatistics
from regraft.restoration.base import (
    Between,
    Budgeted,
    Context,
    HeadChoice,
    Method,
    MethodSettings,
    Needs,
    Space,
)
from regraft.restoration.ranking import Ranking, WeightScore
from regraft.restoration.selection import (
    Band,
    Head,
    RankingScope,
    Scorer,
    all_heads,
    blocks_of,
    hsr_scores,
    kept_share,
    random_heads,
    ties_drawn,
)

MARGIN = 0.2  # p_max - p in the paper
Regions = Callable[[LinearArchitecture], Sequence[Block]]
_OF_HEADS = {
    "top": ("head_seed",),
    "random": ("criterion",),
    "all": ("criterion", "top_heads", "head_seed"),
}


class InHeads(MethodSettings):
    """In which heads weights are restored."""

    heads: Literal["top", "random", "all"] = Field(
        "top", description="The best by their scores, random ones (a control) or all."
    )
    criterion: Criterion = Field(
        "ships",
        description="What scores a head; released: as in HSR's code.",
    )
    top_heads: int = Field(10, ge=1, description="How many heads (h).")
    head_seed: int = Field(0, description="Another seed draws other random heads.")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if name := self.first_set(*_OF_HEADS[self.heads]):
            raise ValueError(f"`{name}` changes nothing where `heads` is {self.heads}")
        return self

    @property
    def drawn(self) -> bool:
        """Whether a seed decides what is restored, so that repeats differ."""
        return self.heads == "random"

    @property
    def of_heads(self) -> Needs:
        """What choosing the heads needs."""
        if self.heads == "all":
            return Needs()
        top = HeadChoice(self.criterion, self.top_heads) if self.heads == "top" else None
        return Needs(heads=top, some_heads=self.top_heads)

    @property
    def heads_label(self) -> str:
        """What tables call the choice."""
        if self.heads == "top":
            return f"top {self.top_heads} by {self.criterion}"
        return f"{self.heads} heads"


class ByImportance(Budgeted, InHeads):
    """Which weights of the heads are restored, by importance for safety and for utility."""

    budget: float | None = Field(
        None,
        gt=0,
        lt=10_000,
        description="Restored weights per 10,000 pruned; replaces q.",
    )
    score: ScoreName = Field(
        "wanda",
        description="What I^s and I^u are: importance by this pruner.",
    )
    q: float = Field(0.5, gt=0, le=1, description="Top share by safety importance.")
    p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share that pruning kept; of each matrix if not given.",
    )

    @model_validator(mode="after")
    def _check_q(self) -> Self:
        if self.searchable and self.first_set("q"):
            raise ValueError("a budget or a count takes the place of `q`; leave one of them out")
        return self

    @property
    def open_q(self) -> float:
        """The share q, which a budget leaves open."""
        return 1.0 if self.searchable else self.q

    @property
    def statistics(self) -> str | None:
        """The kind of importance that must be gathered first."""
        return self.score if PRUNERS.get(self.score).reads_data else None


class HSRSettings(ByImportance):
    """Hierarchical Safety Realignment as the paper defines it."""

    method: Literal["hsr"] = "hsr"
    p_max: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Outer bound by utility; p + 0.2 if not given.",
    )
    scope: RankingScope = Field("row", description="Within what weights compete.")

    @model_validator(mode="after")
    def _check_p(self) -> Self:
        if self.p is not None and self.p_max is not None and self.p >= self.p_max:
            raise ValueError(f"p is {self.p} and p_max {self.p_max}; p < p_max is needed")
        return self

    def band(self, kept: float) -> Band | None:
        """The thresholds for a matrix of which pruning kept a share; None where empty."""
        p = kept if self.p is None else self.p
        p_max = min(1.0, p + MARGIN) if self.p_max is None else self.p_max
        return Band(self.open_q, p, p_max, self.scope) if p < p_max else None


class HSRMethod(Method[HSRSettings]):
    """HSR as the paper defines it."""

    name: ClassVar[str] = "hsr"
    Settings: ClassVar[type[MethodSettings]] = HSRSettings

    def needs(self, settings: HSRSettings) -> Needs:
        """Scored heads, and statistics of both kinds of prompts."""
        return replace(settings.of_heads, statistics=settings.statistics)

    def rank(self, settings: HSRSettings, context: Context) -> Ranking:
        """By the share q at which HSR would restore each weight of the heads."""
        heads = chosen_heads(context.dense, settings, context.heads)
        regions = regions_of(context.dense, heads)
        score = by_importance(context, regions, settings.band, settings.score, hsr_scores)
        return context.rank_by(score, heads)

    def label(self, settings: HSRSettings) -> str:
        """What tables call it."""
        return f"HSR{score_label(settings.score)}, {settings.heads_label}"

    def space(self, settings: HSRSettings, dense: Source, kept: float) -> Space:
        """q or p_max, the scope, how many heads, and by what they are chosen."""
        p = kept if settings.p is None else settings.p
        found: Space = {} if settings.searchable else {"q": Between(0.01, 1.0, log=True)}
        found |= {
            "p_max": Between(min(p + 0.05, 1.0), min(p + 0.5, 1.0)),
            "scope": ("row", "matrix", "head"),
        }
        return found | heads_space(settings, dense)


def heads_space(settings: InHeads, dense: Source) -> Space:
    """What tuning varies of the choice of heads."""
    if settings.heads == "all":
        return {}
    most = min(32, len(all_heads(dense.architecture)))
    found: Space = {"top_heads": Between(1, most, whole=True)}
    return found | ({"criterion": ("ships", "kl")} if settings.heads == "top" else {})


def score_label(score: str) -> str:
    """What tables add for an importance other than the paper's."""
    return "" if score == "wanda" else f" by {score}"


def chosen_heads(dense: Source, settings: InHeads, scores: HeadScores | None) -> list[Head]:
    """The heads in which weights are restored.

    Raises:
        RegraftError: more heads are asked for than there are, or than were scored exactly.
    """
    if settings.heads == "all":
        return all_heads(dense.architecture)
    if settings.heads == "random":
        return random_heads(dense.architecture, settings.top_heads, settings.head_seed)
    if scores is None:
        raise RegraftError("Ranking heads needs their scores: run `regraft analyse heads` first.")
    return scores.best(settings.criterion, settings.top_heads)


def regions_of(dense: Source, heads: Sequence[Head]) -> Regions:
    """Where in each weight of attention the heads are."""
    layer_of = {
        linear.key: layer for layer in dense.architecture.layers for linear in layer.linears
    }
    by_layer: dict[int, list[int]] = {}
    for layer_index, head in heads:
        by_layer.setdefault(layer_index, []).append(head)

    def regions(linear: LinearArchitecture) -> Sequence[Block]:
        layer = layer_of[linear.key]
        return blocks_of(layer, linear, by_layer.get(layer.index, []))

    return regions


def by_importance(
    context: Context,
    regions: Regions,
    band: Callable[[float], Band | None],
    name: str,
    scores: Callable[[Tensor, Scorer, Scorer, Sequence[Block], Band], Tensor],
) -> WeightScore:
    """A score of weights from their importance on D^s and D^u, within a band of some regions.

    Args:
        context: Its statistics; its seed orders equal scores.
        regions: Where in each weight a value may be restored.
        band: The thresholds for a matrix, from the share of its weights that pruning kept.
        name: Of the importance; of one that reads no data there are no statistics.
        scores: Such as `hsr_scores`.
    """
    none = ImportanceStatistics(name, {}, 0)
    found = context.statistics
    safety, utility = (none, none) if found is None else (found.safety, found.utility)

    def score(
        index: int, linear: LinearArchitecture, weight: Tensor, free: Tensor
    ) -> Tensor | None:
        blocks = regions(linear)
        thresholds = band(kept_share(weight, free)) if blocks else None
        if thresholds is None:
            return None
        scorers = safety.scorer(linear, weight), utility.scorer(linear, weight)
        return ties_drawn(scores(free, *scorers, blocks, thresholds), context.seed, index)

    return score


PLUGIN = HSRMethod()
