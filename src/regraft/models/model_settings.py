"""Check a model's files before transformers reads them.

transformers, tokenizers and processors build whatever settings say, however large, and fail on a
wrong one far from where it was read. So the type and the bounds of each are checked, by its name.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from regraft.disk.parsing import read_json, shown
from regraft.disk.paths import read_text, require_file
from regraft.errors import RegraftError

_PROCESSORS = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", *_PROCESSORS),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
TEXTS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
_OF_BASE = "Take the file of the base model."
_MOST_GROWN = 1000  # characters that a normalizer may make of one

_Bounds = Sequence[tuple[str, float, float]]  # end of a field's name, range that covers all models
_ANY = -math.inf
_BOUNDS: dict[str, _Bounds] = {
    "config.json": (
        ("(layers?|depths?|blocks|stages)", _ANY, 1024),  # one object each
        ("num_hidden_layers", 0, 1024),
        ("num_labels", _ANY, 4096),
        ("experts", _ANY, 2**14),  # Doge's number
        ("(_size|dim|dims|d_model|d_ff|n_embd|heads|channels)", _ANY, 2**24),  # rows, columns
    ),
    **dict.fromkeys(
        _PROCESSORS,
        (
            ("(image_std|rescale_factor)", 1e-6, 1e6),  # divided or multiplied by
            ("image_mean", -1e6, 1e6),
            (r"(^|[._])(height|width|patch_size|merge_size)", 1, 2**16),
            ("temporal_patch_size", 1, 64),  # frames
            ("_edge", 1, 2**28),  # for some processors a number of pixels
        ),
    ),
}


def _of(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_length(value: Any) -> bool:
    return _is_number(value) and abs(value) < 2**40


def _is_filter(value: Any) -> bool:
    return type(value) is int and 0 <= value < 6


def _are_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) and value else [value]
    return all(type(one) is int and -(2**31) <= one < 2**31 for one in ids)


def _are_numbers(value: Any) -> bool:
    many = isinstance(value, list) and len(value) > 0
    return all(map(_is_number, value)) if many else _is_number(value)


def _is_size(value: Any) -> bool:
    if isinstance(value, dict):
        value = [one for one in value.values() if one is not None]
    return _are_numbers(value)


def _is_patch(value: Any) -> bool:
    named = isinstance(value, dict) and value.keys() >= {"height", "width"}
    return _are_numbers(list(value.values()) if named else value)


_is_token = _of(str, dict, bool)  # True or False in settings such as add_bos_token


def _are_tokens(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str | dict) for one in value)
    return isinstance(value, dict | bool)


_Kinds = Sequence[tuple[str, Callable[[Any], bool], str]]  # name of a field, type, type in words
_LENGTH = r"rope_(scaling|parameters)\.(.+\.)?factor|(original_)?max_position_embeddings"
_KINDS: dict[str, _Kinds] = {
    "config.json": (
        ("model_type", _of(str), "a name"),
        ("dtype", _of(str, dict), "a name"),
        (_LENGTH, _is_length, "a number"),  # generation.py reads them
    ),
    "generation_config.json": (
        ("(bos|eos|pad)_token_id", _are_ids, "a token id or a list of them"),
    ),
    "tokenizer_config.json": (("model_max_length", _is_number, "a number"),),
    **dict.fromkeys(
        _PROCESSORS,
        (
            ("do_.*", _of(bool), "true or false"),
            (".*_(type|class)", _of(str), "a name"),
            (".*_processor", _of(dict), "an object with settings"),
            (".*_(mean|std)", _are_numbers, "a number, or a list of numbers"),
            ("(temporal_patch|merge)_size", _is_number, "a number"),
            ("height|width|.*_edge|rescale_factor", _is_number, "a number"),
            ("(crop_)?size", _is_size, "a number, or a list or an object of numbers"),
            ("patch_size", _is_patch, "a number, or height and width"),
            ("resample", _is_filter, "0 to 5, a filter of Pillow"),
        ),
    ),
}
# Checked once a tokenizer failed, since some have settings of their own with such names
TOKENIZER_KINDS: _Kinds = (
    (".*_side", ("left", "right").__contains__, "left or right"),
    (".*_class", _of(str), "a name"),
    (".*_token", _is_token, "a token"),
    (".*_special_tokens", _are_tokens, "a list of tokens"),
)
# null is not replaced by a default
_REQUIRED = re.compile(r"((\.patch|temporal_patch|merge)_size|_side)$")


def check_settings(folder: Path) -> None:
    """Check a model's settings before transformers builds what they say.

    Raises:
        RegraftError: a file is not a regular file or not a JSON object, a size (layers, rows ...)
            is beyond any model, or a setting has a wrong type; the message names file and field.
    """
    for name in (*TEXTS, *SETTINGS):
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            continue
        require_file(path)  # opening a pipe may block forever
        with path.open("rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                raise RegraftError(
                    f"{path} begins with a byte order mark, which transformers does not read. Save "
                    "it as UTF-8 without one."
                )
        if path.suffix == ".jinja":
            read_text(path)
        if name == "tokenizer.json":
            _check_tokenizer(path)
        if name in TEXTS:
            continue
        content = read_json(path, lenient=True)
        if not isinstance(content, dict):
            raise RegraftError(f"{path}: expected a JSON object, found {shown(content)}.")
        _check_bounds(path, content, _BOUNDS.get(name, ()))
        # of the checkpoint's own processor class the settings are unknown
        if not (name in _PROCESSORS and "auto_map" in content):
            check_kinds(path, content, _KINDS.get(name, ()))


def _check_tokenizer(path: Path) -> None:
    """Raise if a tokenizer is not JSON, has no tokens, or a normalizer that makes far longer texts.

    Such a text may take all memory, which ends the process without an error.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RegraftError(f"{path}: not valid JSON: {error}. {_OF_BASE}") from error
    if not isinstance(content, dict):
        raise RegraftError(f"{path}: expected a JSON object, found {shown(content)}. {_OF_BASE}")
    model = content.get("model")
    if isinstance(model, dict) and model.get("vocab", ...) in ({}, []):
        raise RegraftError(f"{path}: model.vocab is empty. {_OF_BASE}")
    replacements = list(_replacements(content.get("normalizer")))
    starts = [start for start, _ in [("a", ""), *replacements] if start]
    growth = max(_growth(start, replacements) for start in starts)
    if growth > _MOST_GROWN:
        raise RegraftError(
            f"{path}: its normalizer makes {growth:,} characters of one; expected at most "
            f"{_MOST_GROWN:,}. {_OF_BASE}"
        )


