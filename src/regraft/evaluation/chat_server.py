"""A chat model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, or a paid service."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

from regraft.errors import PassingError, RegraftError

KEY_VARIABLE = "OPENAI_API_KEY"
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_WRONG = frozenset({400, 422})
_FILTERED = ("content_filter", "content_policy", "content management policy")
_TRIES = 5
_LONGEST_PAUSE = 60.0  # seconds, whatever a busy server asks for


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was named and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and why it ended: "stop", "length", "content_filter" or another word.

    A prompt that the server's filter refuses has an empty reply that ended by "content_filter".
    """

    text: str
    ended: str


@dataclass(frozen=True)
class ChatServer:
    """A chat model at `url` ("http://localhost:8000/v1").

    The key, where one is needed, is read from the variable OPENAI_API_KEY. Replies are greedy
    (temperature 0) where the model lets one say so; what the server makes of that is its own
    affair, so results are repeatable only where the server's are.
    """

    url: str
    model: str
    timeout: float = 120.0
    pause: float = 1.0  # seconds before the second try, twice as long before each later one
    _unknown: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "URL#MODEL".

        Raises:
            RegraftError: it is written otherwise, or holds a password.
        """
        url, _, model = text.rpartition("#")
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError:  # a bracket of an IPv6 address is missing
            parts = urllib.parse.SplitResult("", "", "", "", "")
        if parts.scheme not in ("http", "https") or not (parts.netloc and model and url.isascii()):
            raise RegraftError(
                f"{f'endpoint:{text}'!r} names no endpoint; expected endpoint:URL#MODEL, as in "
                "endpoint:http://localhost:8000/v1#Qwen/Qwen3-8B."
            )
        if parts.username or parts.password:
            raise RegraftError(
                f"The address of the endpoint at {parts.hostname} holds a name or password, and "
                f"would be written into results. Give the key in the variable {KEY_VARIABLE}."
            )
        return cls(url, model)

    @property
    def address(self) -> str:
        """Where requests go."""
        return f"{self.url.rstrip('/')}/chat/completions"

    def reply(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Reply:
        """The model's reply, asked for again where the server is busy.

        Raises:
            PassingError: the server cannot be reached, says that the request is wrong, or does not
                answer like a chat server.
            RegraftError: the key cannot be sent.
        """
        problem, failures, asked_for = "", 0, 0.0
        while failures < _TRIES:
            if failures:
                own = self.pause * 2 ** (failures - 1)
                time.sleep(min(_LONGEST_PAUSE, max(own, asked_for)))
            body, found = self._body(messages, max_tokens), b""
            try:
                with _OPENER.open(self._request(body), timeout=self.timeout) as response:
                    found = response.read()
                return _reply(json.loads(found))
            except urllib.error.HTTPError as error:
                said, asked_for = _said(error), _retry_after(error)
                if error.code in _WRONG and self._learns(said, body):
                    continue
                if error.code in _WRONG and any(one in said.lower() for one in _FILTERED):
                    return Reply("", "content_filter")
                problem = f"{error.code} {error.reason} ({said[:200]})"
                if error.code not in _RETRIED:
                    break
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                shown = " ".join(found.decode(errors="replace").split())[:200]
                problem = f"it does not answer like a chat endpoint: {shown}"
            except (urllib.error.URLError, HTTPException, OSError) as error:
                problem = str(getattr(error, "reason", error))
            failures += 1
        raise PassingError(
            f"The model at {self.address} failed: {problem}. Check the address, the model's name "
            f"{self.model!r} and the variable {KEY_VARIABLE}; the same command goes on from here."
        )

    def _body(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
        newer = "max_tokens" in self._unknown
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body["max_completion_tokens" if newer else "max_tokens"] = max_tokens
        if "temperature" not in self._unknown:
            body["temperature"] = 0
        return body

    def _request(self, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(self.address, json.dumps(body).encode(), headers)

    def _learns(self, said: str, body: Mapping[str, Any]) -> bool:
        """Whether a refusal tells of a field of the request that this model does not take.

        OpenAI's later models want `max_completion_tokens`, which other servers do not know, and no
        temperature.
        """
        for field_name, sign in (("max_tokens", "max_completion_tokens"), ("temperature",) * 2):
            if sign in said and field_name in body:
                self._unknown.add(field_name)
                return True
        return False


def user_message(text: str, image: Path | None = None) -> dict[str, Any]:
    """What a user says, with an image before it where there is one."""
    if image is None:
        return {"role": "user", "content": text}
    kind = mimetypes.guess_type(image.name)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [shown, {"type": "text", "text": text}]}


def _reply(completion: Any) -> Reply:
    """Of a chat completion.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none.
    """
    choice = completion["choices"][0]
    content = choice["message"]["content"] or ""
    if isinstance(content, list):  # parts
        content = "".join(part.get("text", "") for part in content)
    if not isinstance(content, str):
        raise TypeError(type(content))
    # without halves of surrogate pairs, which no file takes
    return Reply(content.encode("utf-8", "replace").decode(), choice.get("finish_reason") or "")


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RegraftError(
            f"The variable {KEY_VARIABLE} holds characters that no key has, such as a line's end "
            "inside it. Set it to the key alone."
        )
    return key


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(4096).decode(errors="replace").split())
    except (HTTPException, OSError):
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that a server asks to wait, 0 where it does not say."""
    try:
        return max(0.0, float(error.headers.get("Retry-After") or 0))
    except ValueError:  # a date
        return 0.0
