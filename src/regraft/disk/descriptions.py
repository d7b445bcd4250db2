"""Read an artifact's description (`about`): how it was made.

A field that is missing or of the wrong type raises a `RegraftError` that names file and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from regraft.disk.parsing import from_json, json_object, shown
from regraft.disk.paths import read_text
from regraft.errors import RegraftError

_Count = Annotated[int, Field(ge=0)]
_OPEN = with_config(ConfigDict(extra="allow"))


class Fields(dict[str, Any]):
    """A JSON object read from a file, nested ones included; a missing field is a `RegraftError`."""

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        self.where = where
        super().__init__({name: _wrapped(one, f"{where}.{name}") for name, one in value.items()})

    def __missing__(self, name: str) -> Any:
        raise RegraftError(f"{self.where}: the field {name!r} is missing. Create the file again.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Fields, (dict(self), self.where)


def _wrapped(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return Fields(value, where)
    return [_wrapped(one, where) for one in value] if isinstance(value, list) else value


@_OPEN
class _Account(TypedDict, total=False):
    """Prompts of one source: how many were read, used and skipped (by reason)."""

    source: str
    read: _Count
    used: _Count
    skipped: dict[str, _Count]
    digest: str


@_OPEN
class _Settings(TypedDict, total=False):
    """The settings that other code reads back."""

    full_answers: bool
    max_new_tokens: _Count
    limit: _Count | None


@_OPEN
class _About(TypedDict, total=False):
    """The fields that other code reads back, of the descriptions of all kinds of artifacts."""

    stage: str
    versions: dict[str, str]
    inputs: dict[str, str]
    settings: _Settings
    compute: dict[str, Any]
    data: dict[str, _Account]
    before: _About | None
    replies: dict[str, _Count]
    zeros: _Count
    prunable: Annotated[int, Field(ge=1)]
    pruned: _Count
    changed: _Count
    restored: _Count
    kind: Literal["pruned", "changed"]  # of a pair, see patch/pair.py
    n_m: Annotated[str, Field(pattern="^[0-9]{1,4}:[0-9]{1,4}$")] | None
    groups: _Count
    violated_groups: _Count
    heads: list[tuple[_Count, _Count]]
    judge: str


def described(value: Any, where: str) -> Fields:
    """Check a description that was read; `where` names its file and field in messages.

    Raises:
        RegraftError: it is not an object, or one of its fields has the wrong type.
    """
    if not isinstance(value, dict):
        raise RegraftError(f"{where}: expected an object with fields, found {shown(value)}.")
    from_json(_About, value, where)
    return Fields(value, where)


def about_of(path: Path) -> Fields:
    """Read the description in a JSON file.

    Raises:
        RegraftError: the file is missing or holds no valid description.
    """
    return described(fields_of(path, "description", "about")["about"], f"{path}: about")


def fields_of(path: Path, what: str, *needed: str) -> dict[str, Any]:
    """Read the JSON object in a file that regraft wrote; `needed` are fields that it must have.

    `what` it holds ("description") is for messages.

    Raises:
        RegraftError: the file is missing, holds no JSON object, or lacks a needed field.
    """
    content = json_object(read_text(path, "A JSON file is needed."), str(path))
    for name in needed:
        if name not in content:
            raise RegraftError(f"{path} holds no {what} of regraft: the field {name!r} is missing.")
    return content
