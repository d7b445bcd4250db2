"""MMBench (Liu et al. 2024, arXiv 2307.06281): multiple choice, asked with the options rotated."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset
from regraft.data.rows import Row, checked, csv_rows
from regraft.data.storage import cached_image
from regraft.errors import RegraftError

CIRCULAR = 1_000_000  # index of a rotated copy: base + k * CIRCULAR
_LETTERS = "ABCDE"
_ENDING = "Answer with the option's letter from the given choices directly."
_MISSING = ("", "nan")
_SHORT = 64  # a cell of at most this many characters is another row's index, not an image
_WHAT = "MMBench is a TSV file such as MMBench_DEV_EN.tsv."


def read_mmbench(path: Path) -> Reading:
    """Read a TSV with answers, such as MMBench_DEV_EN.tsv, including rotated copies.

    Columns: index, question, hint, A to E (empty for fewer options), answer, category and image in
    base64; a rotated copy may have the index of the row with its image instead. The prompt is
    lmms-eval's: hint, question, options, and the request for a letter. The copies of a question are
    a group, which counts as right if every copy is; a question with fewer copies than options is
    left out. A file without any rotated copy gives plain accuracy, and its source says so. Images
    are written to the user's cache.

    Raises:
        RegraftError: the file, a column or a value is missing or wrong, an index repeats, or the
            file has no answers (the test split has none: its owners score it).
    """
    rows = csv_rows(path, _WHAT, tabs=True)
    if rows and "answer" not in rows[0].values:
        raise RegraftError(
            f"{path} has no column answer: the test split is scored by its owners. Use the dev "
            "split, MMBench_DEV_EN.tsv."
        )
    cells = {row.text("index"): row.text("image") for row in rows}
    images: dict[str, Path] = {}
    examples = tuple(_example(row, cells, images) for row in rows)
    return checked(_circular(Reading(str(path), examples)))


def _circular(reading: Reading) -> Reading:
    """Keep complete groups only; count the examples of the others in `skipped`."""
    copies = Counter(example.group for example in reading.examples)
    if all(count == 1 for count in copies.values()):
        return replace(reading, source=f"{reading.source} (no rotated copies: plain accuracy)")
    complete = (one for one in reading.examples if copies[one.group] >= len(one.choices))
    return reading.keep(complete, "rotated copies missing")


def _example(row: Row, cells: dict[str, str], images: dict[str, Path]) -> Example:
    index, number = row.text("index"), row.number_in("index", "a whole number")
    options = {letter: _cell(row, letter) for letter in _LETTERS if letter in row.values}
    choices = tuple(text for text in options.values() if text)
    given = "".join(letter for letter, text in options.items() if text)
    if len(choices) < 2 or not _LETTERS.startswith(given):
        raise RegraftError(f"{row.where}: expected two or more options A, B, ... without a gap.")
    answer = row.text("answer").strip().upper()
    if len(answer) != 1 or answer not in given:
        raise row.wrong_type("answer", f"the letter of an option, one of {given}")
    lines = [f"{letter}. {text}" for letter, text in zip(given, choices, strict=True)]
    hint = _cell(row, "hint")
    question = f"{hint} {row.text('question')}" if hint else row.text("question")
    prompt = "\n".join([f"{question} There are several options:", *lines, "", _ENDING])
    base = number % CIRCULAR
    return Example(
        id=f"mmbench-{index}",
        instruction=prompt,
        harmful=False,
        category=_cell(row, "category") or "uncategorised",
        image=_image(row, cells, images),
        response=answer,
        choices=choices,
        group=f"mmbench-{base}",
    )


def _cell(row: Row, name: str) -> str:
    text = (row.optional_text(name) or "").strip()
    return "" if text in _MISSING else text


def _image(row: Row, cells: dict[str, str], images: dict[str, Path]) -> Path:
    text = row.text("image")
    if len(text) <= _SHORT and text in cells and len(cells[text]) > _SHORT:
        text = cells[text]
    if text not in images:
        try:
            content = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise RegraftError(
                f"{row.where}: the field 'image' is neither an image in base64 nor the index of a "
                f"row with one: {error}."
            ) from error
        images[text] = cached_image(content)
    return images[text]


PLUGIN = Dataset(lambda path, _split: read_mmbench(path), only="harmless")
