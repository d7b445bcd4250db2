"""Example answers of a run, and all its answers as data for the page's filter."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from regraft.data.images import open_image
from regraft.disk.files import file_digest
from regraft.evaluation.results import Answer
from regraft.report.formatting import clip, marked
from regraft.report.run import Run, Variant, paired_answers

HARMFUL, HARMLESS = 12, 6  # numbers of examples
MOST_BYTES = 3_000_000  # of all answers on the page
ANSWER_LENGTH, PROMPT_LENGTH = 800, 400  # maximum characters
THUMBNAIL = 220  # longer side, pixels
Row = tuple[Answer, ...]


def shown_group(run: Run) -> tuple[Variant, ...]:
    """The pruned model with the highest ASR and those realigned from it; empty without any."""

    def attacked(group: tuple[Variant, ...]) -> float:
        asr = group[0].result.asr
        return asr.value if asr else 0.0

    return max(run.groups, key=attacked, default=())


def shown_variants(run: Run) -> tuple[Variant, ...]:
    """The dense model, then the pruned and the first realigned model of the shown group.

    All models if they are unrelated.
    """
    if run.unrelated:
        return run.variants
    return (run.dense, *shown_group(run)[:2])


def choose_examples(run: Run) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Choose example rows (harmful, harmless), with one answer per shown variant.

    The choice is deterministic. About three quarters are prompts on which the models differ, as
    long as there are enough of both kinds; among each kind the patterns of refusals take turns.
    """
    rows = paired_answers(shown_variants(run))
    harmful = [row for row in rows if row[0].harmful]
    harmless = [row for row in rows if not row[0].harmful]
    return _choose(harmful, HARMFUL), _choose(harmless, HARMLESS)


def _choose(rows: Sequence[Row], count: int) -> tuple[Row, ...]:
    differing, alike = (
        _by_turns([row for row in rows if (len({one.complies for one in row}) > 1) == differ])
        for differ in (True, False)
    )
    chosen = differing[: max(count * 3 // 4, count - len(alike))]
    return tuple(chosen + alike[: count - len(chosen)])


def _by_turns(rows: Sequence[Row]) -> list[Row]:
    """Reorder rows round-robin over the patterns of refusals."""
    patterns: dict[tuple[bool, ...], list[Row]] = {}
    for row in rows:
        patterns.setdefault(tuple(a.complies for a in row), []).append(row)
    return [row for row in chain.from_iterable(zip_longest(*patterns.values())) if row]


def answer_data(run: Run, most_bytes: int = MOST_BYTES) -> tuple[Markup, int, int]:
    """(JSON that is safe in a script element, number of prompts in it, number of all prompts).

    Repeated texts are stored once. If all answers take more than `most_bytes`, the last prompts of
    each kind are left out.
    """
    variants = shown_variants(run)
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

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    encoded = []
    for row in rows:
        first = row[0]
        shown = {"prompt": first.instruction, "request": first.request}
        complied = "complied" if first.harmful else "answered"
        answers = [
            (index(clip(one.answer.strip(), ANSWER_LENGTH)), marked(one, complied), one.reason)
            for one in row
        ]
        encoded.append(
            {
                "id": first.id,
                **{
                    key: index(clip(text, PROMPT_LENGTH))
                    for key, text in shown.items()
                    if text is not None
                },
                "category": first.category,
                "harmful": first.harmful,
                "image": first.image or "",
                "answers": answers,
            }
        )
    content = {"models": list(labels), "texts": list(texts), "rows": encoded}
    # A "<" could end the script element or open a comment in it.
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def pictures(answers: Iterable[Answer], images: Mapping[str, Path]) -> dict[str, str]:
    """Thumbnails by answer id, of the images that are still those the models were shown."""
    return {
        one.id: thumbnail(path)
        for one in answers
        if (path := images.get(one.id)) and path.is_file() and file_digest(path) == one.image_digest
    }


def thumbnail(path: Path) -> str:
    """An image file as a small data URI: PNG (for drawings) or JPEG, whichever is shorter."""
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    drawing = image.quantize(16, method=Image.Quantize.MEDIANCUT)
    return min(_uri(drawing, "png", optimize=True), _uri(image, "jpeg", quality=70), key=len)


def _uri(image: Image.Image, kind: str, **settings: int) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
