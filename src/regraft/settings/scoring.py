"""How heads are scored, and what weights are ranked from."""

from __future__ import annotations

from pydantic import Field, field_validator

from regraft.heads.score import CANDIDATES, WINDOW, Mode, Scoring
from regraft.models.ablation import EPS, AblationTarget
from regraft.pruning.base import PRUNERS, ScoreName
from regraft.settings.base import Settings


class HeadSettings(Settings):
    """Head scoring by ablation on D^s prompts."""

    r_max: int = Field(5, ge=1, description="Rank of the subspaces of Ships.")
    target: AblationTarget = Field("all", description="What of a head is scaled.")
    eps: float = Field(EPS, ge=0, lt=1, description="The scale.")
    mode: Mode = Field(
        "exact",
        description="exact: every head is ablated exactly. screened: all are estimated, the best "
        "then ablated exactly.",
    )
    window: int = Field(
        WINDOW,
        ge=1,
        description="Screening: positions of a prompt at which effects are followed.",
    )
    candidates: int = Field(
        CANDIDATES, ge=1, description="Screening: best heads that are scored exactly."
    )
    tokens_per_pass: int | None = Field(
        None,
        ge=1,
        description="Tokens in one pass, which bounds memory; what fits if not given.",
    )

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        name = None if self.mode == "screened" else self.first_set("window", "candidates")
        return None if name is None else f"`{name}` changes nothing where `mode` is {self.mode}"

    def scoring(self) -> Scoring:
        """These settings as the scoring of heads takes them."""
        return Scoring(**self.model_dump())


class StatisticsSettings(Settings):
    """What is gathered on D^s and D^u, from which weights are ranked."""

    score: ScoreName = Field("wanda", description="For which importance: wanda, sparsegpt or snip.")

    @field_validator("score")
    @classmethod
    def _check(cls, score: str) -> str:
        if not PRUNERS.get(score).reads_data:
            raise ValueError(f"importance by {score} needs no statistics")
        return score
