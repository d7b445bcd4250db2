"""Evaluate a model: `regraft eval`; check that it is as safe as the dense one: `regraft check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from regraft.cli.exits import leave
from regraft.cli.options import Answering, Compute, Flat, OutFolder
from regraft.console import live_progress, say, show_grid, show_table
from regraft.evaluation.results import Estimate, EvalResult, Rates
from regraft.report.formatting import degenerate, number_cell, on_text, rate_cell
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import Suites
from regraft.settings.evaluating import EndpointSettings, EvalSettings, Margins

EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}  # 2 is bad input
Prompts = Annotated[
    Suites,
    Parameter(
        help="Prompts to evaluate models on: demo:test, a .jsonl file or NAME PATH, as in "
        "`regraft eval --help`; repeat the flag for several.",
        negative="",
    ),
]
Side = Annotated[str, Parameter(help="Model, endpoint:URL#MODEL or evaluation folder.")]


def _given(*blocks: Settings) -> dict[str, Any]:
    """The settings that were given in these blocks, as keyword arguments for `regraft.api`."""
    return {name: getattr(one, name) for one in blocks for name in one.model_fields_set}


def evaluate(
    model: Answering,
    *,
    suite: Suites,
    out: OutFolder,
    patch: Path | None = None,
    defence: Path | None = None,
    text: Path | None = None,
    dense: Path | None = None,
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),
    compute: Compute = ComputeSettings(),
    endpoint: Annotated[EndpointSettings, Flat] = EndpointSettings(),
) -> None:
    """Evaluate a model on test suites: ASR, over-refusal and utility with 95 % intervals.

    ASR is the share of harmful prompts that are answered, over-refusal that of harmless ones that
    are refused, utility how close answers to harmless ones are to their references. Answers are
    decoded greedily and saved.

    Example: regraft eval pruned --suite safebench FigStep/data --suite mossbench MOSSBench/data
    --out eval/pruned

    Parameters
    ----------
    patch
        Patch to apply to the model in memory first.
    defence
        Inference-time defence to answer under, from `regraft analyse defence`.
    text
        Text file to measure perplexity on: documents separated by blank lines.
    dense
        With --text: folder of the dense model's evaluation on it, to measure KL to that model.
    """
    from regraft import api

    progress = live_progress()
    result = api.evaluate(
        model,
        suite,
        out,
        patch=patch,
        defence=defence,
        text=text,
        dense=dense,
        progress=progress,
        **_given(settings, compute, endpoint),
    )
    _show_result(progress.console, result)
    progress.note(f"Answers and results: {out}. For a report: regraft report {out}")


def _show_result(console: Console, result: EvalResult) -> None:
    from regraft.report.summary import NO_OVER_REFUSAL  # scipy, slow to import

    overall = [*_rate_rows(result)]
    show_table(
        console,
        ("", "rate", "95 % interval", "count"),
        overall,
        (_rate_row(f"ASR, {category}", one) for category, one in result.asr_by_category.items()),
        *(_rate_rows(rates, suite) for suite, rates in result.by_suite.items()),
        title=f"{result.suite}, judge {result.judge}",
        bold=range(len(overall)),
    )
    if (found := result.perplexity) is not None:
        say(console, f"Perplexity of {found.n:,} references: {number_cell(found).text}")
    if (text := result.text) is not None:
        kl = f", KL(dense || model) {number_cell(text.kl).text} nats per token" if text.kl else ""
        perplexity = number_cell(text.perplexity).text
        say(console, f"Ordinary text, {on_text(text)}: perplexity {perplexity}{kl}")
    if result.asr is not None and result.over_refusal is None:
        say(console, NO_OVER_REFUSAL)
    if result.degenerate:
        kinds = degenerate(result)
        say(console, f"Degenerate answers, neither refusals nor successful attacks: {kinds}.")


def _rate_rows(rates: EvalResult | Rates, suite: str = "") -> Iterator[tuple[str, ...]]:
    kinds = {"ASR": rates.asr, "over-refusal": rates.over_refusal, "utility": rates.utility}
    for kind, estimate in kinds.items():
        if estimate is not None:
            yield _rate_row(f"{kind}, {suite}" if suite else kind, estimate)


def _rate_row(name: str, estimate: Estimate) -> tuple[str, ...]:
    cell = rate_cell(estimate)
    return name, cell.value, cell.interval, cell.note


def check(
    dense: Side,
    compressed: Side,
    *,
    out: OutFolder,
    suite: Prompts = (),
    patch: Path | None = None,
    margins: Annotated[Margins, Flat] = Margins(),
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),
    compute: Compute = ComputeSettings(),
    endpoint: Annotated[EndpointSettings, Flat] = EndpointSettings(),
) -> None:
    """Check whether a compressed model is as safe as the dense one, within margins: exit code 0
    yes, 1 no, 3 undecided.

    Each model is a folder, a hub id, 'demo', endpoint:URL#MODEL or the folder of a finished
    evaluation. ASR, over-refusal, utility and degenerate answers each pass if the one-sided 95 %
    interval of their change is within the margin, and fail if it is beyond it. A margin of 100
    leaves a rate out.

    Example: regraft check model model-w4 --suite safebench FigStep/data --suite mossbench
    MOSSBench/data --out check

    Parameters
    ----------
    patch
        Patch to apply to the compressed model first.
    """
    from regraft import api
    from regraft.report.gate import WOULD_DECIDE, table

    progress = live_progress()
    blocks = _given(margins, settings, compute, endpoint) | {"suites": suite, "patch": patch}
    found = api.check(dense, compressed, out, progress=progress, **blocks)
    show_grid(progress.console, table(found))
    if any(metric.needed for metric in found.metrics):
        say(progress.console, WOULD_DECIDE, "dim")
    for note in found.notes:
        say(progress.console, note, "dim")
    progress.note(f"Verdict: {found.verdict}. Files: {out}")
    leave(EXIT_CODES[found.verdict])
