"""The two formats that several data sets share.

`read_jsonl`: a data set of your own, one JSON object per line or the same fields as columns of a
table. `read_prompts`: AdvBench, HarmBench, JailbreakBench, StrongREJECT, or your own lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.parquet import is_parquet
from regraft.data.rows import Row, checked, csv_rows, require_end, table_rows, text_lines
from regraft.disk.parsing import json_value, read_json
from regraft.errors import RegraftError

_FIELDS = (
    *("id", "split", "image", "system", "instruction", "response", "content"),
    *("harmful", "category", "request"),
)
_OTHER_SYSTEM = {"system_prompt", "system_message"}
_OTHER_LABELS = {
    *("unsafe", "safe", "is_safe", "is_unsafe", "safety", "toxic", "label"),
    *("harm", "is_harm", "is_harmful", "malicious", "is_malicious"),
}
# The first that exists is read: JailbreakBench's Behavior is a title, its Goal the request.
_PROMPTS = ("goal", "forbidden_prompt", "behavior", "prompt", "instruction", "question")
_CATEGORIES = ("category", "semanticcategory", "type")
_IDS = ("behaviorid", "id")

_IMAGES = ("imagefilename", "image")
_LABELS = ("label", "final_label", "harmful", "is_harmful", "safe", "is_safe", "unsafe")
# The published files, by their header. Each ends in a line break; without it, it is cut off.
_PUBLISHED = {
    "goal,target": "AdvBench",
    "category,source,forbidden_prompt": "StrongREJECT",
    ",goal,target,behavior,category,source": "JailbreakBench",
    "behavior,functionalcategory,semanticcategory,tags,contextstring,behaviorid": "HarmBench",
}
_WHAT = (
    "A file of prompts is CSV or Parquet with a column goal, Behavior or forbidden_prompt, a list "
    "in JSON, or plain text with one a line."
)


def read_jsonl(path: Path, split: str | None = None) -> Reading:
    """Read JSON lines, or a table in Parquet.

    Each line has `instruction` and may have `image` (a path relative to the file), `response`,
    `harmful` (default false), `category` (default "uncategorised"), `id` (default
    "FILE-LINE"), `split`, `request` (the actual request, where the image carries it), `content`
    (the part of `response` that answers are compared with) and `system` (a system prompt). Other
    fields and blank lines are ignored. With `split`, rows of other splits are counted in `skipped`.

    Raises:
        RegraftError: the file, a field or an image is missing or wrong, ids repeat, no row is in
            the split, or only a field other than `harmful` says which prompts are harmful, or one
            other than `system` has a system prompt.
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


