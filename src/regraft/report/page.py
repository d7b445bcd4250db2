"""A study as one HTML page or as Markdown, from the same sections."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regraft.report import formatting, tables
from regraft.report.examples import (
    ANSWER_LENGTH,
    PROMPT_LENGTH,
    answer_data,
    choose_examples,
    pictures,
    shown_group,
    shown_variants,
)
from regraft.report.formatting import Grid
from regraft.report.rate_figures import (
    curve_figure,
    relation_figure,
    trade_off_figure,
)
from regraft.report.run import Run, Variant
from regraft.report.study import Study, plain
from regraft.report.summary import COSTS_NOTE, controls, correlation_text, gloss, notes, summary
from regraft.report.weight_figures import head_map_figure, path_figure, restored_figure

TRADE_OFF = (
    "ASR against over-refusal, numbered as in the table, with 95 % intervals; down and to the left "
    "is better."
)
CIRCLES = (
    " The area of a circle shows the share of weights that was restored, on a log scale; squares "
    "are models without restored weights."
)
CURVES_CAPTION = (
    "Rates on validation prompts. A line joins the points of a method in order of restored "
    "weights, starting at the pruned model; one line per seed. Dotted: the bound on over-refusal."
)
PATHS_CAPTION = (
    "Mean loss along the path of gain, the sum of safety and utility loss, in nats; two lines per "
    "seed. The calibration prompts are split: gradient prompts choose the weights, and their loss "
    "is shown before each step; held-out prompts decide how many of these weights a step restores, "
    "and their loss is shown after each step. Dots: numbers of weights that were tried; losses "
    "above the frame are not shown. The axis of weights is logarithmic."
)
APPLYING = (
    "A patch holds only the restored weights. It is applied to the pruned checkpoint that it was "
    "made for, which stays unchanged. Several patches are alternatives: choose one by its row in "
    "the results. The results of a patch that was chosen by them are slightly optimistic: expect a "
    "little less on other prompts. In the folder of the run:"
)


@dataclass(frozen=True)
class Figure:
    """An SVG with its caption; `name` is that of its own file, "" if it has none."""

    svg: str
    caption: str
    name: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with text, tables and a block of code below it."""

    key: str
    title: str
    text: str = ""
    grids: tuple[Grid, ...] = ()
    code: str = ""


def render_html(study: Study, drawn: Sequence[Figure] | None = None) -> str:
    """One self-contained page: inline styles and figures, nothing is loaded from elsewhere.

    `drawn` are the figures, if they have been drawn already.
    """
    context = _context(study)
    shown = [figure for figure in (figures(study) if drawn is None else drawn) if figure.svg]
    run = study.run
    if run is not None:
        rows = (*context["harmful"], *context["harmless"])
        context["pictures"] = pictures([row[0] for row in rows], run.images())
        context["answers"], context["kept"], context["total"] = answer_data(run)
    context["figures"] = [(Markup(one.svg), one.caption) for one in shown]
    return _environment().get_template("report.html.j2").render(context)


def render_markdown(study: Study) -> str:
    """The page as Markdown, without figures and without the list of all answers."""
    return render("report.md.j2", **_context(study))


def render(template: str, **context: Any) -> str:
    text = _environment().get_template(template).render(context)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _context(study: Study) -> dict[str, Any]:
    run = study.run
    harmful, harmless = choose_examples(run) if run else ((), ())
    return {
        "study": study,
        "run": run,
        "models": ", ".join(dict.fromkeys(filter(None, (one.model for one in study.runs)))),
        "caveat": next((one.caveat for one in study.runs if one.caveat), ""),
        "summary": summary(study),
        "gloss": gloss(study),
        "controls": controls(study),
        "before": [one for one in _results(study) if one.grids or one.text],
        "after": [one for one in _about(study) if one.grids or one.text or one.code],
        "notes": notes(study),
        "harmful": harmful,
        "harmless": harmless,
        "shown": [variant.label for variant in shown_variants(run)] if run else [],
        "answers": "",
        "pictures": {},
        "answer_categories": sorted({a.category for a in run.dense.result.answers}) if run else [],
        "answer_length": ANSWER_LENGTH,
        "prompt_length": PROMPT_LENGTH,
    }


