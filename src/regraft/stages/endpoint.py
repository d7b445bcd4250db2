"""Evaluation target behind an OpenAI-compatible server; opens any target by its name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from regraft.data.example import Reading
from regraft.data.sources import DataSource
from regraft.defence import Direction
from regraft.disk.files import file_digest
from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT, ChatServer
from regraft.evaluation.served import counts, explained, served_answers
from regraft.models.load import Source, open_answering
from regraft.progress import SILENT, Progress
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings
from regraft.stages.evaluation_cache import Prompts
from regraft.stages.reading import warn_of_bundled
from regraft.stages.targets import Answered, AnyTarget, OnText, Target

_PATIENCE = 600.0  # seconds to wait for a reply, which may be queued on the server


def open_target(
    named: str | Path | Source,
    compute: ComputeSettings,
    endpoint: EndpointSettings = EndpointSettings(),
    progress: Progress = SILENT,
    patch: Path | None = None,
    defence: Path | None = None,
    text: OnText | None = None,
) -> Target | EndpointTarget:
    """Open a target by its name; no weight is loaded and no request is sent.

    Args:
        named: A folder, a hub id, "demo" for the bundled model, an opened model, or
            endpoint:URL#MODEL.
        compute: How a checkpoint is run; not used for endpoints.
        patch: Patch to apply to a checkpoint in memory.

    Raises:
        RegraftError: see `open_answering` and `ChatServer.parse`; an endpoint is given a patch or a
            text.
    """
    if not isinstance(named, str) or not named.startswith(ENDPOINT):
        if not isinstance(named, Source):
            named = open_answering(named, trust_remote_code=compute.trust_remote_code)
        return Target(named, compute, patch, text, defence=defence, progress=progress)
    if patch is not None:
        raise RegraftError(
            "An endpoint takes no patch in memory. Write the checkpoint with `regraft apply`, "
            "start the server with it, and evaluate without --patch."
        )
    if text is not None:
        raise RegraftError("An endpoint gives answers and no likelihoods of text: drop --text.")
    server = replace(ChatServer.parse(named.removeprefix(ENDPOINT)), timeout=_PATIENCE)
    return EndpointTarget(server, endpoint.concurrency, defence=defence, progress=progress)


@dataclass(frozen=True)
class EndpointTarget(AnyTarget):
    """A model behind a server, of which only answers are known."""

    compute: ClassVar[None] = None  # it runs elsewhere
    server: ChatServer
    concurrency: int = EndpointSettings().concurrency  # answers do not depend on it

    def check(self, settings: EvalSettings) -> None:
        """Refuse what a server cannot do.

        Raises:
            RegraftError: perplexity, answers that stop early or a refusal direction are asked for.
        """
        if settings.perplexity:
            raise RegraftError(
                "An endpoint gives answers and no likelihoods of references: drop --perplexity."
            )
        if not settings.full_answers:
            raise RegraftError(
                "An endpoint always gives full answers: drop --no-full-answers (in a recipe "
                "full_answers: false)."
            )
        if isinstance(self.loaded_defence, Direction):
            raise RegraftError(
                f"{self.defence} is a refusal direction, which acts inside a model and cannot on "
                "an endpoint. A defence prompt can; or evaluate the checkpoint itself."
            )

    def reading(self, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """The examples of the suites."""
        return self.cache.reading(None, suites, limit)

    def warn(self, suites: Sequence[DataSource]) -> None:
        """Note if prompts were made for the bundled model; the server's may be another."""
        for suite in suites:
            warn_of_bundled(None, suite, self.progress.note)

    def inputs(self) -> dict[str, str]:
        """Address and model name, what the server says about it, and the defence's digest.

        Raises:
            PassingError: the server cannot be reached.
        """
        found = {"model": f"{ENDPOINT}{self.server.url}#{self.server.model}"}
        if described := self.server.described():
            found["served"] = json.dumps(described, sort_keys=True, ensure_ascii=False)
        if self.defence is not None:
            found["defence"] = file_digest(self.defence)
        return found

    def sizes(self) -> dict[str, int]:
        """Empty, since the weights are not known."""
        return {}

    def answered(self, prompts: Prompts, settings: EvalSettings, work: Path) -> Answered:
        """Answer every prompt; finished answers are kept in the folder `work`."""
        what = f"Answering {prompts.name}", len(prompts.examples), "prompts"
        with self.progress.task(*what) as done:
            replies = served_answers(
                self.server,
                prompts.examples,
                max_new_tokens=settings.max_new_tokens,
                concurrency=self.concurrency,
                partial=work,
                advance=done,
            )
        counted = counts(replies)
        for sentence in explained(counted):
            self.progress.note(sentence)
        return Answered([one.text for one in replies], more={"replies": counted})


Evaluable = Target | EndpointTarget
