"""What artifacts say of how they were made, as read from their files.

Whoever asks such a description for a field that it lacks, or that is of another type, gets a
`RegraftError` with the name of the file and the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from regraft.disk.parsing import from_json, read_json, shown
from regraft.errors import RegraftError

_Count = Annotated[int, Field(ge=0)]
_OPEN = with_config(ConfigDict(extra="allow"))


class Fields(dict[str, Any]):
    """A JSON object of a file, and all objects in it; a field that is missing is an error."""

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        self.where = where
        super().__init__({name: _wrapped(one, f"{where}.{name}") for name, one in value.items()})

    def __missing__(self, name: str) -> Any:
        raise RegraftError(f"{self.where}: the field {name!r} is missing. Make it again.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Fields, (dict(self), self.where)


def _wrapped(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return Fields(value, where)
    return [_wrapped(one, where) for one in value] if isinstance(value, list) else value


@_OPEN
class _Account(TypedDict, total=False):
    """Of prompts that were used."""

    source: str
    read: _Count
    used: _Count
    skipped: dict[str, _Count]
    digest: str


@_OPEN
class _Settings(TypedDict, total=False):
    """Settings that are read again."""

    full_answers: bool
    max_new_tokens: _Count
    limit: _Count | None


@_OPEN
class _About(TypedDict, total=False):
    """The fields of descriptions that are read again, wherever they stand."""

    stage: str
    versions: dict[str, str]
    inputs: dict[str, str]
    settings: _Settings
    compute: dict[str, Any]
    data: dict[str, _Account]
    before: dict[str, Any] | None
    replies: dict[str, _Count]
    zeros: _Count
    prunable: Annotated[int, Field(ge=1)]
    pruned: _Count
    changed: _Count
    restored: _Count
    n_m: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None
    groups: _Count
    violated_groups: _Count
    heads: list[tuple[_Count, _Count]]


def described(value: Any, where: str) -> Fields:
    """A description that was read; `where` names its file, and the field that it is.

    Raises:
        RegraftError: it is none, or a field of it is of the wrong type, by name.
    """
    if not isinstance(value, dict):
        raise RegraftError(f"{where}: expected an object with fields, found {shown(value)}.")
    from_json(_About, value, where)
    return Fields(value, where)


def about_of(path: Path) -> Fields:
    """The description in a JSON file.

    Raises:
        RegraftError: the file is missing or holds none.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "about" not in content:
        raise RegraftError(f"{path} is nothing that regraft wrote: the field 'about' is missing.")
    return described(content["about"], f"{path}: about")
