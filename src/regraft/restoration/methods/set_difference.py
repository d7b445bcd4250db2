"""The set difference of Wei et al. (2024, arXiv 2402.05162): what safety needs and utility not.

Weights of all linears among the top q by importance for safety, minus the top p for utility. q is
left open: weights are ranked by the q at which they would come in, as in `importance.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.models.load import Source
from regraft.restoration.base import AlwaysBudgeted, Between, Context, Method, Needs, Space
from regraft.restoration.importance import P_IS_KEPT, Band, by_importance, hsr_scores
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import whole


class SetDifferenceSettings(AlwaysBudgeted):
    """Weights that matter for safety and not for utility, by Wanda's importance."""

    method: Literal["set-difference"] = "set-difference"
    p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Top share by utility importance that is left out; if not given, what pruning "
        "kept of each matrix.",
    )
    scope: Literal["row", "matrix"] = Field(
        "row", description="Weights compete within their row or the matrix."
    )

    @property
    def only_pruned(self) -> str | None:
        return P_IS_KEPT if self.p is None else None

    def band(self, kept: float) -> Band | None:
        """The thresholds for a matrix of which pruning kept a share; None where empty."""
        p = kept if self.p is None else self.p
        return Band(1.0, p, 1.0, self.scope) if p < 1 else None


class SetDifference(Method[SetDifferenceSettings]):
    """See the module."""

    name, settings_type = "set-difference", SetDifferenceSettings

    def needs(self, settings: SetDifferenceSettings) -> Needs:
        """Statistics of both kinds of prompts."""
        return Needs(statistics="wanda")

    def rank(self, settings: SetDifferenceSettings, context: Context) -> Ranking:
        """By the share q at which the set difference would hold each weight."""
        return by_importance(context, whole, settings.band, "wanda", hsr_scores).ranked()

    def label(self, settings: SetDifferenceSettings) -> str:
        return "set difference"

    def space(self, settings: SetDifferenceSettings, dense: Source, kept: float) -> Space:
        return {"p": Between(min(kept, 0.999), min(kept + 0.4, 0.999)), "scope": ("row", "matrix")}


PLUGIN = SetDifference()
