"""What can be evaluated: a checkpoint, which answers in memory; see endpoint.py for servers.

Only a model in memory says how likely it finds a text; of a server nothing is asked but answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
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
from regraft.models.load import Source, has_processor
from regraft.patch.apply import make_plan, patched, zeros_filled
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import is_changed
from regraft.progress import SILENT, Progress
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages.evaluation_cache import EvaluationCache, Prompts
from regraft.stages.provenance import fingerprints
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
class Answered:
    """What came of prompts."""

    texts: Sequence[str]  # the answers, in order
    references: Mapping[str, Nll] = field(default_factory=dict)  # of responses by id, if asked for
    text: TextResult | None = None  # of ordinary text
    teacher: Teacher | None = None  # from which others measure their KL to this model on that text
    more: Mapping[str, Any] = field(default_factory=dict)  # for the evaluation's description


@dataclass(frozen=True, kw_only=True)
class AnyTarget:
    """What all have that can be evaluated.

    Attributes:
        defence: Answer under this defence at inference, from `write_defence`.
        cache: Shared with the other evaluations of a run, which saves work and changes nothing.
    """

    defence: Path | None = None
    progress: Progress = SILENT
    cache: EvaluationCache = field(default_factory=lambda: EvaluationCache(memo_bytes=0))

    @cached_property
    def loaded_defence(self) -> Defence | None:
        """The defence in the file."""
        return None if self.defence is None else load_defence(self.defence)

    def defended(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as the model gets them."""
        return asked(self.loaded_defence, examples)


@dataclass(frozen=True)
class Target(AnyTarget):
    """A checkpoint that is to be evaluated, and how it is run.

    Args:
        model: The checkpoint.
        patch: Put this patch on the model in memory first.
        text: Measure perplexity on ordinary text too, and KL to the dense model.
        processor_from: Take the processor from there if the checkpoint comes without one.
    """

    model: Source
    compute: ComputeSettings
    patch: Path | None = None
    text: OnText | None = None
    processor_from: Source | None = None

    def check(self, settings: EvalSettings) -> None:
        """A model in memory does all that the settings can ask for."""

    def reading(self, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """The examples of the suites, which the model can read."""
        return self.cache.reading(self.model, suites, limit)

    def warn(self, suites: Sequence[DataSource]) -> None:
        """Say where another model goes by prompts made for the bundled one."""
        for suite in suites if self.processor_from is None else ():  # a run says it once
            warn_of_bundled(self.model, suite, self.progress.note)

    def inputs(self) -> dict[str, str]:
        """Digests of the model, of all that is put on or around it and of the text.

        Raises:
            RegraftError: a file is missing or is for another model.
        """
        found = fingerprints(model=self.model)
        if self.patch and self._patch:
            found["patch"] = file_digest(self.patch)
        if self.defence and self.loaded_defence:
            if isinstance(self.loaded_defence, Direction):  # a prompt fits quantised models too
                check_fits(self.loaded_defence, self.model.architecture, self.defence)
            found["defence"] = file_digest(self.defence)
        return found | (self.text.digests() if self.text else {})

    def sizes(self) -> dict[str, int]:
        """How many prunable weights there are, how many are zero; empty of quantised weights.

        With a patch also how many it restores, and of how many that were `pruned` or `changed`.
        """
        if (architecture := self.model.readable_architecture) is None:
            return {}
        found = {"zeros": self.cache.zero_count(self.model, architecture)}
        found["prunable"] = architecture.prunable
        if self._patch is not None:
            found["zeros"] -= zeros_filled(self.model.checkpoint, self._patch)
            kind = "changed" if is_changed(self._patch) else "pruned"
            found |= {"restored": self._patch.restored, kind: self._patch.about.get("pruned", 0)}
        return found

    def answered(self, prompts: Prompts, settings: EvalSettings, work: Path) -> Answered:
        """Answer every prompt greedily; finished answers are kept in the folder `work`.

        Raises:
            RegraftError: a prompt is too long for the model.
        """
        own = self.processor_from is None or has_processor(self.model)
        made_of = self.model, self.model if own else self.processor_from or self.model
        self.cache.check_lengths_once(*made_of, prompts.examples, settings.max_new_tokens)
        with self.running() as (network, processor):
            wanted = _compared(prompts.examples) if settings.perplexity else []
            references = self._references(network, processor, wanted, work) if wanted else {}
            on_text = self.text.predicted(network, processor, self.progress) if self.text else ()
            judge = None if settings.full_answers else settings.text_judge()
            answerer = self.cache.answerer(
                made_of, processor, prompts, self.compute.batch_size, judge
            )
            tokens = answering_tokens(prompts.examples, settings.max_new_tokens)
            what = f"Answering {len(prompts.examples)} prompts of {prompts.name}"
            with self.progress.task(what, tokens, "tokens, about") as done:
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
        """The patch to be put on the model; another model's is refused."""
        if self.patch is None:
            return None
        found = load_patch(self.patch)
        _ = self.model.architecture  # what keeps a model from being patched is said before loading
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
    """Those with a reference that answers are compared with."""
    return [
        one
        for one in examples
        if is_compared(one) and not one.choices and (one.response or "").strip()
    ]
