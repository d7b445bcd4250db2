"""Estimates of the time left, by a clock that stands still unless it is moved."""

from __future__ import annotations

from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from regraft import console, progress
from regraft.console import ConsoleProgress
from regraft.costs import Metered
from regraft.progress import Pace, Progress, Task, expect


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(-50, 50)), min_size=1), st.floats(0.1, 9))
def test_with_units_that_take_equally_long_the_estimate_is_true(parts, seconds) -> None:
    """Whatever was announced, once what there is to do is known."""
    clock = Clock()
    pace = Pace(1_000, clock)
    for units, more in parts:
        clock.now += seconds * units
        pace.advance(units)
        pace.expect(more)
    assert pace.left == pytest.approx(seconds * (pace.total - pace.done), rel=1e-9)
    assert pace.done == sum(units for units, _ in parts) <= pace.total


def test_work_of_an_earlier_run_says_nothing_about_the_pace() -> None:
    clock = Clock()
    pace = Pace(100, clock)
    assert pace.left is None
    expect(Task(pace.advance, pace.expect), -90)
    clock.now += 5
    pace.advance(5)
    assert (pace.done, pace.total, pace.left) == (5, 10, 5.0)


def test_between_two_pieces_of_work_the_time_left_runs_down() -> None:
    clock = Clock()
    pace = Pace(4, clock)
    clock.now += 10
    pace.advance(1)
    assert pace.left == 30
    clock.now += 12
    assert pace.left == 18 and pace.elapsed == 22
    clock.now += 100
    assert pace.left == 0


def test_something_that_only_counts_hears_of_fewer_units_as_done() -> None:
    told: list[int] = []
    expect(told.append, -3)
    expect(told.append, 5)
    assert told == [3]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress.Pace.__init__, "__defaults__", (clock,))
    out = StringIO()
    watch = ConsoleProgress(Console(file=out, force_terminal=terminal, width=100))
    with watch.task("Scoring heads", 100, "heads") as task:
        task.expect(-50)
        clock.now += 20
        task(10)
    text = out.getvalue()
    if terminal:
        assert "Scoring heads" in text and "100%" in text
        left = console._Left().render(type("Task", (), {"fields": {"pace": _pace(clock)}})())
        assert left.plain == "0:01:20"
    else:
        assert "20 %, about 80 s left" in text and "done in 20.0 s" in text


def _pace(clock: Clock) -> Pace:
    pace = Pace(50, clock)
    clock.now += 20
    pace.advance(10)
    return pace


def test_what_is_metered_says_too_how_much_more_there_is() -> None:
    told: list[Any] = []

    class Told(Progress):
        @contextmanager
        def task(self, what: str, total: int, unit: str = "") -> Any:
            yield Task(told.append, lambda more: told.append((more,)))

    with Metered(Told()).task("Scoring heads", 3) as done:
        done(1)
        expect(done, -2)
    assert told == [1, (-2,)]
