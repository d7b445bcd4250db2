"""Which weights come back together: a greedy choice that sees what each does to every prompt.

The weights with the best mean gains tend to do the same to the same prompts, so that many of them
together overshoot. Here candidate j has its own gain a_ej on prompt e. A loss, which cannot fall
below 0, is taken to be a square; with s_e, the sum of the chosen gains, it becomes

    L_e(s) = L_e - s_e + s_e^2 / (4 (L_e + damping)),

0 at s_e = 2 L_e (without damping): Gauss-Newton's step on the root of the loss, one dimension a
prompt. Candidates are taken one after the other by what each still adds: what others have done for
a prompt is not done again, and harm that others have done weighs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft import ranks

DAMPING = 0.1  # nats, added to every loss: without it nothing could change a prompt with no loss
_ROUNDS = 256  # that suffice where those taken in a round do not get in each other's way
_SHARE = 0.8  # of what those of a round add one by one, what they add together at least
_AT_ONCE = 1 << 26  # squares in memory at a time
_NONE = 1e-30  # instead of no weight at all


@dataclass(frozen=True)
class Effects:
    """What candidates do to this process's prompts.

    Attributes:
        gains: How far each loss is predicted to fall, `[prompts, candidates]` float32.
        losses: Of the prompts now, `[prompts]` float32.
        weights: How much each prompt counts, by which both are multiplied already, `[prompts]`
            float32.
    """

    gains: Tensor
    losses: Tensor
    weights: Tensor

    @property
    def mean(self) -> Tensor:
        """The sum over the prompts of all processes, `[candidates]` float32."""
        return ranks.total(self.gains.sum(dim=0))


def joined(
    sides: Sequence[Effects], shares: Sequence[float], chosen: Tensor, device: torch.device
) -> Effects:
    """Several kinds of prompts as one, a kind by its share, with some of the candidates.

    Args:
        sides: The same candidates, on CPU.
        shares: Of each kind.
        chosen: Places of the candidates that are kept, `[n]` int64.
        device: Where to.
    """
    rows = [len(side.losses) for side in sides]
    gains = torch.empty(sum(rows), len(chosen), device=device)
    for part, side, share in zip(gains.split(rows), sides, shares, strict=True):
        part.copy_(side.gains[:, chosen]).mul_(share)
    pairs = list(zip(sides, shares, strict=True))
    losses = torch.cat([side.losses * share for side, share in pairs])
    weights = torch.cat([side.weights * share for side, share in pairs])
    return Effects(gains, losses.to(device), weights.to(device))


def together(effects: Effects, count: int) -> tuple[Tensor, Tensor]:
    """The candidates to take, at most `count`, in order, and what each adds.

    Fewer where no other lowers the sum of all prompts' losses. Several are taken at once where they
    do not get in each other's way; what they add together is then shared out.

    Returns:
        (`[k]` int64, `[k]` float32 on CPU: the fall of that sum, on which all processes agree)
    """
    gains = effects.gains
    stiffness = 1 / (4 * (effects.losses + DAMPING * effects.weights).clamp_min(_NONE))  # [E]
    rows = max(1, _AT_ONCE // max(1, gains.shape[1]))
    parts = zip(stiffness.split(rows), gains.split(rows), strict=True)
    overshoot = gains.new_zeros(gains.shape[1])
    for stiff, part in parts:
        overshoot += stiff @ part.square()
    overshoot = ranks.total(overshoot)  # [N]
    done = torch.zeros_like(effects.losses)  # [E], s
    taken = torch.zeros(gains.shape[1], dtype=torch.bool, device=gains.device)
    order, added = [taken.nonzero().flatten()], [overshoot[:0]]
    most = at_once = -(-count // _ROUNDS)
    room = count
    while room > 0:
        slope = 1 - 2 * stiffness * done  # [E]
        worth = ranks.total(slope @ gains) - overshoot  # [N]
        worth.masked_fill_(taken, -torch.inf)
        best = worth.topk(min(at_once, room, len(worth)))
        helps = best.values > 0
        chosen, alone = best.indices[helps], best.values[helps]
        if not len(chosen):
            break
        while True:
            sums = gains[:, chosen].sum(dim=1)  # [E]
            fall = ranks.total(slope @ sums - stiffness @ sums.square())
            if len(chosen) == 1 or fall >= _SHARE * alone.sum():
                break
            chosen, alone = (one[: len(chosen) // 2] for one in (chosen, alone))
        order.append(chosen)
        added.append(alone * (fall / alone.sum()))
        taken[chosen] = True
        done += sums
        room -= len(chosen)
        at_once = min(most, 2 * len(chosen))
    return torch.cat(order).cpu(), torch.cat(added).cpu()
