"""Every answer of the shown models as data for the page's filter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from regraft.evaluation.results import Answer
from regraft.report.examples import Row, shown_variants
from regraft.report.model import Report, paired_answers
from regraft.report.words import clip, marked

MOST_BYTES = 3_000_000  # of the page, for answers
ANSWER_LENGTH, PROMPT_LENGTH = 800, 400


def answer_data(report: Report, most_bytes: int = MOST_BYTES) -> tuple[Markup, int, int]:
    """(JSON that may stand in a script element, prompts in it, all prompts).

    Texts stand there once, however often they come. Where all answers would be larger than
    `most_bytes`, the last prompts of each kind are left out.
    """
    variants = shown_variants(report)
    rows = paired_answers(variants)
    labels = [variant.label for variant in variants]
    kept, encoded = list(rows), ""
    while True:
        encoded = _encoded(labels, kept)
        if len(encoded.encode()) <= most_bytes or not kept:
            return Markup(encoded), len(kept), len(rows)
        share = 0.9 * most_bytes / len(encoded.encode())
        groups = [[row for row in kept if row[0].harmful == harmful] for harmful in (True, False)]
        kept = [row for group in groups for row in group[: int(share * len(group))]]


def _encoded(labels: Sequence[str], rows: Sequence[Row]) -> str:
    texts: dict[str, int] = {}

    def place(text: str) -> int:
        return texts.setdefault(text, len(texts))

    found = [
        {
            "id": row[0].id,
            "prompt": place(clip(row[0].instruction, PROMPT_LENGTH)),
            **_request(row[0], place),
            "category": row[0].category,
            "harmful": row[0].harmful,
            "image": row[0].image or "",
            "answers": [_answer(answer, place(_shown(answer))) for answer in row],
        }
        for row in rows
    ]
    content = {"models": list(labels), "texts": list(texts), "rows": found}
    # No "<" can then end the script element or open a comment in it.
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _request(answer: Answer, place: Callable[[str], int]) -> dict[str, int]:
    return {"request": place(clip(answer.request, PROMPT_LENGTH))} if answer.request else {}


def _answer(answer: Answer, text: int) -> list[Any]:
    complied = "complied" if answer.harmful else "answered"
    return [text, marked(answer, complied), answer.reason]


def _shown(answer: Answer) -> str:
    return clip(answer.answer.strip(), ANSWER_LENGTH)
