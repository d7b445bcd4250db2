"""A data set of your own: one JSON object a line, or the same fields as columns of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.parquet import is_parquet
from regraft.data.rows import Row, checked, table_rows, text_lines
from regraft.disk.parsing import json_value
from regraft.errors import RegraftError

_FIELDS = (
    *("id", "split", "image", "instruction", "response", "content"),
    *("harmful", "category", "request"),
)
_SAYS_SO = {
    *("unsafe", "safe", "is_safe", "is_unsafe", "safety", "toxic", "label"),
    *("harm", "is_harm", "is_harmful", "malicious", "is_malicious"),
}


def read_jsonl(path: Path, split: str | None = None) -> Reading:
    """Read JSON lines, or a table in Parquet.

    Each line has `instruction` and may have `image` (a path relative to the file), `response`,
    `harmful` (default false), `category` (default "uncategorised"), `id` (default
    "FILE-LINE"), `split`, `request`, what is really asked where the image shows it, and `content`,
    the part of `response` that answers are compared in. Other fields and blank lines are ignored.
    With `split`, rows of other splits are counted in `skipped`.

    Raises:
        RegraftError: the file, a field or an image is missing or wrong, ids repeat, no row fits, or
            another field than `harmful` says which are.
    """
    rows = list(_rows(path))
    splits = {row.optional_text("split") for row in rows}
    if split is not None and split not in splits:
        names = ", ".join(sorted(name for name in splits if name)) or "none"
        raise RegraftError(f"{path}: there is no split {split!r}. Splits found: {names}.")
    kept = [row for row in rows if split in (None, row.values.get("split"))]
    skipped = {f"not in split {split!r}": len(rows) - len(kept)} if len(kept) < len(rows) else {}
    reading = Reading(str(path), tuple(_example(row, path) for row in kept), skipped)
    if reading.examples:
        _require_harmful(rows, path)
    return checked(reading, path.parent)


def _require_harmful(rows: Sequence[Row], path: Path) -> None:
    """Raise where another field than `harmful` marks harmful prompts: all would be harmless."""
    if any("harmful" in row.values for row in rows):
        return
    for name in (name for row in rows for name in row.values):
        if name.lower() in _SAYS_SO:
            raise RegraftError(
                f"{path}: no row has the field 'harmful', so that all would be harmless, but there "
                f"is {name!r}. Write 'harmful': true into those that are."
            )


def _rows(path: Path) -> Iterator[Row]:
    if is_parquet(path):
        yield from table_rows(path, "Expected is a table with a column instruction.")
        return
    lines = text_lines(path, "Expected are JSON lines.")
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        raise RegraftError(
            f"{path} is a JSON array, and JSON lines are expected: one object a line, without "
            "brackets around them or commas behind."
        )
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if line.strip():
            yield Row.of(where, json_value(line, where), number)


def _example(row: Row, path: Path) -> Example:
    row.refuse_misspelt(_FIELDS)
    image = row.optional_text("image")
    return Example(
        id=f"{path.stem}-{row.key}" if row.values.get("id") in (None, "") else row.name("id"),
        instruction=row.text("instruction"),
        harmful=row.flag("harmful", default=False),
        category=row.optional_text("category") or "uncategorised",
        image=Path(image) if image else None,
        response=row.optional_text("response"),
        request=row.optional_text("request") or None,
        content=_content(row),
    )


def _content(row: Row) -> str:
    """The part of the response that answers are compared in, "" where it is all of it."""
    content, response = row.optional_text("content") or "", row.optional_text("response") or ""
    if content not in response:
        raise RegraftError(
            f"{row.where}: 'content' is the part of 'response' that answers are compared in, and "
            f"{content!r} does not stand in it. Copy it from there, or leave 'content' out."
        )
    return content
