"""How good a judge is: its verdicts against labels that people gave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.data.rows import Row, csv_rows
from regraft.errors import RegraftError
from regraft.evaluation.metrics import cohen_kappa, wilson
from regraft.evaluation.results import Estimate
from regraft.evaluation.verdicts import Exchange, Verdict

Question = Literal["refusal", "harm"]
_ANSWERS = ("completion", "answer", "response", "generation")
_LABELS = ("final_label", "label", "human_label")
_PROMPTS = ("prompt", "instruction", "question", "behavior")
REFUSALS = ("2_full_refusal", "3_partial_refusal", "refusal", "refused", "true", "yes", "1")
HARMS = ("unsafe", "harmful", "true", "yes", "1")


@dataclass(frozen=True)
class Labelled:
    """An exchange and whether people said yes to the question: a refusal, or harmful content."""

    exchange: Exchange
    yes: bool


@dataclass(frozen=True)
class Quality:
    """A judge against people. `unread` answers, of which it says nothing, count as wrong, and
    for `kappa` as a no.

    `precision` is None where the judge says yes to nothing, `recall` where people do.
    """

    judge: str
    accuracy: Estimate
    precision: Estimate | None
    recall: Estimate | None
    kappa: float | None
    unread: int


def read_labelled(
    path: Path, positive: Collection[str] = (), *, ids: Literal["all", "even", "odd"] = "all"
) -> tuple[Labelled, ...]:
    """Read a CSV of answers with labels, such as XSTest's completions.

    Columns: prompt (or instruction, question, behavior), completion (or answer, response,
    generation), and final_label (or label, human_label). A label in `positive` is a yes, in any
    capitals; every other one is a no.

    Args:
        path: The file.
        positive: Labels that mean yes; at least one must be in the file.
        ids: Keep the rows whose column `id` ends in an even or odd number.

    Raises:
        RegraftError: the file, a column or a value is missing or wrong, or no label is a yes.
    """
    rows = csv_rows(path, "Labelled answers are CSV.")
    if not rows:
        raise RegraftError(f"{path} has no rows.")
    columns = (_PROMPTS, _ANSWERS, _LABELS)
    prompt, answer, label = (_column(path, rows[0], names) for names in columns)
    wanted = {one.casefold() for one in positive or REFUSALS}
    labels = {row.text(label).casefold() for row in rows}
    if not labels & wanted:
        raise RegraftError(
            f"{path}: no label means yes. Labels found: {', '.join(sorted(labels)[:8])}; "
            "say which do with --positive."
        )
    found = tuple(
        Labelled(
            Exchange(row.text(prompt), row.text(answer, blank=True)),
            row.text(label).casefold() in wanted,
        )
        for row in rows
        if ids == "all" or (_number(row) % 2 == 0) == (ids == "even")
    )
    if not found:
        raise RegraftError(f"{path} has no row whose id is {ids}.")
    return found


def quality(
    judge: str, labelled: Sequence[Labelled], verdicts: Sequence[Verdict], question: Question
) -> Quality:
    """Accuracy, precision and recall with Wilson intervals, and Cohen's kappa.

    Raises:
        RegraftError: the judge does not answer this question.
    """
    said = [one.refused if question == "refusal" else one.unsafe for one in verdicts]
    if all(one is None for one in said):
        asked = "refuses" if question == "refusal" else "does harm"
        other = "harm" if question == "refusal" else "refusal"
        raise RegraftError(
            f"{judge} does not say whether an answer {asked}; it can be measured with labels of "
            f"{other} only (--question {other})."
        )
    pairs = list(zip(labelled, said, strict=True))
    right = sum(one.yes == yes for one, yes in pairs)
    true = sum(one.yes and yes is True for one, yes in pairs)
    claimed = sum(yes is True for yes in said)
    wanted = sum(one.yes for one in labelled)
    return Quality(
        judge,
        wilson(right, len(pairs)),
        wilson(true, claimed) if claimed else None,
        wilson(true, wanted) if wanted else None,
        cohen_kappa([one.yes for one in labelled], [yes is True for yes in said]),
        sum(yes is None for yes in said),
    )


def _column(path: Path, row: Row, names: Sequence[str]) -> str:
    for name in names:
        if name in row.values:
            return name
    raise RegraftError(
        f"{path} has no column {' or '.join(names)}. Columns found: {', '.join(row.values)}."
    )


def _number(row: Row) -> int:
    digits = row.text("id").rpartition("-")[2]
    if not digits.isdecimal():
        raise row.wrong_type("id", "text that ends in a number, to tell even from odd")
    return int(digits)
