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

from regraft.evaluation.results import Estimate, EvalResult, Rates
from regraft.evaluation.tradeoff import NOTE, Point, Searched, Tuned
from regraft.watch import Advance

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from regraft.analysis.overlap import LayerOverlap
    from regraft.analysis.relation import ModelPoint, Spearman
    from regraft.analysis.sweep import Sweep
    from regraft.bundle_check import Bundle
    from regraft.evaluation.labelled import Bench
    from regraft.evaluation.metrics import Recovery
    from regraft.evaluation.significance import PairedTest
    from regraft.evaluation.verdicts import Agreement, Judged
    from regraft.heads.score import HeadScores
    from regraft.report.compare import Study
    from regraft.report.model import Report, Variant
    from regraft.report.models import ModelTable

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
    from regraft.report.words import (  # scipy, slow to import
        NO_OVER_REFUSAL,
        degenerate,
        digits,
        on_text,
    )

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
        told = f"Ordinary text, {on_text(result.text)}: perplexity {digits(result.text.perplexity)}"
        if result.text.kl is not None:
            told += f", KL(dense || model) {digits(result.text.kl)} nats a token"
        console.print(told, highlight=False, markup=False)
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


def show_report(console: Console, report: Report) -> None:
    """Print the table of a run: every model with sparsity, ASR, RSR, over-refusal, utility."""
    from regraft.report.model import comparisons  # scipy, slow to import
    from regraft.report.words import broken, degenerate, digits, tested_against

    on_text = any(variant.result.text for variant in report.variants)
    restoring, several = "realigned" in report.roles, len(report.variants) > 1
    patterned = any(variant.n_m for variant in report.variants)
    grouped = len(report.groups) > 1 and "realigned" in report.roles
    table = Table(
        "model",
        "sparsity",
        *(("restored", "per 10,000") if restoring else ()),
        *(("N:M",) if patterned else ()),
        "ASR %",
        *(("RSR %",) if restoring else ()),
        *(("p",) if several else ()),
        "over-refusal %",
        "utility %",
        *(("KL to dense",) if on_text else ()),
        title=Text(report.title),
    )
    compared = {one.name: one for one in comparisons(report)}
    for variant, role in zip(report.variants, report.roles, strict=True):
        comparison = compared.get(variant.name)
        recovery = None if comparison is None else comparison.recovery
        attacks = None if comparison is None else comparison.attacks
        text = variant.result.text
        if grouped and role == "pruned":
            table.add_section()
        table.add_row(
            Text(variant.label_in_group),
            f"{100 * variant.sparsity:.2f} %",
            *(_came_back(variant) if restoring else ()),
            *((broken(variant),) if patterned else ()),
            _percent(variant.result.asr),
            *((_recovered(recovery),) if restoring else ()),
            *((_p_text(attacks),) if several else ()),
            _percent(variant.result.over_refusal),
            _percent(variant.result.utility),
            *((digits(text.kl if text else None),) if on_text else ()),
        )
    console.print(table)
    console.print(
        "Brackets are 95 % intervals"
        + (
            "; p is McNemar's exact test on the same harmful prompts, " + tested_against(report)
            if several
            else ""
        )
        + ".",
        style="dim",
        markup=False,
    )
    if report.dense.result.by_suite:
        console.print(_by_suite(report))
    if report.caveat:
        console.print(report.caveat, style="bold", markup=False)
    if silent := [v for v in report.variants if v.result.degenerate]:
        told = "; ".join(f"{v.label}: {degenerate(v.result)}" for v in silent)
        console.print(
            f"Degenerate answers, neither refusals nor successful attacks. {told}.", markup=False
        )


def _by_suite(report: Report) -> Table:
    """ASR and over-refusal of every model on each of several suites."""
    table = Table("suite", "model", "ASR %", "over-refusal %", "utility %")
    for suite in report.dense.result.by_suite:
        for variant in report.variants:
            rates = variant.result.by_suite.get(suite, Rates(None, None, None))
            cells = map(_percent, (rates.asr, rates.over_refusal, rates.utility))
            name = suite if variant is report.dense else ""
            table.add_row(Text(name), Text(variant.label_in_group), *cells)
        table.add_section()
    return table


