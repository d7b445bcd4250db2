"""Check a model's files before transformers reads them, and name them when it fails.

transformers and tokenizers raise arbitrary errors on a bad file, or build whatever it says, however
large. So settings are checked first, and their errors are reported with the folder and the files.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.disk.parsing import read_json, shown
from regraft.disk.paths import read_text, require_file
from regraft.errors import RegraftError, is_device_memory, is_fault, is_host_memory
from regraft.models import processor_settings

_SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *processor_settings.FILES,
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
_TEXT = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
_OF_BASE = "Take the file of the base model."
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ANY = -math.inf
_BOUNDS = {  # pattern of a field's name, and the range that covers all models
    "config.json": (
        (re.compile(r"(layers?|depths?|blocks|stages)$"), _ANY, 1024),  # one object each
        (re.compile(r"num_hidden_layers$"), 0, 1024),
        (re.compile(r"num_labels$"), _ANY, 4096),
        (re.compile(r"experts$"), _ANY, 2**14),  # Doge's number
        (  # rows, columns
            re.compile(r"(_size|dim|dims|d_model|d_ff|n_embd|heads|channels)$"),
            *(_ANY, 2**24),
        ),
    ),
    **dict.fromkeys(processor_settings.FILES, processor_settings.BOUNDS),
}
_Bounds = Sequence[tuple[re.Pattern[str], float, float]]
_LENGTH = re.compile(  # fields that generation.py reads
    r"(^|\.)(rope_(scaling|parameters)\.(.+\.)?factor|(original_)?max_position_embeddings)$"
)
_MOST_GROWN = 1000  # characters that a normalizer may make of one


def check_settings(folder: Path) -> None:
    """Check a model's settings before transformers builds what they say.

    Raises:
        RegraftError: a file is not a regular file or not a JSON object, a size (layers, rows ...)
            is beyond any model, or a token id is invalid; the message names file and field.
    """
    for name in (*_TEXT, *_SETTINGS):
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
        if name in _TEXT:
            continue
        content = read_json(path, lenient=True)
        if not isinstance(content, dict):
            raise RegraftError(f"{path}: expected a JSON object, found {shown(content)}.")
        _require_within(path, content, _BOUNDS.get(name, ()))
        if name in processor_settings.FILES:
            processor_settings.check_kinds(path, content)
        if name == "config.json":
            _require_names(path, content)
        if name == "generation_config.json":
            _require_ids(path, content)
        length = content.get("model_max_length")
        if name == "tokenizer_config.json" and not isinstance(length, int | float | None):
            raise RegraftError(f"{path}: model_max_length is {shown(length)}; expected a number.")


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


def _require_names(path: Path, content: dict[str, Any]) -> None:
    for name, kinds in {"model_type": str | None, "dtype": str | dict | None}.items():
        if not isinstance(value := content.get(name), kinds):
            raise RegraftError(f"{path}: {name} is {shown(value)}; expected a name.")


def _require_within(path: Path, content: Any, bounds: _Bounds, field: str = "") -> None:
    length = type(content) in (int, float) and abs(content) < 2**40
    if bounds and _LENGTH.search(field) and not (content is None or length):
        raise RegraftError(f"{path}: {field} is {shown(content)}; expected a number.")
    if isinstance(content, dict):
        for name, inner in content.items():
            _require_within(path, inner, bounds, f"{field}.{name}" if field else name)
    elif isinstance(content, list):
        for inner in content:
            _require_within(path, inner, bounds, field)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        for name, least, most in bounds:
            if name.search(field) and not least <= content <= most:
                wanted = f"{most:,} at most" if least == _ANY else f"{least:g} to {most:,.0f}"
                raise RegraftError(f"{path}: {field} is {shown(content)}; expected {wanted}.")


def _require_ids(path: Path, content: dict[str, Any]) -> None:
    for name in _IDS:
        value = content.get(name)
        ids = value if isinstance(value, list) and value else [value]
        for one in ids:
            unset = one is None and not isinstance(value, list)
            if not unset and not (type(one) is int and -(2**31) <= one < 2**31):
                raise RegraftError(
                    f"{path}: {name} is {shown(value)}; expected a token id or a list of them."
                )


@contextmanager
def foreign(folder: Path, what: str, advice: str) -> Iterator[None]:
    """Turn any error that libraries raise while they load `what` from a folder into a clear one.

    Raises:
        RegraftError: with `advice`, in place of any error except running out of memory.
    """
    try:
        yield
    except BaseException as error:
        memory = is_host_memory(error) or is_device_memory(error)
        if isinstance(error, RegraftError) or memory or not is_fault(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, ImportError):
            raise RegraftError(
                f"{folder}: {what} needs a package that is not installed: {reason}"
            ) from error
        raise RegraftError(
            f"{folder}: {what} could not be loaded ({reason}{_suspects(folder, reason)}). {advice}"
        ) from error


def _suspects(folder: Path, reason: str) -> str:
    """Settings that may have caused a failure, as part of a sentence; "" if there are none."""
    from transformers import CONFIG_MAPPING

    found: list[str] = []
    for name in _SETTINGS:
        try:
            given = read_json(folder / name, lenient=True)
            kind: str = given.get("model_type", "") if name == "config.json" else ""
            default = CONFIG_MAPPING[kind]().to_dict() if kind in CONFIG_MAPPING else {}
            found += [f"{field} of {name}" for field in _suspicious(given, default, reason)]
        except Exception:  # no such file, or no defaults for this type
            continue
    return f"; look at {', '.join(found[:3])}" if found else ""


def _suspicious(given: Mapping[str, Any], default: Mapping[str, Any], reason: str) -> Iterator[str]:
    """Fields that `reason` names, whose type is not the default's, or that should be positive."""
    for name, value in given.items():
        usual = default.get(name)
        if name.endswith("token_id"):  # they differ between models, and may be lists
            continue
        if isinstance(value, dict):
            inside = usual if isinstance(usual, dict) else {}
            yield from (f"{name}.{inner}" for inner in _suspicious(value, inside, reason))
        named = isinstance(value, str) and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reason)
        if named and value != usual and len(value) > 2:
            yield name
        elif value is None or usual is None:
            continue
        elif _kind(value) is not _kind(usual) or (_kind(value) is float and value <= 0 < usual):
            yield name


