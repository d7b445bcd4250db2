"""Name a model's files when transformers fails on them.

transformers and tokenizers raise arbitrary errors on a bad file. These are reported with the folder
and the files and settings that may be at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.disk.parsing import read_json
from regraft.errors import RegraftError, is_device_memory, is_fault, is_host_memory
from regraft.models.model_settings import SETTINGS, TEXTS, TOKENIZER_KINDS, check_kinds


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
    for name in SETTINGS:
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
    existing = [name for name in (*TEXTS, *SETTINGS[2:]) if (folder / name).is_file()]
    made = f"It is made of {', '.join(existing)}. " if existing else ""
    advice = f"{made}If a tokenizer or processor file is damaged or missing, copy the base model's."
    with foreign(folder, "the processor", advice):
        try:
            yield
        except Exception:
            path = folder / "tokenizer_config.json"
            if path.is_file():
                check_kinds(path, read_json(path, lenient=True), TOKENIZER_KINDS)
            raise
