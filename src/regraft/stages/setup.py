"""What the stages of one experiment share, and where their artifacts lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from regraft.data.example import Reading
from regraft.errors import RegraftError
from regraft.loading import check_shares
from regraft.models.load import Source
from regraft.progress import SILENT, Progress
from regraft.restoration.base import Needs
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.reading import (
    draw_calibration,
    draw_prompts,
    order_calibration,
    responses_are_given,
)


@dataclass(frozen=True)
class Inputs:
    """Artifacts that a method may need; see `Needs`."""

    heads: Path | None = None  # scores
    statistics: Path | None = None
    positions: Path | None = None  # another ranking
    responses: Path | None = None  # folder for the dense model's answers; one beside the ranking


@dataclass(frozen=True)
class ArtifactPaths:
    """Where the artifacts of a restoration lie."""

    heads: Path
    statistics: Callable[[str], Path]  # by the kind of importance
    responses: Path  # folder for the dense model's answers to calibration prompts
    ranking: Path  # methods that differ in what they take of it share one
    patch: Path
    curve: Path  # results of a search
    references: Path | None = None  # evaluations of the dense and the pruned model, for searches
    points: Path | None = None  # patches and answers of a search
    states: Path | None = None  # of ablated models, from which heads are scored for any r_max
    given: Inputs = field(default_factory=Inputs)  # made elsewhere, and taken instead

    @classmethod
    def beside(cls, out: Path, given: Inputs | None = None) -> ArtifactPaths:
        """All beside the patch `out`, named after it."""
        return cls(
            heads=_beside(out, "heads.safetensors"),
            statistics=lambda _: _beside(out, "statistics.safetensors"),
            responses=_beside(out, "responses"),
            ranking=_beside(out, "ranking.safetensors"),
            patch=out,
            curve=_beside(out, "curve.json"),
            given=given or Inputs(),
        )

    def inputs(self, needs: Needs) -> Inputs:
        """What a ranking is made from."""
        heads = self.heads if needs.heads else None
        statistics = self.statistics(needs.statistics) if needs.statistics else None
        return Inputs(
            heads=self.given.heads or heads,
            statistics=self.given.statistics or statistics,
            positions=self.given.positions,
            responses=self.responses,
        )


@dataclass(frozen=True)
class Setup:
    """The dense model, what is learnt from, and where and how work is done.

    Attributes:
        calibration: Prompts of both kinds, with responses where a stage learns from these; its
            seed is that of whatever is drawn.
        cache: Data that was read already, and what evaluations share.
        evaluation: How validation prompts are answered and judged.
    """

    dense: Source
    calibration: CalibrationSettings = CalibrationSettings()
    compute: ComputeSettings = ComputeSettings()
    progress: Progress = SILENT
    cache: EvaluationCache = field(default_factory=EvaluationCache)
    evaluation: EvalSettings = EvalSettings(full_answers=False)

    def drawn(self, *, harmful: bool) -> Reading:
        """D^s or D^u; see `draw_calibration`.

        Raises:
            RegraftError: see there; there are fewer batches than processes.
        """
        reading = self._once(draw_calibration, harmful=harmful)
        check_shares(reading.examples, self.compute)
        return reading

    def imitated(self) -> dict[str, Reading]:
        """Prompts on which the dense model is imitated: "safety" (harmful ones) and "utility"."""
        return {
            "safety": self._once(draw_prompts, harmful=True),
            "utility": self._once(draw_prompts, harmful=False),
        }

    def learnt_from(self, kinds: Iterable[bool]) -> dict[str, Reading]:
        """By role all calibration prompts of these kinds (harmful: True) that may be learnt from.

        Where the dense model answers them itself any may be, until enough answers are kept.

        Raises:
            RegraftError: as `drawn`.
        """
        learnt: dict[str, Reading] = {}
        for harmful in kinds:
            role = f"{'harmful' if harmful else 'harmless'} calibration"
            drawn = self.drawn(harmful=harmful)
            if responses_are_given(self.calibration, harmful=harmful):
                learnt[role] = drawn
            else:
                learnt[f"{role} (self)"] = self._once(order_calibration, harmful=harmful)
        return learnt

    def _once(self, read: Callable[..., Reading], *, harmful: bool) -> Reading:
        """What a function of reading.py takes of the calibration data, read once."""
        key = read, self.calibration, harmful, self.dense.has_vision
        return self.cache.once(key, lambda: read(self.dense, self.calibration, harmful=harmful))

    def check_gradients(self, what: str) -> None:
        """Raise where the model will be loaded in a dtype in which gradients vanish."""
        if self.compute.dtype_of(self.dense) == "float16":
            raise RegraftError(
                f"{what} needs gradients, which vanish in float16, the dtype of "
                f"{self.dense.folder} or the one asked for. Use --dtype bfloat16 (in a recipe "
                "compute.dtype), or float32."
            )

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


def _beside(out: Path, what: str) -> Path:
    """A file beside a patch, named after it: of x.safetensors and of x alone x.WHAT."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.{what}")
