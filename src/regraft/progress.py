"""How long work tells of itself; the command line draws it, libraries may stay silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

Advance = Callable[[int], None]


class Task:
    """What work tells of itself: units done, and by how many more or fewer it was misjudged."""

    def __init__(self, done: Advance, expect: Advance) -> None:
        self._done, self.expect = done, expect

    def __call__(self, units: int) -> None:
        self._done(units)


def expect(advance: Advance, more: int) -> None:
    """Say that there are `more` units to do than announced, fewer where it is negative.

    What a killed run has left goes this way too: as done just now it would make what is left look
    quicker than it is. Something that only counts is told of fewer units as of units done.
    """
    if isinstance(advance, Task):
        advance.expect(more)
    elif more < 0:
        advance(-more)


class Pace:
    """How much of a task is done, and how long the rest takes if it goes on like this.

    Args:
        total: Units of work; each should take as long as any other.
        clock: In seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.done, self.total, self._clock = 0, max(total, 1), clock
        self._start = self._last = clock()

    def advance(self, units: int) -> None:
        """So many units are done."""
        self.done += units
        self._last = self._clock()

    def expect(self, more: int) -> None:
        """There are so many more units to do than was announced, fewer where it is negative."""
        self.total = max(self.done, 1, self.total + more)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def left(self) -> float | None:
        """Seconds; None before anything is done."""
        if not self.done:
            return None
        whole = (self._last - self._start) * (self.total - self.done) / self.done
        return max(0.0, whole - (self._clock() - self._last))


class Progress(Protocol):
    """Something that shows progress."""

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """Announce `total` units of work; the yielded function is called with units done.

        Units should take equally long: the estimate of the time left goes by them. Where there
        turns out to be more or less to do, see `expect`.
        """

    def note(self, text: str) -> None:
        """Say one thing."""

    def loaded(self, network: nn.Module) -> None:
        """A model is in memory and about to be used."""


class Silent:
    """Shows nothing."""

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        pass

    def loaded(self, network: nn.Module) -> None:
        pass


SILENT: Progress = Silent()
