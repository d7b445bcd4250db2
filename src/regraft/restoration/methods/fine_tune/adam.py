"""Sparse fine-tuning: what a user would do instead of restoring dense values.

The values of a few weights are trained by Adam (Kingma & Ba 2015, arXiv 1412.6980), all others stay
as they are; SHiRA in PEFT (Bhardwaj et al. 2024, arXiv 2406.13175) trains such sparse adapters. The
baseline that tells whether gain's positions or the dense values at them are what helps: the same
number of weights, losses, prompts and passes.

Weights are written in the model's dtype, and trained from float32 copies. Copies and moments are
kept for the chosen positions alone, three numbers a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regraft.models.architecture import Architecture
from regraft.models.layerwise import LayerwisePass
from regraft.models.places import at
from regraft.patch.format import Patch
from regraft.progress import Advance
from regraft.pruning.gradients import Loss, layer_gradients
from regraft.restoration.teacher import Recorded, mean_of

Side = tuple[LayerwisePass, Loss]
"""Prompts of one kind before the first layer, and what a response to them costs."""
TRAINED = "trained"  # what the `about` of a patch calls its values
TRAINED_VALUES = (
    "the values are trained and not the dense model's, so that the result is a new training of "
    "these weights. It can no longer be said that every weight is the pruned or the dense model's, "
    "on which their licence and evaluations rest; reverting works as with any patch."
)
BETAS = (0.9, 0.999)
EPS = 1e-8


def is_trained(patch: Patch) -> bool:
    """Whether a patch holds trained values instead of dense ones."""
    return patch.about.get("values") == TRAINED


@dataclass
class _Trained:
    """The chosen weights of one matrix: `at` are flat positions; all but `weight` are `[k]`."""

    weight: Tensor
    at: Tensor
    value: Tensor
    mean: Tensor
    square: Tensor


class SparseAdam:
    """Adam over a few weights of each matrix, as torch.optim.Adam without weight decay."""

    def __init__(
        self, weights: Mapping[str, Tensor], positions: Mapping[str, Tensor], rate: float
    ) -> None:
        """Start from the values that the weights have.

        Args:
            weights: `LinearArchitecture.key` -> the weight in memory, `[out, in]`;
                changed in place.
            positions: The same keys -> flat positions to train, `[k]` int64, without repetition.
            rate: The learning rate.
        """
        self.rate, self.updates = rate, 0
        self._trained = {}
        for key, position in positions.items():
            weight = weights[key]
            value = weight[at(position, weight)].float()
            nothing = torch.zeros_like(value)
            here = position.to(weight.device)
            self._trained[key] = _Trained(weight, here, value, nothing, nothing.clone())

    @property
    def positions(self) -> dict[str, Tensor]:
        """Key -> flat positions on the weight's device, `[k]` int64."""
        return {key: one.at for key, one in self._trained.items()}

    @property
    def values(self) -> dict[str, Tensor]:
        """Key -> the trained values as the model holds them, `[k]` in its dtype, on CPU."""
        return {key: one.weight[at(one.at, one.weight)].cpu() for key, one in self._trained.items()}

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """One step down these gradients, key -> `[k]` float32; a missing one counts as 0."""
        self.updates += 1
        for key, one in self._trained.items():
            gradient = gradients.get(key)
            if gradient is None:
                gradient = torch.zeros_like(one.value)
            gradient = gradient.to(one.value)
            one.mean.lerp_(gradient, 1 - BETAS[0])
            one.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            root = (one.square / (1 - BETAS[1] ** self.updates)).sqrt_().add_(EPS)
            one.value -= self.rate / (1 - BETAS[0] ** self.updates) * one.mean / root
            self._write(one)

    def state(self) -> dict[str, Tensor]:
        """All that the next update depends on, to be stored."""
        parts = ("value", "mean", "square")
        found = {
            f"{key}.{part}": getattr(one, part).cpu()
            for key, one in self._trained.items()
            for part in parts
        }
        return found | {"updates": torch.tensor(self.updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a stored `state` of the same positions; writes its values into the weights."""
        self.updates = int(state["updates"])
        for key, one in self._trained.items():
            for part in ("value", "mean", "square"):
                getattr(one, part).copy_(state[f"{key}.{part}"])
            self._write(one)

    @staticmethod
    def _write(one: _Trained) -> None:
        one.weight[at(one.at, one.weight)] = one.value.to(one.weight.dtype)


def loss_and_gradients(
    sides: Sequence[Side],
    architecture: Architecture,
    positions: Mapping[str, Tensor],
    scratch: Path,
    advance: Advance = lambda _: None,
) -> tuple[float, dict[str, Tensor]]:
    """The sum over kinds of the mean loss, and its gradient at a few weights of each matrix.

    One forward and one backward pass over all prompts, one layer's gradients in memory at a time.
    `positions` are flat, by `LinearArchitecture.key`, `[k]` int64; `scratch` and `advance` are as
    for `layer_gradients`.

    Returns:
        The loss, and key -> `[k]` float32; a linear that no prompt used is missing.
    """
    total, found = 0.0, dict[str, Tensor]()
    for number, (layerwise, loss) in enumerate(sides):
        recorded = Recorded(loss)
        layerwise.rewind()
        layers = layer_gradients(
            layerwise,
            architecture,
            scratch / str(number),
            lambda linear: linear.key in positions,
            advance,
            loss=recorded,
        )
        for _, gradients in layers:
            for key, gradient in gradients.items():
                part = gradient.reshape(-1)[positions[key].to(gradient.device)]
                found[key] = found[key] + part if key in found else part
        total += mean_of(recorded.seen)
    return total, found


def train(
    optimizer: SparseAdam,
    batches: Sequence[Sequence[Side]],
    architecture: Architecture,
    scratch: Path,
    advance: Advance = lambda _: None,
) -> list[float]:
    """One pass: an update after each batch.

    The batches are of all kinds of prompts each, and go through the optimizer's model; the rest is
    as in `loss_and_gradients`.

    Returns:
        The loss of each batch before its update.
    """
    losses = []
    for sides in batches:
        loss, gradients = loss_and_gradients(
            sides, architecture, optimizer.positions, scratch, advance
        )
        optimizer.update(gradients)
        losses.append(loss)
    return losses
