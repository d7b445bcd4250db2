"""Servers of chat models for tests: one that is scripted, in this process, and a real one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Response:
    """What a scripted server sends: JSON values as such, text as it is."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    wait: float = 0.0  # seconds before it
    drip: float = 0.0  # seconds between its bytes


def said(text: Any, ended: str = "stop", tokens: int | None = None) -> dict[str, Any]:
    """A chat completion."""
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return {"choices": [{"message": {"content": text}, "finish_reason": ended}], **usage}


def echo(body: dict[str, Any]) -> Any:
    """Answers with what was asked."""
    return said(f"You asked: {asked(body)}")


def asked(body: Mapping[str, Any]) -> str:
    """The text of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@dataclass
class Scripted:
    """Answers by `answer`, first by `first` in turn; keeps bodies, keys and the most at a time."""

    answer: Callable[[dict[str, Any]], Any] = echo
    first: list[Any] = field(default_factory=list)
    models: Any = field(default_factory=lambda: Response("no such page", 404))
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most: int = 0
    url: str = ""
    before: Callable[[], None] = lambda: None
    _now: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def name(self, model: str = "m") -> str:
        """As an endpoint is named."""
        return f"endpoint:{self.url}#{model}"

    def asked(self) -> list[str]:
        """The texts of all requests."""
        return [asked(body) for body in self.bodies]

    def take(self, body: dict[str, Any], headers: Mapping[str, str]) -> Response:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._now += 1
            self.most = max(self.most, self._now)
            own = self.first.pop(0) if self.first else self.answer
        found = own(body) if callable(own) else own
        response = found if isinstance(found, Response) else Response(found)
        self.before()
        time.sleep(response.wait)
        with self._lock:
            self._now -= 1
        return response


@contextmanager
def scripted(**script: Any) -> Iterator[Scripted]:
    """A scripted server at work."""
    own = Scripted(**script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here = self.path == "/v1/chat/completions"
            self._send(own.take(body, dict(self.headers)) if here else Response("?", 404))

        def do_GET(self) -> None:
            own.headers.append(dict(self.headers))
            found = own.models if self.path == "/v1/models" else Response("?", 404)
            self._send(found if isinstance(found, Response) else Response(found))

        def _send(self, response: Response) -> None:
            content = response.content
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            try:
                self.send_response(response.status, response.reason)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                sent = text if isinstance(text, bytes) else text.encode()
                for i in range(len(sent) if response.drip else 0):
                    self.wfile.write(sent[i : i + 1])
                    time.sleep(response.drip)
                self.wfile.write(b"" if response.drip else sent)
            except OSError:
                pass  # whoever asked is gone

        def log_message(self, *_: Any) -> None:
            """Be quiet."""

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.daemon_threads = True
    own.url = f"http://127.0.0.1:{service.server_port}/v1"
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    try:
        yield own
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def transformers_serve(folder: Path, log: Path, *words: str) -> Iterator[str]:
    """`transformers serve FOLDER` on a free port, until the block ends; its URL."""
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), *words]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        _await(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-2000:])