def _results(study: Study) -> Iterator[Section]:
    yield Section("results", "Results", grids=tables.results(study))
    yield Section("details", "More on each model", grids=tables.details(study))
    yield Section("suites", "By suite", grids=tables.suites(study))
    yield Section("paths", "Paths of gain", grids=tables.paths(study))
    yield Section("categories", "ASR by category", grids=tables.categories(study))
    if study.correlation:
        text = correlation_text(study.correlation, study.published)
        title = "Total Ships and lost safety"
        yield Section("ships", title, text, (tables.ships(study.correlation),))


def _about(study: Study) -> Iterator[Section]:
    run = study.run
    if run is None:
        return
    if run.opinions:
        yield Section("judges", "Other judges", grids=(tables.judges(run),))
    if run.data:
        yield Section("data", "Data", grids=(tables.data(run),))
    if run.costs:
        devices = "; ".join(dict.fromkeys(cost.device for cost in run.costs))
        yield Section("costs", "Costs", f"On {devices}. {COSTS_NOTE}", tables.costs(run))
    degenerate = [
        f"{v.label}: {formatting.degenerate(v.result)}" for v in run.variants if v.result.degenerate
    ]
    yield Section("degenerate", "Degenerate answers", "; ".join(degenerate))
    perplexities = [
        f"{v.label}: {formatting.number_cell(v.result.perplexity).text}"
        for v in run.variants
        if v.result.perplexity
    ]
    yield Section("references", "Perplexity of the references", "; ".join(perplexities))
    code = yaml.safe_dump(plain(run.recipe), sort_keys=False, allow_unicode=True)
    if run.recipe:
        yield Section("recipe", "Evaluation settings" if run.unrelated else "Recipe", code=code)
    commands = [one for v in run.variants if (one := apply_command(run, v, "OUT"))]
    if commands:
        yield Section("apply", "Apply the patch", APPLYING, code="\n".join(commands))
    versions = "\n".join(f"{name} {version}" for name, version in run.versions.items())
    yield Section("versions", "Versions", code=versions)


def apply_command(run: Run, variant: Variant, out: str) -> str:
    """The command that applies a model's patch to its pruned checkpoint; "" without a patch."""
    if not (variant.restored and variant.patch):
        return ""
    base = next(one for one in run.variants if one.name == variant.base)
    return shlex.join(("regraft", "apply", base.checkpoint, variant.patch, "--out", out))


def figures(study: Study) -> tuple[Figure, ...]:
    """All figures of a page; the SVG of a figure with nothing to show is empty."""
    circles = CIRCLES if any(row.restored for row in study.rows) else ""
    paths = [(title, [one.path for one in of_seed]) for title, of_seed in study.paths.items()]
    return (
        Figure(trade_off_figure(study), TRADE_OFF + circles, "trade-off"),
        Figure(curve_figure(study.tables), CURVES_CAPTION, "curves"),
        Figure(path_figure(paths), PATHS_CAPTION, "paths"),
        Figure(
            relation_figure(study.correlation.points) if study.correlation else "",
            "The rise in ASR by the total Ships of a model's heads.",
        ),
        *(_weight_figures(study.run) if study.run else ()),
    )


def _weight_figures(run: Run) -> Iterator[Figure]:
    group = shown_group(run)
    heads = group[1].heads if len(group) > 1 else ()
    for variant in group:
        caption = f"{variant.label}: weights restored in each module and layer."
        yield Figure(restored_figure(variant), caption)
    rings = " Rings: heads open to restoration." if heads else ""
    for one in run.head_maps:
        caption = f"{one.name} of each attention head ({one.unit}).{rings} Blank: not scored."
        yield Figure(head_map_figure(one, heads), caption)


@cache
def _environment() -> Environment:
    """The templates with their filters, compiled once; text is escaped in HTML."""
    environment = Environment(
        loader=PackageLoader("regraft.report"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "clip": formatting.clip,
        "fenced": fenced,
        "marked": formatting.marked,
        "md": escape_markdown,
        "md_cell": escape_cell,
        "unbroken": formatting.unbroken,
    }
    return environment


def escape_markdown(text: str) -> str:
    """Text in one line, with everything that Markdown or HTML would read as markup escaped."""
    line = " ".join(text.split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    return re.sub(r"[\\`*_|~]|\](?=[(\[:])|^[#>+-]|(?<=^\d)[.)]", r"\\\g<0>", line)


def escape_cell(text: str) -> str:
    """Escape text for a table cell, in which no list or heading can start."""
    return escape_markdown(f"|{text}").removeprefix("\\|")


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
