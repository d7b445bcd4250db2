"""What of a chat server's complaint is its own, and not only said again of a request.

OpenAI's form is {"error": {"message", "param", "code"}}, FastAPI's {"detail": [{"loc", "msg"}]} or
{"detail": "words"}; others write plain words. Many repeat the prompt, whose words are no complaint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FILTERED = "content_filter"  # how a reply ended that the server's filter cut or withheld
_FILTERS = (FILTERED, "content_policy", "content management policy")
_SAID = ("message", "param", "code", "loc", "msg", "error", "detail")
_INPUT = re.compile(
    r"(\binput_value\s*=|[\"']input[\"']\s*:).*", re.DOTALL
)  # as pydantic repeats it
_FIELDS = (("max_tokens", "max_completion_tokens"), ("temperature", "temperature"))
_LEVELS = 8


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
