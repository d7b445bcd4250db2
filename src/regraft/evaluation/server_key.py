"""A chat server's key: read from the environment only, and masked where the server repeats it."""

from __future__ import annotations

import html
import os
import re
from functools import cache

from regraft.errors import RegraftError

KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_KEY = 6  # shorter ones are placeholders such as EMPTY, for servers that take any key
_BEGINNING = 16  # fewest characters of a cut key; fewer may be words of an answer


def without_key(text: str) -> str:
    """Mask the key in a server's text, and replace what cannot be written to a file."""
    if len(key := _given_key()) >= _SHORTEST_KEY:
        text = _pattern(key).sub(f"[{KEY_VARIABLE}]", text)
    return text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


@cache
def _pattern(key: str) -> re.Pattern[str]:
    """A pattern of the key, or of at least the first half of a long one, which a server may cut.

    Each character is plain or escaped as in URLs, HTML or JSON.
    """

    def character(one: str) -> str:
        code, plain = ord(one), re.escape(one)
        if one.isalnum() or one in "-_.":
            return plain
        coded = rf"(?i:%{code:02x}|\\u{code:04x}|&#x0*{code:x};|&#0*{code};)"
        return rf"(?:\\?{plain}|{re.escape(html.escape(one))}|{coded})"

    told = max(_BEGINNING, len(key) // 2)
    rest = (f"{character(one)}?" for one in key[told:])  # nested groups would be too deep
    return re.compile("".join([*map(character, key[:told]), *rest]))


def _given_key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def server_key() -> str:
    """The key to send, "" if none is set.

    Raises:
        RegraftError: it holds characters that no key has.
    """
    key = _given_key()
    if not (key.isascii() and key.isprintable()):
        raise RegraftError(
            f"The variable {KEY_VARIABLE} holds characters that no key has, such as a line break. "
            "Set it to the key alone."
        )
    return key
