"""Evaluation targets: a checkpoint, which is run in memory; see endpoint.py for servers.

Only a model in memory gives likelihoods of text; a server is only asked for answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource
from regraft.defence import Defence, Direction, acting, asked, check_fits, load_defence
from regraft.disk.files import digest, file_digest
from regraft.errors import RegraftError
from regraft.evaluation.generate import answering_tokens
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
from regraft.loading import with_processor
from regraft.models.load import Source
from regraft.patch.apply import make_plan, patched, zeros_filled
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import is_changed
from regraft.progress import SILENT, Progress
from regraft.pruning.prune import zeros
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages.evaluation_cache import EvaluationCache, Prompts
from regraft.stages.provenance import fingerprints
from regraft.stages.reading import warn_of_bundled

STATES = "text-states.safetensors"  # in the folder of a dense model's evaluation


@dataclass(frozen=True)
class OnText:
    """Ordinary text to measure on: a file of documents separated by blank lines.

    `dense` is the folder of the dense model's evaluation on the same text, to which KL is measured.
    Without it, the evaluation saves the states that others need to measure KL to this model.
    """

    file: Path
    dense: Path | None = None

    def digests(self) -> dict[str, str]:
        """Digests of everything that determines the result.

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
        """As `predict`; the teacher is this model, or None if KL is measured to `dense`."""
        documents = read_documents(self.file)
        teacher = None if self.dense is None else load_teacher(self.dense / STATES, len(documents))
        with progress.task("Reading ordinary text", len(documents), "documents") as done:
            result, own = predict(network, processor, documents, teacher, done)
        return result, own if teacher is None else None


@dataclass(frozen=True)
class Answered:
    """What a target gives for prompts and text."""

    texts: Sequence[str]  # the answers, in order
    references: Mapping[str, Nll] = field(default_factory=dict)  # of reference responses, by id
    text: TextResult | None = None  # on ordinary text
    teacher: Teacher | None = None  # with which others measure their KL to this model on that text
    more: Mapping[str, Any] = field(default_factory=dict)  # for the evaluation's description


@dataclass(frozen=True, kw_only=True)
class AnyTarget:
    """Base class of evaluation targets.

    Attributes:
        defence: File of a defence at inference to use, from `write_defence`.
        cache: Shared with other evaluations of a run, which saves work and changes no result.
    """

    defence: Path | None = None
    progress: Progress = SILENT
    cache: EvaluationCache = field(default_factory=lambda: EvaluationCache(memo_bytes=0))

    @cached_property
    def loaded_defence(self) -> Defence | None:
        """The defence, if there is one."""
        return None if self.defence is None else load_defence(self.defence)

    def defended(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as the model gets them, with a defence's prompt."""
        return asked(self.loaded_defence, examples)


@dataclass(frozen=True)
class Target(AnyTarget):
    """A checkpoint to evaluate, and how to run it.

    Args:
        patch: Patch to apply to the model in memory.
        text: Ordinary text on which to measure perplexity, and KL to the dense model.
        processor_from: Model whose processor is used if the checkpoint has none.
    """

    model: Source
    compute: ComputeSettings
    patch: Path | None = None
    text: OnText | None = None
    processor_from: Source | None = None

    def check(self, settings: EvalSettings) -> None:
        """Accept any settings: a model in memory can do all that they ask for."""

    def reading(self, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """The examples of the suites, checked to be readable by the model."""
        return self.cache.reading(self.model, suites, limit)

    def warn(self, suites: Sequence[DataSource]) -> None:
        """Note if a model other than the bundled one is given prompts made for that one.

        Evaluations that share a cache are of one dense model, and note it once.
        """
        dense = self.processor_from or self.model
        for suite in suites:
            key = "bundled", suite.name, dense.folder
            self.cache.once(key, partial(warn_of_bundled, dense, suite, self.progress.note))

    def inputs(self) -> dict[str, str]:
        """Digests of the model, patch, defence and text.

        Raises:
            RegraftError: a file is missing or is for another model.
        """
        found = fingerprints(self.progress, model=self.model)
        if self.patch and self._patch:
            found["patch"] = file_digest(self.patch)
        if self.defence and self.loaded_defence:
            if isinstance(self.loaded_defence, Direction):  # a prompt fits quantised models too
                check_fits(self.loaded_defence, self.model, self.defence)
            found["defence"] = file_digest(self.defence)
        return found | (self.text.digests() if self.text else {})

    def sizes(self) -> dict[str, int]:
        """Numbers of prunable weights and of zeros among them; empty if weights are quantised.

        With a patch also how many it restores, and how many were `pruned` or `changed`.
        """
        if (architecture := self.model.readable_architecture) is None:
            return {}
        checkpoint = self.model.checkpoint
        key = "zeros", checkpoint.fingerprint
        count = self.cache.once(key, lambda: zeros(checkpoint, architecture))
        found = {"zeros": count, "prunable": architecture.prunable}
        if self._patch is not None:
            found["zeros"] -= zeros_filled(checkpoint, self._patch)
            kind = "changed" if is_changed(self._patch) else "pruned"
            found |= {"restored": self._patch.restored, kind: self._patch.about.get("pruned", 0)}
        return found

    def answered(self, prompts: Prompts, settings: EvalSettings, work: Path) -> Answered:
        """Answer every prompt greedily; finished answers are kept in the folder `work`.

        Raises:
            RegraftError: a prompt is too long for the model.
        """
        sources = self.model, with_processor(self.model, self.processor_from)
        self.cache.check_lengths_once(*sources, prompts.examples, settings.max_new_tokens)
        with self.running() as (network, processor):
            compared = _compared(prompts.examples) if settings.perplexity else []
            references = self._references(network, processor, compared, work) if compared else {}
            on_text = self.text.predicted(network, processor, self.progress) if self.text else ()
            judge = None if settings.full_answers else settings.text_judge()
            answerer = self.cache.answerer(
                sources, processor, prompts, self.compute.batch_size, judge
            )
            tokens = answering_tokens(prompts.examples, settings.max_new_tokens)
            what = f"Answering {len(prompts.examples)} prompts of {prompts.name}"
            with self.progress.task(what, tokens, "tokens (estimate)") as done:
                texts = answerer.answers(
                    network, max_new_tokens=settings.max_new_tokens, partial=work, advance=done
                )
        return Answered(texts, references, *on_text)

    @contextmanager
    def running(self) -> Iterator[tuple[nn.Module, Any]]:
        """The model in memory as it is to be evaluated, and its processor."""
        network, processor = self.cache.loaded_model(
            self.model, self.compute, self.progress, self.processor_from
        )
        patch = self._patch
        restored = patched(network, self.model.architecture, patch) if patch else nullcontext()
        with restored, acting(self.loaded_defence, network):
            yield network, processor

    @cached_property
    def _patch(self) -> Patch | None:
        """The loaded patch, checked to be for this model."""
        if self.patch is None:
            return None
        found = load_patch(self.patch)
        _ = self.model.architecture  # raises if the model cannot be patched
        make_plan(self.model.checkpoint, found, "apply")
        return found

    def _references(
        self, network: nn.Module, processor: Any, examples: Sequence[Example], work: Path
    ) -> dict[str, Nll]:
        size = self.compute.batch_size
        with self.progress.task("Reading the references", len(examples), "responses") as done:
            found = response_nlls(network, processor, examples, size, partial=work, advance=done)
        return {example.id: nll for example, nll in zip(examples, found, strict=True)}


def _compared(examples: Sequence[Example]) -> list[Example]:
    """The examples whose answers are compared with a reference."""
    return [one for one in examples if is_compared(one) and not one.choices]
