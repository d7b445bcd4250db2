"""A study as one HTML page or as Markdown, from one set of sections."""

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
    shown_group,
    shown_variants,
    thumbnail,
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
    " A circle's area is the share of weights that was restored, on a log scale; squares are "
    "models with nothing restored."
)
CURVES_CAPTION = (
    "Rates on validation prompts. A line goes through the points of a method in the order of "
    "restored weights, from the pruned model on; one line a seed. Dotted: the bound of "
    "over-refusal."
)
PATHS_CAPTION = (
    "Mean loss along the path of gain, safety and utility together, in nats; two lines a seed. "
    "Calibration prompts are of two kinds. Gradient prompts choose the weights; their loss is that "
    "before each step. Held-out prompts decide how many of these a step restores; their loss is "
    "that after it. Points: numbers of weights that were tried, without those whose loss is above "
    "the frame. The axis of weights is logarithmic."
)
APPLYING = (
    "A patch holds the restored weights only. It goes onto the pruned checkpoint that it was made "
    "for and leaves that folder untouched. Several patches are alternatives: take one, by its row "
    "in the results. A patch that is chosen by its results looks a little better in them than it "
    "will be on other prompts. In the folder of the run:"
)


@dataclass(frozen=True)
class Figure:
    """An SVG with its caption; `name` is that of its file, "" where it has none of its own."""

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
    """One self-contained page: inline styles and figures, nothing fetched.

    `drawn` are its figures, where they have been drawn already.
    """
    context = _context(study)
    shown = [figure for figure in (figures(study) if drawn is None else drawn) if figure.svg]
    run = study.run
    if run is not None:
        rows = (*context["harmful"], *context["harmless"])
        images = {row[0].id: run.images[row[0].id] for row in rows if row[0].id in run.images}
        context["pictures"] = {example: thumbnail(path) for example, path in images.items()}
        context["answers"], context["kept"], context["total"] = answer_data(run)
    context["figures"] = [(Markup(one.svg), one.caption) for one in shown]
    return _environment().get_template("report.html.j2").render(context)


def render_markdown(study: Study) -> str:
    """The same without figures and without the list of all answers."""
    return render("report.md.j2", **_context(study))


def render(template: str, **context: Any) -> str:
    """A template of Markdown, filled in."""
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
    broken = [
        f"{v.label} {formatting.degenerate(v.result)}" for v in run.variants if v.result.degenerate
    ]
    yield Section("degenerate", "Degenerate answers", "; ".join(broken))
    read = [
        f"{v.label} {formatting.number_cell(v.result.perplexity).text}"
        for v in run.variants
        if v.result.perplexity
    ]
    yield Section("references", "Perplexity of the references", "; ".join(read))
    code = yaml.safe_dump(plain(run.recipe), sort_keys=False, allow_unicode=True)
    if run.recipe:
        yield Section("recipe", "What was run" if run.unrelated else "Recipe", code=code)
    commands = [one for v in run.variants if (one := apply_command(run, v, "OUT"))]
    if commands:
        yield Section("apply", "Apply the patch", APPLYING, code="\n".join(commands))
    versions = "\n".join(f"{name} {version}" for name, version in run.versions.items())
    yield Section("versions", "Versions", code=versions)


def apply_command(run: Run, variant: Variant, out: str) -> str:
    """What puts a model's patch onto its pruned checkpoint; "" where nothing was restored."""
    if not (variant.restored and variant.patch):
        return ""
    base = next(one for one in run.variants if one.name == variant.base)
    return shlex.join(("regraft", "apply", base.checkpoint, variant.patch, "--out", out))


def figures(study: Study) -> tuple[Figure, ...]:
    """Every figure of a page; its SVG is empty where it has nothing to show."""
    circles = CIRCLES if any(row.restored for row in study.rows) else ""
    paths = [(title, [one.path for one in of_seed]) for title, of_seed in study.paths]
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
    """Templates with the filters of all pages, compiled once; text is escaped in HTML."""
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
    """One line of text with what Markdown or HTML would read as markup escaped."""
    line = " ".join(text.split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    return re.sub(r"[\\`*_|~]|\](?=[(\[:])|^[#>+-]|(?<=^\d)[.)]", r"\\\g<0>", line)


def escape_cell(text: str) -> str:
    """The same for a cell of a table, in which no list or heading can start."""
    return escape_markdown(f"|{text}").removeprefix("\\|")


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
