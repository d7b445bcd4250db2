"""Rows of CSV, JSON and Parquet files, with errors that name file, row and field."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from regraft.data.example import Example, Reading
from regraft.data.images import locate_images
from regraft.data.parquet import is_parquet, records
from regraft.disk.parsing import read_json, shown
from regraft.disk.paths import is_text, read_text, require_file, unreadable
from regraft.errors import RegraftError

_MOST_TEXT = 2**20  # characters; no model reads more
_MOST_DIGITS = 18  # of a whole number, so that it fits 64 bits


@dataclass(frozen=True)
class Row:
    """A JSON object or CSV record and where it was found ("train.json, row 12")."""

    where: str
    values: Mapping[str, Any]
    key: str = ""  # its number or name in the file

    @classmethod
    def of(cls, where: str, value: object, key: str | int = "") -> Row:
        if not isinstance(value, dict):
            raise RegraftError(f"{where}: expected an object with fields, found {shown(value)}.")
        return cls(where, value, str(key))

    def text(self, field: str, *, blank: bool = False) -> str:
        """Return a required string, which may be empty or white space only if `blank`."""
        value = self.optional_text(field)
        if value is None:
            raise self.wrong_type(field, "a string")
        if not (blank or value.strip()):
            raise RegraftError(f"{self.where}: the field {field!r} is empty.")
        return value

    def optional_text(self, field: str) -> str | None:
        """Return a string, or None where the field is absent or null."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, str):
            raise self.wrong_type(field, "a string")
        return value

    def flag(self, field: str, default: bool | None = None) -> bool:
        """Return a boolean; `default` where the field is absent (None: it must be there)."""
        value = self.values.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong_type(field, "true or false")
        return value

    def texts(self, field: str, expected: str, *, least: int = 1) -> list[str]:
        """Return a list of at least `least` strings."""
        value = self.values.get(field)
        if not isinstance(value, list) or len(value) < least:
            raise self.wrong_type(field, expected)
        if not all(isinstance(one, str) for one in value):
            raise self.wrong_type(field, expected)
        return value

    def name(self, field: str) -> str:
        """Return an identifier, a string or a number, as a string."""
        value = self.values.get(field)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise self.wrong_type(field, "a string or a number")
        return str(value)

    def number_in(self, field: str, expected: str, *, after: str = "") -> int:
        """Return the whole number in a text: all of it, or what follows the last `after`."""
        text = self.text(field)
        digits = text.rpartition(after)[2] if after else text
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS):
            raise self.wrong_type(field, expected)
        return int(digits)

    def refuse_misspelt(self, known: Collection[str]) -> None:
        """Raise where an unknown field is spelt almost like a known one that is absent."""
        absent = [name for name in known if name not in self.values]
        for field in (name for name in self.values if name not in known):
            if meant := get_close_matches(field, absent, n=1, cutoff=0.75):
                raise RegraftError(
                    f"{self.where}: unknown field {field!r}; did you mean {meant[0]!r}?"
                )

    def wrong_type(self, field: str, expected: str) -> RegraftError:
        """Make the error for a field of the wrong type, or a missing one."""
        if field not in self.values:
            return RegraftError(
                f"{self.where}: the field {field!r} is missing; expected {expected}. "
                f"Fields found: {', '.join(self.values) or 'none'}."
            )
        found = shown(self.values[field])
        return RegraftError(f"{self.where}: the field {field!r} must be {expected}, found {found}.")


def csv_rows(path: Path, what: str, *, tabs: bool = False) -> list[Row]:
    """Read a table with a header line, CSV or (`tabs`) TSV, or one in Parquet, values as text.

    Raises:
        RegraftError: the file is missing (`what` says what it should be), is not such a table, or
            a row has more or fewer cells than the header.
    """
    if is_parquet(path):
        return table_rows(path, what, as_text=True)
    csv.field_size_limit(2**31 - 1)  # cells may hold images in base64
    lines = io.StringIO(read_text(path, what), newline="")
    table = csv.DictReader(lines, delimiter="\t" if tabs else ",", restkey="(more)", strict=True)
    try:
        header = table.fieldnames or ()
        if twice := [name for name, count in Counter(header).items() if name and count > 1]:
            raise RegraftError(f"{path} has two columns {twice[0]!r}. Rename or remove one.")
        rows = [
            Row(f"{path}, row {number}", values, str(number))
            for number, values in enumerate(table, 1)
        ]
    except csv.Error as error:
        raise RegraftError(
            f"{path} is not valid CSV: {error}. It is cut off, or a quote in a cell is not doubled."
        ) from error
    for row in rows:
        if "(more)" in row.values or None in row.values.values():
            raise RegraftError(
                f"{row.where} has more or fewer cells than the header; the file is cut off, or a "
                "cell with a comma or line break has no quotes."
            )
        if wrong := [name for name, cell in row.values.items() if "\0" in cell]:
            raise RegraftError(
                f"{row.where}: the field {wrong[0]!r} holds a NUL character, which is not text."
            )
    return rows


