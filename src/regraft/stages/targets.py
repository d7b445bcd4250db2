"""What can be evaluated: a checkpoint, which answers in memory; see endpoint.py for servers.

`evaluate` asks a target what it is made of and for a backend, and the backend for answers. Only a
model in memory says how likely it finds a text; of a server nothing is asked but answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource
from regraft.defence.artifact import Defence, Direction, acting, asked, check_fits, load_defence
from regraft.disk.files import digest, file_digest
from regraft.errors import RegraftError
from regraft.evaluation.perplexity import (
    Nll,
    Teacher,
    load_teacher,
    predict,
    read_documents,
    response_nlls,
)
from regraft.evaluation.results import TextResult
from regraft.evaluation.summary import is_compared
from regraft.loading import patch_in_memory
from regraft.models.load import Source, has_processor
from regraft.patch.apply import patched, zeros_filled
from regraft.patch.format import Patch
from regraft.patch.pair import is_changed
from regraft.progress import Progress, Silent
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages.evaluation_cache import EvaluationCache, Prompts
from regraft.stages.reading import warn_of_bundled

STATES = "text-states.safetensors"  # in the folder of a dense model's evaluation


@dataclass(frozen=True)
class OnText:
    """Ordinary text to measure on: a file of documents separated by blank lines.

    `dense` is the folder of the dense model's evaluation on the same text, from which KL is
    measured. An evaluation without it keeps the states by which others measure theirs.
    """

    file: Path
    dense: Path | None = None

    def digests(self) -> dict[str, str]:
        """Of all that decides the result.

        Raises:
            RegraftError: the text is missing, or the dense model was not evaluated on one.
        """
        found = {"text": digest(*read_documents(self.file))}
        if self.dense is None:
            return found
        states = self.dense / STATES
        if not states.is_file():
            raise RegraftError(
                f"{self.dense} holds no evaluation of the dense model on a text: there is no "
                f"{STATES} in it. Evaluate the dense model first, with --text and without --dense."
            )
        return found | {"dense on text": file_digest(states)}

    def predicted(
        self, network: nn.Module, processor: Any, progress: Progress
    ) -> tuple[TextResult, Teacher | None]:
        """See `predict`; the teacher is None where the text has one, which is the dense model."""
        documents = read_documents(self.file)
        teacher = None if self.dense is None else load_teacher(self.dense / STATES, len(documents))
        with progress.task("Reading ordinary text", len(documents), "documents") as done:
            result, own = predict(network, processor, documents, teacher, done)
        return result, own if teacher is None else None


@dataclass(frozen=True)
class Likelihoods:
    """How likely a model finds text that others wrote, where that is asked for.

    `references` are by the id of their example. `teacher` is what later evaluations on the same
    ordinary text need to measure KL to this model.
    """

    references: Mapping[str, Nll] = field(default_factory=dict)
    text: TextResult | None = None
    teacher: Teacher | None = None


class Backend(ABC):
    """What answers the prompts of an evaluation, by whatever means."""

    @abstractmethod
    def answers(self, prompts: Prompts, work: Path) -> list[str]:
        """Answer every prompt greedily, in order.

        Finished answers are kept in the folder `work`, and found there after a kill.
        """

    def check(self, examples: Sequence[Example]) -> None:  # noqa: B027, most have nothing to check
        """Raise a `RegraftError` before long work where some prompts cannot be answered."""

    def likelihoods(self, prompts: Prompts, work: Path) -> Likelihoods:
        """Nothing, for what can only be asked for answers."""
        return Likelihoods()

    def outcome(self) -> dict[str, Any]:
        """What there is to tell of the answers beside their texts, once they are there."""
        return {}


class Evaluable(Protocol):
    """What `evaluate` takes: a `Target`, or an `EndpointTarget`."""

    @property
    def compute(self) -> ComputeSettings | None:
        """How it is run, None for what runs elsewhere."""

    @property
    def cache(self) -> EvaluationCache:
        """Shared with other evaluations."""

    def backend(self, settings: EvalSettings) -> Backend:
        """What answers as the settings ask for."""

    def reading(self, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """The examples of the suites."""

    def asked(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as the model gets them."""

    def announce(self, suites: Sequence[DataSource], reading: Reading) -> None:
        """Say what is about to be answered."""

    def inputs(self) -> dict[str, str]:
        """What tells the model, and all that is put on or around it, from others: "model" ..."""

    def sizes(self) -> dict[str, int]:
        """How many prunable weights there are, and how many of them are zero, where it is known."""


