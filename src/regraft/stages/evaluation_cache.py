"""What the checks and evaluations of one run share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from regraft.data.collate import prompt_batch
from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource
from regraft.disk.artifact import ABOUT_FILE
from regraft.evaluation.generate import MEMO_BYTES, Answerer, check_lengths
from regraft.evaluation.judges import TextJudge
from regraft.loading import load
from regraft.models.architecture import Architecture
from regraft.models.load import Source, load_processor
from regraft.patch.pair import Survey, survey
from regraft.progress import Progress
from regraft.pruning.prune import zeros
from regraft.settings.compute import ComputeSettings
from regraft.stages.reading import read_suites


@dataclass(frozen=True)
class Prompts:
    """What an evaluation asks, as the model gets it; `digest` covers the bytes of images too."""

    name: str
    examples: Sequence[Example]
    digest: str


T = TypeVar("T")
_LOOKED_AT = 4  # prompts whose length tells that of all


class EvaluationCache:
    """Data sets, encoded prompts, what images became, and the model that was loaded last.

    Nothing in it decides a result: an evaluation without a cache, or with that of other
    evaluations, writes the same files.

    Args:
        memo_bytes: Host memory for prompts and images; none are kept with 0.
    """

    def __init__(self, memo_bytes: int = MEMO_BYTES) -> None:
        self._memo_bytes = memo_bytes
        self._known: dict[Hashable, Any] = {}
        self._answerers: dict[Hashable, Answerer] = {}
        self._loaded: tuple[Hashable, tuple[nn.Module, Any]] | None = None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made the first time that it is asked for under this key."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def reading(
        self, model: Source | None, suites: Sequence[DataSource], limit: int | None
    ) -> Reading:
        """`read_suites`, and every image of them is decoded once only."""
        key = "suites", tuple(suites), limit, model is None or model.has_vision
        return self.once(key, lambda: read_suites(model, suites, limit))

    def zero_count(self, model: Source, architecture: Architecture) -> int:
        """Number of prunable weights that are zero on disk."""
        key = "zeros", model.checkpoint.fingerprint
        return self.once(key, lambda: zeros(model.checkpoint, architecture))

    def surveyed(self, dense: Source, pruned: Source, progress: Progress) -> Survey:
        """`survey`, for which all weights are read, once for all methods that rank them."""
        state = ((one.folder, *one.checkpoint.stamps()) for one in (dense, pruned))
        return self.once(("survey", *state), lambda: survey(dense, pruned, progress))

    def check_lengths_once(
        self, model: Source, processor: Source, examples: Sequence[Example], max_new_tokens: int
    ) -> None:
        """`check_lengths`, once for all models that read the same prompts alike."""
        made_of = model.config.to_json_string(), processor.checkpoint.fingerprint
        self.once(
            ("lengths", *made_of, tuple(examples), max_new_tokens),
            lambda: check_lengths(
                model.config, load_processor(processor), examples, max_new_tokens
            ),
        )

    def prompt_tokens(self, model: Source, examples: Sequence[Example]) -> float:
        """How long prompts are on average, going by the first few."""
        some = tuple(examples[:_LOOKED_AT])

        def mean() -> float:
            processor = load_processor(model)
            ids = [prompt_batch(processor, [one]).inputs["input_ids"] for one in some]
            return sum(one.numel() for one in ids) / max(1, len(ids))

        return self.once(("tokens", model.checkpoint.fingerprint, some), mean)

    def loaded_model(
        self,
        model: Source,
        compute: ComputeSettings,
        progress: Progress,
        processor_from: Source | None = None,
    ) -> tuple[nn.Module, Any]:
        """The model, which must be left as it is, and its processor."""
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
        """Give back the memory of the model, for work that loads one itself."""
        self._loaded = None

    def forget_prompts(self) -> None:
        """Give back the encoded prompts and the model, for runs of another; what was read stays."""
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
        """The prompts, encoded by the processor; see `Answerer`.

        Models share them where config, tokenizer, processor, chat template and the layout of
        weights are the same, in the checkpoints of the model and of the processor; `Answerer` sees
        to it that their vision parts are.
        """
        outlines = (
            one.checkpoint.outline({*one.checkpoint.tensors, ABOUT_FILE}) for one in checkpoints
        )
        key = (*outlines, tuple(prompts.examples), prompts.digest, batch_size, judge)
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
