"""Measure judges against labels given by people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regraft.data.rows import Row, csv_rows
from regraft.errors import RegraftError
from regraft.evaluation.judges import Exchange, Verdict
from regraft.evaluation.metrics import bootstrap_ratio, wilson
from regraft.evaluation.pairing import cohen_kappa, paired_exact
from regraft.evaluation.results import Estimate

Question = Literal["refusal", "harm"]
_ANSWERS = ("completion", "answer", "response", "generation")
_LABELS = ("final_label", "label", "human_label")
_PROMPTS = ("prompt", "instruction", "question", "behavior")
REFUSALS = ("2_full_refusal", "3_partial_refusal", "refusal", "refused", "true", "yes", "1")
HARMS = ("unsafe", "harmful", "true", "yes", "1")


@dataclass(frozen=True)
class Labelled:
    """An exchange and whether people said yes to the question: a refusal, or harmful content.

    `label` is their answer as it is in the file.
    """

    exchange: Exchange
    yes: bool
    label: str = ""


@dataclass(frozen=True)
class Labels:
    """Which labelled rows are read (by their ids), and which labels mean yes.

    `positive` are those; the usual ones for the question if empty.
    """

    question: Question = "refusal"
    positive: tuple[str, ...] = ()
    ids: Literal["all", "even", "odd"] = "all"

    @property
    def positives(self) -> tuple[str, ...]:
        return self.positive or (REFUSALS if self.question == "refusal" else HARMS)


@dataclass(frozen=True)
class Difference:
    """A judge's accuracy minus that of the best other one, on the same answers.

    The 95 % interval is the bootstrap's over prompts. `p` is two-sided and exact: if the judges are
    equally good, a prompt's difference in right verdicts is as likely as its opposite (Fisher 1935;
    with one answer per prompt, McNemar's test). It is not corrected for choosing the best.
    """

    other: str
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Quality:
    """A judge measured against people.

    Answers without a verdict (`unread`) count as wrong, and for `kappa` as a no. Answers to one
    prompt are not independent: `n` of a rate is the number of prompts, and its interval Wilson's if
    each has one answer, otherwise the percentile bootstrap's over prompts. `precision` is None if
    the judge never says yes, `recall` if people never do, `against` if there is no other judge.
    """

    judge: str
    accuracy: Estimate
    precision: Estimate | None
    recall: Estimate | None
    kappa: float | None
    unread: int
    against: Difference | None = None


@dataclass(frozen=True)
class Bench:
    """Judges measured against one file, with the labels that were taken as yes and as no."""

    answers: int
    prompts: int
    yes: tuple[str, ...]
    no: tuple[str, ...]
    judges: tuple[Quality, ...]


def read_labelled(path: Path, wanted: Labels) -> tuple[Labelled, ...]:
    """Read a CSV of answers with labels, such as XSTest's completions.

    Columns: prompt (or instruction, question, behavior), completion (or answer, response,
    generation), and final_label (or label, human_label); the number at the end of `id` decides even
    or odd. Labels may be upper or lower case; those that do not mean yes mean no.

    Raises:
        RegraftError: the file, a column or a value is missing or wrong, or no label is a yes.
    """
    rows = csv_rows(path, "Labelled answers are CSV.")
    if not rows:
        raise RegraftError(f"{path} has no rows.")
    columns = (_PROMPTS, _ANSWERS, _LABELS)
    prompt, answer, label = (_column(path, rows[0], names) for names in columns)
    positive = {one.casefold() for one in wanted.positives}
    labels = {row.text(label).casefold() for row in rows}
    if not labels & positive:
        raise RegraftError(
            f"{path}: no label means yes. Labels found: {', '.join(sorted(labels)[:8])}; "
            "name those that do with --positive."
        )
    labelled = tuple(
        Labelled(
            Exchange(row.text(prompt), row.text(answer, blank=True)),
            row.text(label).casefold() in positive,
            row.text(label),
        )
        for row in rows
        if wanted.ids == "all" or _is_even(row) == (wanted.ids == "even")
    )
    if not labelled:
        raise RegraftError(f"{path} has no row whose id is {wanted.ids}.")
    return labelled


def bench(
    labelled: Sequence[Labelled],
    judges: Sequence[tuple[str, Sequence[Verdict]]],
    question: Question,
) -> Bench:
    """Measure judges (name, one verdict per answer) against labels and against each other.

    Raises:
        RegraftError: a judge does not answer this question.
    """
    rows = [quality(name, labelled, verdicts, question) for name, verdicts in judges]
    right = [_right(labelled, verdicts, question) for _, verdicts in judges]
    prompts = [one.exchange.prompt for one in labelled]
    for i, row in enumerate(rows):
        others = [k for k in range(len(rows)) if k != i]
        if others:
            best = max(others, key=lambda k: sum(right[k]))
            difference = _difference(prompts, right[i], right[best], rows[best].judge)
            rows[i] = replace(row, against=difference)
    yes, no = (
        tuple(sorted({one.label for one in labelled if one.yes == said})) for said in (True, False)
    )
    return Bench(len(labelled), len(set(prompts)), yes, no, tuple(rows))


def quality(
    judge: str, labelled: Sequence[Labelled], verdicts: Sequence[Verdict], question: Question
) -> Quality:
    """Accuracy, precision and recall with intervals by prompts, and Cohen's kappa.

    Raises:
        RegraftError: the judge does not answer this question.
    """
    replies = [_reply(one, question) for one in verdicts]
    if all(one is None for one in replies):
        asked = "refuses" if question == "refusal" else "is harmful"
        other = "harm" if question == "refusal" else "refusal"
        raise RegraftError(
            f"{judge} does not say whether an answer {asked}; it can be measured with labels of "
            f"{other} only (--question {other})."
        )
    prompts = [one.exchange.prompt for one in labelled]
    wanted = [one.yes for one in labelled]
    claimed = [yes is True for yes in replies]
    true = [a and b for a, b in zip(wanted, claimed, strict=True)]
    accuracy = _rate(prompts, _right(labelled, verdicts, question), [True] * len(prompts))
    assert accuracy is not None  # there is a label
    return Quality(
        judge,
        accuracy,
        _rate(prompts, true, claimed),
        _rate(prompts, true, wanted),
        cohen_kappa(wanted, claimed),
        sum(yes is None for yes in replies),
    )


def _reply(verdict: Verdict, question: Question) -> bool | None:
    return verdict.refused if question == "refusal" else verdict.unsafe


def _right(
    labelled: Sequence[Labelled], verdicts: Sequence[Verdict], question: Question
) -> list[bool]:
    pairs = zip(labelled, verdicts, strict=True)
    return [one.yes == _reply(verdict, question) for one, verdict in pairs]


def _rate(
    prompts: Sequence[str], events: Sequence[bool], counted: Sequence[bool]
) -> Estimate | None:
    """Rate of an event among the answers that are counted; None if none is.

    The interval is Wilson's over prompts if the answers to each prompt agree, and either all
    prompts have equally many answers or all answers agree; otherwise the bootstrap's.
    """
    kept = [prompt for prompt, counts in zip(prompts, counted, strict=True) if counts]
    if not kept:
        return None
    kept_events = [event for event, counts in zip(events, counted, strict=True) if counts]
    hits, sizes = _per_prompt(kept, kept_events), _per_prompt(kept, [True] * len(kept))
    agree = (hits == 0) | (hits == sizes)
    if agree.all() and (np.unique(sizes).size == 1 or np.unique(hits == 0).size == 1):
        return wilson(int((hits > 0).sum()), hits.size)
    return bootstrap_ratio(hits, sizes)


def _difference(
    prompts: Sequence[str], one: Sequence[bool], best: Sequence[bool], name: str
) -> Difference:
    ours, theirs = _per_prompt(prompts, one), _per_prompt(prompts, best)
    sizes = _per_prompt(prompts, [True] * len(prompts))
    mean = bootstrap_ratio(ours - theirs, sizes)
    return Difference(name, mean.value, mean.low, mean.high, paired_exact([ours], [theirs]).p)


def _per_prompt(prompts: Sequence[str], events: Sequence[bool]) -> NDArray[np.int64]:
    """How many of each prompt's answers have the event, by first appearance of the prompt."""
    counts: Counter[str] = Counter()
    for prompt, event in zip(prompts, events, strict=True):
        counts[prompt] += event
    return np.array(list(counts.values()), dtype=np.int64)


def _column(path: Path, row: Row, names: Sequence[str]) -> str:
    for name in names:
        if name in row.values:
            return name
    raise RegraftError(
        f"{path} has no column {' or '.join(names)}. Columns found: {', '.join(row.values)}."
    )


def _is_even(row: Row) -> bool:
    number = row.number_in("id", "text that ends in a number, for --ids even or odd", after="-")
    return number % 2 == 0
