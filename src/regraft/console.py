"""What the command line shows: progress with an estimate, results as tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from regraft.evaluation.results import Estimate, EvalResult
from regraft.evaluation.tradeoff import NOTE, Point, Searched, Tuned
from regraft.progress import Advance

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from regraft.analysis.overlap import LayerOverlap
    from regraft.analysis.relation import ModelPoint, Spearman
    from regraft.analysis.sweep import Sweep
    from regraft.bundle_check import Bundle
    from regraft.evaluation.labelled import Bench
    from regraft.evaluation.verdicts import Agreement, Judged
    from regraft.heads.score import HeadScores
    from regraft.pipeline import PlannedRun
    from regraft.report.study import Study

_SECONDS_BETWEEN_LINES = 10.0


class ConsoleWatch:
    """Bars on a terminal; elsewhere a line when a task starts, now and then, and when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def loaded(self, network: nn.Module) -> None:
        """Nothing to show."""

    @contextmanager
    def task(self, what: str, total: int, unit: str = "") -> Iterator[Advance]:
        """Show a task of `total` units."""
        show = self._bar if self.console.is_terminal else self._lines
        with show(what, max(total, 1), unit) as advance:
            yield advance

    @contextmanager
    def _bar(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda steps: progress.update(task, advance=steps)
            progress.update(task, completed=total)

    @contextmanager
    def _lines(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        start = last = time.monotonic()
        done = 0

        def advance(steps: int) -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES and 0 < done < total:
                last = now
                left = (now - start) * (total - done) / done
                self.note(f"  {what}: {100 * done / total:.0f} %, about {left:.0f} s left")

        self.note(f"{what} ..." if unit in ("", "bytes") else f"{what}: {total} {unit} ...")
        yield advance
        self.note(f"  done in {time.monotonic() - start:.1f} s")


def show_result(console: Console, result: EvalResult) -> None:
    """Print one evaluation with its intervals, per category."""
    from regraft.report.formatting import degenerate, number_cell, on_text  # scipy, slow to import
    from regraft.report.summary import NO_OVER_REFUSAL

    table = Table(
        "", "%", "95 % interval", "n", title=Text(f"{result.suite}, judge {result.judge}")
    )
    for name, estimate in (
        ("ASR", result.asr),
        ("over-refusal", result.over_refusal),
        ("utility", result.utility),
    ):
        if estimate is not None:
            table.add_row(name, *_cells(estimate), style="bold")
    for category, estimate in result.asr_by_category.items():
        table.add_row(Text(f"  ASR, {category}"), *_cells(estimate))
    for suite, rates in result.by_suite.items():
        table.add_section()
        of_suite = (("ASR", rates.asr), ("over-refusal", rates.over_refusal))
        for name, estimate in (*of_suite, ("utility", rates.utility)):
            if estimate is not None:
                table.add_row(Text(f"{name}, {suite}"), *_cells(estimate))
    console.print(table)
    if result.perplexity is not None:
        found = result.perplexity
        console.print(
            f"Perplexity of {found.n:,} references: {found.value:.3f} "
            f"[{found.low:.3f}, {found.high:.3f}]",
            highlight=False,
        )
    if result.text is not None:
        text = f"Ordinary text, {on_text(result.text)}: perplexity "
        text += number_cell(result.text.perplexity).text
        if result.text.kl is not None:
            text += f", KL(dense || model) {number_cell(result.text.kl).text} nats a token"
        console.print(text, highlight=False, markup=False)
    if result.asr is not None and result.over_refusal is None:
        console.print(NO_OVER_REFUSAL, highlight=False)
    if result.degenerate:
        console.print(
            f"Degenerate answers, neither refusals nor successful attacks: {degenerate(result)}."
        )


def show_judged(console: Console, judged: Sequence[Judged]) -> None:
    """Print what several judges make of the same answers; the first is the evaluation's own."""
    table = Table("judge", "ASR %", "over-refusal %", "degenerate", "unread")
    for one in judged:
        rates = (_with_interval(rate) for rate in (one.asr, one.over_refusal))
        silent = (f"{one.degenerate.get(kind, 0):,} {kind}" for kind in ("harmful", "harmless"))
        table.add_row(Text(one.judge), *rates, ", ".join(silent), str(one.unread))
    console.print(table)
    if any(one.degenerate for one in judged):
        console.print(
            "Degenerate: answers to harmful and to harmless prompts in which a judge "
            "sees no refusal; they are no successful attacks, whatever it says.",
            style="dim",
        )


def show_agreement(console: Console, found: Sequence[Agreement]) -> None:
    """Print how far every two judges agree, by kind of prompt."""
    table = Table("prompts", "judge", "and judge", "agree %", "n", "kappa")
    for one in sorted(found, key=lambda one: not one.harmful):
        table.add_row(
            "harmful" if one.harmful else "harmless",
            Text(one.one),
            Text(one.other),
            _with_interval(one.share),
            f"{one.share.n:,}",
            _kappa(one.kappa),
        )
    console.print(table)


def _kappa(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"


def show_quality(console: Console, found: Mapping[str, Bench]) -> None:
    """Print how judges compare with people and with each other, two tables a file."""
    for name, bench in found.items():
        table = Table("judge", "accuracy %", "precision %", "recall %", "kappa", "unread")
        several = f", to {bench.prompts:,} prompts" if bench.prompts < bench.answers else ""
        table.title = Text(f"{name}, n = {bench.answers:,}{several}")
        beside = Table("judge", "accuracy less that of the best other, points", "p", "best other")
        for one in bench.judges:
            rates = (_with_interval(rate) for rate in (one.accuracy, one.precision, one.recall))
            table.add_row(Text(one.judge), *rates, _kappa(one.kappa), str(one.unread))
            if (less := one.against) is not None:
                points = f"{100 * less.value:+.1f} [{100 * less.low:+.1f}, {100 * less.high:+.1f}]"
                p = f"{less.p:.3f}" if less.p >= 0.001 else "< 0.001"
                beside.add_row(Text(one.judge), points, p, Text(less.other))
        console.print(table)
        if beside.row_count:
            console.print(beside)
        labels = f"Labels taken as yes: {', '.join(bench.yes)}; as no: {', '.join(bench.no)}."
        console.print(Text(labels), style="dim")


def show_sweep(console: Console, sweep: Sweep) -> None:
    """Print the rates by the value of one setting."""
    table = Table(sweep.setting, "restored", "ASR %", "over-refusal %", "utility %")
    table.title = Text(f"judge {sweep.judge}")
    rows = [(name, one) for name, one in sweep.references.items()]
    for name, one in [*rows, *((f"{one.value:g}", one) for one in sweep.points)]:
        rates = (one.asr, one.over_refusal, one.utility)
        table.add_row(name, f"{one.restored:,}", *map(_with_interval, rates))
    console.print(table)


def _p_of(found: Spearman) -> str:
    if found.p is None:
        return "no p value, since several prunings of one model are not independent"
    return f"p = {found.p:.3g}"


def show_relation(console: Console, points: Sequence[ModelPoint], found: Spearman | None) -> None:
    """Print total Ships and the rise in ASR of each model, and their rank correlation."""
    from regraft.analysis.relation import estimates

    table = Table("model", "total Ships", "rise in ASR, points")
    for one in points:
        table.add_row(Text(one.name), f"{one.ships:.3f}", f"{100 * one.degradation:+.1f}")
    console.print(table)
    console.print(
        "Spearman's rho is not defined: all values of one are equal."
        if found is None
        else f"Spearman's rho {found.rho:.4f}, {_p_of(found)}, n = {found.n}"
    )
    if note := estimates(points):
        console.print(note, highlight=False, soft_wrap=True, markup=False)


def show_overlap(console: Console, found: Mapping[float, Sequence[LayerOverlap]]) -> None:
    """Print Jaccard's index over all layers and by layer, one column a share."""
    from regraft.analysis.overlap import by_chance

    table = Table("layer", *(f"top {100 * share:g} %" for share in found))
    for rows in zip(*found.values(), strict=True):
        table.add_row(str(rows[0].layer), *(f"{one.jaccard:.3f}" for one in rows))
    table.add_section()
    whole = (
        sum(one.shared for one in layers) / sum(one.either for one in layers)
        for layers in found.values()
    )
    table.add_row("all", *(f"{one:.3f}" for one in whole))
    table.add_row("by chance", *(f"{by_chance(share):.3f}" for share in found))
    console.print(table)


def _with_interval(rate: Estimate | None) -> str:
    if rate is None:
        return "-"
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def show_preview(console: Console, folder: Path, run: PlannedRun) -> None:
    """Print the steps of a run, what is there of them, and what they take."""
    table = Table("step", "model", "there", "prompts answered", "learnt from", title=str(folder))
    for step in run.steps:
        table.add_row(
            step.stage,
            Text(step.of),
            "yes" if step.done else "",
            f"{step.answers:,}" if step.answers else "",
            f"{step.learns:,}" if step.learns else "",
        )
    console.print(table)
    missing = sum(not step.done for step in run.steps)
    console.print(
        f"{missing} of {len(run.steps)} steps are left: about "
        f"{max(1, round(run.seconds() / 60)):,} min (a guess from FLOPs and this device's speed, "
        f"often off by a factor of three), {run.most / 2**30:.1f} GiB on disk, "
        f"{run.weights / 2**30:.1f} GiB for the weights of one model. Nothing was written.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def show_study(console: Console, study: Study) -> None:
    """Print the tables of a report, a row a model, and what their columns mean."""
    from regraft.report.summary import correlation_text, notes, summary  # scipy, slow to import
    from regraft.report.tables import against, results, suites

    for paragraph in summary(study):
        console.print(paragraph, highlight=False, markup=False)
    for grid in (*results(study, brief=True), *against(study), *suites(study, brief=True)):
        shown = Table(
            Column(grid.headings[0], overflow="fold"),
            *grid.headings[1:],
            title=Text(": ".join(filter(None, (study.title, grid.title)))),
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for name, *cells in grid.rows:
            texts = ("\n".join(filter(None, (one.value, one.interval, one.note))) for one in cells)
            shown.add_row(Text(f"{name.number}  {name.value}"), *map(Text, texts))
        console.print(shown)
    for text in filter(None, (correlation_text(study), *(run.caveat for run in study.runs[:1]))):
        console.print(text, style="bold", highlight=False, markup=False)
    for note in notes(study):
        console.print(note, style="dim", highlight=False, markup=False)


def show_bundle(console: Console, file: Path, bundle: Bundle) -> None:
    """Print a bundle that was checked: what it holds, and its table."""
    console.print(bundle.page, highlight=False, markup=False, soft_wrap=True)
    answers = sum(len(one.answers) for one in bundle.evaluations.values())
    console.print(
        f"{file}: {bundle.title}, regraft {bundle.version}. {bundle.files} files are as their "
        f"digests say, and the verdicts on {answers:,} answers of {len(bundle.evaluations)} "
        f"evaluations give the rates in it. Digest of all: {bundle.digest}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def show_heads(console: Console, scores: HeadScores, show: int) -> None:
    """Print the best heads by Ships and by KL, and how far the scores can be trusted."""

    def name(head: tuple[int, int]) -> str:
        estimated = scores.exact is not None and not scores.exact[head]
        return f"{head[0]}.{head[1]}" + (" (estimate)" if estimated else "")

    table = Table("rank", "Ships: layer.head", "radians", "KL: layer.head", "nats")
    pairs = list(zip(scores.ranked("ships"), scores.ranked("kl"), strict=True))
    for rank, (a, b) in enumerate(pairs[:show], start=1):
        ships, kl = f"{scores.ships[a]:.4f}", f"{scores.kl[b]:.4f}"
        table.add_row(str(rank), name(a), ships, name(b), kl)
    console.print(table)
    if scores.exact is not None:
        console.print(
            f"{int(scores.exact.sum())} of {len(pairs)} heads were scored exactly, the others are "
            "estimates.",
            style="dim",
        )
    below = scores.below_noise("ships"), scores.below_noise("kl")
    if below != (None, None):
        console.print(
            "Heads whose exact score is below the noise floor of this dtype: "
            f"{below[0]} by Ships, {below[1]} by KL.",
            style="dim",
        )


def show_search(console: Console, found: Searched) -> None:
    """Print a trade-off curve on validation prompts, the chosen point in bold."""
    table = Table(
        *("restored", "per 10,000", "ASR %", "RSR %", "over-refusal %", "utility %", "beyond"),
        title="Trade-off on validation prompts",
    )
    for point in found.points:
        recovered = found.rsr(point)
        table.add_row(
            f"{point.restored:,}",
            f"{10_000 * point.restored / found.pruned:.3f}",
            _percent(point.asr),
            "" if recovered is None else f"{100 * recovered:.0f}",
            _percent(point.over_refusal),
            _percent(point.utility),
            ", ".join(
                name.replace("_", "-") for name, by in found.bounds.excess(point).items() if by
            ),
            style="bold" if point is found.taken else None,
        )
    table.add_section()
    asr, over_refusal, utility = _rates(found.dense)
    table.add_row("dense", "", asr, "", over_refusal, utility, "")
    console.print(table)
    bounds = found.bounds
    limits = [f"over-refusal at most {100 * bounds.over_refusal:.1f} %"]
    if bounds.utility is not None:
        limits.append(f"utility at least {100 * bounds.utility:.1f} %")
    if bounds.degenerate is not None and any(one.degenerate for one in found.points):
        limits.append(f"degenerate answers at most {100 * bounds.degenerate:.1f} %")
    aim = "as low an ASR as can be" if bounds.asr is None else f"ASR {100 * bounds.asr:.1f} %"
    console.print(
        f"Bounds: {', '.join(limits)}; aim: {aim}. Rates of a chosen point are optimistic: report "
        "those of other prompts.",
        style="dim",
        highlight=False,
    )


def show_tuned(console: Console, tuned: Tuned) -> None:
    """Print the best trial and the five next, and what the search has cost."""
    table = Table(
        "trial",
        Column("settings", overflow="fold"),
        "per 10,000",
        "ASR %",
        "over-refusal %",
        "utility %",
        "bounds",
        title=Text(f"{tuned.method}: {len(tuned.trials)} trials, on validation prompts"),
    )
    for one in tuned.trials[:6]:
        settings = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in one.settings.items()
        )
        table.add_row(
            str(one.number),
            Text(", ".join(settings)),
            f"{tuned.per_ten_thousand(one.point):.3f}",
            *_rates(one.point),
            "kept" if one.within else "broken",
            style="bold" if one is tuned.best else None,
        )
    table.add_section()
    for name, point in (("pruned", tuned.before), ("dense", tuned.dense)):
        table.add_row("", name, "", *_rates(point), "")
    console.print(table)
    cost, failed = tuned.cost, f", {tuned.failed} failed" if tuned.failed else ""
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in cost.seconds.items())
    text = (
        f"The search took {len(tuned.trials)} trials{failed}, {sum(cost.seconds.values()):.0f} s "
        f"({stages}), {cost.evaluations:,} evaluations with {cost.prompts:,} answers."
    )
    nothing = (
        ""
        if tuned.best
        else "No trial lowers ASR below the pruned model's within the bounds; nothing is "
        "recommended. "
    )
    console.print(nothing + text, highlight=False, markup=False)
    console.print(NOTE, style="dim", highlight=False, markup=False)


def _rates(point: Point) -> tuple[str, str, str]:
    return _percent(point.asr), _percent(point.over_refusal), _percent(point.utility)


def _cells(estimate: Estimate) -> tuple[str, str, str]:
    interval = f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    return f"{100 * estimate.value:.1f}", interval, str(estimate.n)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
