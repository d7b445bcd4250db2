"""The control: random pruned weights are restored, as many as a budget says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.restoration.base import AlwaysBudgeted, Context, Method
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import random_ranking


class RandomSettings(AlwaysBudgeted):
    """Random pruned weights, a control."""

    method: Literal["random"] = "random"
    draw_seed: int = Field(
        0, description="Seed of the choice, with --seed: another of either draws others."
    )

    @property
    def drawn(self) -> bool:
        return True


class RandomWeights(Method[RandomSettings]):
    """See the module."""

    name, settings_type = "random", RandomSettings

    def rank(self, settings: RandomSettings, context: Context) -> Ranking:
        """A random order, another one for each calibration seed."""
        return random_ranking(context, settings.draw_seed)

    def label(self, settings: RandomSettings) -> str:
        return "random weights"


PLUGIN = RandomWeights()
