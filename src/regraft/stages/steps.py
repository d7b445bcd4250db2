"""A run is a list of steps, each with its artifact: made in order, skipped where it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from regraft.progress import Progress
from regraft.stages.evaluation_cache import EvaluationCache

StepGuard = Callable[[str, str], AbstractContextManager[None]]
"""(stage, name of what it is for) -> what surrounds a step while it is made."""


def unguarded(_stage: str, _of: str) -> AbstractContextManager[None]:
    """Nothing surrounds a step; a function, so that what holds it can go to another process."""
    return nullcontext()


@dataclass(frozen=True)
class Step:
    """One artifact of a run.

    Attributes:
        stage: What is done, as costs name it.
        of: For which model; "" for all of the run.
        out: The artifact.
        make: Makes it, goes on with it, or finds that it is there and as wanted.
        title: What is told when the step begins, if anything.
        answers: How many prompts a model answers.
        learns: How many prompts go through a model forward, or forward and backward.
        alone: Loads a model itself, so that the one evaluated last must go from memory.
    """

    stage: str
    of: str
    out: Path
    make: Callable[[], object]
    title: str = ""
    answers: int = 0
    learns: int = 0
    alone: bool = False

    @property
    def done(self) -> bool:
        """Whether its artifact is there; `make` sees whether it is the right one."""
        return self.out.exists()


def make_all(
    steps: Iterable[Step], guard: StepGuard, cache: EvaluationCache, progress: Progress
) -> None:
    """Make the steps in order."""
    for step in steps:
        if step.title:
            progress.note(step.title)
        if step.alone and not step.done:
            cache.unload()
        with guard(step.stage, step.of):
            step.make()
