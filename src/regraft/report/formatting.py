"""Formatting of numbers and names on all pages and on the console."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.evaluation.labelled import Difference
    from regraft.evaluation.noninferiority import Rise
    from regraft.evaluation.results import Answer, Estimate, EvalResult, TextResult
    from regraft.evaluation.verdicts import Agreement
    from regraft.report.study import Recovered, Row, Spread, Tested

DASH = "–"
UNCHECKED = "†"
_ADDRESS = re.compile(r"(?P<name>[\w-]+):(?P<path>.*?)(?P<marks>(?:#[\w-]+)*)", re.DOTALL)
_GENERIC = ("jsonl", "prompts", "benign")  # readers of any data set


@dataclass(frozen=True)
class Cell:
    """A table cell: a value with its interval and a note; a dash if nothing was measured.

    `kind` is a class of the style sheet, `number` the model's number in figures, `title` a tooltip.
    """

    value: str = DASH
    interval: str = ""
    note: str = ""
    kind: str = ""
    number: int = 0
    title: str = ""

    @property
    def blank(self) -> bool:
        return self.value == DASH

    @property
    def text(self) -> str:
        """The cell in one line: "25.0 % [14.2, 40.2], 10 of 40"."""
        return ", ".join(
            filter(None, (" ".join(filter(None, (self.value, self.interval))), self.note))
        )


@dataclass(frozen=True)
class Grid:
    """A table for display; the first cell of a row is its heading."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    @classmethod
    def of(
        cls,
        title: str,
        headings: Iterable[str],
        rows: Iterable[Iterable[Cell | str]],
        caption: str = "",
    ) -> Grid:
        """A table of cells and texts; an empty text becomes a dash."""
        cells = (
            tuple(Cell(one or DASH) if isinstance(one, str) else one for one in row) for row in rows
        )
        return cls(title, tuple(headings), tuple(cells), caption)


def percent(fraction: float) -> str:
    """0.144 -> "14.4 %"."""
    return f"{100 * fraction:.1f} %"


def short_percent(fraction: float) -> str:
    """0.6 -> "60 %", 0.625 -> "62.5 %"."""
    return f"{round(100 * fraction, 1):g} %"


def interval(low: float, high: float) -> str:
    """A 95 % interval of fractions, in per cent: "[10.6, 19.3]"."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def rate_cell(estimate: Estimate | None) -> Cell:
    """A rate or mean in per cent, with its interval and count or n."""
    if estimate is None:
        return Cell()
    count, n = estimate.count, estimate.n
    note = f"n = {n:,}" if count is None else f"{count:,} of {n:,}"
    return Cell(percent(estimate.value), interval(estimate.low, estimate.high), note)


def rate(estimate: Estimate | None) -> str:
    """A rate with its interval, without n: "14.4 % [10.6, 19.3]"."""
    return replace(rate_cell(estimate), note="").text


def points_cell(estimate: Estimate | Difference | Rise | None) -> Cell:
    """A difference of rates in points: "+1.3 [-0.7, +3.3]"."""
    if estimate is None:
        return Cell()
    # adding 0.0 turns -0.0 into 0.0
    value, low, high = (100 * x + 0.0 for x in (estimate.value, estimate.low, estimate.high))
    return Cell(f"{value:+.1f}", f"[{low:+.1f}, {high:+.1f}]")


def number_cell(estimate: Estimate | None) -> Cell:
    """A number that is not a rate, to three digits: "4.19 [3.92, 4.51]"."""
    if estimate is None:
        return Cell()
    return Cell(f"{estimate.value:.3g}", f"[{estimate.low:.3g}, {estimate.high:.3g}]")


def share(value: float) -> str:
    """Restored weights per 10,000, to three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def passes(value: float) -> str:
    """Passes over the calibration prompts: "0", "< 0.1", "12.3", "1,240.0"."""
    if value == 0:
        return "0"
    return "< 0.1" if value < 0.1 else f"{value:,.1f}"


def spread_cell(spread: Spread | None, write: Callable[[float], str]) -> Cell:
    """A mean with the range of its values, if they differ: "15.5", "14.9 to 16.2"."""
    if spread is None:
        return Cell()
    least, most = write(spread.least), write(spread.most)
    return Cell(write(spread.mean), note="" if least == most else f"{least} to {most}")


def rsr_cell(recovered: Recovered | None) -> Cell:
    """RSR in per cent with its interval, and the RSR of each of several seeds."""
    if recovered is None:
        return Cell()
    if recovered.value is None:
        return Cell("undefined", note="pruning did not raise ASR")
    around = interval(*recovered.interval) if recovered.interval else ""
    seeds = ["undefined" if s is None else f"{100 * s:.1f}" for s in recovered.by_seed]
    notes = (
        "" if around else "no interval: the rise in ASR is uncertain",
        f"by seed {', '.join(seeds)}" if len(seeds) > 1 else "",
    )
    return Cell(percent(recovered.value), around, "; ".join(filter(None, notes)))


