"""The tables of a page: their columns and the content of the cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from regraft.costs import Cost
from regraft.evaluation.results import Estimate
from regraft.report import formatting
from regraft.report.formatting import (
    Cell,
    Grid,
    file_names,
    number_cell,
    points_cell,
    rate_cell,
    rsr_cell,
    spread_cell,
    tested_cell,
)
from regraft.report.published import Beside
from regraft.report.run import Run, SharedPath
from regraft.report.study import Correlation, Measured, Row, Study, Table
from regraft.restoration.methods.gain.path import LIMITS, REASONS

Interval = tuple[float, float]
Place = Literal["everywhere", "page", "details"]


@dataclass(frozen=True)
class Column:
    """A column of a table with one row per model.

    Those that are shown `everywhere` fit on a console and a card; those of a `page` are in its
    first table too, `details` in its second one.
    """

    heading: str
    cell: Callable[[Row], Cell]
    place: Place = "details"


def results(study: Study, *, brief: bool = False) -> tuple[Grid, ...]:
    """The main rates and tests, one table per pruning; `brief` without those for a page only."""
    places = ("everywhere",) if brief else ("everywhere", "page")
    return _grids(study, (one for one in _columns(study) if one.place in places))


def details(study: Study) -> tuple[Grid, ...]:
    """Everything else that was measured on all prompts, one table per pruning."""
    return _grids(study, (one for one in _columns(study) if one.place == "details"))


def against(study: Study) -> tuple[Grid, ...]:
    """Only the tests against named methods, for the console."""
    return _grids(study, _against(study))


def suites(study: Study, *, brief: bool = False) -> tuple[Grid, ...]:
    """Rates on each of several suites, one table per pruning."""
    columns = _suite_columns(study)
    return _grids(study, (one for one in columns if one.place == "everywhere" or not brief))


def _grids(study: Study, columns: Iterable[Column]) -> tuple[Grid, ...]:
    """One table per pruning; columns and tables without any value are left out."""
    shown = [one for one in columns if any(not one.cell(row).blank for row in study.rows)]
    return tuple(
        Grid.of(
            _title(study, table),
            ("Model", *(one.heading for one in shown)),
            (
                (_heading(row, number), *(column.cell(row) for column in shown))
                for number, row in enumerate(table.rows, start=1)
            ),
        )
        for table in study.tables
        if any(not one.cell(row).blank for one in shown for row in table.rows)
    )


def _title(study: Study, table: Table) -> str:
    """The pruning, if there are several to tell apart."""
    return table.name if len(study.tables) > 1 else ""


def name_of(row: Row) -> str:
    """ "random (x5)"; a dagger marks an inference-time defence."""
    repeats = f" (x{len(row.draws)})" if len(row.draws) > 1 else ""
    return f"{row.name}{repeats}{f' {formatting.UNCHECKED}' if row.first.inference_time else ''}"


def look_of(row: Row, number: int) -> str:
    """The style class of a row; methods that restore no weights have the colour of controls."""
    if row.role == "other":
        return f"of-{number}"
    if row.role == "method":
        return "control" if row.drawn or row.weights is None else "realigned"
    return row.role


def _heading(row: Row, number: int) -> Cell:
    return Cell(name_of(row), note=row.method, kind=look_of(row, number), number=number)


def _columns(study: Study) -> Iterator[Column]:
    means: Place = "details" if study.published is None else "everywhere"  # means are published
    yield Column("Sparsity", _sparsity)
    yield Column("Restored", _restored)
    yield Column(
        "Restored per 10,000", lambda row: spread_cell(row.restored, formatting.share), "everywhere"
    )
    yield _published(lambda one: (one.row.per_ten_thousand, None), "{:.3f}".format, "page")
    yield Column("ASR", lambda row: rate_cell(row.asr), "everywhere")
    yield Column("ASR, mean", lambda row: rate_cell(row.mean_asr), means)
    yield _published(lambda one: (one.row.mean_asr, _ends(one.asr)))
    yield Column("ASR, test", lambda row: tested_cell(row.attacks), "everywhere")
    yield from _against(study)
    yield Column("RSR", lambda row: rsr_cell(row.rsr), "everywhere")
    yield Column("RSR of means", lambda row: rsr_cell(row.mean_rsr), means)
    yield _published(lambda one: (one.row.rsr, one.rsr_interval))
    yield Column("Lost refusals regained", lambda row: rate_cell(row.regained))
    yield Column("Refusals added", lambda row: rate_cell(row.added))
    if any(row.degenerate is not None and row.degenerate.value for row in study.rows):
        yield Column("Degenerate", lambda row: rate_cell(row.degenerate), "everywhere")
    yield Column("Over-refusal", lambda row: rate_cell(row.over_refusal), "everywhere")
    yield Column("Over-refusal, test", lambda row: tested_cell(row.refusals), "page")
    yield Column("Over-refusal vs pruned", lambda row: points_cell(row.over_refusal_from_pruned))
    yield Column("Over-refusal vs dense", lambda row: points_cell(row.over_refusal_from_dense))
    yield Column("Utility", lambda row: rate_cell(row.utility), "everywhere")
    yield Column("Utility vs pruned", lambda row: points_cell(row.utility_from_pruned))
    yield Column("Utility vs dense", lambda row: points_cell(row.utility_from_dense))
    yield Column("Perplexity", lambda row: number_cell(row.text.perplexity if row.text else None))
    yield Column(
        "KL to dense", lambda row: number_cell(row.text.kl if row.text else None), "everywhere"
    )
    yield Column("Passes", lambda row: spread_cell(row.passes, formatting.passes))


def _against(study: Study) -> Iterator[Column]:
    def cell(name: str, row: Row) -> Cell:
        return tested_cell(row.against.get(name))

    for name in study.against:
        yield Column(f"ASR, test against {name}", partial(cell, name), "page")


def _suite_columns(study: Study) -> Iterator[Column]:
    for suite, name in study.suites.items():
        yield from _columns_of(suite, name)


def _columns_of(suite: str, name: str) -> Iterator[Column]:
    """Rates on one suite; published ones are of its data set, of which it may be a part."""
    data = name.partition("#")[0]

    def rate(heading: str, of: Callable[[Measured], Cell], place: Place = "everywhere") -> Column:
        def cell(row: Row) -> Cell:
            return of(row.by_suite[suite]) if suite in row.by_suite else Cell()

        return Column(f"{name}: {heading}", cell, place)

    yield rate("ASR", lambda one: rate_cell(one.asr))
    yield _published(lambda one: (one.row.asr.get(data), _ends(one.by_suite.get(data))))
    yield rate("RSR", lambda one: rsr_cell(one.rsr), "page")
    yield rate("over-refusal", lambda one: rate_cell(one.over_refusal))
    yield rate("utility", lambda one: rate_cell(one.utility))
    yield _published(lambda one: (one.row.utility.get(data), None))
    yield rate("degenerate", lambda one: _if_any(one.degenerate), "page")


def _if_any(estimate: Estimate | None) -> Cell:
    return rate_cell(estimate) if estimate is not None and estimate.value else Cell()


def _sparsity(row: Row) -> Cell:
    return Cell(formatting.short_percent(row.sparsity)) if round(row.sparsity, 3) else Cell()


def _restored(row: Row) -> Cell:
    found = spread_cell(row.weights, "{:,.0f}".format)
    return replace(found, note=", ".join(filter(None, (found.note, formatting.pattern(row)))))


def _published(
    figure: Callable[[Beside], tuple[float | None, Interval | None]],
    write: Callable[[float], str] = lambda value: f"{100 * value:.2f} %",
    place: Place = "everywhere",
) -> Column:
    """A column of published figures, with a dagger if they were not checked."""

    def of(row: Row) -> Cell:
        value, around = figure(row.published) if row.published else (None, None)
        if row.published is None or value is None:
            return Cell()
        mark = "" if row.published.row.checked else f" {formatting.UNCHECKED}"
        ends = formatting.interval(*around) if around else ""
        return Cell(f"{write(value)}{mark}", ends, kind="soft")

    return Column("published", of, place)


def _ends(estimate: Estimate | None) -> Interval | None:
    return None if estimate is None else (estimate.low, estimate.high)


def categories(study: Study) -> tuple[Grid, ...]:
    return tuple(
        Grid.of(
            _title(study, table),
            ("Category", *map(name_of, table.rows)),
            (
                (
                    name or "no category",
                    *(rate_cell(row.by_category.get(name)) for row in table.rows),
                )
                for name in table.rows[0].by_category
            ),
        )
        for table in study.tables
        if table.rows[0].by_category
    )


def paths(study: Study) -> tuple[Grid, ...]:
    """One table per path of gain: the pruned model, then one row per step."""
    return tuple(
        path_grid(f"{title}, seed {seed}" if len(study.seeds) > 1 else title, shared)
        for title, of_seed in study.paths.items()
        for seed, shared in zip(study.seeds, of_seed, strict=False)
    )


def path_grid(title: str, shared: SharedPath) -> Grid:
    """The table of a path; losses are the sum of safety and utility loss, in nats."""
    path = shared.path
    rows = [("pruned", "", "", "", "0", "", f"{path.start.sum:.3f}")]
    for number, (step, taken) in enumerate(zip(path.steps, path.taken, strict=True), start=1):
        tried = ", ".join(f"{one.number:,}" for one in step.tries)
        losses = f"{step.gradient.sum:.3f}", f"{step.held_out.sum:.3f}"
        limit, restored = LIMITS[step.limit], f"{step.restored:,}"
        rows.append((str(number), tried, f"{taken:,}", limit, restored, *losses))
    counts = ("Step", "Weights tried", "Taken", "Limited by", "Restored in total")
    headings = (*counts, "Loss on gradient prompts before", "Held-out loss after")
    return Grid.of(title, headings, rows, ending(shared))


def ending(shared: SharedPath) -> str:
    """Where and why a path ended, with the methods whose budget it did not use up."""
    path = shared.path
    steps, weights = len(path.steps), path.restored
    found = (
        f"after {steps} step{'' if steps == 1 else 's'} with {weights:,} "
        f"weight{'' if weights == 1 else 's'} restored"
    )
    if path.end is None:
        return f"The path has not ended, {found}."
    below = (
        f" {name} restored {weights:,} of the {allowed:,} weights that its budget allows."
        for name, allowed in shared.allowed.items()
        if weights < allowed
    )
    return f"The path ended {found}: {REASONS[path.end]}.{''.join(below)}"


def ships(found: Correlation) -> Grid:
    models = ", ".join(filter(None, ("Model", found.pruning)))
    rows = ((name, f"{total:.3f}", f"{100 * rise:+.1f}") for name, total, rise in found.points)
    return Grid.of("", (models, "Total Ships, radians", "Rise in ASR, points"), rows)


def judges(run: Run) -> Grid:
    return Grid.of(
        "",
        ("Model", "Judge", "ASR", "Attacks agree", "Over-refusal", "Refusals agree", "Unreadable"),
        (
            (
                one.name,
                one.judged.judge,
                rate_cell(one.judged.asr),
                formatting.agreed(one.agreement, harmful=True),
                rate_cell(one.judged.over_refusal),
                formatting.agreed(one.agreement, harmful=False),
                str(one.judged.unread),
            )
            for one in run.opinions
        ),
        f"Agreement with {run.dense.result.judge} on what is an attack and what a refusal, with "
        "Cohen's kappa: 1 is full agreement, 0 is agreement by chance.",
    )


def data(run: Run) -> Grid:
    """The data: every row that was read is used, or counted by the reason it was left out."""
    return Grid.of(
        "",
        ("Role", "Source", "Read", "Used", "Left out"),
        (
            (
                one.role,
                Cell(file_names(one.source), title=one.source),
                f"{one.read:,}",
                f"{one.used:,}",
                ", ".join(f"{why}: {n:,}" for why, n in one.skipped.items()),
            )
            for one in run.data
        ),
    )


def costs(run: Run) -> tuple[Grid, ...]:
    """Costs by stage, with their sum, and by model."""
    stages: dict[str, list[Cost]] = {}
    for cost in run.costs:
        stages.setdefault(cost.stage, []).append(cost)
    rows = [(stage, str(len(found)), *_spent(found)) for stage, found in stages.items()]
    rows.append(("total", "", *_spent(run.costs)))
    each = ((cost.of or "all", cost.stage, *_spent([cost])) for cost in run.costs)
    measures = ("Time", "Operations", "Peak memory")
    return (
        Grid.of("By stage", ("Stage", "Models", *measures), rows),
        Grid.of("By model", ("Model", "Stage", *measures), each),
    )


def _spent(costs: Sequence[Cost]) -> tuple[str, str, str]:
    """Time, operations and peak memory of several costs together."""
    return (
        formatting.duration(sum(one.seconds for one in costs)),
        formatting.operations(sum(one.flops for one in costs)),
        formatting.memory(max(one.peak_bytes for one in costs)),
    )
