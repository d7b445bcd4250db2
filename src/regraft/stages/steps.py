"""The steps of a run, one artifact each: all are checked before the first is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.sources import seen_before
from regraft.data.storage import kept_if_read
from regraft.stages.provenance import unfinished_bytes

StepGuard = Callable[[str, str], AbstractContextManager[None]]
"""(stage, name of the model) -> context in which a step is made."""


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
    answers: int = 0  # number of prompts that a model answers
    learns: int = 0  # number of prompts that are learnt from
    passes: float = 1  # estimated cost of learning, in forward passes over these prompts
    loads_model: bool = False  # outside the cache, whose model must be freed first
    bytes: int = 0  # size of the artifact on disk, if it is large
    temporary_bytes: Callable[[], int] = lambda: 0  # more on disk while it is made

    @property
    def done(self) -> bool:
        """Whether its artifact exists; `make` checks that it is the right one."""
        return self.out.exists()


@kept_if_read()
def check_all(steps: Iterable[Step]) -> PromptUse:
    """Check the input of all steps, before the first is made; returns their use of prompts."""
    found = PromptUse()
    for step in steps:
        found |= step.check()
    return found


def not_done(steps: Iterable[Step]) -> Sequence[Step]:
    """The steps that are not done, one per artifact, since steps may share one."""
    return tuple({step.out: step for step in steps if not step.done}.values())


def disk_bytes(steps: Iterable[Step]) -> tuple[int, int]:
    """Additional disk space for the artifacts still to be made: in the end, and at the peak.

    Unfinished work of a killed run counts as free, since its step removes it.
    """
    kept = most = 0
    for step in not_done(steps):
        kept += step.bytes - unfinished_bytes(step.out)
        most = max(most, kept + step.temporary_bytes())
    return kept, most
