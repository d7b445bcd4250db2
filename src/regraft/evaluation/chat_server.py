"""A chat model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, or a paid service."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from typing import Any, Self, TypeVar

from regraft.errors import PassingError, RegraftError
from regraft.evaluation.server_key import KEY_VARIABLE, server_key, without_key
from regraft.evaluation.server_words import FILTERED, complaint, is_filter, not_taken

T = TypeVar("T")
ENDPOINT = "endpoint:"  # what names of these models begin with
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_WRONG = frozenset({400, 422})
_TOO_LONG = frozenset({400, 413, 422})  # what servers say of a prompt beyond their context
_TRIES = 5
_LONGEST_PAUSE = 60.0  # seconds, whatever a busy server asks for
_MOST = 16 << 20  # bytes of a reply
_MOST_OF_ERROR = 1 << 16  # bytes; what is longer is no message
_CHUNK = 1 << 16  # bytes read at a time
_DRAWN_OUT = 2  # how often the timeout a whole reply may take, which a server may send in drops
_LIST_TIMEOUT = 30.0  # seconds, for what no model is asked
_SHOWN = 200  # characters of what a server said, in an error
_LASTING = ("id", "root", "parent", "owned_by", "meta")  # not the context, which may be made larger
_MOST_TOKENS = 2**31  # of an answer; more is nonsense


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was named and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(eq=False)
class _Failed(Exception):  # noqa: N818 - one request did, which may be sent again
    """A request without a reply: why, and where the server said it, its status and words."""

    problem: str
    code: int = 0
    said: str = ""
    wait: float = 0.0  # seconds that the server asks for


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and why it ended: "stop", "length", "content_filter" or another word.

    A prompt that the server's filter refuses has an empty reply that ended by "content_filter".
    `greedy` tells that the model took temperature 0, `tokens` how long the server says it is.
    """

    text: str
    ended: str
    greedy: bool = True
    tokens: int | None = None