def table_rows(path: Path, what: str, *, as_text: bool = False) -> list[Row]:
    """Read a Parquet table, all its shards; see `regraft.data.parquet.records`."""
    found = enumerate(records(path, what, as_text=as_text), start=1)
    return [Row(where, values, str(number)) for number, (where, values) in found]


def require_end(path: Path, what: str) -> None:
    """Raise where a text file lacks the published file's line break at the end: it is cut off."""
    if is_parquet(path):  # has an end mark of its own
        return
    size = require_file(path)
    with unreadable(path), path.open("rb") as handle:
        handle.seek(max(0, size - 1))
        ended = handle.read() == b"\n"
    if not ended:
        raise RegraftError(
            f"{path} is cut off: {what} ends in a line break, and this file does not. Get it "
            "again; if it is whole, add a line break at its end."
        )


def json_rows(path: Path, what: str, unit: str, *, inside: str = "") -> list[Row]:
    """Read the objects of a JSON file, in a list or by name ({"1": {...}}), or a Parquet table.

    `unit` is what messages call an object, `inside` the field that holds the list, if any.

    Raises:
        RegraftError: the file is missing (`what` says what it should be), is not JSON, or holds
            something else.
    """
    if is_parquet(path):
        return table_rows(path, what)
    content = read_json(path, what)
    if inside:
        content = content.get(inside) if isinstance(content, dict) else None
        if not isinstance(content, list):
            raise RegraftError(f"{path}: expected an object with a list `{inside}`.")
    if not isinstance(content, list | dict):
        raise RegraftError(
            f"{path}: expected a list with an object for each {unit}, or an object of them by name."
        )
    named = content.items() if isinstance(content, dict) else enumerate(content, start=1)
    return [Row.of(f"{path}, {unit} {key}", value, key) for key, value in named]


def text_lines(path: Path, what: str) -> list[str]:
    """Read the lines of a text file; unlike `str.splitlines`, only line breaks end a line."""
    return io.StringIO(read_text(path, what), newline=None).read().split("\n")


def checked(reading: Reading, *roots: Path) -> Reading:
    """Check a finished reading, and find its images below `roots` if any are given.

    Raises:
        RegraftError: it has no example, two with the same id, or a text that cannot be used; see
            also `locate_images`.
    """
    if not reading.examples:
        reasons = "; ".join(f"{count} {reason}" for reason, count in reading.skipped.items())
        raise RegraftError(
            f"{reading.source}: no examples. "
            + (f"Rows left out: {reasons}." if reasons else "The file has no rows.")
        )
    seen: dict[str, Example] = {}
    for example in reading.examples:
        _require_text(example, reading.source)
        if example.id in seen:
            raise RegraftError(
                f"{reading.source}: the id {example.id!r} is used twice, for the instructions "
                f"{shown(seen[example.id].instruction)} and {shown(example.instruction)}. "
                "Ids must be unique."
            )
        seen[example.id] = example
    return locate_images(reading, roots) if roots else reading


def _require_text(example: Example, source: str) -> None:
    """Raise where a text is too long, or cannot be saved with the answers, which would be lost."""
    texts = {"id": example.id, "instruction": example.instruction, "category": example.category}
    texts |= {"response": example.response or "", "image": str(example.image or "")}
    texts |= {"system": example.system}
    for field, text in texts.items():
        if len(text) > _MOST_TEXT:
            raise RegraftError(
                f"{source}: {field} of the example {example.id[:60]!r} has {len(text):,} "
                f"characters; at most {_MOST_TEXT:,} are read."
            )
        if not is_text(text) or (field in ("id", "image") and "\0" in text):
            raise RegraftError(
                f"{source}: {field} of the example {example.id!r} holds bytes that are not text: "
                f"{text[:60]!r}."
            )
