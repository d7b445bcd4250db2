"""How heads are scored, and what weights are ranked from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from regraft.heads.score import CANDIDATES, WINDOW, Mode, Scoring
from regraft.models.ablation import EPS, AblationTarget
from regraft.pruning.base import PRUNERS, ScoreName
from regraft.settings.base import EXPERT, NAMED, Settings


class HeadSettings(Settings):
    """Head scoring by ablation on D^s prompts."""

    r_max: int = Field(5, ge=1, description="Rank of the subspaces of Ships.")
    target: Annotated[AblationTarget, EXPERT] = Field(
        "all", description="What of a head is scaled."
    )
    eps: Annotated[float, EXPERT] = Field(
        EPS, ge=0, lt=1, description="The factor; with 0 a head is switched off."
    )
    mode: Annotated[Mode, NAMED] = Field(
        "exact",
        description="exact: ablate every head. screened, faster: estimate all, then ablate the "
        "best.",
    )
    window: Annotated[int, EXPERT] = Field(
        WINDOW, ge=1, description="Screening: prompt positions followed."
    )
    candidates: Annotated[int, EXPERT] = Field(
        CANDIDATES, ge=1, description="Screening: best heads to ablate."
    )
    tokens_per_pass: Annotated[int | None, EXPERT] = Field(
        None, ge=1, description="Tokens in one pass; fewer need less memory."
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
