"""A chat server's key: from the environment alone, and blotted out where the server says it."""

from __future__ import annotations

import html
import os
import re
from functools import cache

from regraft.errors import RegraftError

KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_KEY = 6  # shorter ones are words such as EMPTY, for servers that want any


def without_key(text: str) -> str:
    """A server's words without the key, if it says it, and without what no file takes."""
    if len(key := _given_key()) >= _SHORTEST_KEY:
        text = _spelled(key).sub(f"[{KEY_VARIABLE}]", text)
    return text.encode("utf-8", "replace").decode()  # JSON may spell halves of surrogate pairs


@cache
def _spelled(key: str) -> re.Pattern[str]:
    """The key, each letter as it is or as addresses, pages and JSON may spell it."""

    def letter(one: str) -> str:
        code, plain = ord(one), re.escape(one)
        if one.isalnum() or one in "-_.":
            return plain
        coded = rf"(?i:%{code:02x}|\\u{code:04x}|&#x0*{code:x};|&#0*{code};)"
        return rf"(?:\\?{plain}|{re.escape(html.escape(one))}|{coded})"

    return re.compile("".join(map(letter, key)))


def _given_key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def server_key() -> str:
    """The key to send, "" where none is set.

    Raises:
        RegraftError: it cannot be one.
    """
    key = _given_key()
    if not (key.isascii() and key.isprintable()):
        raise RegraftError(
            f"The variable {KEY_VARIABLE} holds characters that no key has, such as a line's end "
            "inside it. Set it to the key alone."
        )
    return key
