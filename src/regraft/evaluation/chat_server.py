"""A chat model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, or a paid service."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from typing import Any, Self, TypeVar

from regraft.errors import PassingError, RegraftError
from regraft.evaluation.server_key import KEY_VARIABLE, server_key, without_key
from regraft.evaluation.server_words import FILTERED, complaint, is_filter, not_taken

T = TypeVar("T")
ENDPOINT = "endpoint:"  # prefix of the names of these models
_RETRIED = frozenset({408, 409, 424, 429, 500, 502, 503, 504})  # 424: TGI failed to generate
# How replies end that the server broke off: SGLang and vLLM, routers such as OpenRouter, DeepSeek
_BROKEN_OFF = frozenset({"abort", "error", "insufficient_system_resource"})
_BAD_REQUEST = frozenset({400, 422})
_TOO_LONG = frozenset({400, 413, 422})  # statuses that servers give for a prompt beyond the context
_TRIES = 5
_LONGEST_PAUSE = 60.0  # seconds, whatever a busy server asks for
_MOST = 16 << 20  # bytes of a reply
_MOST_OF_ERROR = 1 << 16  # bytes; a longer body is not a message
_CHUNK = 1 << 16  # bytes read at a time
_TIMEOUTS = 2  # that a whole reply may take, which a server may send bit by bit
_LIST_TIMEOUT = 30.0  # seconds, for the list of models
_SHOWN = 200  # characters of a server's message in an error
_STABLE = ("id", "root", "parent", "owned_by", "meta")  # not the context length, which may grow
_MOST_OF_FIELD = 4096  # characters of a field that is kept, as JSON; results repeat it
_MOST_TOKENS = 2**31  # of an answer; more is nonsense


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Send the key to the given address only, never to one it redirects to."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(eq=False)
class _Failed(Exception):  # noqa: N818 - a single request, which may be sent again
    """A request without a reply: the problem and, if the server answered, status and message."""

    problem: str
    code: int = 0
    message: str = ""
    wait: float = 0.0  # seconds that the server asks to wait


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and why it ended: "stop", "length", "content_filter" or another word.

    A prompt that the server's filter refuses gets an empty reply that ended by "content_filter".
    `greedy` is whether the model accepted temperature 0, `tokens` the length that the server gives.
    """

    text: str
    ended: str
    greedy: bool = True
    tokens: int | None = None


