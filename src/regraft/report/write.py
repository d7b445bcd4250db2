"""`Report` to `report.json`, `report.md`, `report.html`, and a model card.

The same report always gives the same bytes: there are no times and no random ids in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regraft.data.storage import MODEL_ID
from regraft.evaluation.metrics import wilson
from regraft.evaluation.results import Estimate, EvalResult, TextResult, result_to_json
from regraft.evaluation.tradeoff import Searched, curve_to_json
from regraft.evaluation.verdicts import Judged
from regraft.files import write_json, write_text
from regraft.report import spent, words
from regraft.report.addresses import file_names, public_suite, short_names, suites_of
from regraft.report.all_answers import answer_data
from regraft.report.curve_figure import CURVES_CAPTION, curve_figure
from regraft.report.examples import choose_examples, shown_group, shown_variants
from regraft.report.figures import (
    category_figure,
    head_map_figure,
    restored_figure,
    sparsity_figure,
    trade_off_figure,
    trade_off_map,
)
from regraft.report.model import Comparison, Report, Variant, comparisons, measured
from regraft.report.path_figure import path_figure
from regraft.report.paths import PATHS_CAPTION, ending, step_rows
from regraft.report.thumbnails import thumbnail
from regraft.restoration.path import path_to_json

ANSWER_LENGTH, PROMPT_LENGTH = 1200, 400
DEGENERATE = "degenerate"


@dataclass(frozen=True)
class SuiteRow:
    """What was measured on a suite, in words, and of every model; None where it was not."""

    suite: str
    what: str
    estimates: tuple[Estimate | None, ...]


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `.md` and `.html` and `card.md` into `folder`, replacing older ones.

    Unrelated models have no card, since nothing is known of what they are. The JSON holds every
    number of the page; the answers themselves stay where the evaluation put them, except for the
    few examples on the page.

    Raises:
        RegraftError: variants cannot be compared, or a file cannot be written.
    """
    compared = comparisons(report)
    page, text = render_html(report, compared), render_markdown(report, compared)
    write_json(folder / "report.json", report_to_json(report, compared))
    write_text(folder / "report.md", text)
    if not report.unrelated:
        write_text(folder / "card.md", render_card(report, compared))
    write_text(folder / "report.html", page)


def report_to_json(report: Report, compared: Sequence[Comparison]) -> dict[str, Any]:
    """The report and its comparisons as JSON values, without answers."""
    return {
        "title": report.title,
        "model": report.model,
        "caveat": report.caveat,
        "verdict": list(words.verdict(report, compared)),
        "variants": [_variant_to_json(v) for v in report.variants],
        "comparisons": [asdict(c) for c in compared],
        "head_maps": [asdict(m) for m in report.head_maps],
        "data": [_shallow(account) for account in report.data],
        "recipe": _plain(report.recipe),
        "versions": dict(report.versions),
        "costs": [asdict(cost) for cost in report.costs],
        "notes": list(report.notes),
        "opinions": [asdict(one) for one in report.opinions],
        "paths": [
            {"pruning": one.pruning, "methods": list(one.methods), **path_to_json(one.path)}
            for one in report.paths
        ],
    }


def render_html(report: Report, compared: Sequence[Comparison]) -> str:
    """One self-contained page: inline styles and figures, nothing fetched."""
    context = _context(report, compared)
    rows = (*context["harmful"], *context["harmless"])
    shown = [row[0].id for row in rows if row[0].id in report.images]
    answers, kept, total = answer_data(report)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            **context,
            figures=_figures(report),
            pictures={example: thumbnail(report.images[example]) for example in shown},
            answers=answers if total else "",
            answers_kept=kept,
            answers_all=total,
            answer_categories=sorted({one.category for one in report.dense.result.answers}),
        )
    )


def render_markdown(report: Report, compared: Sequence[Comparison]) -> str:
    """The same without figures."""
    text = page_environment().get_template("report.md.j2").render(_context(report, compared))
    return text.rstrip() + "\n"


