"""Console output of the command line: progress with time estimates, results as tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from regraft import distributed
from regraft.disk.files import readable_size
from regraft.evaluation.results import Estimate
from regraft.evaluation.tradeoff import NOTE, Point, Searched, Tried, Tuned
from regraft.progress import Advance, Pace, Progress, Task
from regraft.report.formatting import DASH, Grid, percent, rate

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.report.study import Study
    from regraft.stages.steps import Planned

_SECONDS_BETWEEN_LINES = 10.0


class ConsoleProgress(Progress):
    """Bars on a terminal; elsewhere lines at the start, at intervals and at the end of a task."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        say(self.console, text, soft_wrap=True)

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Task]:
        show = self._bar if self.console.is_terminal else self._lines
        return show(what, max(total, 1), unit)

    @contextmanager
    def _bar(self, what: str, total: int, unit: str) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            _Left(),
        )
        pace = Pace(total)
        with RichProgress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=total, pace=pace)

            def change_and_show(change: Advance, units: int) -> None:
                change(units)
                progress.update(task, completed=pace.done, total=pace.total)

            yield Task(
                partial(change_and_show, pace.advance), partial(change_and_show, pace.expect)
            )
            progress.update(task, completed=pace.total)

    @contextmanager
    def _lines(self, what: str, total: int, unit: str) -> Iterator[Task]:
        pace, last = Pace(total), 0.0

        def advance(units: int) -> None:
            nonlocal last
            pace.advance(units)
            now, left = pace.elapsed, pace.left
            if now - last >= _SECONDS_BETWEEN_LINES and left is not None and pace.done < pace.total:
                last = now
                share = pace.done / pace.total
                self.note(f"  {what}: {100 * share:.0f} %, about {left:.0f} s left")

        self.note(f"{what} ..." if unit in ("", "bytes") else f"{what}: {total} {unit} ...")
        yield Task(advance, pace.expect)
        self.note(f"  done in {pace.elapsed:.1f} s")


def live_progress() -> ConsoleProgress:
    """Progress and notes on standard output; of several processes only the first one prints."""
    width = None if sys.stdout.isatty() else 120
    return ConsoleProgress(Console(width=width, quiet=not distributed.first(), emoji=False))


class _Left(ProgressColumn):
    """The time left by our own estimate: rich's starts over whenever the total changes."""

    max_refresh = 0.5

    def render(self, task: RichTask) -> Text:
        left = task.fields["pace"].left
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))))


