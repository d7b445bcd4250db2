"""Random control: restore a budget of pruned weights drawn at random."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.restoration.base import Budgeted, Context, Method
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import random_ranking


class RandomSettings(Budgeted):
    """Restore random pruned weights, as a control."""

    method: Literal["random"] = "random"
    draw_seed: int = Field(
        0, description="Seed of the draw, combined with --seed: changing either draws others."
    )

    @property
    def drawn(self) -> bool:
        return True


class RandomWeights(Method[RandomSettings]):
    """See the module."""

    name, settings_type = "random", RandomSettings

    def rank(self, settings: RandomSettings, context: Context) -> Ranking:
        """All restorable weights in a random order, a different one for each calibration seed."""
        return random_ranking(context, settings.draw_seed)

    def label(self, settings: RandomSettings) -> str:
        return "random weights"


PLUGIN = RandomWeights()
