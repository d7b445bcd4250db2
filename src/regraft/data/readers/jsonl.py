"""A data set of your own: one JSON object per line, or the same fields as columns of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.parquet import is_parquet
from regraft.data.readers import Dataset
from regraft.data.rows import Row, checked, table_rows, text_lines
from regraft.disk.parsing import json_value
from regraft.errors import RegraftError

_FIELDS = (
    *("id", "split", "image", "instruction", "response", "content"),
    *("harmful", "category", "request"),
)
_OTHER_LABELS = {
    *("unsafe", "safe", "is_safe", "is_unsafe", "safety", "toxic", "label"),
    *("harm", "is_harm", "is_harmful", "malicious", "is_malicious"),
}


def read_jsonl(path: Path, split: str | None = None) -> Reading:
    """Read JSON lines, or a table in Parquet.

    Each line has `instruction` and may have `image` (a path relative to the file), `response`,
    `harmful` (default false), `category` (default "uncategorised"), `id` (default
    "FILE-LINE"), `split`, `request` (the actual request, where the image carries it) and `content`
    (the part of `response` that answers are compared with). Other fields and blank lines are
    ignored. With `split`, rows of other splits are counted in `skipped`.

    Raises:
        RegraftError: the file, a field or an image is missing or wrong, ids repeat, no row is in
            the split, or only a field other than `harmful` says which prompts are harmful.
    """
    rows = list(_rows(path))
    splits = {row.optional_text("split") for row in rows}
    if split is not None and split not in splits:
        names = ", ".join(sorted(name for name in splits if name)) or "none"
        raise RegraftError(f"{path}: there is no split {split!r}. Splits found: {names}.")
    kept = [row for row in rows if split in (None, row.values.get("split"))]
    skipped = {f"not in split {split!r}": len(rows) - len(kept)}
    reading = Reading(str(path), tuple(_example(row, path) for row in kept), skipped)
    if reading.examples:
        _require_harmful(rows, path)
    return checked(reading, path.parent)


def _require_harmful(rows: Sequence[Row], path: Path) -> None:
    """Raise where only a field other than `harmful` marks prompts, so all would be harmless."""
    if any("harmful" in row.values for row in rows):
        return
    for name in (name for row in rows for name in row.values):
        if name.lower() in _OTHER_LABELS:
            raise RegraftError(
                f"{path}: no row has the field 'harmful', so all would count as harmless, but "
                f"rows have a field {name!r}. Add 'harmful': true to the harmful ones."
            )


def _rows(path: Path) -> Iterator[Row]:
    if is_parquet(path):
        yield from table_rows(path, "Expected a table with a column instruction.")
        return
    lines = text_lines(path, "Expected JSON lines.")
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        raise RegraftError(
            f"{path} is a JSON array; expected JSON lines: one object per line, without brackets "
            "around them or commas between them."
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
    """The part of the response that answers are compared with; "" for all of it."""
    content, response = row.optional_text("content") or "", row.optional_text("response") or ""
    if content not in response:
        raise RegraftError(
            f"{row.where}: 'content' must be a part of 'response', the one that answers are "
            f"compared with; {content!r} is not in it. Copy it from there, or leave 'content' out."
        )
    return content


PLUGIN = Dataset(read_jsonl, splits=None)
