"""The environment variables of a launcher such as torchrun; imports no torch."""

from __future__ import annotations

import os
import re

from regraft.errors import RegraftError


def processes() -> int:
    """Number of processes that a launcher started; 1 without a launcher.

    Raises:
        RegraftError: WORLD_SIZE or a variable that goes with it is missing or invalid.
    """
    count = _number("WORLD_SIZE", "1", least=1)
    if count > 1:
        _number("RANK", least=0, most=count - 1)
        _number("MASTER_PORT", least=1, most=2**16 - 1)
        if not os.environ.get("MASTER_ADDR"):
            raise _wrong("MASTER_ADDR", None, "the address of process 0")
    return count


def local_rank() -> int:
    """Index of this process among those on its machine."""
    return _number("LOCAL_RANK", "0", least=0)


def _number(name: str, default: str | None = None, *, least: int, most: int | None = None) -> int:
    text = os.environ.get(name, default)
    expected = f"a number >= {least}" if most is None else f"a number from {least} to {most}"
    if text is None or not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise _wrong(name, text, expected)
    if int(text) < least or (most is not None and int(text) > most):
        raise _wrong(name, text, expected)
    return int(text)


def _wrong(name: str, text: str | None, expected: str) -> RegraftError:
    found = "is not set" if text is None else f"is {text[:40]!r}"
    return RegraftError(
        f"The environment variable {name} {found}; expected {expected}. torchrun and accelerate "
        "launch set it: without them, unset WORLD_SIZE."
    )
