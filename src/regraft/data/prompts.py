"""Harmful prompts: AdvBench, HarmBench, JailbreakBench, StrongREJECT, MaliciousInstruct."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.rows import Row, csv_rows, require_examples
from regraft.errors import RegraftError

# The first column found counts: JailbreakBench's Behavior is a title, its Goal the request.
_PROMPTS = ("goal", "forbidden_prompt", "behavior", "prompt", "instruction", "question")
_CATEGORIES = ("category", "semanticcategory", "type")
_IDS = ("behaviorid", "id")
_CONTEXT = "contextstring"
_WHAT = "A file of prompts is CSV with a column goal, Behavior or forbidden_prompt, or plain text."


def read_prompts(path: Path) -> Reading:
    """Read harmful prompts from CSV, or from a text file with one a line.

    Columns, in any capitals: goal, forbidden_prompt, behavior, prompt, instruction or question, the
    first of these that is there; category, SemanticCategory or type; BehaviorID or id. The context
    of a HarmBench behaviour stands before it, as in HarmBench. None has a response.

    Raises:
        RegraftError: the file or the column is missing, a prompt is empty, ids repeat.
    """
    if path.suffix.lower() == ".csv":
        examples = tuple(_of_rows(path, csv_rows(path, _WHAT)))
    else:
        examples = tuple(_of_lines(path))
    return require_examples(Reading(str(path), examples))


def _of_rows(path: Path, rows: Sequence[Row]) -> list[Example]:
    if not rows:
        return []
    names = {name.strip().lower(): name for name in rows[0].values}
    prompt = _first(names, _PROMPTS)
    if prompt is None:
        raise RegraftError(
            f"{path} has no column of prompts: none of {', '.join(_PROMPTS)}. Columns found: "
            f"{', '.join(filter(None, rows[0].values))}."
        )
    category, name, context = (_first(names, ones) for ones in (_CATEGORIES, _IDS, (_CONTEXT,)))
    return [
        Example(
            id=(name and row.optional_text(name)) or f"{path.stem}-{number}",
            instruction=_with_context(row, prompt, context),
            harmful=True,
            category=(category and row.optional_text(category)) or "uncategorised",
        )
        for number, row in enumerate(rows, start=1)
    ]


def _with_context(row: Row, prompt: str, context: str | None) -> str:
    before = row.optional_text(context) if context else None
    return f"{before}\n\n---\n\n{row.text(prompt)}" if before else row.text(prompt)


def _of_lines(path: Path) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RegraftError(f"{path} is not a file. {_WHAT}") from error
    except UnicodeDecodeError as error:
        raise RegraftError(f"{path} is not UTF-8 text: {error}") from error
    return [
        Example(f"{path.stem}-{number}", line.strip(), True, "uncategorised")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _first(names: dict[str, str], wanted: Sequence[str]) -> str | None:
    return next((names[one] for one in wanted if one in names), None)
