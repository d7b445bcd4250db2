"""A model behind an OpenAI-compatible server as what is evaluated; and targets by their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft.data.demo import demo_model
from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource
from regraft.defence.artifact import Defence, Direction, asked, load_defence
from regraft.disk.files import file_digest
from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT, ChatServer
from regraft.evaluation.served import counts, explained, served_answers
from regraft.models.load import Source, open_answering
from regraft.progress import Progress, Silent
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings
from regraft.stages.evaluation_cache import EvaluationCache, Prompts
from regraft.stages.targets import Backend, Evaluable, OnText, Target

_PATIENCE = 600.0  # seconds for a reply, which may wait for others on the server


def open_target(
    named: str | Path | Source,
    compute: ComputeSettings,
    endpoint: EndpointSettings = EndpointSettings(),
    progress: Progress | None = None,
    *,
    patch: Path | None = None,
    defence: Path | None = None,
    text: OnText | None = None,
) -> Evaluable:
    """What a command line names to be evaluated; no weight is loaded and nothing is sent.

    Args:
        named: A folder, a hub id, "demo" for the bundled model, a model that is opened, or
            endpoint:URL#MODEL.
        compute: How a checkpoint is run; an endpoint runs as its server does.
        endpoint: How an endpoint is asked.
        progress: Progress.
        patch: Put on a checkpoint in memory.
        defence: Around the prompts, or inside of a checkpoint.
        text: Ordinary text, for a checkpoint.

    Raises:
        RegraftError: see `open_answering` and `ChatServer.parse`; an endpoint cannot do it.
    """
    progress = progress or Silent()
    if not isinstance(named, str) or not named.startswith(ENDPOINT):
        if not isinstance(named, Source):
            named = demo_model() if str(named) == "demo" else named
            named = open_answering(named, trust_remote_code=compute.trust_remote_code)
        return Target(named, compute, patch, defence, text, progress=progress)
    if patch is not None:
        raise RegraftError(
            "An endpoint takes no patch in memory. Write the checkpoint with `regraft apply`, "
            "start the server with it, and evaluate without --patch."
        )
    if text is not None:
        raise RegraftError("An endpoint gives answers and no likelihoods of text: leave --text.")
    server = replace(ChatServer.parse(named.removeprefix(ENDPOINT)), timeout=_PATIENCE)
    return EndpointTarget(server, endpoint.concurrency, defence, progress)


@dataclass(frozen=True)
class EndpointTarget:
    """A model behind a server that is to be evaluated; of it nothing is known but its answers.

    Args:
        server: Of the model.
        concurrency: Requests at a time; answers do not depend on it.
        defence: Answer under this defence prompt, from `defend`.
        progress: Progress.
        cache: Shared with other evaluations: data sets.
    """

    server: ChatServer
    concurrency: int = EndpointSettings().concurrency
    defence: Path | None = None
    progress: Progress = field(default_factory=Silent)
    cache: EvaluationCache = field(default_factory=lambda: EvaluationCache(memo_bytes=0))

    @property
    def compute(self) -> None:
        """It runs elsewhere."""

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{ENDPOINT}{self.server.url}#{self.server.model}"

    def backend(self, settings: EvalSettings) -> Backend:
        """What answers as the settings ask for.

        Raises:
            RegraftError: a server cannot: perplexity, answers that a verdict ends, a direction.
        """
        if settings.perplexity:
            raise RegraftError(
                "An endpoint gives answers and no likelihoods of references: leave --perplexity."
            )
        if not settings.full_answers:
            raise RegraftError(
                "An endpoint always gives full answers, which no verdict ends: leave "
                "--no-full-answers (in a recipe full_answers: false)."
            )
        if isinstance(self._defence, Direction):
            raise RegraftError(
                f"{self.defence} is a refusal direction, which acts inside a model and cannot on "
                "an endpoint. A defence prompt can; or evaluate the checkpoint itself."
            )
        return _ByServer(self, settings)

    def reading(self, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """The examples of the suites."""
        return self.cache.reading(None, suites, limit)

    def asked(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as the model gets them."""
        return asked(self._defence, examples)

    def announce(self, suites: Sequence[DataSource], reading: Reading) -> None:
        """Say what is about to be answered."""
        for suite in suites:
            if suite.name == "demo":
                self.progress.note(
                    f"{suite} are the bundled images, made for the bundled model: measured on "
                    "another they say little of it."
                )
        self.progress.note(reading.describe("Prompts"))

    def inputs(self) -> dict[str, str]:
        """The address and the model's name, what the server says of it, the defence's digest.

        Raises:
            PassingError: the server cannot be reached.
        """
        found = {"model": self.name}
        if described := self.server.described():
            found["served"] = json.dumps(described, sort_keys=True, ensure_ascii=False)
        if self.defence is not None:
            found["defence"] = file_digest(self.defence)
        return found

    def sizes(self) -> dict[str, int]:
        """Nothing is known."""
        return {}

    @cached_property
    def _defence(self) -> Defence | None:
        return None if self.defence is None else load_defence(self.defence)


class _ByServer(Backend):
    """The server, asked for one answer a prompt."""

    def __init__(self, target: EndpointTarget, settings: EvalSettings) -> None:
        self._target, self._settings = target, settings
        self._counts: dict[str, int] = {}

    def answers(self, prompts: Prompts, work: Path) -> list[str]:
        target = self._target
        what = f"Answering {prompts.name}", len(prompts.examples), "prompts"
        with target.progress.task(*what) as done:
            replies = served_answers(
                target.server,
                prompts.examples,
                max_new_tokens=self._settings.max_new_tokens,
                concurrency=target.concurrency,
                partial=work,
                advance=done,
            )
        self._counts = counts(replies)
        for sentence in explained(self._counts):
            target.progress.note(sentence)
        return [one.text for one in replies]

    def outcome(self) -> dict[str, Any]:
        """How many replies are not what was asked for, by kind."""
        return {"replies": self._counts}
