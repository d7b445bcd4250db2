"""Restoration gain: how much each loss falls when a weight is restored, to first order.

At the pruned (or otherwise changed) model let G^s and G^u be the mean gradients of the safety and
the utility loss. When weight ij takes its dense value, a loss is predicted to fall by its gain
`-G_ij (W_dense - W)_ij` (RigL's growth criterion, Evci et al. 2020, arXiv 1911.11134, applied to
restoration). Weights are restored in steps:

    repeat
        G^s, G^u   <- mean gradients of the current model, over the prompts that are not held out
        candidates <- restorable weights with gain^u >= 0 and gain^s + gain^u > 0, by that sum
        n          <- as many as are predicted to halve the loss, at most twice the step before
        try the first n, n/2, n/4 ... n/64 and restore the number with the lowest held-out loss
    until a step lowers the held-out loss by less than 1 %, or 5 steps are done

With swaps a kept weight of the same row, or of the same N:M group, is pruned in exchange: the one
whose removal changes both losses least, by `|-G w + F w^2 / 2|` with F the diagonal of the
empirical Fisher matrix. The absolute value keeps a removal from being chosen because it is
predicted to help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TRIES = 7  # numbers of weights that a line search tries: n, n/2 ... n/64


def worth_of(safety: Tensor, utility: Tensor) -> Tensor:
    """`gain^s + gain^u`, or -inf where gain^u < 0: it would raise the loss on harmless prompts.

    Any shape, float32.
    """
    return (safety + utility).masked_fill_(utility < 0, -torch.inf)


def gain(gradient: Tensor, dense: Tensor, current: Tensor) -> Tensor:
    """Predicted fall of the loss when each weight takes its dense value. `[out, in]` float32."""
    return gradient.float() * (current.float() - dense.float())  # -G (W_dense - W)


def first_order_limit(worth: Tensor, loss: float) -> int:
    """Number of weights that are together predicted to halve the loss, at least one.

    The best weights of a step all push the same decision, so together they do less than the sum of
    their predictions: with enough weights to predict a loss of zero the model refuses much more
    than the dense one, and later steps are spent on undoing that. `worth` `[k]` float32 is the
    predicted fall by each weight, best first; `loss` is the current loss.
    """
    return max(1, int((worth.double().cumsum(0) <= loss / 2).sum()))


class Try(NamedTuple):
    """The held-out loss with the first `number` of a step's candidates restored."""

    number: int
    loss: float


def line_search(
    value: Callable[[int], float], now: float, most: int
) -> tuple[int, tuple[Try, ...]]:
    """Find how many of a step's best weights give the lowest held-out loss.

    First order overestimates the joint effect of many weights. `most` are tried, then half as many,
    and so on, until some number has helped and the next smaller one is no better. `value` maps n to
    the held-out loss with the first n weights restored; `now` is the loss without them.

    Returns:
        (the best number, 0 if no try lowers the loss; the tries with a finite loss, in order)
    """
    best, lowest = 0, now
    tries: list[Try] = []
    for number in numbers_tried(most):
        loss = value(number)
        if math.isfinite(loss):
            tries.append(Try(number, loss))
        if loss < lowest:
            best, lowest = number, loss
        elif best:
            break
    return best, tuple(tries)


def numbers_tried(most: int) -> tuple[int, ...]:
    """All numbers that a line search may try: n = `most`, n/2 ... n/64, or down to 1."""
    return tuple(most >> i for i in range(min(MOST_TRIES, most.bit_length())))


def removal_cost(gradient: Tensor, fisher: Tensor, current: Tensor) -> Tensor:
    """Predicted rise of the loss when each weight becomes 0, to second order. `[out, in]`."""
    weight = current.float()
    return (fisher * weight / 2 - gradient).mul_(weight)


def swaps_in_rows(worth: Tensor, cost: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Pair the best candidates of each row with its cheapest kept weights, in order.

    Args:
        worth: Worth of restoring each weight, `[out, in]` float32, -inf where impossible.
        cost: Cost of removing each weight, `[out, in]` float32, inf where it must stay.
        most: Maximum number of pairs per row.

    Returns:
        (worth of each candidate minus the cost of its removal, -inf elsewhere; flat position of the
        weight removed for it, -1 elsewhere), `[out, in]` float32 and int64.
    """
    rows, columns = worth.shape
    most = min(most, columns)
    best, restored = worth.topk(most, dim=1)  # [out, most]
    cheapest, removed = cost.topk(most, dim=1, largest=False)
    start = torch.arange(rows, device=worth.device)[:, None] * columns
    return _scattered(worth, restored, best - cheapest, removed + start)


def swaps_in_groups(worth: Tensor, cost: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The best single swap of each group of M consecutive inputs; see `swaps_in_rows`."""
    rows, columns = worth.shape
    best, restored = worth.view(rows, -1, m).max(dim=2)  # [out, in / M]
    cheapest, removed = cost.view(rows, -1, m).min(dim=2)
    first = torch.arange(columns // m, device=worth.device) * m
    start = torch.arange(rows, device=worth.device)[:, None] * columns
    return _scattered(worth, restored + first, best - cheapest, removed + first + start)


def _scattered(like: Tensor, column: Tensor, net: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Put `net` and `removed` of each swap at its `column`; -inf and -1 where there is no swap."""
    net = net.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)  # inf - inf, after an overflow
    worth = torch.full_like(like, -torch.inf).scatter_(1, column, net)
    position = torch.full(like.shape, -1, device=like.device).scatter_(1, column, removed)
    return worth, position.masked_fill_(worth == -torch.inf, -1)
