"""Which pruned weights are restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from regraft.heads.score import Criterion
from regraft.pruning.base import PRUNERS, GradientPruner, ScoreName
from regraft.restoration.selection import RankingScope
from regraft.settings.base import Settings

DEFAULT_BUDGET = 5.0  # per 10,000 pruned


_OF_HEADS = ("heads", "criterion", "top_heads")


_NOT_OF_HEADS = {
    "top": ("head_seed",),
    "random": ("criterion",),
    "all": ("criterion", "top_heads", "head_seed"),
}
_OF_HSR = ("score", "p", "p_max", "scope")


_OF_FINE_TUNING = ("positions", "learning_rate", "passes")


RestorationMethod = Literal[
    "hsr", "hsr-released", "hsr-a", "set-difference", "random", "gain", "fine-tune"
]

RANDOM = "random"  # positions that are drawn
SELECTING = ("hsr", "hsr-released")  # single weights in heads, by I^s and I^u
OF_HEADS = (*SELECTING, "hsr-a")


class RealignSettings(Settings):
    """Which pruned weights are restored."""

    method: RestorationMethod = Field(
        "hsr",
        description="hsr selects single weights in heads, hsr-released those that the authors' "
        "code would (docs/hsr-released.md), hsr-a whole heads; gain those that are "
        "predicted to bring the model's answers nearest to the dense model's, step by step, as "
        "long as that helps on held-out prompts; set-difference (Wei et al.) those that matter "
        "for safety and not for utility; random is a control; fine-tune, a baseline, trains "
        "values by Adam instead of restoring dense ones.",
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=10_000,
        description="Restored weights per 10,000 pruned ones, at most in gain, which stops where "
        "more do not help; of hsr it takes the place of q. Where gain, set-difference or random "
        f"are given neither this nor a count it is {DEFAULT_BUDGET:g}.",
    )
    count: int | None = Field(None, ge=1, description="Restored weights; instead of the budget.")
    score: ScoreName = Field(
        "wanda",
        description="Importance I^s and I^u: wanda, sparsegpt, snip or magnitude (which is the "
        "same for both, so that only q above p selects anything).",
    )
    heads: Literal["top", "random", "all"] = Field(
        "top", description="The top-scored heads, as many random ones (a control), or all."
    )
    criterion: Criterion = Field(
        "ships",
        description="Rank heads by Ships, by query-level KL, or by what HSR's released code "
        "computes (released), which hsr-released does if not given.",
    )
    top_heads: int = Field(10, ge=1, description="How many heads (h).")
    q: float = Field(0.5, gt=0, le=1, description="Top share by safety importance.")
    p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share kept by the pruner; if not given, what each matrix has kept.",
    )
    p_max: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Outer bound by utility importance; p + 0.2 if not given, 0.7 always in "
        "hsr-released.",
    )
    scope: RankingScope = Field(
        "row", description="Weights compete within their row, the matrix or the head."
    )
    head_seed: int = Field(0, description="Of random heads and of random weights.")
    swap: bool = Field(
        False,
        description="gain: prune a kept weight of the same row or N:M group for each that is "
        "restored, so that sparsity stays exactly as it was.",
    )
    positions: str = Field(
        RANDOM,
        description="fine-tune: which weights are trained, those of a ranking of weights FILE (in "
        "a recipe also the name of a method before it), the first of it, or random pruned ones.",
    )
    learning_rate: float = Field(0.003, gt=0, description="fine-tune: of Adam.")
    passes: int = Field(
        3, ge=1, description="fine-tune: forward and backward passes over all prompts."
    )

    @property
    def random(self) -> bool:
        """Whether `head_seed` decides what is restored."""
        if self.method == "fine-tune":
            return self.positions == RANDOM
        return self.method == "random" or (self.method in OF_HEADS and self.heads == "random")

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, given: Any) -> Any:
        """Written out, so that an artifact tells what it was made with."""
        if not isinstance(given, Mapping):
            return given
        method = given.get("method", "hsr")
        if method == "hsr-released" and given.get("heads", "top") == "top":
            return {"criterion": "released", **given}
        if method in OF_HEADS:
            return given
        if method == "fine-tune" and given.get("positions", RANDOM) != RANDOM:
            return given  # all of the ranking
        if given.get("budget") is not None or given.get("count") is not None:
            return given
        return {**given, "budget": DEFAULT_BUDGET}

    @model_validator(mode="after")
    def _check(self) -> RealignSettings:
        if self.p is not None and self.p_max is not None and self.p >= self.p_max:
            raise ValueError(f"p is {self.p} and p_max {self.p_max}; p < p_max is needed")
        if self.budget is not None and self.count is not None:
            raise ValueError("`budget` and `count` say the same thing; give one of them")
        if self.method == "hsr-a" and self.amount is not None:
            raise ValueError("hsr-a restores whole heads: give `top_heads`, not a budget")
        if self.method == "set-difference" and not PRUNERS.get(self.score).reads_data:
            raise ValueError(
                f"set-difference needs two rankings that differ, and by {self.score} safety and "
                "utility have the same; give `score: wanda`"
            )
        if self.method == "set-difference" and not PRUNERS.get(self.score).every_linear:
            raise ValueError(
                f"set-difference ranks the weights of all linears, and {self.score} statistics are "
                "kept for those of attention alone; give `score: wanda`"
            )
        if self.swap and self.method != "gain":
            raise ValueError(f"only gain can swap, not {self.method}")
        return self

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        if self.method in SELECTING and self.ranked and self.first_set("q"):
            return "a budget or a count takes the place of `q`"
        not_read: tuple[str, ...] = {
            "hsr": (),
            "hsr-released": ("p_max", "scope"),
            "hsr-a": ("q", *_OF_HSR),
            "set-difference": ("q", "p_max", *_OF_HEADS),
            "random": ("q", *_OF_HSR, *_OF_HEADS),
            "gain": ("q", *_OF_HSR, *_OF_HEADS),
            "fine-tune": ("q", *_OF_HSR, *_OF_HEADS),
        }[self.method]
        if self.method != "fine-tune":
            not_read = (*not_read, *_OF_FINE_TUNING)
        if (name := self.first_set(*not_read)) is not None:
            return f"`{name}` changes nothing with {self.method}"
        if self.in_heads and (name := self.first_set(*_NOT_OF_HEADS[self.heads])) is not None:
            return f"`{name}` changes nothing where `heads` is {self.heads}"
        if not self.random and self.first_set("head_seed"):
            return f"`head_seed` changes nothing with {self.method}"
        return None

    @property
    def amount(self) -> float | None:
        """The budget or the count, whichever is given."""
        return self.count if self.budget is None else self.budget

    @property
    def ranked(self) -> bool:
        """Whether weights are ranked and the best k taken, rather than a set selected."""
        if self.method == "fine-tune":
            return False
        return self.method not in OF_HEADS or self.amount is not None

    @property
    def in_heads(self) -> bool:
        """Whether weights are restored in chosen heads alone."""
        return self.method in OF_HEADS

    @property
    def by_heads(self) -> bool:
        """Whether scored heads decide where weights are restored."""
        return self.in_heads and self.heads == "top"

    @property
    def needs_statistics(self) -> bool:
        """Whether weights are ranked by something that must be gathered from data first."""
        by_score = self.method in (*SELECTING, "set-difference")
        return by_score and PRUNERS.get(self.score).reads_data

    @property
    def imitates(self) -> bool:
        """Whether it learns from the dense model's own answers, and needs prompts alone."""
        return self.method in ("gain", "fine-tune")

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients are taken, for the ranking or for its statistics."""
        return self.imitates or (
            self.needs_statistics and isinstance(PRUNERS.get(self.score), GradientPruner)
        )

    def how_many(self, pruned: int) -> int:
        """How many of `pruned` weights are restored at most."""
        if self.count is not None:
            return min(self.count, pruned)
        return int((self.budget or 0) * pruned / 10_000)

    def ranking(self) -> RealignSettings:
        """What the ranking depends on: gain's has no budget, which takes the first part of it."""
        free = {"budget": None, "count": None} if self.method == "gain" else {}
        return self.selection().model_copy(update=free)

    def selection(self) -> RealignSettings:
        """These settings without those that only name and store the result."""
        return RealignSettings(**self.model_dump(include=set(RealignSettings.model_fields)))
