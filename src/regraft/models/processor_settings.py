"""Check settings of processors by name: the type of each and its bounds.

Processors do not check them, and fail on a wrong one far from where it was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from regraft.disk.parsing import read_json, shown
from regraft.errors import RegraftError

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
BOUNDS = (
    (re.compile(r"image_std$|rescale_factor$"), 1e-6, 1e6),  # divided or multiplied by
    (re.compile(r"image_mean$"), -1e6, 1e6),
    (re.compile(r"(^|[._])(height|width|patch_size|merge_size)$"), 1, 2**16),
    (re.compile(r"temporal_patch_size$"), 1, 64),  # frames
    (re.compile(r"_edge$"), 1, 2**28),  # for some processors a number of pixels
)
_REQUIRED = re.compile(r"(\.patch|temporal_patch|merge)_size$")  # null is not replaced by a default


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(value: Any) -> bool:
    many = isinstance(value, list) and len(value) > 0
    return all(map(_is_number, value)) if many else _is_number(value)


def _is_filter(value: Any) -> bool:
    return type(value) is int and 0 <= value < 6


def _is_size(value: Any) -> bool:
    if isinstance(value, dict):
        value = [one for one in value.values() if one is not None]
    return _are_numbers(value)


def _is_patch(value: Any) -> bool:
    named = isinstance(value, dict) and value.keys() >= {"height", "width"}
    return _are_numbers(list(value.values()) if named else value)


_KINDS: tuple[tuple[re.Pattern[str], Callable[[Any], bool], str], ...] = (
    (re.compile(r"^do_"), lambda value: isinstance(value, bool), "true or false"),
    (re.compile(r"_(type|class)$"), lambda value: isinstance(value, str), "a name"),
    (re.compile(r"_processor$"), lambda value: isinstance(value, dict), "an object with settings"),
    (re.compile(r"_(mean|std)$"), _are_numbers, "a number, or a list of numbers"),
    (re.compile(r"^(temporal_patch|merge)_size$"), _is_number, "a number"),
    (re.compile(r"^(height|width)$|_edge$|^rescale_factor$"), _is_number, "a number"),
    (re.compile(r"^(crop_)?size$"), _is_size, "a number, or a list or an object of numbers"),
    (re.compile(r"^patch_size$"), _is_patch, "a number, or height and width"),
    (re.compile(r"^resample$"), _is_filter, "0 to 5, a filter of Pillow"),
)


def check_kinds(path: Path, settings: dict[str, Any]) -> None:
    """Check the type of each setting, nested ones included, by its name.

    Raises:
        RegraftError: a setting has a wrong type; the message names file and field.
    """
    if "auto_map" in settings:  # the checkpoint's own processor class, whose settings are unknown
        return
    for field, name, value in _fields(settings):
        for pattern, fits, expected in _KINDS:
            unset = value is None and not _REQUIRED.search(field)
            if pattern.search(name) and not (unset or fits(value)):
                raise RegraftError(f"{path}: {field} is {shown(value)}; expected {expected}.")


def disagreement(folder: Path) -> str:
    """A phrase that names a setting on which config.json and the processor differ, or ""."""
    stated: dict[str, dict[str, list[Any]]] = {}
    for file in filter(lambda name: (folder / name).is_file(), ("config.json", *FILES)):
        for _, name, value in _fields(read_json(folder / file, lenient=True)):
            if type(value) in (int, str):
                stated.setdefault(name, {}).setdefault(file, []).append(value)
    for name, files in stated.items():
        own = files.pop("config.json", [])
        for file, values in files.items():
            if own and not {*own} & {*values}:
                return (
                    f", whose {name} is {shown(own[0])} in config.json and {shown(values[0])} in "
                    f"{file}"
                )
    return ""


def _fields(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted path, name, value) of every setting, nested ones included."""
    for name, value in settings.items():
        yield f"{above}{name}", name, value
        if isinstance(value, dict):
            yield from _fields(value, f"{above}{name}.")
