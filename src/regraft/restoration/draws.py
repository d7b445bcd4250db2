"""What a seed draws: a random order of weights, and the order of those with equal scores."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.restoration.base import Context
from regraft.restoration.ranking import Best, Ranking

_TIE = 2.0**-30  # shares a/n and b/m differ by 1/(nm) at least, rows have up to 2^15 inputs


def random_ranking(context: Context, draw_seed: int) -> Ranking:
    """All weights that can be restored, in an order of each `draw_seed` and calibration seed."""
    best, seed = Best(context.count), draw_seed + 1000 * context.seed
    for one in context.matrices():
        best.add(one.index, random_scores(one.free, seed, one.index))
    return best.ranked()


def random_scores(free: Tensor, seed: int, index: int) -> Tensor:
    """A random order of all pruned weights of matrix `index`, `[out, in]` float32."""
    scores = torch.rand(free.shape, generator=_generator(seed, index)).to(free.device)
    return scores.masked_fill_(~free, -torch.inf)


def ties_drawn(scores: Tensor, seed: int, index: int) -> Tensor:
    """Scores among which equal ones have a random order, of matrix `index`. `[out, in]` float64.

    Shares of a row are few, and as many weights have one as there are rows: without a draw a budget
    that ends among them would go to the first layers and rows alone.
    """
    draw = torch.rand(scores.shape, generator=_generator(seed, index), dtype=torch.float64)
    return scores.double() - _TIE * draw.to(scores.device)


def _generator(seed: int, index: int) -> torch.Generator:
    """On the CPU, so that a draw depends on seed and matrix alone and not on the device."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