def _replacements(normalizer: Any) -> Iterator[tuple[str, str]]:
    """(pattern, replacement) of a normalizer, in order; "" stands for a prefix or for a regex."""
    if isinstance(normalizer, dict):
        inside = normalizer.get("normalizers")
        for one in inside if isinstance(inside, list) else ():
            yield from _replacements(one)
        pattern = normalizer.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else ""
        for name in ("content", "prepend"):
            if isinstance(text := normalizer.get(name), str):
                yield literal if isinstance(literal, str) and name == "content" else "", text


def _growth(start: str, replacements: Sequence[tuple[str, str]]) -> int:
    """Characters that replacements make of each one of `start`; stops once they are too many."""
    text = start
    for pattern, by in replacements:
        found = text.count(pattern) if pattern else len(text)
        if len(text) + found * len(by) > 2 * _MOST_GROWN * len(start):
            return len(text) + found * len(by)
        text = text.replace(pattern, by) if pattern else text + by * (found if len(by) > 1 else 0)
    return len(text) // len(start)


def _check_bounds(path: Path, value: Any, bounds: _Bounds, field: str = "") -> None:
    """Raise where a number is out of bounds, also inside of lists, whose items have its name."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_bounds(path, inner, bounds, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for inner in value:
            _check_bounds(path, inner, bounds, field)
    elif _is_number(value):
        for name, least, most in bounds:
            if re.search(f"{name}$", field) and not least <= value <= most:
                wanted = f"{most:,} at most" if least == _ANY else f"{least:g} to {most:,.0f}"
                raise RegraftError(f"{path}: {field} is {shown(value)}; expected {wanted}.")


def check_kinds(path: Path, settings: dict[str, Any], kinds: _Kinds) -> None:
    """Raise where a setting, nested ones included, is not of the type that its name asks for."""
    for field, value in _fields(settings):
        unset = value is None and not _REQUIRED.search(field)
        for name, fits, expected in kinds:
            if re.search(rf"(^|\.)({name})$", field) and not (unset or fits(value)):
                raise RegraftError(f"{path}: {field} is {shown(value)}; expected {expected}.")


def disagreement(folder: Path) -> str:
    """A phrase that names a setting on which config.json and the processor differ, or ""."""
    stated: dict[str, dict[str, list[Any]]] = {}
    for file in filter(lambda name: (folder / name).is_file(), ("config.json", *_PROCESSORS)):
        for field, value in _fields(read_json(folder / file, lenient=True)):
            if type(value) in (int, str):
                name = field.rpartition(".")[2]
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


def _fields(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every setting, nested ones included."""
    for name, value in settings.items():
        yield f"{above}{name}", value
        if isinstance(value, dict):
            yield from _fields(value, f"{above}{name}.")
