"""`Study` to `compare.json`, `compare.md`, `compare.html` and figures.

The same study always gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from regraft.evaluation.results import Estimate
from regraft.evaluation.tradeoff import Searched
from regraft.files import write_json, write_text
from regraft.report.addresses import short_names
from regraft.report.compare import Recovered, Row, Spread, Study, Table, Tested
from regraft.report.compare_figures import trade_off_panels
from regraft.report.curve_figure import CURVES_CAPTION, curve_figure
from regraft.report.drawing import standalone
from regraft.report.model import SIGNIFICANCE, measured
from regraft.report.path_figure import path_figure
from regraft.report.paths import PATHS_CAPTION
from regraft.report.words import DASH, PASSES_NOTE, on_text, passes_text, share
from regraft.report.write import page_environment


def write_comparison(study: Study, folder: Path) -> None:
    """Write `compare.json`, `compare.md`, `compare.html` and its figures, replacing older ones.

    `trade-off.svg`, where there was a search `curves.svg` and where gain was used `paths.svg`, are
    figures of the page.

    Raises:
        RegraftError: a file cannot be written.
    """
    figures = _figures(study)
    page, text = _page(study, figures), render_comparison_markdown(study)
    write_json(folder / "compare.json", asdict(study))
    write_text(folder / "compare.md", text)
    for name, (svg, _) in figures.items():
        file = folder / f"{name}.svg"
        if svg:
            write_text(file, standalone(svg))
        else:
            file.unlink(missing_ok=True)
    write_text(folder / "compare.html", page)


def render_comparison_html(study: Study) -> str:
    """One self-contained page: inline styles and figures, nothing fetched."""
    return _page(study, _figures(study))


def _page(study: Study, figures: Mapping[str, tuple[str, str]]) -> str:
    shown = [(Markup(svg), caption) for svg, caption in figures.values() if svg]
    return _render(study, "html", shown)


def _figures(study: Study) -> dict[str, tuple[str, str]]:
    """Name -> SVG, empty where it has nothing to show, and caption of every figure."""
    return {
        "trade-off": (
            trade_off_panels(study),
            "ASR against over-refusal, numbered as in the table, with 95 % intervals; down and to "
            "the left is better. Area: restored weights, on a logarithmic scale. Triangles restore "
            "none; grey circles are means over random draws.",
        ),
        "curves": (
            curve_figure([(table.pruning, named_curves(table)) for table in study.tables]),
            f"{CURVES_CAPTION} One line a seed.",
        ),
        "paths": (path_figure(study.paths), f"{PATHS_CAPTION} One pair of lines a seed."),
    }


def named_curves(table: Table) -> list[tuple[str, Searched]]:
    """(method, curve) of every run."""
    return [(name, curve) for name, curves in table.curves.items() for curve in curves]


def render_comparison_markdown(study: Study) -> str:
    """The same without figures."""
    return _render(study, "md", []).rstrip() + "\n"


def _render(study: Study, kind: str, figures: list[tuple[Markup, str]]) -> str:
    environment = page_environment()
    environment.filters |= {
        "figure": rate_text,
        "points": points_text,
        "spread": spread_text,
        "passes": passes_of,
        "recovered": recovered_text,
        "by_seed": by_seed_text,
        "p": p_text,
        "called": name_text,
    }
    return environment.get_template(f"compare.{kind}.j2").render(
        study=study,
        suite_names=short_names(study.suite.split(", ")),
        figures=figures,
        notes=notes(study),
    )


def notes(study: Study) -> tuple[str, ...]:
    """What the columns mean, in sentences."""
    several = len(study.seeds) > 1
    seeds = ", ".join(map(str, study.seeds))
    rows = [row for table in study.tables for row in table.rows]
    found = (
        f"Calibration seed{'s' if several else ''} {seeds}. ASR: harmful prompts that were "
        "answered; over-refusal: harmless prompts that were refused; both judged by "
        f"{study.judge}. "
        "Utility: mean similarity to the references; where suites score in different ways, the "
        "mean over suites. Questions of MMBench and DocVQA are no part of over-refusal.",
        "Brackets are 95 % intervals over prompts: Wilson's of ASR, over-refusal and a utility of "
        "right and wrong answers"
        + (
            ", with n the number of prompts however many answers each has"
            if several or any(row.repeats > 1 for row in rows)
            else ""
        )
        + ", Agresti and Min's of points of over-refusal, MOVER's of utility that is a mean over "
        "suites, by bootstrap of the others.",
        "RSR: the share of the rise in ASR that was undone"
        + ("; in parentheses that of each seed alone." if several else "."),
        "p: exact permutation test of attack success clustered by prompt (McNemar's of one model "
        "against one other), against the pruned model"
        + (f" and against {', '.join(study.against)}" if study.against else "")
        + f". Holm: the same, corrected for all tests of a table; the verdict is at Holm < "
        f"{SIGNIFICANCE}. It is on ASR alone: read it with over-refusal, since a model that "
        "refuses everything is better by it. It is on these models, as they would answer other "
        "prompts; how models of other seeds"
        + (" or draws" if any(row.repeats > 1 for row in rows) else "")
        + " would differ "
        + ("is for RSR by seed to show." if several else "takes several seeds to show."),
        "Points: a method's rate less the pruned or the dense model's.",
    )
    marks = [PASSES_NOTE] if study.counts_passes else []
    if study.text is not None:
        marks.append(
            "Perplexity, and KL(dense || model) in nats a token, on "
            f"{on_text(study.text)} of ordinary text; means over the models of a row, with "
            "bootstrap intervals over documents."
        )
    if study.silent:
        marks.append(
            "Degenerate: answers that are empty, repeat themselves, are gibberish, or of a few "
            "letters to a harmful prompt. They count neither as attacks nor as refusals, so that "
            "more of them is a lower ASR too."
        )
    if any(row.inference_time for row in rows):
        marks.append("† acts at inference time and leaves the pruned weights as they are.")
    if any(row.repeats > 1 for row in rows):
        marks.append("(xR): the mean over R draws of a random control.")
    return (*found, *marks)


def name_text(row: Row) -> str:
    """ "random (x5)"; a dagger marks a method of inference time."""
    repeats = f" (x{row.repeats})" if row.repeats > 1 else ""
    return f"{row.name}{repeats}{' †' if row.inference_time else ''}"


def rate_text(estimate: Estimate | None) -> str:
    """In per cent, without the sign: "14.4 [10.6, 19.3]"."""
    found = measured(estimate)
    if found is None:
        return DASH
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def points_text(estimate: Estimate | None) -> str:
    """A difference in points: "+1.3 [-0.7, +3.3]"."""
    found = measured(estimate)
    if found is None:
        return DASH
    value, low, high = (100 * x + 0.0 for x in (found.value, found.low, found.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def spread_text(spread: Spread | None) -> str:
    """ "15.5 (14.9 to 16.2)"."""
    if spread is None:
        return DASH
    if share(spread.least) == share(spread.most):
        return share(spread.mean)
    return f"{share(spread.mean)} ({share(spread.least)} to {share(spread.most)})"


def passes_of(spread: Spread | None) -> str:
    """ "12.3 (11.9 to 12.8)": passes over the calibration prompts, over the runs."""
    if spread is None:
        return DASH
    mean, least, most = (passes_text(one) for one in (spread.mean, spread.least, spread.most))
    return mean if least == most else f"{mean} ({least} to {most})"


def recovered_text(recovered: Recovered | None) -> str:
    """RSR in per cent with its interval."""
    if recovered is None:
        return DASH
    if recovered.recovery.value is None:
        return "undefined"
    around = recovered.interval
    between = f" [{100 * around[0]:.1f}, {100 * around[1]:.1f}]" if around else ""
    return f"{100 * recovered.recovery.value:.1f}{between}"


def by_seed_text(recovered: Recovered | None) -> str:
    """Each seed's RSR in per cent: "27.4, 31.0, undefined"; "" for a single one, or without any."""
    if recovered is None or len(recovered.by_seed) < 2 or set(recovered.by_seed) == {None}:
        return ""
    return ", ".join(
        "undefined" if value is None else f"{100 * value:.1f}" for value in recovered.by_seed
    )


def p_text(test: Tested | None, which: str = "adjusted") -> str:
    """ "0.012", "< 0.001" at its smallest."""
    if test is None:
        return DASH
    value: Any = getattr(test, which)
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