def render_card(report: Report, compared: Sequence[Comparison]) -> str:
    """A model card for the hub: metadata that it reads, and the results with intervals.

    To be put beside the realigned weights as README.md.
    """
    context = _context(report, compared)
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base} if (base := _hub_id(report.model)) else {}),
        "tags": ["regraft", "pruning", "safety", "sparse"],
        "model-index": [{"name": report.title, "results": _card_results(report)}],
    }
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    text = (
        page_environment()
        .get_template("card.md.j2")
        .render(
            context,
            metadata=front,
            base=_public(report.model),
            of=card_variant(report),
            among=len(realigned_models(report)),
            suites_shown=_public_suites(report.dense.result.suite),
            command=_command(report, card_variant(report), "MODEL"),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def card_variant(report: Report) -> Variant:
    """Of the models that lead their pruning the one with the lowest ASR, or else a pruned one.

    Where there is none either, it is the dense model.
    """

    def attacked(variant: Variant) -> float:
        asr = variant.result.asr
        return 1.0 if asr is None else asr.value

    realigned = realigned_models(report)
    return min(realigned, key=attacked) if realigned else (shown_group(report) or [report.dense])[0]


def realigned_models(report: Report) -> list[Variant]:
    """Those a card may be of: the first of each pruning, which leads the others.

    Not the one of lowest ASR among all: more are tried than anyone means to ship, controls too.
    """
    roles = zip(report.variants, report.roles, strict=True)
    return [v for v, role in roles if role == "realigned" and not v.inference_time]


def _public(model: str) -> str:
    """A hub id as it is, a folder by its name: paths of a machine mean nothing elsewhere."""
    return model if _hub_id(model) else Path(model).name


def _hub_id(model: str) -> str | None:
    """Of a model from the hub its id without a revision, as the hub takes it; None of a folder."""
    found = MODEL_ID.fullmatch(model)
    return found[1] if found and not Path(model).exists() else None


def _public_suites(suites: str) -> str:
    return ", ".join(map(public_suite, suites.split(", ")))


def _card_results(report: Report) -> list[dict[str, Any]]:
    """Of the model that the card is of, in the form that the hub reads."""
    chosen = card_variant(report).result
    named = (
        ("asr", "attack success rate", chosen.asr),
        ("over_refusal", "over-refusal", chosen.over_refusal),
        ("utility", "utility", chosen.utility),
    )
    metrics = [
        {"type": kind, "name": name, "value": round(100 * estimate.value, 2)}
        for kind, name, estimate in named
        if estimate is not None
    ]
    return [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"name": _public_suites(chosen.suite), "type": "safety"},
            "metrics": metrics,
        }
    ]


def _context(report: Report, compared: Sequence[Comparison]) -> dict[str, Any]:
    harmful, harmless = choose_examples(report)
    called = report.ways
    suites = _suite_rows(report)
    commands = [one for v in report.variants if (one := _command(report, v, "OUT"))]
    return {
        "report": report,
        "verdict": words.verdict(report, compared),
        "controls": words.control_lines(report, compared),
        "comparisons": {c.name: c for c in compared},
        "categories": sorted({c for v in report.variants for c in v.result.asr_by_category}),
        "headings": _headings(report),
        "tested_against": words.tested_against(report),
        "chosen": words.how_chosen(report),
        "suites": suites,
        "suite_names": short_names(suites_of(report.dense.result)),
        "text": (found := _text_of(report)) and words.on_text(found),
        "silent": any(row.what == DEGENERATE for row in suites),
        "shown": shown_variants(report),
        "numbered": tuple(zip(count(1), report.variants, report.roles, strict=False)),
        "several": len(report.groups) > 1,
        "ways": called,
        "by_way": lambda group: [
            next((v for v in group[1:] if v.name_in_group == name), None) for name in called
        ],
        "realigned": "realigned" in report.roles,
        "scored": any(answer.scored_by for answer in report.dense.result.answers),
        "patterned": any(v.n_m for v in report.variants),
        "passes": words.passes_note(report),
        "opinions": _opinion_rows(report),
        "commands": commands,
        "applying": words.applying(len(commands)),
        "harmful": harmful,
        "harmless": harmless,
        "paths": [(one.title, step_rows(one.path), ending(one.path)) for one in report.paths],
        "spent": spent.by_stage(report.costs),
        "spent_in_all": spent.total(report.costs) if report.costs else None,
        "devices": spent.devices(report.costs),
        "recipe_heading": "What was run" if report.unrelated else "Recipe",
        "answers_file": (
            "the answers.jsonl of each evaluation"
            if report.unrelated
            else "evaluation/*/answers.jsonl in the run's folder"
        ),
        "recipe": yaml.safe_dump(_plain(report.recipe), sort_keys=False, allow_unicode=True),
        "answer_length": ANSWER_LENGTH,
        "prompt_length": PROMPT_LENGTH,
    }


def _headings(report: Report) -> tuple[str, ...]:
    """Of the table of results, those that have something to say of these models."""
    restoring = ("Restored", "per 10,000") if "realigned" in report.roles else ()
    passes = ("Passes",) if words.passes_note(report) else ()
    pruned = any(round(v.sparsity, 3) for v in report.variants) or not report.unrelated
    compared = len(report.variants) > 1
    return (
        "Model",
        *(("Sparsity",) if pruned else ()),
        *restoring,
        *passes,
        "ASR",
        *(("p, ASR",) if compared else ()),
        *(("RSR",) if restoring else ()),
        "Over-refusal",
        *(("p, over-refusal",) if compared else ()),
        "Utility",
        *(("Perplexity", "KL to dense") if _text_of(report) else ()),
    )


def _text_of(report: Report) -> TextResult | None:
    """What was measured on ordinary text, of the first model of which it was."""
    return next((v.result.text for v in report.variants if v.result.text), None)


