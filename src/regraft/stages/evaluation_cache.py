"""What the checks and evaluations of one run share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn

from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource
from regraft.evaluation.generate import MEMO_BYTES, Answerer
from regraft.loading import load
from regraft.models.load import Source, has_processor
from regraft.progress import Progress
from regraft.provenance import ABOUT_FILE
from regraft.pruning.prune import zeros
from regraft.reading import (
    draw_calibration,
    draw_prompts,
    order_calibration,
    read_suites,
    responses_are_given,
)
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings


class EvaluationCache:
    """Data sets, encoded prompts, what images became, and the model that was loaded last.

    Nothing in it decides a result: an evaluation without a session, or with that of other
    evaluations, writes the same files.

    Args:
        memo_bytes: Host memory for prompts and images; none are kept with 0.
    """

    def __init__(self, memo_bytes: int = MEMO_BYTES) -> None:
        self._memo_bytes = memo_bytes
        self._readings: dict[Hashable, Reading] = {}
        self._zeros: dict[str, int] = {}
        self._answerers: dict[Hashable, Answerer] = {}
        self._loaded: tuple[Hashable, tuple[nn.Module, Any]] | None = None

    def reading(self, model: Source, suites: Sequence[DataSource], limit: int | None) -> Reading:
        """`read_suites`, and every image of them is decoded once only."""
        key = (tuple(suites), limit, model.architecture.has_vision)
        if key not in self._readings:
            self._readings[key] = read_suites(model, suites, limit)
        return self._readings[key]

    def drawn(self, model: Source, calibration: CalibrationSettings, *, harmful: bool) -> Reading:
        """`draw_calibration`, and every image is decoded once only."""
        key = ("drawn", calibration, harmful, model.architecture.has_vision)
        if key not in self._readings:
            self._readings[key] = draw_calibration(model, calibration, harmful=harmful)
        return self._readings[key]

    def prompts(self, model: Source, calibration: CalibrationSettings, *, harmful: bool) -> Reading:
        """`draw_prompts`, and every image is decoded once only."""
        key = ("prompts", calibration, harmful, model.architecture.has_vision)
        if key not in self._readings:
            self._readings[key] = draw_prompts(model, calibration, harmful=harmful)
        return self._readings[key]

    def learnt_from(
        self, model: Source, calibration: CalibrationSettings, *, harmful: bool
    ) -> dict[str, Reading]:
        """Every calibration prompt of a kind that may be learnt from, by its role.

        Where the dense model answers them itself any may be, until enough answers are kept.
        """
        role = f"{'harmful' if harmful else 'harmless'} calibration"
        if responses_are_given(calibration, harmful=harmful):
            return {role: self.drawn(model, calibration, harmful=harmful)}
        return {f"{role} (self)": order_calibration(model, calibration, harmful=harmful)}

    def imitated(self, model: Source, calibration: CalibrationSettings) -> dict[str, Reading]:
        """The prompts on which gain and fine-tuning imitate the dense model, by their role."""
        return {
            f"{role} calibration (imitated)": self.prompts(model, calibration, harmful=harmful)
            for role, harmful in (("harmful", True), ("harmless", False))
        }

    def zeros(self, model: Source) -> int:
        """Number of prunable weights that are zero on disk."""
        key = model.checkpoint.fingerprint
        if key not in self._zeros:
            self._zeros[key] = zeros(model.checkpoint, model.architecture)
        return self._zeros[key]

    def load(
        self,
        model: Source,
        compute: ComputeSettings,
        progress: Progress,
        processor_from: Source | None = None,
    ) -> tuple[nn.Module, Any]:
        """The model, which must be left as it is, and its processor."""
        key = (
            model.checkpoint.fingerprint,
            _processor(model, processor_from).folder,
            compute.device,
            compute.dtype,
            compute.placement,
        )
        if self._loaded is None or self._loaded[0] != key:
            self.unload()
            self._loaded = key, load(model, compute, progress, processor_from)
        progress.loaded(self._loaded[1][0])
        return self._loaded[1]

    def unload(self) -> None:
        """Give back the memory of the model, for work that loads one itself."""
        self._loaded = None

    def forget_prompts(self) -> None:
        """Give back the encoded prompts and the model, for runs of another; what was read stays."""
        self._answerers.clear()
        self.unload()

    def answerer(
        self,
        model: Source,
        processor: Any,
        examples: Sequence[Example],
        content: str,
        settings: EvalSettings,
        compute: ComputeSettings,
        processor_from: Source | None = None,
    ) -> Answerer:
        """The prompts, encoded by the model's processor.

        Models share them where config, tokenizer, processor, chat template and the layout of
        weights are the same; `Answerer` sees to it that their vision parts are. `content` is a
        digest of the examples that covers the bytes of their images.
        """
        judge = None if settings.full_answers else settings.text_judge()
        sources = (model, _processor(model, processor_from))
        key = (
            *(one.checkpoint.outline({*one.checkpoint.tensors, ABOUT_FILE}) for one in sources),
            tuple(examples),
            content,
            compute.batch_size,
            judge,
        )
        if key not in self._answerers:
            kept = sum(one.kept_bytes for one in self._answerers.values())
            self._answerers[key] = Answerer(
                processor,
                examples,
                batch_size=compute.batch_size,
                judge=judge,
                memo_bytes=max(0, self._memo_bytes - kept),
            )
        return self._answerers[key]


def _processor(model: Source, processor_from: Source | None) -> Source:
    """The checkpoint that the processor is taken from; see `load`."""
    return model if processor_from is None or has_processor(model) else processor_from