def _kind(value: object) -> type:
    return float if type(value) is int else type(value)


@contextmanager
def of_processor(folder: Path) -> Iterator[None]:
    """`foreign` for tokenizer and processor: the message names their files."""
    existing = [name for name in (*_TEXT, *_SETTINGS[2:]) if (folder / name).is_file()]
    made = f"It is made of {', '.join(existing)}. " if existing else ""
    advice = f"{made}If a tokenizer or processor file is damaged or missing, copy the base model's."
    with foreign(folder, "the processor", advice):
        try:
            yield
        except Exception:
            _blame_tokenizer(folder / "tokenizer_config.json")
            raise


def _blame_tokenizer(path: Path) -> None:
    """Raise a `RegraftError` that names a setting of the wrong type, if the file has one."""

    def is_token(value: Any) -> bool:
        return isinstance(value, str | dict)

    for name, value in read_json(path, lenient=True).items() if path.is_file() else ():
        expected = ""
        if name.endswith("_side") and value not in ("left", "right"):
            expected = "left or right"
        elif name.endswith("_class") and not isinstance(value, str):
            expected = "a name"
        elif name.endswith("_token") and not is_token(value):
            expected = "a token"
        elif name.endswith("_special_tokens") and not isinstance(value, dict):
            fits = isinstance(value, list) and all(map(is_token, value))
            expected = "" if fits else "a list of tokens"
        unset = value is None and not name.endswith("_side")
        if expected and not (unset or isinstance(value, bool)):
            raise RegraftError(f"{path}: {name} is {shown(value)}; expected {expected}.")
