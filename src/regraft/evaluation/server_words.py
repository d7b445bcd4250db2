"""What a chat server says, without its key and without what it only says again of a request.

OpenAI's form is {"error": {"message", "param", "code"}}, FastAPI's {"detail": [{"loc", "msg"}]} or
{"detail": "words"}; others write plain words. Many repeat the prompt, whose words are no complaint.
The key comes from the environment alone, and is blotted out where the server repeats it.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from regraft.errors import RegraftError

FILTERED = "content_filter"  # how a reply ended that the server's filter cut or withheld
_FILTERS = (FILTERED, "content_policy", "content management policy")
_SAID = ("message", "param", "code", "loc", "msg", "error", "detail")
_INPUT = re.compile(
    r"(\binput_value\s*=|[\"']input[\"']\s*:).*", re.DOTALL
)  # as pydantic repeats it
_FIELDS = (("max_tokens", "max_completion_tokens"), ("temperature", "temperature"))
_LEVELS = 8
KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_KEY = 6  # shorter ones are words such as EMPTY, for servers that want any


def complaint(said: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The words of a refusal that are the server's own.

    Args:
        said: The body of its answer.
        messages: What was asked, whose texts are taken out.
    """
    try:
        words = "\n".join(_words(json.loads(said), _LEVELS))
    except (ValueError, RecursionError):  # plain text
        words = said
    for text in filter(_misleads, _texts(messages)):
        for spelt in (text, repr(text)[1:-1], json.dumps(text)[1:-1], " ".join(text.split())):
            words = words.replace(spelt, "")
    return _INPUT.sub("", words)


def is_filter(words: str) -> bool:
    """Whether a complaint is that of a filter of contents."""
    return any(one in words.lower() for one in _FILTERS)


def not_taken(words: str, body: Mapping[str, Any]) -> str | None:
    """A field of the request that the model does not take.

    OpenAI's later models want `max_completion_tokens`, which other servers do not know, and no
    temperature.
    """
    return next((name for name, sign in _FIELDS if sign in words and name in body), None)


def _misleads(text: str) -> bool:
    """Whether a prompt holds a word that means something in a complaint; others may stay in it."""
    return is_filter(text) or any(sign in text for _, sign in _FIELDS)


def _words(value: Any, levels: int) -> Iterator[str]:
    if isinstance(value, str | int):
        yield str(value)
    elif isinstance(value, list) and levels:
        for one in value:
            yield from _words(one, levels - 1)
    elif isinstance(value, dict) and levels:
        for name in _SAID:
            yield from _words(value.get(name), levels - 1)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"text": content}]:
            if isinstance(text := part.get("text"), str):
                yield text


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