def p_value(p: float) -> str:
    """A p value: "p = 0.012", or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def tested_cell(test: Tested | None) -> Cell:
    """p, the Holm-corrected p in brackets if it differs, and the outcome."""
    if test is None:
        return Cell()
    adjusted = (
        "" if test.adjusted == test.p else f"(Holm {p_value(test.adjusted)[2:].lstrip('= ')})"
    )
    return Cell(p_value(test.p), adjusted, test.verdict, f"outcome {test.outcome.split()[0]}")


def tested(test: Tested | None) -> str:
    """A test in a sentence, with the Holm-corrected p: "better than pruned (p = 0.012)"."""
    return "not tested" if test is None else f"{test.verdict} ({p_value(test.adjusted)})"


def pattern(row: Row) -> str:
    """What restoring did to an N:M pattern: "breaks 12 of 400 2:4 groups"; "" without a pattern."""
    first = row.first
    if first.n_m is None or row.violated is None:
        return ""
    if not row.violated.most:
        return f"keeps all {first.groups:,} {first.n_m} groups"
    return f"breaks {row.violated.mean:,.0f} of {first.groups:,} {first.n_m} groups"


def on_text(result: TextResult) -> str:
    """The text of perplexity and KL: "5,301 tokens of 40 documents"."""
    return f"{result.tokens:,} tokens of {result.perplexity.n:,} documents"


def degenerate(result: EvalResult) -> str:
    """Number of degenerate answers: "3 of 250 to harmful prompts, 1 of 200 to harmless prompts".

    If there are any, degenerate refusals follow: "(refusals that are degenerate too: 2 of 90 to
    harmful prompts)".
    """
    counted, refusals = (
        ", ".join(
            f"{count:,} of {_total(result, kind, refused=bool(suffix)):,} to {kind} prompts"
            for kind in ("harmful", "harmless")
            if (count := result.degenerate.get(kind + suffix, 0))
        )
        for suffix in ("", " refusals")
    )
    also = f" (refusals that are degenerate too: {refusals})" if refusals else ""
    return (counted or "none") + also


def _total(result: EvalResult, kind: str, *, refused: bool) -> int:
    """Number of answers to prompts of a kind, or only of the refusals among them."""
    answers = [one for one in result.answers if one.harmful == (kind == "harmful")]
    return sum(one.refused for one in answers) if refused else len(answers)


def marked(answer: Answer, complied: str) -> str:
    """The outcome of an answer, with a symbol; `complied` is the word for one that complies."""
    if answer.refused:
        return f"■ refused, {answer.degenerate}" if answer.degenerate else "■ refused"
    return f"▨ {answer.degenerate}" if answer.degenerate else f"□ {complied}"


def agreed(agreement: tuple[Agreement, ...], *, harmful: bool) -> Cell:
    """How often two judges agree on a kind of prompts, with n and Cohen's kappa."""
    found = next((one for one in agreement if one.harmful == harmful), None)
    if found is None:
        return Cell()
    note = f"n = {found.share.n:,}, kappa {kappa(found.kappa)}"
    return replace(rate_cell(found.share), note=note)


def kappa(value: float | None) -> str:
    """Cohen's kappa to two digits; "undefined" if both judges always give the same verdict."""
    return "undefined" if value is None else f"{value:z.2f}"


def clip(text: str, length: int) -> str:
    """At most `length` characters of `text`, followed by the number of those left out."""
    more = len(text) - length
    return text if more <= 0 else f"{text[:length].rstrip()} … [{more:,} more characters]"


def unbroken(text: str) -> str:
    """Keep a number and its unit, a relation and its number, an interval, on one line."""
    return re.sub(r" (?=%|[<=] )|(?<=[<=]) |(?<=\[)(\S+) (?=\S+\])", "\\1\u00a0", text)


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min", 61.2 -> "1 min 1 s", 4.26 -> "4.3 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def operations(flops: float) -> str:
    """2.34e12 -> "2.34 TFLOP"."""
    for power, prefix in zip(range(7, 1, -1), "ZEPTGM", strict=True):
        number = flops / 1000**power
        if number >= 0.9995:  # rounds to 1
            return f"{number:.3g} {prefix}FLOP" if number < 999.5 else f"{number:,.0f} {prefix}FLOP"
    return f"{flops:,.0f} FLOP"


def memory(count: int) -> str:
    """Bytes: "640 MiB", "1.2 GiB", "79 GiB"."""
    mebibytes = round(count / 2**20)
    if mebibytes < 1024:
        return f"{mebibytes} MiB"
    return f"{count / 2**30:.2g} GiB" if count < 10 * 2**30 else f"{count / 2**30:,.0f} GiB"


def short_names(suites: Iterable[str]) -> dict[str, str]:
    """Suite -> "safebench#even", "vlguard-test": its data set, or its file if that says more.

    If two names would be equal, all get data set and file; if that is not enough, the full names.
    """
    full = tuple(suites)
    for shorten in (_short, public_suite):
        found = {suite: shorten(suite) for suite in full}
        if len(set(found.values())) == len(found):
            return found
    return {suite: suite for suite in full}


def _short(suite: str) -> str:
    found = _ADDRESS.fullmatch(suite)
    if found is None or found["name"] == "demo":
        return suite
    file = re.sub(r"(?<=.)\.\w+$", "", Path(found["path"]).name)
    return (file if found["name"] in _GENERIC else found["name"]) + found["marks"]


def public_suite(suite: str) -> str:
    """The suite without folders of this machine; a suite on the hub is unchanged."""
    return suite if ":hf:" in suite else re.sub(r":.*/", ":", suite)


def file_names(source: str) -> str:
    """The file names of a reading's source, which is one path or several with commas."""
    return ", ".join(Path(one).name for one in source.split(", "))
