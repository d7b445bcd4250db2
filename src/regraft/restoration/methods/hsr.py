"""Hierarchical Safety Realignment (Li et al. 2025, arXiv 2505.16104, section 3).

    heads <- the h heads without which answers to harmful prompts change most (Ships)
    for each of their query, key, value and output weights W:
        I^s, I^u <- importance of W on harmful and on harmless prompts (Wanda)
        restore (top_q(I^s) AND top_pmax(I^u)) minus top_p(I^u), where pruning took a weight

p is the share that pruning kept, so that what is restored matters for safety and lies just beyond
what pruning kept for utility. With a budget q is left open: weights are ranked by the q at which
they would come in, and the first of them restored. HSR-a restores all of the heads instead.

`heads.ships` scores heads, `models.architecture.head_block` says which part of a weight is a
head's, and `restoration.importance.hsr_scores` is the set.
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
    """Hierarchical Safety Realignment: in the best heads, top q by I^s, p to p_max by I^u."""

    method: Literal["hsr"] = "hsr"
    p_max: float | None = Field(
        None, gt=0, le=1, description="Outer bound by I^u, harmless; p + 0.2 if not given."
    )
    scope: RankingScope = Field("row", description="Within what weights compete.")

    @model_validator(mode="after")
    def _check_p(self) -> Self:
        if self.p is not None and self.p_max is not None and self.p >= self.p_max:
            raise ValueError(f"p is {self.p} and p_max {self.p_max}; p < p_max is needed")
        return self

    def bounds(self, kept: float) -> tuple[float, RankingScope]:
        p = kept if self.p is None else self.p
        return min(1.0, p + MARGIN) if self.p_max is None else self.p_max, self.scope


class HSRMethod(ByImportance):
    """HSR as the paper defines it."""

    name, settings_type, title = "hsr", HSRSettings, "HSR"

    def own_space(self, settings: ImportanceSettings, kept: float) -> Space:
        """p_max and the scope."""
        p = kept if settings.p is None else settings.p
        return {
            "p_max": Between(min(p + 0.05, 1.0), min(p + 0.5, 1.0)),
            "scope": ("row", "matrix", "head"),
        }


PLUGIN = HSRMethod(hsr_scores)
