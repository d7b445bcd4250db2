"""The cache that checks and evaluations of a run share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from regraft.data.collate import check_system_prompts, prompt_batch
from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource
from regraft.disk.artifact import ABOUT_FILE
from regraft.evaluation.generate import MEMO_BYTES, Answerer, check_lengths
from regraft.evaluation.judges import TextJudge
from regraft.loading import load
from regraft.models.load import Source, load_processor
from regraft.patch.pair import Survey, survey
from regraft.progress import Progress
from regraft.settings.compute import ComputeSettings
from regraft.stages.reading import read_suites


@dataclass(frozen=True)
class Prompts:
    """Prompts of an evaluation as the model gets them; `digest` also covers images' bytes."""

    name: str
    examples: Sequence[Example]
    digest: str


T = TypeVar("T")
_SAMPLED = 4  # prompts by which the mean length of all is estimated


class EvaluationCache:
    """Data sets, encoded prompts, image features, and the model that was loaded last.

    No result depends on it: an evaluation without a cache, or with one shared by others, writes the
    same files.

    Args:
        memo_bytes: Host memory for prompts and images; 0 keeps none.
    """

    def __init__(self, memo_bytes: int = MEMO_BYTES) -> None:
        self._memo_bytes = memo_bytes
        self._known: dict[Hashable, Any] = {}
        self._answerers: dict[Hashable, Answerer] = {}
        self._loaded: tuple[Hashable, tuple[nn.Module, Any]] | None = None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, which is called only the first time for this key."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def reading(
        self, model: Source | None, suites: Sequence[DataSource], limit: int | None
    ) -> Reading:
        """As `read_suites`, once for the same suites, so that images are decoded only once."""
        key = "suites", tuple(suites), limit, model is None or model.has_vision
        return self.once(key, lambda: read_suites(model, suites, limit))

    def surveyed(self, dense: Source, pruned: Source, progress: Progress) -> Survey:
        """As `survey`, which reads all weights, once for the same pair of checkpoints."""
        state = ((one.folder, *one.checkpoint.stamps()) for one in (dense, pruned))
        return self.once(("survey", *state), lambda: survey(dense, pruned, progress))

    def check_lengths_once(
        self, model: Source, processor: Source, examples: Sequence[Example], max_new_tokens: int
    ) -> None:
        """As `check_lengths` and `check_system_prompts`, once for all models that they fit."""
        key = model.config.to_json_string(), _settings_of(processor)
        self.check_system_prompts_once(processor, examples)
        self.once(
            ("lengths", *key, tuple(examples), max_new_tokens),
            lambda: check_lengths(
                model.config, load_processor(processor), examples, max_new_tokens
            ),
        )

    def check_system_prompts_once(
        self, processor: Source, examples: Sequence[Example], *, answered: bool = False
    ) -> None:
        """As `check_system_prompts`, once for all models with the same processor."""
        if any(one.system for one in examples):
            self.once(
                ("system prompts", _settings_of(processor), tuple(examples), answered),
                lambda: check_system_prompts(
                    load_processor(processor), examples, answered=answered
                ),
            )

    def prompt_tokens(self, model: Source, examples: Sequence[Example]) -> float:
        """Mean length of prompts in tokens, estimated by the first few."""
        some = tuple(examples[:_SAMPLED])

        def mean() -> float:
            processor = load_processor(model)
            ids = [prompt_batch(processor, [one]).inputs["input_ids"] for one in some]
            return sum(one.numel() for one in ids) / max(1, len(ids))

        return self.once(("tokens", _settings_of(model), some), mean)

    def loaded_model(
        self,
        model: Source,
        compute: ComputeSettings,
        progress: Progress,
        processor_from: Source | None = None,
    ) -> tuple[nn.Module, Any]:
        """The model, which callers must leave unchanged, and its processor."""
        key = (
            model.checkpoint.fingerprint,
            None if processor_from is None else processor_from.folder,
            compute.device,
            compute.dtype,
            compute.placement,
        )
        if self._loaded is None or self._loaded[0] != key:
            self.unload()
            self._loaded = key, load(model, compute, progress, processor_from)
        progress.loaded(self._loaded[1][0])
        return self._loaded[1]

    @property
    def keeps(self) -> bool:
        """Whether anything is kept for further evaluations."""
        return self._memo_bytes > 0

    def unload(self) -> None:
        """Free the cached model, before work that loads a model of its own."""
        self._loaded = None

    def forget_prompts(self) -> None:
        """Free encoded prompts and the model before a run of another one; data sets stay."""
        self._answerers.clear()
        self.unload()

    def answerer(
        self,
        checkpoints: Sequence[Source],
        processor: Any,
        prompts: Prompts,
        batch_size: int,
        judge: TextJudge | None,
    ) -> Answerer:
        """An `Answerer` for the prompts, encoded by the processor.

        Models share it if config, tokenizer, processor, chat template and the layout of weights are
        the same in `checkpoints`, those of the model and of the processor; `Answerer` checks that
        their vision parts are the same, too.
        """
        key = (
            *map(_settings_of, checkpoints),
            tuple(prompts.examples),
            prompts.digest,
            batch_size,
            judge,
        )
        if key not in self._answerers:
            kept = sum(one.kept_bytes for one in self._answerers.values())
            self._answerers[key] = Answerer(
                processor,
                prompts.examples,
                batch_size=batch_size,
                judge=judge,
                memo_bytes=max(0, self._memo_bytes - kept),
            )
        return self._answerers[key]


def _settings_of(source: Source) -> str:
    """A digest of a checkpoint's settings files and layout, without reading its weights."""
    return source.checkpoint.outline({*source.checkpoint.tensors, ABOUT_FILE})
