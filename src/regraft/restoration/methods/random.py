"""The control: random pruned weights are restored, as many as a budget says."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from regraft.restoration.base import AlwaysBudgeted, Context, Method
from regraft.restoration.ranking import Best, Ranking


class RandomSettings(AlwaysBudgeted):
    """Random pruned weights, a control."""

    method: Literal["random"] = "random"
    draw_seed: int = Field(
        0, description="Seed of the choice, with --seed: another of either draws others."
    )

    @property
    def drawn(self) -> bool:
        """Whether a seed decides what is restored, so that repeats differ."""
        return True


class RandomWeights(Method[RandomSettings]):
    """See the module."""

    name, settings_type = "random", RandomSettings

    def rank(self, settings: RandomSettings, context: Context) -> Ranking:
        """A random order, another one for each calibration seed."""
        return drawn(context, settings.draw_seed)

    def label(self, settings: RandomSettings) -> str:
        """What tables call it."""
        return "random weights"


def drawn(context: Context, draw_seed: int) -> Ranking:
    """Random pruned weights."""
    best, seed = Best(context.count), draw_seed + 1000 * context.seed
    for one in context.matrices():
        best.add(one.index, random_scores(one.free, seed, one.index))
    return best.ranked()


def random_scores(free: Tensor, seed: int, index: int) -> Tensor:
    """A random order of all pruned weights of matrix `index`, `[out, in]` float32."""
    scores = torch.rand(free.shape, generator=generator_of(seed, index)).to(free.device)
    return scores.masked_fill_(~free, -torch.inf)


def generator_of(seed: int, index: int) -> torch.Generator:
    """On the CPU, so that a draw depends on seed and matrix alone and not on the device."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


PLUGIN = RandomWeights()