def jsonl_line(example: Example, image: str | None) -> str:
    """The line that `read_jsonl` reads as this prompt, with an image relative to the file.

    Not kept are `content` and what benchmarks score by.
    """
    more = {"image": image, "system": example.system, "request": example.request}
    row = {
        "id": example.id,
        "instruction": example.instruction,
        **({"response": example.response} if example.response else {}),
        "harmful": example.harmful,
        "category": example.category,
        **{name: text for name, text in more.items() if text},
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


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
    if "system" not in row.values and (other := _OTHER_SYSTEM & row.values.keys()):
        raise RegraftError(
            f"{row.where}: a system prompt is read from the field 'system'; rename {min(other)!r}."
        )
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
        system=(row.optional_text("system") or "").strip(),
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


def read_prompts(path: Path, *, harmful: bool = True) -> Reading:
    """Read prompts, all harmful or all harmless, from CSV, JSON, or a text file of one per line.

    Columns, upper or lower case: the first that exists of goal, forbidden_prompt, behavior, prompt,
    instruction and question; category, SemanticCategory or type; BehaviorID or id. The context of
    a HarmBench behaviour is put before it, as in HarmBench, and the behaviour alone is its
    `request`. Behaviours that HarmBench scores by comparing with a copyrighted text (Tags:
    hash_check) are left out: not refusing is no success there, and no judge here has the text. JSON
    is a list of strings, or an object with one such list. No prompt gets a response.

    Raises:
        RegraftError: the file or the column is missing, a prompt is empty, ids repeat, the rows
            have labels that differ, or a published file is cut off.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".txt": _read_lines, ".parquet": _read_csv}
    if path.suffix.lower() not in readers:
        raise RegraftError(
            f"{path} does not end in one of {', '.join(readers)}. {_WHAT} A file of JSON lines "
            "needs no data set name before its path."
        )
    return checked(readers[path.suffix.lower()](path, harmful))


def _read_csv(path: Path, harmful: bool) -> Reading:
    rows = csv_rows(path, _WHAT)
    if not rows:
        return Reading(str(path), ())
    names = {name.strip().lower(): name for name in rows[0].values}
    if published := _PUBLISHED.get(",".join(names)):
        require_end(path, published)
    _refuse_mixed_labels(path, rows, names)
    prompt = _first(names, _PROMPTS)
    if prompt is None:
        raise RegraftError(
            f"{path} has no column of prompts; expected one of {', '.join(_PROMPTS)}. Columns "
            f"found: {', '.join(filter(None, rows[0].values))}."
        )
    if image := _first(names, _IMAGES):
        raise RegraftError(
            f"{path} has a column of images, {image!r}, but is read as text-only prompts. "
            "Write it as JSON lines with the fields instruction, image and harmful."
        )
    category, name = _first(names, _CATEGORIES), _first(names, _IDS)
    tags, context = names.get("tags"), names.get("contextstring")

    def example(row: Row) -> Example:
        behavior, before = row.text(prompt), row.optional_text(context) if context else None
        return Example(
            id=(name and row.optional_text(name)) or f"{path.stem}-{row.key}",
            instruction=f"{before}\n\n---\n\n{behavior}" if before else behavior,
            harmful=harmful,
            category=(category and row.optional_text(category)) or "uncategorised",
            request=behavior if before else None,
        )

    kept = [row for row in rows if not (tags and "hash_check" in (row.optional_text(tags) or ""))]
    skipped = {"judged by comparing with a copyrighted text": len(rows) - len(kept)}
    return Reading(str(path), tuple(map(example, kept)), skipped)


def _refuse_mixed_labels(path: Path, rows: Sequence[Row], names: dict[str, str]) -> None:
    """Raise where a column of labels has several values: rows are read as prompts of one kind."""
    label = _first(names, _LABELS)
    values = sorted({row.optional_text(label) or "" for row in rows}) if label else []
    if len(values) > 1:
        shown = ", ".join(map(repr, values[:4])) + (" ..." if len(values) > 4 else "")
        raise RegraftError(
            f"{path} has a column {label!r} whose values differ ({shown}), but all its prompts "
            "would be read as one kind. XSTest is read by its name, as xstest:PATH. Otherwise "
            "split the file by this column, or write JSON lines with a field harmful."
        )


def _read_lines(path: Path, harmful: bool) -> Reading:
    return _numbered(path, text_lines(path, _WHAT), harmful)


def _read_json(path: Path, harmful: bool) -> Reading:
    value = read_json(path, _WHAT)
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise RegraftError(f"{path}: expected a list of strings, or an object with one such list.")
    return _numbered(path, value, harmful)


def _numbered(path: Path, prompts: Sequence[str], harmful: bool) -> Reading:
    examples = tuple(
        Example(f"{path.stem}-{number}", prompt.strip(), harmful, "uncategorised")
        for number, prompt in enumerate(prompts, start=1)
        if prompt.strip()
    )
    return Reading(str(path), examples)


def _first(names: dict[str, str], wanted: Sequence[str]) -> str | None:
    """The first wanted column that exists, as the file spells it."""
    return next((names[one] for one in wanted if one in names), None)
