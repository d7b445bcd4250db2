"""Steps whose input has been checked, and what they will take: time, memory, disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch

from regraft.models.load import pick_device
from regraft.stages.steps import PromptUse, Step, check_all, disk_bytes, not_done

if TYPE_CHECKING:
    from regraft.stages.restoring import Restoration

_SIDE = 2048  # of the square matrices of a large product, which measures the device's speed
_EFFICIENCY = {"cpu": 0.8}  # whole models reach this share of that speed: measured
_DEFAULT_EFFICIENCY = 0.3  # on devices where products wait for memory: a guess
_TRIES = 5  # the fastest product counts, since other programs may use the machine


@dataclass(frozen=True)
class Planned:
    """Steps that have been checked, with the resources they need."""

    setup: Restoration
    steps: tuple[Step, ...]
    prompts: PromptUse

    @property
    def kept(self) -> int:
        """Bytes of the checkpoints still to be written."""
        return self._disk[0]

    @property
    def most(self) -> int:
        """Peak bytes of disk space, temporary files included."""
        return self._disk[1]

    @cached_property
    def _disk(self) -> tuple[int, int]:
        return disk_bytes(self.steps)

    @property
    def weights(self) -> int:
        """Bytes of one model in memory."""
        dtype: torch.dtype = getattr(torch, self.setup.compute.dtype_of(self.setup.dense))
        return self.setup.dense.architecture.parameters * dtype.itemsize

    def seconds(self) -> float:
        """Estimated seconds of the steps that are not done, within a factor of about three."""
        dense, compute = self.setup.dense, self.setup.compute
        prompt = self.setup.cache.prompt_tokens(dense, self.prompts.examples)
        answered = prompt + self.setup.evaluation.max_new_tokens
        tokens = sum(
            step.answers * answered + step.learns * step.passes * prompt
            for step in not_done(self.steps)
        )
        device = pick_device(compute.device)
        efficiency = _EFFICIENCY.get(device.type, _DEFAULT_EFFICIENCY)
        speed = efficiency * _speed(device, compute.dtype_of(dense))
        return 2 * dense.architecture.parameters * tokens / speed


def plan_steps(setup: Restoration, steps: Sequence[Step]) -> Planned:
    """Check the input of all steps, before anything is written.

    Raises:
        RegraftError: bad input.
    """
    return Planned(setup, tuple(steps), check_all(steps))


@cache
def _speed(device: torch.device, dtype: str) -> float:
    """FLOPs per second of one large matrix product, measured once per device and dtype."""
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=getattr(torch, dtype))
    float((matrix @ matrix)[0, 0])
    seconds = []
    for _ in range(_TRIES):
        start = time.monotonic()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.monotonic() - start)
    return 2 * _SIDE**3 / max(min(seconds), 1e-6)
