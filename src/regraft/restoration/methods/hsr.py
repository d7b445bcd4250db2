"""Hierarchical Safety Realignment (Li et al. 2025, arXiv 2505.16104, section 3).

    heads <- the h heads whose ablation changes answers to harmful prompts most (Ships)
    for each of their query, key, value and output matrices W:
        I^s, I^u <- importance of W on harmful and on harmless prompts (Wanda)
        restore (top_q(I^s) AND top_pmax(I^u)) minus top_p(I^u) where the weight was pruned

p is the share that pruning kept. The restored weights therefore matter for safety, and come next by
importance for utility after those that pruning kept. With a budget instead of q, weights are ranked
by the smallest q at which they enter the set. HSR-a restores the whole heads instead.

`heads.ships` scores heads, `models.architecture.head_block` gives the region of a head in a weight,
and `restoration.importance.hsr_scores` computes the set.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from regraft.restoration.base import Between, Space
from regraft.restoration.importance import (
    ByImportance,
    ImportanceSettings,
    RankingScope,
    hsr_scores,
)

MARGIN = 0.2  # p_max - p in the paper


class HSRSettings(ImportanceSettings):
    """HSR, the published method: weights that matter for safety, in the top heads."""

    method: Literal["hsr"] = "hsr"
    p_max: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Outer bound on harmless prompts; default p + 0.2.",
    )
    scope: RankingScope = Field("row", description="Weights compete within this scope.")

    @model_validator(mode="after")
    def _check_p(self) -> Self:
        if self.p is not None and self.p_max is not None and self.p >= self.p_max:
            raise ValueError(f"p is {self.p} and p_max {self.p_max}; p < p_max is required")
        return self

    def bounds(self, kept: float) -> tuple[float, RankingScope]:
        p = kept if self.p is None else self.p
        return min(1.0, p + MARGIN) if self.p_max is None else self.p_max, self.scope


class HSRMethod(ByImportance):
    """HSR as the paper defines it."""

    name, settings_type, title = "hsr", HSRSettings, "HSR"

    def own_space(self, settings: ImportanceSettings, kept: float) -> Space:
        """Search space of p_max and the scope."""
        p = kept if settings.p is None else settings.p
        return {
            "p_max": Between(min(p + 0.05, 1.0), min(p + 0.5, 1.0)),
            "scope": ("row", "matrix", "head"),
        }


PLUGIN = HSRMethod(hsr_scores)