def _suite_rows(report: Report) -> tuple[SuiteRow, ...]:
    """All that is measured on each suite, where there are several."""
    results = [variant.result for variant in report.variants]
    labels = {"asr": "ASR", "over_refusal": "over-refusal", "utility": "utility"}
    rows = (
        SuiteRow(suite, what, estimates)
        for suite in report.dense.result.by_suite
        for what, estimates in (
            *(
                (
                    label,
                    tuple(
                        getattr(result.by_suite[suite], name) if suite in result.by_suite else None
                        for result in results
                    ),
                )
                for name, label in labels.items()
            ),
            (DEGENERATE, tuple(_silent(result, suite) for result in results)),
        )
    )
    return tuple(
        row
        for row in rows
        if row.estimates[0] is not None
        and (row.what != DEGENERATE or any(one and one.count for one in row.estimates))
    )


def _silent(result: EvalResult, suite: str) -> Estimate | None:
    """How many of the answers to a suite are neither refusals nor say anything."""
    mine = [answer.says_nothing for answer in result.answers if answer.suite == suite]
    return wilson(sum(mine), len(mine)) if mine else None


def _opinion_rows(report: Report) -> tuple[tuple[str, Judged, str, str], ...]:
    """(model, other judge, agreement on harmful prompts, on harmless ones)."""
    return tuple(
        (
            one.name,
            one.judged,
            words.agreed(one.agreement, harmful=True),
            words.agreed(one.agreement, harmful=False),
        )
        for one in report.opinions
    )


def _command(report: Report, variant: Variant, out: str) -> str:
    """What puts a model's patch onto its pruned checkpoint; "" where nothing was restored."""
    if not (variant.restored and variant.patch):
        return ""
    base = next(one for one in report.variants if one.name == variant.base)
    return shlex.join(("regraft", "apply", base.checkpoint, variant.patch, "--out", out))


def _figures(report: Report) -> tuple[tuple[Markup, str], ...]:
    """(SVG, caption) of every figure that has something to show."""
    group = shown_group(report)
    heads = group[1].heads if len(group) > 1 else ()
    ringed = " Rings: heads open to restoration." if heads else ""
    drawn = [
        _trade_off(report),
        *(
            (
                sparsity_figure(report, series),
                f"{series}: rates by sparsity, with 95 % bands. Dashed: the dense model.",
            )
            for series in dict.fromkeys(group[0].series for group in report.groups)
            if series
        ),
        (
            category_figure(shown_variants(report)),
            "ASR by harm category, with 95 % intervals (lines).",
        ),
        (curve_figure(_searched(report)), CURVES_CAPTION),
        (path_figure([(one.title, (one.path,)) for one in report.paths]), PATHS_CAPTION),
        *(
            (restored_figure(v), f"{v.label}: weights restored in each module and layer.")
            for v in group
        ),
        *(
            (
                head_map_figure(m, heads),
                f"{m.name} of each attention head ({m.unit}).{ringed} Blank: not scored.",
            )
            for m in report.head_maps
        ),
    ]
    return tuple((Markup(svg), caption) for svg, caption in drawn if svg)


def _searched(report: Report) -> list[tuple[str, list[tuple[str, Searched]]]]:
    """Of every pruning its methods with a validation curve."""
    return [
        (pruned.label, [(v.name_in_group, v.curve) for v in made if v.curve])
        for pruned, *made in report.groups
    ]


def _trade_off(report: Report) -> tuple[str, str]:
    if len(report.groups) > 1:
        svg = trade_off_map(report)
        marks = (
            "dense and pruned models numbered as in the table, dotted lines to those realigned "
            "from them, with 95 % intervals"
        )
    else:
        svg = trade_off_figure(report.variants)
        marks = "numbered as in the table, with 95 % intervals"
    return svg, f"ASR against over-refusal, {marks}. Down and to the left is better."


def page_environment() -> Environment:
    """Templates with the filters of all pages; text is escaped in HTML."""
    environment = Environment(
        loader=PackageLoader("regraft.report"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        name: getattr(words, name)
        for name in (
            "percent",
            "short_percent",
            "interval",
            "rate",
            "share",
            "passes_text",
            "p_value",
            "rsr_text",
            "broken",
            "tested",
            "unbroken",
            "clip",
            "degenerate",
            "cell",
            "digits",
            "marked",
        )
    }
    environment.filters |= {
        name: getattr(spent, name) for name in ("duration", "operations", "memory")
    }
    environment.filters |= {"measured": measured, "md": escape_markdown, "fenced": fenced}
    environment.filters |= {"file_names": file_names}
    environment.globals["dash"] = words.DASH
    return environment


def escape_markdown(text: str) -> str:
    """One line of text with what Markdown or HTML would read as markup escaped."""
    line = " ".join(text.split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    return re.sub(r"[\\`*_|~]|\](?=[(\[:])|^[#>+-]|(?<=^\d)[.)]", r"\\\g<0>", line)


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _variant_to_json(variant: Variant) -> dict[str, Any]:
    return {
        **_shallow(variant),
        "result": result_to_json(variant.result),
        "curve": curve_to_json(variant.curve) if variant.curve else None,
        "per_ten_thousand": variant.per_ten_thousand,
    }


def _shallow(item: Any) -> dict[str, Any]:
    return {f.name: _plain(getattr(item, f.name)) for f in fields(item)}


def _plain(value: Any) -> Any:
    """Mappings to dicts, sequences to lists, paths to text, for JSON and YAML."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