def _came_back(variant: Variant) -> tuple[str, str]:
    share = variant.per_ten_thousand
    return (
        f"{variant.restored:,}" if variant.restored else "",
        "" if share is None else f"{share:.2f}",
    )


def _p_text(test: PairedTest | None) -> str:
    return "" if test is None else f"{test.p:.3f}" if test.p >= 0.001 else "< 0.001"


def _recovered(recovery: Recovery | None) -> str:
    return "" if recovery is None or recovery.value is None else f"{100 * recovery.value:.1f}"


def show_study(console: Console, study: Study) -> None:
    """Print a comparison, one table a pruning."""
    from regraft.report import write_compare as words  # matplotlib, slow to import
    from regraft.report.words import digits

    def stacked(text: str) -> str:
        return text.replace(" [", "\n[").replace(" (", "\n(").replace(" to ", "\nto ")

    for table in study.tables:
        shown = Table(
            Column("method", overflow="fold"),
            *("per\n10,000", "ASR %", "RSR %", "p, Holm"),
            Column("verdict", min_width=len("distinguishable")),
            *(("says\nnothing %",) if study.silent else ()),
            *("over-\nrefusal %", "from\npruned", "utility %"),
            Column("from\npruned", min_width=len("pruned")),
            *(("KL to\ndense",) if study.text else ()),
            title=Text(f"{study.title}: {table.pruning}"),
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for row in table.rows:
            shown.add_row(
                Text(words.name_text(row)),
                stacked(words.spread_text(row.restored)),
                stacked(words.rate_text(row.asr)),
                stacked(words.recovered_text(row.rsr)),
                words.p_text(row.test),
                row.test.verdict if row.test else "",
                *((stacked(words.rate_text(row.degenerate)),) if study.silent else ()),
                stacked(words.rate_text(row.over_refusal)),
                words.points_text(row.over_refusal_from_pruned).partition(" ")[0],
                stacked(words.rate_text(row.utility)),
                words.points_text(row.utility_from_pruned).partition(" ")[0],
                *((stacked(digits(row.text.kl if row.text else None)),) if study.text else ()),
            )
        console.print(shown)
        for other in table.against:
            beside = Table(
                *("method", "p", "Holm", "verdict"),
                title=Text(f"{table.pruning}: against {other}"),
                box=SIMPLE_HEAD,
            )
            for row in table.rows:
                if test := row.against.get(other):
                    texts = words.p_text(test, "p"), words.p_text(test), test.verdict
                    beside.add_row(Text(words.name_text(row)), *texts)
            console.print(beside)
    for note in words.notes(study):
        console.print(note, style="dim", highlight=False, markup=False)


def show_models(console: Console, table: ModelTable) -> None:
    """Print the table over several models, published figures beside."""
    from regraft.report import write_models as words  # matplotlib, slow to import
    from regraft.report.write_compare import rate_text

    theirs = ("published",) if table.published else ()
    for model in table.models:
        shown = Table(
            Column("model", overflow="fold"),
            *("per 10,000", "ASR %, mean", *theirs, "RSR %", *theirs, "p"),
            *("over-refusal %", "utility %"),
            title=Text(f"{table.title}: {model}"),
            box=SIMPLE_HEAD,
        )
        for row in table.of(model):
            shown.add_row(
                Text(row.name),
                words.restored_text(row),
                rate_text(row.measured.asr),
                *((words.published_asr(row),) if theirs else ()),
                words.rsr_text(row),
                *((words.published_rsr(row),) if theirs else ()),
                words.p_text(row),
                rate_text(row.measured.over_refusal),
                rate_text(row.measured.utility),
            )
        console.print(shown)
    if table.correlation:
        console.print(words.correlation_text(table), highlight=False, markup=False)
    for note in words.notes(table):
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
    told = (
        f"The search took {len(tuned.trials)} trials{failed}, {sum(cost.seconds.values()):.0f} s "
        f"({stages}), {cost.evaluations:,} evaluations with {cost.prompts:,} answers."
    )
    nothing = (
        ""
        if tuned.best
        else "No trial lowers ASR below the pruned model's within the bounds; nothing is "
        "recommended. "
    )
    console.print(nothing + told, highlight=False, markup=False)
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