def say(console: Console, text: str, style: str | None = None, *, soft_wrap: bool = False) -> None:
    """Print text verbatim: a name in it may look like rich's markup."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=soft_wrap)


def show_table(
    console: Console,
    headings: Sequence[str],
    *sections: Iterable[Sequence[object]],
    title: str = "",
    bold: Collection[int] = (),
) -> None:
    """Print a table of estimates, counts and text, with lines between sections.

    `bold` holds the indices of the rows to print in bold, counted over all sections.
    """
    table = Table(*_columns(headings), title=Text(title) if title else None)
    for section in sections:
        for row in section:
            style = "bold" if table.row_count in bold else None
            table.add_row(*(Text(_formatted(value)) for value in row), style=style)
        table.add_section()
    console.print(table)


def _columns(headings: Sequence[str]) -> Iterator[Column]:
    return (Column(Text(one), overflow="fold") for one in headings)


def _formatted(value: object) -> str:
    if isinstance(value, Estimate):
        return rate(value)
    if isinstance(value, int):
        return f"{value:,}"
    return DASH if value is None else str(value)


def show_grid(console: Console, grid: Grid, title: str = "") -> None:
    """Print a table of a report; a cell's value, interval and note are on separate lines."""
    table = Table(
        *_columns(grid.headings),
        title=Text(": ".join(filter(None, (title, grid.title)))),
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name, *cells in grid.rows:
        number = f"{name.number}  " if name.number else ""
        lines = ("\n".join(filter(None, (one.value, one.interval, one.note))) for one in cells)
        table.add_row(Text(f"{number}{name.value}"), *map(Text, lines))
    console.print(table)


def show_study(console: Console, study: Study) -> None:
    from regraft.report.summary import correlation_text, notes, summary  # scipy, slow to import
    from regraft.report.tables import against, results, suites

    for paragraph in summary(study):
        say(console, paragraph)
    for grid in (*results(study, brief=True), *against(study), *suites(study, brief=True)):
        show_grid(console, grid, study.title)
    if study.correlation:
        say(console, correlation_text(study.correlation, study.published), "bold")
    if study.runs[0].caveat:
        say(console, study.runs[0].caveat, "bold")
    for note in notes(study):
        say(console, note, "dim")


def show_preview(console: Console, out: Path, plan: Planned) -> None:
    columns: dict[str, Sequence[object]] = {
        "step": [one.stage for one in plan.steps],
        "model": [one.of for one in plan.steps],
        "done": ["yes" if one.done else "" for one in plan.steps],
        "prompts answered": [one.answers() or "" for one in plan.steps],
        "calibration prompts": [one.learns() or "" for one in plan.steps],
    }
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    show_table(console, [*shown], zip(*shown.values(), strict=True), title=str(out))
    missing, count = sum(not step.done for step in plan.steps), len(plan.steps)
    if not missing:
        say(console, f"Steps done: all of {count}. Nothing was written.")
        return
    say(
        console,
        f"Steps left: {missing} of {count}; about "
        f"{max(1, round(plan.seconds() / 60)):,} min (estimated from FLOPs and the device's speed; "
        "often off by a factor of three), at most "
        f"{readable_size(plan.peak)} on disk, {readable_size(plan.weights)} of memory for the "
        "weights of one model. Nothing was written.",
        soft_wrap=True,
    )


def show_search(console: Console, found: Searched) -> None:
    """Print a trade-off curve on validation prompts, the chosen point in bold."""

    def row(point: Point) -> Sequence[object]:
        rsr = found.rsr(point)
        broken = (name for name, excess in found.bounds.excess(point).items() if excess)
        return (
            point.restored,
            f"{10_000 * point.restored / found.pruned:.3f}",
            point.asr,
            "" if rsr is None else f"{100 * rsr:.0f} %",
            point.over_refusal,
            point.utility,
            ", ".join(name.replace("_", "-") for name in broken),
        )

    dense = found.dense
    show_table(
        console,
        ("restored", "per 10,000", "ASR", "RSR", "over-refusal", "utility", "bounds broken"),
        map(row, found.points),
        [("dense", "", dense.asr, "", dense.over_refusal, dense.utility, "")],
        title="Trade-off on validation prompts",
        bold=[number for number, point in enumerate(found.points) if point is found.taken],
    )
    bounds = found.bounds
    limits = [f"over-refusal at most {percent(bounds.over_refusal)}"]
    if bounds.utility is not None:
        limits.append(f"utility at least {percent(bounds.utility)}")
    if bounds.degenerate is not None and any(one.degenerate for one in found.points):
        limits.append(f"degenerate answers at most {percent(bounds.degenerate)}")
    goal = "the lowest ASR" if bounds.asr is None else f"ASR {percent(bounds.asr)}"
    optimistic = "The rates of the chosen point are optimistic: report rates on other prompts."
    say(console, f"Bounds: {', '.join(limits)}; goal: {goal}. {optimistic}", "dim")


def show_tuned(console: Console, tuned: Tuned) -> None:
    """Print the best six trials and the cost of the search."""

    def row(one: Tried) -> Sequence[object]:
        settings = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in one.settings.items()
        )
        amount = f"{tuned.per_ten_thousand(one.point):.3f}"
        kept = "kept" if one.within else "broken"
        return one.number, ", ".join(settings), amount, *_rates(one.point), kept

    shown = tuned.trials[:6]
    show_table(
        console,
        ("trial", "settings", "per 10,000", "ASR", "over-refusal", "utility", "bounds"),
        map(row, shown),
        [
            ("", "pruned", "", *_rates(tuned.before), ""),
            ("", "dense", "", *_rates(tuned.dense), ""),
        ],
        title=f"{tuned.method}: {len(tuned.trials)} trials, on validation prompts",
        bold=[number for number, one in enumerate(shown) if one is tuned.best],
    )
    if tuned.best is None:
        nothing = "No trial lowers ASR below the pruned model's within the bounds"
        say(console, f"{nothing}; nothing is recommended.")
    cost, failed = tuned.cost, f", {tuned.failed} failed" if tuned.failed else ""
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in cost.seconds.items())
    say(
        console,
        f"The search took {len(tuned.trials)} trials{failed}, {sum(cost.seconds.values()):.0f} s "
        f"({stages}), {cost.evaluations:,} evaluations with {cost.prompts:,} answers.",
    )
    say(console, NOTE, "dim")


def _rates(point: Point) -> tuple[object, ...]:
    return point.asr, point.over_refusal, point.utility