@dataclass(frozen=True)
class ChatServer:
    """A chat model at `url` ("http://localhost:8000/v1").

    The key, where one is needed, is read from the variable OPENAI_API_KEY, and blotted out wherever
    the server says it again. Replies are greedy (temperature 0) where the model lets one say so;
    what the server makes of that is its own affair, so results are repeatable only where the
    server's are.
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
            RegraftError: it is written otherwise, or holds a password, a query or the key.
        """
        url, _, model = text.partition("#")
        if f"[{KEY_VARIABLE}]" in without_key(text):
            raise RegraftError(
                f"The name of the endpoint holds the key of the variable {KEY_VARIABLE}, and would "
                "be written into results. Leave it out: the variable is enough."
            )
        try:
            parts = urllib.parse.urlsplit(url)
            _ = parts.port, (parts.hostname or "").encode("idna")
        except ValueError:  # no such port or host, or a bracket of an IPv6 address is missing
            parts = urllib.parse.SplitResult("", "", "", "", "")
        named = model.isprintable() and url.isprintable() and url.isascii() and " " not in url
        if parts.scheme not in ("http", "https") or not (parts.netloc and model and named):
            raise RegraftError(
                f"{ENDPOINT + text!r} names no endpoint; expected endpoint:URL#MODEL, as in "
                "endpoint:http://localhost:8000/v1#Qwen/Qwen3-8B."
            )
        if parts.username or parts.password or parts.query:
            what = "a query" if parts.query else "a name or password"
            raise RegraftError(
                f"The address of the endpoint at {parts.hostname} holds {what}, and "
                f"would be written into results. Give the key in the variable {KEY_VARIABLE}."
            )
        return cls(url, model)

    @property
    def address(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def reply(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Reply:
        """The model's reply, asked for again where the server is busy.

        Raises:
            PassingError: the server cannot be reached, says that the request is wrong, or does not
                answer like a chat server.
            RegraftError: the key cannot be sent.
        """
        return self._patiently(lambda: self._once(messages, max_tokens))

    def described(self) -> dict[str, Any]:
        """What the server's list of models says of this one, as far as it lasts; {} if nothing.

        Raises:
            PassingError: the server cannot be reached.
            RegraftError: the key cannot be sent.
        """
        request = self._request(f"{self.url.rstrip('/')}/models")

        def entry() -> dict[str, Any]:
            try:
                return self._sent(request, partial(_entry, model=self.model))
            except _Failed as failed:
                if failed.code and failed.code not in _RETRIED:  # it has no such list
                    return {}
                raise

        return self._patiently(entry)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        failed, failures = _Failed(""), 0
        while failures < _TRIES:
            if failures:
                own = self.pause * 2 ** (failures - 1)
                time.sleep(min(_LONGEST_PAUSE, max(own, failed.wait)))
            try:
                return attempt()
            except _Failed as error:
                failed = error
            if failed.code >= 300 and failed.code not in _RETRIED:
                break
            failures += 1
        raise PassingError(
            f"The model at {self.address} failed: {without_key(failed.problem)}. "
            f"{self._advice(failed.code)}; the same command goes on from here."
        )

    def _advice(self, code: int) -> str:
        if code in _TOO_LONG:
            return (
                "If the prompt is too long for it, start it with a longer context or leave the "
                f"row out; if not, check the model's name {self.model!r}"
            )
        if code in _RETRIED:
            return "It is busy or has a fault: wait, or look into its log"
        return f"Check the address, the model's name {self.model!r} and the variable {KEY_VARIABLE}"

    def _once(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        without: frozenset[str] = frozenset(),
    ) -> Reply:
        """One reply; `without` are fields that this request has been refused for."""
        body = self._body(messages, max_tokens, without | self._unknown)
        try:
            request = self._request(self.address, body)
            reply = self._sent(request, partial(_reply, greedy="temperature" in body))
        except _Failed as failed:
            if failed.code not in _WRONG:
                raise
            words = complaint(failed.said, messages)
            if refused := not_taken(words, body):
                return self._once(messages, max_tokens, without | {refused})
            if is_filter(words):
                return Reply("", FILTERED)
            raise
        self._unknown.update(without)  # it was these: a refusal may only repeat words of a prompt
        return reply

    def _sent(self, request: urllib.request.Request, read: Callable[[Any], T]) -> T:
        """What `read` makes of the JSON value that the server answers with.

        Raises:
            _Failed: it does not, or with something else.
        """
        found = b""
        timeout = min(self.timeout, _LIST_TIMEOUT) if request.data is None else self.timeout
        deadline = time.monotonic() + _DRAWN_OUT * timeout
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                found = _read(response, _MOST, deadline)
            return read(json.loads(found))
        except urllib.error.HTTPError as error:
            said = _words(_body_of(error, deadline))
            problem = f"{error.code} {error.reason} ({said[:_SHOWN]})"
            raise _Failed(problem, error.code, said, _retry_after(error)) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = "too long" if len(found) == _MOST else _words(found)[:_SHOWN]
            problem = f"it does not answer like a chat endpoint: {shown}"
            raise _Failed(problem, 200) from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            raise _Failed(str(getattr(error, "reason", error))) from None

    def _body(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int, without: Set[str]
    ) -> dict[str, Any]:
        newer = "max_tokens" in without
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body["max_completion_tokens" if newer else "max_tokens"] = max_tokens
        if "temperature" not in without:
            body["temperature"] = 0
        return body

    def _request(self, url: str, body: Mapping[str, Any] | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if key := server_key():
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(url, sent, headers)


def user_message(text: str, image: tuple[str, bytes] | None = None) -> dict[str, Any]:
    """What a user says, behind an image where there is one: its kind ("image/png") and bytes."""
    if image is None:
        return {"role": "user", "content": text}
    kind, content = image
    url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [shown, {"type": "text", "text": text}]}


def _reply(completion: Any, greedy: bool) -> Reply:
    """Of a chat completion.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none.
    """
    choice = completion["choices"][0]
    message = choice["message"]
    content = message["content"] or message.get("refusal") or ""  # which some models write apart
    if isinstance(content, list):  # parts
        content = "".join(part.get("text", "") for part in content)
    ended, usage = choice.get("finish_reason") or "", completion.get("usage")
    if not (isinstance(content, str) and isinstance(ended, str)):
        raise TypeError(type(content))
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    known = tokens if type(tokens) is int and 0 <= tokens < _MOST_TOKENS else None
    return Reply(without_key(content), without_key(ended), greedy, known)


def _entry(listed: Any, model: str) -> dict[str, Any]:
    """What stays the same of a model's entry, which may hold the time of the request."""
    entries = listed.get("data")
    found = next((one for one in entries if isinstance(one, dict) and one.get("id") == model), {})
    return {name: _plain(found[name]) for name in _LASTING if found.get(name) is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {without_key(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return without_key(value) if isinstance(value, str) else value


def _words(said: bytes) -> str:
    """In one line and without the key, which JSON may spell in escapes."""
    text = said.decode(errors="replace")
    try:
        text = json.dumps(_plain(json.loads(text)), ensure_ascii=False)
    except (ValueError, RecursionError):
        text = without_key(text)
    return without_key(" ".join(text.split()))


def _read(response: Any, most: int, deadline: float) -> bytes:
    """The first bytes of a body.

    Raises:
        TimeoutError: the deadline passes, by `time.monotonic`.
        HTTPException, OSError: it cannot be read.
    """
    found = bytearray()
    while len(found) < most and (chunk := response.read1(min(_CHUNK, most - len(found)))):
        found += chunk
        if time.monotonic() > deadline:
            raise TimeoutError("its reply did not end in time")
    return bytes(found)


def _body_of(error: urllib.error.HTTPError, deadline: float) -> bytes:
    try:
        found = _read(error, _MOST_OF_ERROR, deadline)
        return found if len(found) < _MOST_OF_ERROR else b""  # which might end inside the key
    except (HTTPException, OSError):
        return b""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that a server asks to wait, 0 where it does not say."""
    try:
        return max(0.0, float(error.headers.get("Retry-After") or 0))
    except ValueError:  # a date
        return 0.0
