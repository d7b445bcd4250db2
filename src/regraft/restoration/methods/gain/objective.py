"""Restoration gain: how far each loss falls when a weight is restored, to first order.

At the pruned (or otherwise changed) model let G^s and G^u be the mean gradients of the safety and
the utility loss. When weight ij takes its dense value, a loss is predicted to fall by its gain
`-G_ij (W_dense - W)_ij` (RigL's growth criterion, Evci et al. 2020, arXiv 1911.11134, applied to
restoration). Weights are restored in steps:

    repeat
        G^s, G^u <- mean gradients of the model as it is, over the prompts that are not held out
        candidates <- weights with gain^u >= 0 and gain^s + gain^u > 0, by that sum, of those that
                      pruning or quantising changed
        n <- as many as are predicted to halve the loss, at most twice the step before
        try the first n, n/2, n/4 ... n/64 and restore the number with the lowest held-out loss
    until a step lowers the held-out loss by less than 1 %, or 5 times

In a swap a kept weight of the same row, or of the same N:M group, is pruned in exchange: the one
without which both losses change least, by `|-G w + F w^2 / 2|` with F the diagonal of the empirical
Fisher matrix. The cost is an absolute value, so that no removal is preferred for being predicted to
help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TRIES = 7  # numbers of weights that a line search evaluates: n, n/2 ... n/64


def worth_of(safety: Tensor, utility: Tensor) -> Tensor:
    """`gain^s + gain^u` of each candidate, -inf where it would raise the loss on harmless prompts.

    Any shape, float32.
    """
    return (safety + utility).masked_fill_(utility < 0, -torch.inf)


def gain(gradient: Tensor, dense: Tensor, current: Tensor) -> Tensor:
    """Predicted fall of the loss when each weight takes its dense value. `[out, in]` float32."""
    return gradient.float() * (current.float() - dense.float())  # -G (W_dense - W)


def first_order_limit(worth: Tensor, loss: float) -> int:
    """How many weights are together predicted to halve the loss, at least one.

    The first weights of a step push the same decision the same way, so that they do less together
    than first order promises of each. With as many as are predicted to lower the loss to zero, the
    model refuses much more than the dense one, and further steps go into undoing that. `worth` is
    the predicted fall by each weight, best first, `[k]` float32, `loss` what it is now.
    """
    return max(1, int((worth.double().cumsum(0) <= loss / 2).sum()))


class Try(NamedTuple):
    """The held-out loss with the first `number` of a step's candidates restored."""

    number: int
    loss: float


def line_search(
    value: Callable[[int], float], now: float, most: int
) -> tuple[int, tuple[Try, ...]]:
    """The number of a step's best weights with which the held-out loss is lowest.

    First order overestimates what many weights do together. `most` are tried, then half as many,
    and so on, until fewer are worse than what was found to help.

    Args:
        value: The held-out loss with the first n weights restored.
        now: The held-out loss without them.
        most: How many weights at most.

    Returns:
        (the number, 0 where no try lowers the loss; the tries in order, but for those whose loss
        is not finite)
    """
    best, lowest = 0, now
    tries: list[Try] = []
    for tried in numbers_tried(most):
        found = value(tried)
        if math.isfinite(found):
            tries.append(Try(tried, found))
        if found < lowest:
            best, lowest = tried, found
        elif best:
            break
    return best, tuple(tries)


def numbers_tried(most: int) -> tuple[int, ...]:
    """What a line search tries at most: `most`, half as many, and so on, down to one or n/64."""
    return tuple(most >> i for i in range(min(MOST_TRIES, most.bit_length())))


def removal_cost(gradient: Tensor, fisher: Tensor, current: Tensor) -> Tensor:
    """Predicted rise of the loss when each weight becomes 0, to second order. `[out, in]`."""
    weight = current.float()
    return (fisher * weight / 2 - gradient).mul_(weight)


def swaps_in_rows(keys: Tensor, cost: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Pair the best candidates of each row with its cheapest kept weights, in order.

    Args:
        keys: What restoring each weight is worth, `[out, in]` float32, -inf where none can be.
        cost: What each removal costs, `[out, in]` float32, inf where the weight must stay.
        most: Pairs a row at most.

    Returns:
        (worth of each candidate less the cost of its removal, -inf elsewhere; position of the
        weight removed for it, -1 elsewhere), `[out, in]` float32 and int64.
    """
    rows, columns = keys.shape
    most = min(most, columns)
    worth, restored = keys.topk(most, dim=1)  # [out, most]
    price, removed = cost.topk(most, dim=1, largest=False)
    net = (worth - price).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    start = torch.arange(rows, device=keys.device)[:, None] * columns
    return _spread(keys, restored, net, removed + start)


def swaps_in_groups(keys: Tensor, cost: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The best single swap of each group of M consecutive inputs; see `swaps_in_rows`."""
    rows, columns = keys.shape
    worth, restored = keys.view(rows, -1, m).max(dim=2)  # [out, in / M]
    price, removed = cost.view(rows, -1, m).min(dim=2)
    first = torch.arange(columns // m, device=keys.device) * m
    start = torch.arange(rows, device=keys.device)[:, None] * columns
    net = (worth - price).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    return _spread(keys, restored + first, net, removed + first + start)


def _spread(like: Tensor, at: Tensor, net: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    worth = torch.full_like(like, -torch.inf).scatter_(1, at, net)
    position = torch.full(like.shape, -1, device=like.device).scatter_(1, at, removed)
    return worth, position.masked_fill_(worth == -torch.inf, -1)