@dataclass(frozen=True)
class Target:
    """A checkpoint that is to be evaluated, and how it is run.

    Args:
        model: The checkpoint.
        compute: Device, dtype, batch size.
        patch: Put this patch on the model in memory first.
        defence: Answer under this defence at inference, from `defend`.
        text: Measure perplexity on ordinary text too, and KL to the dense model.
        processor_from: Take the processor from there if the checkpoint comes without one.
        progress: Progress.
        cache: Shared with the other evaluations of a run, which saves work and changes nothing.
    """

    model: Source
    compute: ComputeSettings
    patch: Path | None = None
    defence: Path | None = None
    text: OnText | None = None
    processor_from: Source | None = None
    progress: Progress = field(default_factory=Silent)
    cache: EvaluationCache = field(default_factory=lambda: EvaluationCache(memo_bytes=0))

    def backend(self, settings: EvalSettings) -> Backend:
        """What answers as the settings ask for."""
        return _InMemory(self, settings)

    def reading(self, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """The examples of the suites, which the model can read."""
        return self.cache.reading(self.model, suites, limit)

    def asked(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as the model gets them."""
        return asked(self._defence, examples)

    def announce(self, suites: Sequence[DataSource], reading: Reading) -> None:
        """Say what is about to be answered."""
        for suite in suites if self.processor_from is None else ():  # a run says it once
            warn_of_bundled(self.model, suite, self.progress.note)
        self.progress.note(reading.describe("Prompts"))

    def inputs(self) -> dict[str, str]:
        """Digests of the model, of all that is put on or around it and of the text.

        Raises:
            RegraftError: a file is missing or is for another model.
        """
        _, found = self._patch
        if self.defence and self._defence:
            if isinstance(self._defence, Direction):  # a prompt fits any model, quantised ones too
                check_fits(self._defence, self.model.architecture, self.defence)
            found = found | {"defence": file_digest(self.defence)}
        return found | (self.text.digests() if self.text else {})

    def sizes(self) -> dict[str, int]:
        """How many prunable weights there are, how many are zero; empty of quantised weights.

        With a patch also how many it restores, and of how many that were `pruned` or `changed`.
        """
        if (architecture := self.model.readable_architecture) is None:
            return {}
        found = {"zeros": self.cache.zeros(self.model, architecture)}
        found["prunable"] = architecture.prunable
        patch, _ = self._patch
        if patch is not None:
            found["zeros"] -= zeros_filled(self.model.checkpoint, patch)
            kind = "changed" if is_changed(patch) else "pruned"
            found |= {"restored": patch.restored, kind: patch.about.get("pruned", 0)}
        return found

    @property
    def checkpoints(self) -> tuple[Source, Source]:
        """The model, and what its processor is taken from; see `loading.load`."""
        own = self.processor_from is None or has_processor(self.model)
        return self.model, self.model if own else self.processor_from or self.model

    @contextmanager
    def running(self) -> Iterator[tuple[nn.Module, Any]]:
        """The model in memory as it is to be evaluated, and its processor."""
        network, processor = self.cache.load(
            self.model, self.compute, self.progress, self.processor_from
        )
        patch, _ = self._patch
        restored = patched(network, self.model.architecture, patch) if patch else nullcontext()
        with restored, acting(self._defence, network):
            yield network, processor

    @cached_property
    def _patch(self) -> tuple[Patch | None, dict[str, str]]:
        return patch_in_memory(self.model, self.patch)

    @cached_property
    def _defence(self) -> Defence | None:
        return None if self.defence is None else load_defence(self.defence)


@dataclass(frozen=True)
class _InMemory(Backend):
    """The model in this process, with a patch and a defence where they are named."""

    target: Target
    settings: EvalSettings

    def check(self, examples: Sequence[Example]) -> None:
        made_of, most = self.target.checkpoints, self.settings.max_new_tokens
        self.target.cache.check_lengths(*made_of, examples, most)

    def answers(self, prompts: Prompts, work: Path) -> list[str]:
        target, settings = self.target, self.settings
        judge = None if settings.full_answers else settings.text_judge()
        with target.running() as (network, processor):
            answerer = target.cache.answerer(
                target.checkpoints, processor, prompts, target.compute.batch_size, judge
            )
            what = f"Answering {prompts.name}", len(prompts.examples), "prompts"
            with target.progress.task(*what) as done:
                return answerer.answers(
                    network, max_new_tokens=settings.max_new_tokens, partial=work, advance=done
                )

    def likelihoods(self, prompts: Prompts, work: Path) -> Likelihoods:
        """Of the references that answers are compared with, and of ordinary text."""
        compared = [
            one
            for one in prompts.examples
            if is_compared(one) and not one.choices and (one.response or "").strip()
        ]
        wanted = compared if self.settings.perplexity else []
        text = self.target.text
        if not wanted and text is None:
            return Likelihoods()
        with self.target.running() as (network, processor):
            references = self._references(network, processor, wanted, work) if wanted else {}
            on_text = text.predicted(network, processor, self.target.progress) if text else ()
            return Likelihoods(references, *on_text)

    def _references(
        self, network: nn.Module, processor: Any, examples: Sequence[Example], work: Path
    ) -> dict[str, Nll]:
        size = self.target.compute.batch_size
        task = self.target.progress.task("Reading the references", len(examples), "responses")
        with task as done:
            found = response_nlls(network, processor, examples, size, partial=work, advance=done)
        return {example.id: nll for example, nll in zip(examples, found, strict=True)}
