"""The steps of a run, one artifact each, and what they take: time, memory, disk.

The input of all steps is checked before the first one is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch

from regraft.data.example import Example, Reading
from regraft.data.sources import seen_before
from regraft.data.storage import kept_if_read
from regraft.disk.files import require_space
from regraft.models.load import pick_device
from regraft.stages.provenance import unfinished_bytes
from regraft.stages.setup import Setup

_SIDE = 2048  # of the square matrices of a large product, which measures the device's speed
_EFFICIENCY = {"cpu": 0.8}  # whole models reach this share of that speed: measured
_DEFAULT_EFFICIENCY = 0.3  # on devices where products wait for memory: a guess
_TRIES = 5  # the fastest product counts, since other programs may use the machine


@dataclass(frozen=True)
class PromptUse:
    """Which prompts a run learns from, makes choices on and is evaluated on, by role."""

    learnt: Mapping[str, Reading] = field(default_factory=dict)
    chosen_on: Mapping[str, Reading] = field(default_factory=dict)
    evaluated: Reading | None = None  # the reported rates are over these

    def __or__(self, other: PromptUse) -> PromptUse:
        """The prompts of both."""
        return PromptUse(
            {**self.learnt, **other.learnt},
            {**self.chosen_on, **other.chosen_on},
            self.evaluated or other.evaluated,
        )

    @property
    def examples(self) -> Sequence[Example]:
        """Prompts by whose length work is estimated: those evaluated or, without, those learnt."""
        readings = (self.evaluated, *self.learnt.values())
        return next((one.examples for one in readings if one is not None), ())

    def warnings(self) -> list[str]:
        """Prompts that serve two purposes, which makes rates on them optimistic; a line each."""
        found: list[str] = []
        if self.evaluated is not None:
            found += seen_before(self.evaluated, {**self.learnt, **self.chosen_on})
        for role, reading in self.chosen_on.items():
            lines = seen_before(reading, self.learnt, "chosen on")
            found += [f"{role}: {line}" for line in lines]
        return found


@dataclass(frozen=True)
class Step:
    """One artifact of a run."""

    stage: str  # name of the work, also in the table of costs
    of: str  # name of the model that it is for; "" if for the whole run
    out: Path
    make: Callable[[], object]  # makes or continues it; returns at once if it is done
    check: Callable[[], PromptUse] = PromptUse  # raises on bad input, before any step is made
    title: str = ""  # printed when the step begins
    answers: Callable[[], int] = lambda: 0  # number of prompts that a model answers
    learns: Callable[[], int] = lambda: 0  # number of prompts that are learnt from
    passes: float = 1  # estimated cost of learning, in forward passes over these prompts
    loads_model: bool = False  # outside the cache, whose model must be freed first
    bytes: int = 0  # size of the artifact on disk, if it is large
    temporary_bytes: Callable[[], int] = lambda: 0  # more on disk while it is made

    @property
    def done(self) -> bool:
        """Whether its artifact exists; `make` checks that it is the right one.

        An empty folder is none: a stage may write there.
        """
        return self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()))


@dataclass(frozen=True)
class Planned:
    """Steps that have been checked, with the resources they need."""

    setup: Setup
    steps: tuple[Step, ...]
    prompts: PromptUse

    @property
    def left(self) -> Sequence[Step]:
        """The steps that are not done, one per artifact, since steps may share one."""
        return tuple({step.out: step for step in self.steps if not step.done}.values())

    @property
    def to_write(self) -> int:
        """Bytes of the checkpoints still to be written."""
        return self._disk[0]

    @property
    def peak(self) -> int:
        """Peak bytes of disk space, temporary files included."""
        return self._disk[1]

    @cached_property
    def _disk(self) -> tuple[int, int]:
        """`to_write` and `peak`; unfinished work counts as free, since its step removes it."""
        written = peak = 0
        for step in self.left:
            written += step.bytes - unfinished_bytes(step.out)
            peak = max(peak, written + step.temporary_bytes())
        return written, peak

    @property
    def weights(self) -> int:
        """Bytes of one model in memory."""
        dtype: torch.dtype = getattr(torch, self.setup.compute.dtype_of(self.setup.dense))
        return self.setup.dense.architecture.parameters * dtype.itemsize

    def carry_out(self) -> None:
        """Make the steps in order, each in the context of the guard."""
        for step in self.steps:
            if step.title:
                self.setup.progress.note(step.title)
            if step.loads_model and not step.done:
                self.setup.cache.unload()
            with self.setup.guard(step.stage, step.of):
                step.make()

    def seconds(self) -> float:
        """Estimated seconds of the steps that are not done, within a factor of about three."""
        dense, compute = self.setup.dense, self.setup.compute
        examples = self.prompts.examples
        # without prompts no processor is needed, and there may be none
        prompt = self.setup.cache.prompt_tokens(dense, examples) if examples else 0
        answered = prompt + self.setup.evaluation.max_new_tokens
        tokens = sum(
            step.answers() * answered + step.learns() * step.passes * prompt for step in self.left
        )
        device = pick_device(compute.device)
        efficiency = _EFFICIENCY.get(device.type, _DEFAULT_EFFICIENCY)
        speed = efficiency * _speed(device, compute.dtype_of(dense))
        return 2 * dense.architecture.parameters * tokens / speed


@kept_if_read()
def plan_steps(setup: Setup, steps: Iterable[Step]) -> Planned:
    """Check the input of all steps, and the space on the disk, before anything is written.

    Raises:
        RegraftError: bad input.
        PassingError: the disk is too full.
    """
    known, prompts = tuple(steps), PromptUse()
    for step in known:
        prompts |= step.check()
    plan = Planned(setup, known, prompts)
    if left := plan.left:  # looked at once: another worker of a tuning may finish a step
        require_space(left[0].out, plan.peak)
    return plan


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
