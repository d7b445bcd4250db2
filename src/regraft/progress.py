"""Progress of long work; the command line shows it, calls from Python are silent by default."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Event, Lock

from torch import nn

Advance = Callable[[int], None]


class Task:
    """Callback for work to report units done and to correct the announced number of units."""

    def __init__(self, done: Advance, expect: Advance) -> None:
        self._done, self.expect = done, expect

    def __call__(self, units: int) -> None:
        self._done(units)


def expect(advance: Advance, more: int) -> None:
    """Report that there are `more` units to do than announced; fewer if it is negative.

    Units that an earlier, killed run finished are reported as fewer units: as units done just now
    they would make the time left look too short. A plain callback gets them as units done.
    """
    if isinstance(advance, Task):
        advance.expect(more)
    elif more < 0:
        advance(-more)


def thread_safe(advance: Advance, stop: Event) -> Advance:
    """`advance` behind a lock; raises InterruptedError once `stop` is set."""
    lock = Lock()

    def locked(count: int) -> None:
        with lock:
            if stop.is_set():
                raise InterruptedError
            advance(count)

    return locked


class Pace:
    """Counts the units done of a task and estimates the time left from the pace so far.

    Args:
        total: Units of work; all should take equally long.
        clock: Returns the time in seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.done, self.total, self._clock = 0, max(total, 1), clock
        self._start = self._last = clock()

    def advance(self, units: int) -> None:
        """Add units done."""
        self.done += units
        self._last = self._clock()

    def expect(self, more: int) -> None:
        """Add units to the announced total; negative numbers remove some."""
        self.total = max(self.done, 1, self.total + more)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def left(self) -> float | None:
        """Estimated seconds left; None before anything is done."""
        if not self.done:
            return None
        rest = (self._last - self._start) * (self.total - self.done) / self.done
        return max(0.0, rest - (self._clock() - self._last))


class Progress:
    """Shows the progress of long work; this base class shows nothing."""

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """Announce `total` units of work; the yielded function is called with units done.

        Units should take equally long, for a good estimate of the time left. If there turns out to
        be more or less to do, see `expect`.
        """
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        """Show a message."""

    def loaded(self, network: nn.Module) -> None:
        """Called when a model has been loaded and is about to be used."""


SILENT = Progress()
