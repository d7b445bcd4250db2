"""What callers of `regraft.api` may give for its arguments: names, paths, plain settings.

Whatever is none of them raises `RegraftError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.models.load import Source
from regraft.models.resolve import resolve
from regraft.patch.format import Patch
from regraft.progress import SILENT, Progress
from regraft.settings.base import Settings, explain

Model = str | Path | Source
OnePatch = str | Path | Patch
Patches = OnePatch | Sequence[OnePatch]
Runs = str | Path | Sequence[str | Path]
Suites = str | Path | DataSource | Sequence[str | Path | DataSource]
_DATA = ("data", "validation")  # settings that name a data set


def settings_of(given: Mapping[str, Any], *blocks: type[Settings]) -> list[Any]:
    """Sort settings by name into blocks.

    Raises:
        RegraftError: a setting is invalid, or belongs to no block.
    """
    if not isinstance(given, Mapping):
        raise RegraftError(f"Settings are a mapping, not {type(given).__name__}.")
    remaining = dict(given)
    for name in _DATA:
        if remaining.get(name) is not None:
            remaining[name] = data_of(remaining[name])
    found = []
    for block in blocks:
        own = {name: remaining.pop(name) for name in block.model_fields if name in remaining}
        try:
            found.append(block.model_validate(own))
        except ValidationError as error:
            raise RegraftError(f"Invalid settings:\n{explain(error)}") from error
    if remaining:
        name, known = next(iter(remaining)), {one for block in blocks for one in block.model_fields}
        close = get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RegraftError(f"There is no setting {name!r} here.{hint}")
    return found


def data_of(named: Any) -> DataSource:
    """A data set by its path, NAME:PATH, or the fields of a recipe's."""
    try:
        if isinstance(named, PathLike):
            return DataSource(name="jsonl", path=path_of(named))
        return DataSource.model_validate(named)
    except ValidationError as error:
        raise RegraftError(f"Invalid data set:\n{explain(error)}") from error


def suites_of(named: Suites) -> list[DataSource]:
    """Test suites, each as for `data_of`."""
    return [data_of(one) for one in listed(named)]


def folder_of(model: Model) -> Path:
    """The folder of a model."""
    return model.folder if isinstance(model, Source) else resolve(model)


def path_of(given: str | PathLike[str]) -> Path:
    """The path of a file or folder."""
    path = fspath(given) if isinstance(given, PathLike) else given
    if not isinstance(path, str):
        raise RegraftError(f"A path is a string or a pathlib.Path, not {type(given).__name__}.")
    return Path(path)


def path_or_none(given: str | PathLike[str] | None) -> Path | None:
    """The path of a file or folder that may be left out."""
    return None if given is None else path_of(given)


def patch_of(given: str | PathLike[str] | Patch) -> Path:
    """The file of a patch."""
    if not isinstance(given, Patch):
        return path_of(given)
    if given.file is None:
        raise RegraftError("A patch in memory has no file. Name the file that `realign` wrote.")
    return given.file


def patches_of(given: Patches) -> list[Path]:
    """The files of one or several patches."""
    return [patch_of(one) for one in listed(given)]


def listed(given: Any) -> list[Any]:
    """One item or several as a list."""
    one = not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | DataSource)
    return [given] if one else list(given)


def progress_of(given: bool | Progress) -> Progress:
    """The progress of the command line for True, none for False.

    Raises:
        RegraftError: it is neither, nor a `Progress`.
    """
    if isinstance(given, Progress):
        return given
    if not isinstance(given, bool):
        raise RegraftError(f"`progress` is True or False, not {given!r}.")
    if not given:
        return SILENT
    from regraft.console import live_progress  # rich, which silent calls do not need

    return live_progress()
