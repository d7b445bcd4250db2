"""What weights are ranked from."""

from __future__ import annotations

from pydantic import Field, field_validator

from regraft.pruning.base import PRUNERS, ScoreName
from regraft.settings.base import Settings


class StatisticsSettings(Settings):
    """What is gathered on D^s and D^u, from which weights are ranked."""

    score: ScoreName = Field("wanda", description="For which importance: wanda, sparsegpt or snip.")

    @field_validator("score")
    @classmethod
    def _check(cls, score: str) -> str:
        if not PRUNERS.get(score).reads_data:
            raise ValueError(f"importance by {score} needs no statistics")
        return score
