"""What the stages of one experiment share, and the paths of their artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from regraft.data.example import KINDS, Reading
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.loading import check_shares
from regraft.models.load import Source
from regraft.progress import SILENT, Progress
from regraft.restoration.base import Needs
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import RefusalDirectionSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings, suites_of, with_held_out
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.reading import (
    draw_calibration,
    draw_prompts,
    order_calibration,
    responses_are_given,
)
from regraft.stages.targets import OnText, Target

StepGuard = Callable[[str, str], AbstractContextManager[None]]
"""(stage, name of the model) -> context in which a step is made."""


@dataclass(frozen=True)
class Inputs:
    """Files that a ranking is made from; which of them a method needs is in its `Needs`."""

    heads: Path | None = None  # scores of heads
    statistics: Path | None = None
    positions: Path | None = None  # another ranking
    responses: Path | None = None  # folder for the dense model's answers; by default beside it


@dataclass(frozen=True)
class ArtifactPaths:
    """Paths of the artifacts of a restoration."""

    heads: Path
    statistics: Callable[[str], Path]  # by kind of importance
    responses: Path  # folder for the dense model's answers to calibration prompts
    ranking: Path  # shared by settings that only take different amounts of it
    patch: Path
    curve: Path  # results of a search
    references: Path | None = None  # evaluations of the dense and the pruned model, for searches
    points: Path | None = None  # patches and answers of a search
    states: Path | None = None  # of ablated models, to score heads for any r_max
    given: Inputs = field(default_factory=Inputs)  # existing files to use instead

    @classmethod
    def beside(cls, out: Path, given: Inputs | None = None) -> ArtifactPaths:
        """All next to the patch `out`, named after it."""
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
        """The files that a ranking with these needs is made from."""
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
    """Dense model, calibration data and compute settings that all stages share.

    Attributes:
        calibration: Prompts of both kinds, with responses for stages that learn from these; its
            seed decides whatever is drawn at random.
        cache: Data sets that were read, and what evaluations share.
        evaluation: How validation prompts are answered and judged.
        scoring: How heads are scored.
        guard: Context in which every step of a run is made.
    """

    dense: Source
    calibration: CalibrationSettings = CalibrationSettings()
    compute: ComputeSettings = ComputeSettings()
    progress: Progress = SILENT
    cache: EvaluationCache = field(default_factory=EvaluationCache)
    evaluation: EvalSettings = EvalSettings(full_answers=False)
    scoring: HeadSettings = HeadSettings()
    guard: StepGuard = lambda _stage, _of: nullcontext()

    def choosing(self, choice: SearchSettings) -> tuple[SearchSettings, Setup]:
        """The choice with validation prompts, held out of the calibration if none are named."""
        note, folder = self.progress.note, self.dense.folder
        choice, calibration = with_held_out(choice, folder, self.calibration, note)
        return choice, replace(self, calibration=calibration)

    def target(
        self,
        model: Source,
        *,
        patch: Path | None = None,
        defence: Path | None = None,
        text: OnText | None = None,
    ) -> Target:
        """A model to evaluate; it has the dense model's processor if it has none of its own."""
        return Target(
            model,
            self.compute,
            patch,
            text,
            self.dense,
            defence=defence,
            progress=self.progress,
            cache=self.cache,
        )

    def validation(self, settings: SearchSettings | RefusalDirectionSettings) -> Reading:
        """The prompts that are chosen on, at most `validation_limit` of each kind."""
        prompts = self.cache.reading(self.dense, suites_of(settings), settings.validation_limit)
        self.cache.check_system_prompts_once(self.dense, prompts.examples)
        return prompts

    def drawn(self, kind: str) -> Reading:
        """As `draw_calibration`; raises RegraftError if there are fewer batches than processes."""
        reading = self._once(draw_calibration, kind)
        check_shares(reading.examples, self.compute)
        return reading

    def count(self, kinds: Iterable[str] = KINDS) -> int:
        """Number of calibration prompts; an upper bound if the dense model writes responses."""
        return sum(len(self.drawn(kind).examples) for kind in kinds)

    def count_imitated(self) -> int:
        """Number of prompts on which methods imitate the dense model."""
        return sum(len(one.examples) for one in self.imitated().values())

    def imitated(self) -> dict[str, Reading]:
        """Prompts on which methods imitate the dense model, by kind."""
        return {kind: self._once(draw_prompts, kind) for kind in KINDS}

    def learnt_from(self, kinds: Iterable[str] = KINDS) -> dict[str, Reading]:
        """Calibration prompts of these kinds that may be learnt from, by role.

        These are all prompts if the dense model writes the responses until enough are kept.
        """
        learnt: dict[str, Reading] = {}
        for kind in kinds:
            role, drawn = f"{KINDS[kind]} calibration", self.drawn(kind)
            if responses_are_given(self.calibration, kind):
                learnt[role] = drawn
            else:
                learnt[f"{role} (self)"] = self.ordered(kind)
        return learnt

    def ordered(self, kind: str) -> Reading:
        """As `order_calibration`: the prompts that the dense model answers to calibrate on."""
        return self._once(order_calibration, kind)

    def _once(self, read: Callable[..., Reading], kind: str) -> Reading:
        """Call a function of reading.py on the calibration data, only once for the same data.

        Raises:
            RegraftError: see there; the chat template does not show the system prompts.
        """
        named = "data" in self.calibration.model_fields_set  # else only the bundled model has some
        key = read, self.calibration, kind, self.dense.has_vision, named or self.dense.folder
        reading = self.cache.once(key, lambda: read(self.dense, self.calibration, kind))
        answered = read is not draw_calibration  # which methods may use without the responses
        self.cache.check_system_prompts_once(self.dense, reading.examples, answered=answered)
        return reading

    def check_gradients(self, what: str) -> None:
        """Raise if the model will be loaded in a dtype in which gradients vanish."""
        if self.compute.dtype_of(self.dense) == "float16":
            raise RegraftError(
                f"{what} needs gradients, which vanish in float16, the dtype of "
                f"{self.dense.folder} or the one asked for. Use --dtype bfloat16 (in a recipe "
                "compute.dtype), or float32."
            )

    def state_bytes(self, readings: Iterable[Reading]) -> int:
        """Estimate the disk space of all layers' inputs, which backward passes keep there.

        For a 7B model and 128 prompts of each kind it is at least as much as for the checkpoint.
        """
        architecture = self.dense.architecture
        itemsize = getattr(torch, self.compute.dtype_of(self.dense)).itemsize
        tokens = sum(
            len(one.examples) * self.cache.prompt_tokens(self.dense, one.examples)
            for one in readings
        )
        return int(tokens * len(architecture.layers) * architecture.hidden_size * itemsize)


def _beside(out: Path, what: str) -> Path:
    """A path next to a patch, named after it: x.WHAT both for x.safetensors and for x."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.{what}")
