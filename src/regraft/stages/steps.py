"""A run is a list of steps, each with its artifact: all are checked, then made in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from regraft.data.example import Reading
from regraft.data.sources import seen_before
from regraft.stages.provenance import unfinished_bytes

StepGuard = Callable[[str, str], AbstractContextManager[None]]
"""(stage, name of what it is for) -> what surrounds a step while it is made."""


def unguarded(_step: str, _of: str) -> AbstractContextManager[None]:
    """Nothing surrounds the step; a function with a name, which workers can be sent."""
    return nullcontext()


@dataclass(frozen=True)
class PromptUse:
    """What steps use prompts for; these by their role."""

    learnt: Mapping[str, Reading] = field(default_factory=dict)
    chosen_on: Mapping[str, Reading] = field(default_factory=dict)
    evaluated: Reading | None = None  # what the reported rates are of

    def __or__(self, other: PromptUse) -> PromptUse:
        """Those of both."""
        return PromptUse(
            {**self.learnt, **other.learnt},
            {**self.chosen_on, **other.chosen_on},
            self.evaluated or other.evaluated,
        )

    def warnings(self) -> list[str]:
        """Which prompts are read for two purposes, so that rates on them are too hopeful."""
        found = []
        if self.evaluated is not None:
            found += seen_before(self.evaluated, {**self.learnt, **self.chosen_on})
        for role, reading in self.chosen_on.items():
            lines = seen_before(reading, self.learnt, "chosen on")
            found += [f"{role}: {line}" for line in lines]
        return found


@dataclass(frozen=True)
class Step:
    """One artifact of a run."""

    stage: str  # what is done, as costs name it
    of: str  # for which model; "" for all of the run
    out: Path
    make: Callable[[], object]  # makes it, goes on with it, or finds that it is there and as wanted
    check: Callable[[], PromptUse] = PromptUse  # finds bad input before any step is made
    title: str = ""  # told when the step begins
    answers: int = 0  # prompts that a model answers
    learns: int = 0  # prompts that are learnt from
    passes: float = 1  # what that takes, about, in forward passes of the model over these prompts
    alone: bool = False  # loads a model itself: the one evaluated last must go from memory
    bytes: int = 0  # of the artifact on disk, where it is large
    bytes_beside: Callable[[], int] = lambda: 0  # what work on it keeps on disk meanwhile

    @property
    def done(self) -> bool:
        """Whether its artifact is there; `make` sees whether it is the right one."""
        return self.out.exists()


def check_all(steps: Iterable[Step]) -> PromptUse:
    """Find bad input of any step, before the first is made; returns the use of prompts."""
    found = PromptUse()
    for step in steps:
        found |= step.check()
    return found


def left_of(steps: Iterable[Step]) -> Sequence[Step]:
    """The steps that are not done, one for each artifact, which some share."""
    return tuple({step.out: step for step in steps if not step.done}.values())


def disk_bytes(steps: Iterable[Step]) -> tuple[int, int]:
    """What all artifacts to be made take on disk, and the most at a time on the way there.

    Unfinished work of a killed run is there already, and goes when its step is done.
    """
    kept = most = 0
    for step in left_of(steps):
        kept += step.bytes - unfinished_bytes(step.out)
        most = max(most, kept + step.bytes_beside())
    return kept, most