@dataclass(frozen=True)
class ChatServer:
    """A chat model at `url` ("http://localhost:8000/v1").

    The key, if one is needed, is read from the variable OPENAI_API_KEY, and masked wherever the
    server repeats it. Replies are requested at temperature 0 unless the model refuses that field;
    results are repeatable only if the server's are.
    """

    url: str
    model: str
    timeout: float = 120.0
    pause: float = 1.0  # seconds before the second try; doubled before each later one
    _refused: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse "URL#MODEL".

        Raises:
            RegraftError: it has another form, or contains a password, a query or the key.
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
        clean = model.isprintable() and url.isprintable() and url.isascii() and " " not in url
        if parts.scheme not in ("http", "https") or not (parts.netloc and model and clean):
            raise RegraftError(
                f"{ENDPOINT + text!r} names no endpoint; expected endpoint:URL#MODEL, as in "
                "endpoint:http://localhost:8000/v1#Qwen/Qwen3-8B."
            )
        if parts.username or parts.password or parts.query:
            found = "a query" if parts.query else "a name or password"
            raise RegraftError(
                f"The address of the endpoint at {parts.hostname} holds {found}, and "
                f"would be written into results. Give the key in the variable {KEY_VARIABLE}."
            )
        return cls(url, model)

    @property
    def address(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def reply(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Reply:
        """Request a reply, repeating the request while the server is busy.

        Raises:
            PassingError: the server cannot be reached, rejects the request, or does not answer like
                a chat server.
            RegraftError: the key cannot be sent.
        """
        return self._with_retries(lambda: self._reply_without(messages, max_tokens))

    def described(self) -> dict[str, Any]:
        """The stable fields of this model in the server's list of models; {} if there is none.

        Raises:
            PassingError: the server cannot be reached.
            RegraftError: the key cannot be sent.
        """
        request = self._request(f"{self.url.rstrip('/')}/models")

        def entry() -> dict[str, Any]:
            try:
                return self._send(request, partial(_entry, model=self.model))
            except _Failed as failed:
                # Transformers' server answers 500 where it has no cache of models to list.
                if failed.code == 500 or (failed.code and failed.code not in _RETRIED):
                    return {}
                raise

        return self._with_retries(entry)

    def _with_retries(self, attempt: Callable[[], T]) -> T:
        failed = _Failed("")
        for failures in range(_TRIES):
            if failures:
                pause = self.pause * 2 ** (failures - 1)
                time.sleep(min(_LONGEST_PAUSE, max(pause, failed.wait)))
            try:
                return attempt()
            except _Failed as error:
                failed = error
            if failed.code >= 300 and failed.code not in _RETRIED:
                break
        raise PassingError(
            f"The model at {self.address} failed: {without_key(failed.problem)}. "
            f"{self._advice(failed.code)}; the same command continues from here."
        )

    def _advice(self, code: int) -> str:
        if code in _TOO_LONG:
            return (
                "If the prompt is too long for the server, start it with a longer context or leave "
                f"the row out; otherwise check the model's name {self.model!r}"
            )
        if code in _RETRIED:
            return "The server is busy or failing: wait, or look into its log"
        return f"Check the address, the model's name {self.model!r} and the variable {KEY_VARIABLE}"

    def _reply_without(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        without: frozenset[str] = frozenset(),
    ) -> Reply:
        """Request one reply, without the fields that this request has been refused for."""
        left_out = without | self._refused
        limit = "max_completion_tokens" if "max_tokens" in left_out else "max_tokens"
        body: dict[str, Any] = {"model": self.model, "messages": messages, limit: max_tokens}
        if "temperature" not in left_out:
            body["temperature"] = 0
        try:
            request = self._request(self.address, body)
            reply = self._send(request, partial(_reply, greedy="temperature" in body))
        except _Failed as failed:
            if failed.code not in _BAD_REQUEST:
                raise
            words = complaint(failed.message, messages)
            if refused := not_taken(words, body):
                return self._reply_without(messages, max_tokens, without | {refused})
            if is_filter(words):
                return Reply("", FILTERED)
            raise
        # only success proves it was these fields: the message may have repeated words of the prompt
        self._refused.update(without)
        return reply

    def _send(self, request: urllib.request.Request, read: Callable[[Any], T]) -> T:
        """Send a request and return `read` of the JSON value in the response.

        Raises:
            _Failed: there is no response, or one that is an error or that `read` rejects.
        """
        body = b""
        timeout = min(self.timeout, _LIST_TIMEOUT) if request.data is None else self.timeout
        deadline = time.monotonic() + _TIMEOUTS * timeout
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                body = _read(response, _MOST, deadline)
            return read(json.loads(body))
        except urllib.error.HTTPError as error:
            message = _one_line(_body_of(error, deadline))
            problem = f"{error.code} {error.reason} ({message[:_SHOWN]})"
            raise _Failed(problem, error.code, message, _retry_after(error)) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = "too long" if len(body) == _MOST else _one_line(body)[:_SHOWN]
            problem = f"it does not answer like a chat endpoint: {shown}"
            raise _Failed(problem, 200) from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            raise _Failed(str(getattr(error, "reason", error))) from None

    def _request(self, url: str, body: Mapping[str, Any] | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if key := server_key():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(url, data, headers)


def user_message(text: str, image: tuple[str, bytes] | None = None) -> dict[str, Any]:
    """A user's message: `text`, after an image if given as media type ("image/png") and bytes."""
    if image is None:
        return {"role": "user", "content": text}
    media_type, content = image
    url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [shown, {"type": "text", "text": text}]}


def _reply(completion: Any, greedy: bool) -> Reply:
    """The reply in a chat completion.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not one.
        _Failed: the server broke it off.
    """
    choice = completion["choices"][0]
    message = choice["message"]
    ended, usage = choice.get("finish_reason") or "", completion.get("usage")
    if ended in _BROKEN_OFF:
        raise _Failed(f"it broke the reply off (finish_reason: {ended})", 503)
    # a reply without text may lack the field; some models have another field for refusals
    content = (message.get("content") if ended else message["content"]) or message.get("refusal")
    if isinstance(content, list):  # parts
        content = "".join(part.get("text", "") for part in content)
    content = content or ""
    if not (isinstance(content, str) and isinstance(ended, str)):
        raise TypeError(type(content))
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    known = tokens if type(tokens) is int and 0 <= tokens < _MOST_TOKENS else None
    return Reply(without_key(content), without_key(ended), greedy, known)


def _entry(listed: Any, model: str) -> dict[str, Any]:
    """The stable fields of a model's entry, which may also hold the time of the request."""
    entries = listed.get("data")
    found = next((one for one in entries if isinstance(one, dict) and one.get("id") == model), {})
    stable = {name: found[name] for name in _STABLE if found.get(name) is not None}
    if isinstance(meta := stable.get("meta"), dict):  # llama.cpp's, whose context may be raised
        stable["meta"] = {name: value for name, value in meta.items() if name != "n_ctx"}
    return {
        name: _masked(value)
        for name, value in stable.items()
        if len(json.dumps(value)) <= _MOST_OF_FIELD
    }


def _masked(value: Any) -> Any:
    """A JSON value without the key."""
    if isinstance(value, dict):
        return {without_key(name): _masked(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner) for inner in value]
    return without_key(value) if isinstance(value, str) else value


def _one_line(body: bytes) -> str:
    """A response in one line and without the key, which JSON may have escaped."""
    text = body.decode(errors="replace")
    try:
        text = json.dumps(_masked(json.loads(text)), ensure_ascii=False)
    except (ValueError, RecursionError):
        text = without_key(text)
    return without_key(" ".join(text.split()))


def _read(response: Any, most: int, deadline: float) -> bytes:
    """Read at most the first `most` bytes of a body.

    Raises:
        TimeoutError: it has not ended by the deadline, in `time.monotonic`.
        HTTPException, OSError: it cannot be read.
    """
    body = bytearray()
    while len(body) < most and (chunk := response.read1(min(_CHUNK, most - len(body)))):
        body += chunk
        if time.monotonic() > deadline:
            raise TimeoutError("its reply did not end in time")
    return bytes(body)


def _body_of(error: urllib.error.HTTPError, deadline: float) -> bytes:
    try:
        body = _read(error, _MOST_OF_ERROR, deadline)
        return body if len(body) < _MOST_OF_ERROR else b""  # cut off, maybe inside the key
    except (HTTPException, OSError):
        return b""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that a server asks to wait, 0 if it does not say."""
    try:
        return max(0.0, float(error.headers.get("Retry-After") or 0))
    except ValueError:  # a date
        return 0.0
