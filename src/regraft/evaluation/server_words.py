"""Read a chat server's error messages, apart from what they repeat of the request.

OpenAI's form is {"error": {"message", "param", "code"}}, FastAPI's {"detail": [{"loc", "msg"}]} or
{"detail": "words"}; others write plain text. Many repeat the prompt, which has to be ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FILTERED = "content_filter"  # how a reply ends that the server's filter cut or withheld
_FILTERS = (FILTERED, "content_policy", "content management policy")
_MESSAGE_FIELDS = ("message", "param", "code", "loc", "msg", "error", "detail")
# pydantic's copy of the request
_INPUT = re.compile(r"(\binput_value\s*=|[\"']input[\"']\s*:).*", re.DOTALL)
# a field of the request, and the word by which a server that refuses it names it
_FIELDS = (("max_tokens", "max_completion_tokens"), ("temperature", "temperature"))
_LEVELS = 8


def complaint(body: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The words of an error response that are the server's own, without the request's texts."""
    try:
        words = "\n".join(_words(json.loads(body), _LEVELS))
    except (ValueError, RecursionError):  # plain text
        words = body
    for text in _texts(messages):
        if is_filter(text) or any(sign in text for _, sign in _FIELDS):  # others cannot mislead
            for spelt in (text, repr(text)[1:-1], json.dumps(text)[1:-1], " ".join(text.split())):
                words = words.replace(spelt, "")
    return _INPUT.sub("", words)


def is_filter(words: str) -> bool:
    """Whether an error comes from a content filter."""
    return any(one in words.lower() for one in _FILTERS)


def not_taken(words: str, body: Mapping[str, Any]) -> str | None:
    """The field of the request that an error refuses, or None.

    OpenAI's newer models take `max_completion_tokens`, which other servers do not know, and no
    temperature.
    """
    return next((name for name, sign in _FIELDS if sign in words and name in body), None)


def _words(value: Any, levels: int) -> Iterator[str]:
    if isinstance(value, str | int):
        yield str(value)
    elif isinstance(value, list) and levels:
        for one in value:
            yield from _words(one, levels - 1)
    elif isinstance(value, dict) and levels:
        for name in _MESSAGE_FIELDS:
            yield from _words(value.get(name), levels - 1)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"text": content}]:
            if isinstance(text := part.get("text"), str):
                yield text
