"""The control: random pruned weights are restored, as many as a budget says."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from regraft.restoration.base import AlwaysBudgeted, Context, Method, MethodSettings
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import random_scores


class RandomSettings(AlwaysBudgeted):
    """Random pruned weights, a control."""

    method: Literal["random"] = "random"
    head_seed: int = Field(0, description="Another seed draws other weights.")

    @property
    def drawn(self) -> bool:
        """Whether a seed decides what is restored, so that repeats differ."""
        return True


class RandomWeights(Method[RandomSettings]):
    """See the module."""

    name: ClassVar[str] = "random"
    Settings: ClassVar[type[MethodSettings]] = RandomSettings

    def rank(self, settings: RandomSettings, context: Context) -> Ranking:
        """A random order, another one for each calibration seed."""
        return context.rank_by(drawn_by(settings.head_seed, context.seed))

    def label(self, settings: RandomSettings) -> str:
        """What tables call it."""
        return "random weights"


def drawn_by(head_seed: int, calibration_seed: int) -> Callable[..., Tensor]:
    """A random score of every pruned weight."""
    seed = head_seed + 1000 * calibration_seed
    return lambda index, _linear, _weight, free: random_scores(free, seed, index)


PLUGIN = RandomWeights()
