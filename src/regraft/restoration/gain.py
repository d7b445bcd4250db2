"""Restoration gain: how far each loss falls when a pruned weight comes back, to first order.

At the pruned model let G^s and G^u be the mean gradients of the safety and the utility loss. When
weight ij takes its dense value again, a loss is predicted to fall by `-G_ij (W_dense - W)_ij`
(RigL's growth criterion, Evci et al. 2020, arXiv 1911.11134, pointed at restoration). Weights come
back in steps, with the gradients of the model as it then is.

In a swap a kept weight of the same row, or of the same N:M group, is pruned in exchange: the one
without which both losses change least, by `|-G w + F w^2 / 2|` with F the diagonal of the empirical
Fisher matrix. No removal is sought for being predicted to help; which of these pairs are taken is
then a matter of what both do together (see `joint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Constraint = Literal["utility-gain", "lagrangian", "both", "none"]
MULTIPLIED: tuple[Constraint, ...] = ("lagrangian", "both")  # by a weight that moves
_RATE = 8.0  # of the multiplier, per unit of drift: a drift of 9 points doubles the weight
_LIMITS = (0.05, 50.0)


@dataclass(frozen=True)
class Objective:
    """What a step maximises: `gain^s + utility_weight * gain^u`, and what it holds to.

    "utility-gain" takes only weights with `gain^u >= share * gain^s`: with share 0 those that cost
    utility nothing, with more those that do not merely trade one for the other. "lagrangian" makes
    `utility_weight` a multiplier that grows while harmless prompts drift further from their answers
    than they may, and shrinks while they drift less (see `adapted`). "both" does both.

    A step tries no more than what is predicted to lower the loss by the share `trust` of it, and
    see `backtrack`.
    """

    utility_weight: float = 1.0
    constraint: Constraint = "utility-gain"
    share: float = 0.0
    trust: float = 1.0

    def keys(self, safety: Tensor, utility: Tensor) -> Tensor:
        """The objective of each candidate, -inf where it is not allowed.

        Args:
            safety: gain^s, any shape, float32.
            utility: gain^u, likewise.
        """
        keys = safety + self.utility_weight * utility
        if self.constraint in ("lagrangian", "none"):
            return keys
        return keys.masked_fill_(utility < self.share * safety, -torch.inf)

    def adapted(self, drift: float) -> Objective:
        """The objective of the next step, after harmless prompts drifted `drift` too far.

        Dual ascent: the weight moves by a factor exp(8 drift), drift in [-1, 1].
        """
        if self.constraint not in MULTIPLIED:
            return self
        low, high = _LIMITS
        weight = min(high, max(low, self.utility_weight * math.exp(_RATE * drift)))
        return replace(self, utility_weight=weight)

    def within_trust(self, worth: Tensor, now: float) -> int:
        """How many of a step's weights to take, at least one.

        Args:
            worth: What each is predicted to add, in order, `[k]` float32.
            now: What the step is to lower.
        """
        return max(1, int((worth.double().cumsum(0) <= self.trust * now).sum()))

    def value(self, safety: float, utility: float) -> float:
        """What a step is to lower: `safety + utility_weight * utility`."""
        return safety + self.utility_weight * utility


def backtrack(value: Callable[[int], float], now: float, worth: Tensor) -> int:
    """How many of a step's best weights to take: those that lower the objective most.

    Predictions overestimate what many weights do together. All are tried, then half as many, and
    so on down to one, until less is worse than what was found to help, or is not even predicted to
    be better.

    Args:
        value: The objective with the first n weights of the step back.
        now: The objective without.
        worth: What each is predicted to add to its fall, in order, `[k]` float32.

    Returns:
        0 where no try lowers the objective.
    """
    promised = worth.double().cumsum(0)
    best, fall, tried = 0, 0.0, len(worth)
    while tried and not (best and promised[tried - 1] <= fall):
        found = now - value(tried)
        if found > fall:
            best, fall = tried, found
        elif best:
            break
        tried //= 2
    return best


def gain(gradient: Tensor, dense: Tensor, current: Tensor) -> Tensor:
    """Predicted fall of the loss when each weight takes its dense value. `[out, in]` float32."""
    return gradient.float() * (current.float() - dense.float())


def removal_cost(gradient: Tensor, fisher: Tensor, current: Tensor) -> Tensor:
    """Predicted rise of the loss when each weight becomes 0, to second order. `[out, in]`."""
    weight = current.float()
    return (fisher * weight / 2 - gradient).mul_(weight)


def swaps_in_rows(keys: Tensor, cost: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Pair the best candidates of each row with its cheapest kept weights, in order.

    Args:
        keys: What each return is worth, `[out, in]` float32, -inf where none can come back.
        cost: What each removal costs, `[out, in]` float32, inf where the weight must stay.
        most: Pairs a row at most.

    Returns:
        (worth of each return less the cost of its removal, -inf elsewhere; position of the weight
        removed for it, -1 elsewhere), `[out, in]` float32 and int64.
    """
    rows, columns = keys.shape
    most = min(most, columns)
    worth, back = keys.topk(most, dim=1)  # [out, most]
    price, gone = cost.topk(most, dim=1, largest=False)
    net = (worth - price).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    start = torch.arange(rows, device=keys.device)[:, None] * columns
    return _spread(keys, back, net, gone + start)


def swaps_in_groups(keys: Tensor, cost: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The best single swap of each group of M consecutive inputs; see `swaps_in_rows`."""
    rows, columns = keys.shape
    worth, back = keys.view(rows, -1, m).max(dim=2)  # [out, in / M]
    price, gone = cost.view(rows, -1, m).min(dim=2)
    first = torch.arange(columns // m, device=keys.device) * m
    start = torch.arange(rows, device=keys.device)[:, None] * columns
    net = (worth - price).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    return _spread(keys, back + first, net, gone + first + start)


def _spread(like: Tensor, back: Tensor, net: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.full_like(like, -torch.inf).scatter_(1, back, net)
    removed = torch.full(like.shape, -1, device=like.device).scatter_(1, back, gone)
    return keys, removed.masked_fill_(keys == -torch.inf, -1)
