"""What the stages of one experiment share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from regraft.data.example import Reading
from regraft.loading import check_shares
from regraft.models.load import Source
from regraft.progress import Progress, Silent
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.evaluation_cache import EvaluationCache


@dataclass(frozen=True)
class Setup:
    """The dense model, what is learnt from, and where and how work is done.

    Attributes:
        dense: The dense checkpoint.
        calibration: Prompts of both kinds, with responses where a stage learns from these; its
            seed is that of whatever is drawn.
        compute: Device, dtype, batch size, placement.
        progress: Progress.
        cache: Data that was read already, and what evaluations share.
    """

    dense: Source
    calibration: CalibrationSettings = CalibrationSettings()
    compute: ComputeSettings = ComputeSettings()
    progress: Progress = field(default_factory=Silent)
    cache: EvaluationCache = field(default_factory=EvaluationCache)

    def drawn(self, *, harmful: bool) -> Reading:
        """D^s or D^u; see `draw_calibration`.

        Raises:
            RegraftError: see there; there are fewer batches than processes.
        """
        reading = self.cache.drawn(self.dense, self.calibration, harmful=harmful)
        check_shares(reading.examples, self.compute)
        return reading

    def imitated(self) -> dict[str, Reading]:
        """Prompts on which the dense model is imitated: "safety" (harmful ones) and "utility"."""
        return {
            kind: self.cache.prompts(self.dense, self.calibration, harmful=kind == "safety")
            for kind in ("safety", "utility")
        }

    def learnt_from(self, kinds: Iterable[bool]) -> dict[str, Reading]:
        """By role all calibration prompts of these kinds (harmful: True) that may be learnt from.

        Raises:
            RegraftError: as `drawn`.
        """
        learnt: dict[str, Reading] = {}
        for harmful in kinds:
            self.drawn(harmful=harmful)
            learnt |= self.cache.learnt_from(self.dense, self.calibration, harmful=harmful)
        return learnt

    def state_bytes(self, readings: Iterable[Reading]) -> int:
        """About what the inputs of all layers take on disk, which backward passes keep.

        Those of a 7B model and 128 prompts of each kind are as large as its checkpoint or larger.
        """
        architecture = self.dense.architecture
        itemsize = getattr(torch, self.compute.dtype_of(self.dense)).itemsize
        tokens = sum(
            len(one.examples) * self.cache.prompt_tokens(self.dense, one.examples)
            for one in readings
        )
        return int(tokens * len(architecture.layers) * architecture.hidden_size * itemsize)
