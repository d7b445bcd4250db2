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

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft import ranks

DAMPING = 0.1  # nats; a prompt with no loss bears about twice as much of it
_ROUNDS = 256  # at most, between which what is left to do is worked out again


@dataclass(frozen=True)
class Effects:
    """What candidates do to this process's prompts.

    Attributes:
        gains: How far each loss is predicted to fall, `[prompts, candidates]` float32.
        losses: Of the prompts now, `[prompts]` float32.
        weights: By which both are multiplied already, `[prompts]` float32.
    """

    gains: Tensor
    losses: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Effects:
        """On a device."""
        return Effects(self.gains.to(device), self.losses.to(device), self.weights.to(device))

    def and_of(self, other: Effects) -> Effects:
        """On other prompts too."""
        return Effects(
            torch.cat([self.gains, other.gains]),
            torch.cat([self.losses, other.losses]),
            torch.cat([self.weights, other.weights]),
        )


def together(effects: Effects, count: int) -> tuple[Tensor, Tensor]:
    """The candidates to take, at most `count`, in order, and what each adds.

    Fewer where no other lowers the sum of all prompts' losses.

    Returns:
        (`[k]` int64, `[k]` float32 on CPU: the fall of that sum, on which all processes agree)
    """
    gains = effects.gains
    stiffness = 1 / (4 * (effects.losses + DAMPING * effects.weights))  # [E]
    overshoot = ranks.total(stiffness @ gains.square())  # [N]
    done = torch.zeros_like(effects.losses)  # [E], s
    taken = torch.zeros(gains.shape[1], dtype=torch.bool, device=gains.device)
    order, added = [taken.nonzero().flatten()], [overshoot[:0]]
    at_once, room = -(-count // _ROUNDS), count
    while room > 0:
        worth = ranks.total((1 - 2 * stiffness * done) @ gains) - overshoot  # [N]
        worth.masked_fill_(taken, -torch.inf)
        best = worth.topk(min(at_once, room, len(worth)))
        chosen = best.indices[best.values > 0]
        if not len(chosen):
            break
        order.append(chosen)
        added.append(best.values[: len(chosen)])
        taken[chosen] = True
        done += gains[:, chosen].sum(dim=1)
        room -= len(chosen)
    return torch.cat(order).cpu(), torch.cat(added).cpu()
