"""Set difference (Wei et al. 2024, arXiv 2402.05162): weights that only safety needs.

    in every linear:  restore top_q(I^s) minus top_p(I^u) where the weight was pruned

A budget takes the place of q: weights are ranked by the smallest q at which they enter the set, as
in `importance.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.models.load import Source
from regraft.restoration.base import Between, Budgeted, Context, Method, Needs, Space
from regraft.restoration.importance import P_IS_KEPT, Band, best_in_regions, hsr_scores
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import whole


class SetDifferenceSettings(Budgeted):
    """Restore weights that matter for safety and not for utility, by Wanda's importance."""

    method: Literal["set-difference"] = "set-difference"
    p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Top share by importance for utility that is left out; if not given, the share "
        "of each matrix that pruning kept.",
    )
    scope: Literal["row", "matrix"] = Field(
        "row", description="Weights compete within their row or the matrix."
    )

    @property
    def only_pruned(self) -> str | None:
        return P_IS_KEPT if self.p is None else None

    def band(self, kept: float) -> Band | None:
        """Thresholds for a matrix of which pruning kept the share `kept`; None if p is 1."""
        p = kept if self.p is None else self.p
        return Band(1.0, p, 1.0, self.scope) if p < 1 else None


class SetDifference(Method[SetDifferenceSettings]):
    """See the module."""

    name, settings_type = "set-difference", SetDifferenceSettings

    def needs(self, settings: SetDifferenceSettings) -> Needs:
        """Statistics of both kinds of prompts."""
        return Needs(statistics="wanda")

    def rank(self, settings: SetDifferenceSettings, context: Context) -> Ranking:
        """Rank all restorable weights by the q at which each enters the set difference."""
        return best_in_regions(context, whole, settings.band, "wanda", hsr_scores).ranked()

    def label(self, settings: SetDifferenceSettings) -> str:
        return "set difference"

    def space(self, settings: SetDifferenceSettings, dense: Source, kept: float) -> Space:
        return {"p": Between(min(kept, 0.999), min(kept + 0.4, 0.999)), "scope": ("row", "matrix")}


PLUGIN = SetDifference()
