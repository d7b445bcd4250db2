"""The verdict of a check as JSON, JUnit XML, Markdown and a table.

The same check always gives the same bytes: the files identify the two models by digests and hold no
times, paths, names or addresses.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from regraft.evaluation.gate import Check, Metric
from regraft.evaluation.noninferiority import CHANCE, MOST_PROMPTS
from regraft.report.formatting import Cell, Grid, percent, points_cell, rate_cell

FORMAT = "regraft-check-1"
NAMES = {
    "asr": "ASR",
    "over_refusal": "over-refusal",
    "utility": "utility",
    "degenerate": "degenerate answers",
}
_ASKED = {
    "asr": "harmful prompts",
    "over_refusal": "harmless prompts",
    "utility": "harmless prompts with a response to compare with",
    "degenerate": "prompts",
}
WOULD_DECIDE = (
    f"Would decide: with a probability of {100 * CHANCE:.0f} %, if change and variance stay as "
    "they are."
)
_HEADINGS = ("", "dense", "compressed", "change", "margin", "verdict")
_DIGITS = 6  # decimal places of fractions in the JSON


def check_to_json(check: Check) -> dict[str, Any]:
    """The check as JSON values; rates, margins and changes are fractions."""
    return {
        "format": FORMAT,
        "verdict": check.verdict,
        "metrics": {
            one.name: {key: _rounded(value) for key, value in asdict(one).items() if key != "name"}
            for one in check.metrics
        },
        **check.made_of,
        "notes": list(check.notes),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, _DIGITS) + 0.0 if isinstance(value, float) else value  # -0.0 is 0.0


def table(check: Check) -> Grid:
    rows = []
    for one in check.metrics:
        rates = rate_cell(one.dense), rate_cell(one.compressed), points_cell(one.change)
        rows.append((NAMES[one.name], *rates, _margin(one), Cell(one.outcome, note=_missing(one))))
    return Grid.of(f"check: {check.verdict}", _HEADINGS, rows)


def _missing(metric: Metric) -> str:
    """What a decision lacks, for the table."""
    if metric.outcome == "not measured":
        return f"no {_ASKED[metric.name]}"
    if metric.outcome != "undecided":
        return ""
    return f"about {metric.needed:,} prompts would decide" if metric.needed else "too close to tell"


def _margin(metric: Metric) -> str:
    if metric.margin >= 1:
        return "none"
    sign = "-" if metric.name == "utility" else "+"
    return f"{sign}{100 * metric.margin:g}"


def sentence(metric: Metric) -> str:
    name, asked = NAMES[metric.name], _ASKED[metric.name]
    if metric.change is None:
        return f"{name}: {metric.outcome}; the suite has no {asked}."
    dense, compressed = (
        "" if one is None else percent(one.value) for one in (metric.dense, metric.compressed)
    )
    change = points_cell(metric.change).text
    distinct = metric.change.n
    grouped = "" if distinct == metric.prompts else f" ({distinct:,} distinct requests)"
    found = (
        f"{name}: {metric.outcome}; dense {dense}, compressed {compressed}, change {change} points "
        f"over {metric.prompts:,} {asked}{grouped}, margin {_margin(metric)}."
    )
    return " ".join(filter(None, (found, _how_to_decide(metric))))


def _how_to_decide(metric: Metric) -> str:
    if metric.outcome != "undecided":
        return ""
    if metric.needed is None:
        return f"So close to the margin, even {MOST_PROMPTS:,} prompts would not decide."
    return (
        f"About {metric.needed:,} {_ASKED[metric.name]} would decide, with a probability of "
        f"{100 * CHANCE:.0f} %, if change and variance stay the same."
    )


def cannot_fail(metric: Metric) -> str:
    """A warning for a metric of which the dense model has no more than the margin to lose."""
    assert metric.dense is not None, "it was measured"
    advice = "Give a smaller margin." if metric.room else "Only other prompts could show a loss."
    return (
        f"{NAMES[metric.name]} cannot fail: the dense model's is {percent(metric.dense.value)}, "
        f"and the margin {_margin(metric)} points. {advice}"
    )


def markdown(check: Check) -> str:
    """The verdict in one line, for a pull request, then the table and the notes."""
    line = f"**regraft check: {check.verdict}** · " + " · ".join(map(_short, check.metrics))
    grid = table(check)
    rows = ["| " + " | ".join(grid.headings) + " |", "|" + "---|" * len(grid.headings)]
    rows += ["| " + " | ".join(cell.text for cell in row) + " |" for row in grid.rows]
    legend = (
        "Change: points, compressed minus dense, with one-sided 95 % limits; regraft "
        f"{check.made_of['versions']['regraft']}, judge {check.made_of['judge']}, "
        f"{check.made_of['prompts']['count']:,} prompts."
    )
    notes = [f"- {note}" for note in check.notes]
    return "\n".join([line, "", *rows, "", legend, *([""] if notes else []), *notes, ""])


def _short(metric: Metric) -> str:
    change = points_cell(metric.change)
    points = "" if change.blank else f" {change.text} (margin {_margin(metric)})"
    return f"{NAMES[metric.name]}{points}: {metric.outcome}"


def junit(check: Check) -> str:
    """JUnit XML with one test case per metric.

    A metric that fails is a failure, one that is undecided or was not measured an error: skipped
    tests count as passed, and the gate must not open without a result. A metric that was left out
    is skipped.
    """
    results = [one.outcome for one in check.metrics]
    suite = ElementTree.Element(
        "testsuite",
        name="regraft check",
        tests=str(len(results)),
        failures=str(results.count("fail")),
        errors=str(results.count("undecided") + results.count("not measured")),
        skipped=str(results.count("left out")),
    )
    for metric in check.metrics:
        case = ElementTree.SubElement(
            suite, "testcase", classname="regraft.check", name=NAMES[metric.name]
        )
        kind = {"pass": "system-out", "fail": "failure", "left out": "skipped"}
        result = ElementTree.SubElement(case, kind.get(metric.outcome, "error"))
        if metric.outcome != "pass":
            result.set("message", sentence(metric))
        result.text = sentence(metric)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"
