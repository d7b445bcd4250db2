"""What is tuned, and where tuning keeps what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft.errors import RegraftError
from regraft.models.load import Source
from regraft.restoration.base import MethodSettings, Space
from regraft.settings.base import explain
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import SearchSettings, TuneSettings
from regraft.stages.optimising import Trials


@dataclass(frozen=True)
class TuneDir:
    """Where tuning keeps what."""

    path: Path

    @property
    def about(self) -> Path:
        """What is tuned, on which data."""
        return self.path / "tune.json"

    @property
    def study(self) -> Path:
        """All trials (SQLite)."""
        return self.path / "study.db"

    @property
    def locks(self) -> Path:
        """Who is at what."""
        return self.path / "locks"

    @property
    def tuned(self) -> Path:
        """The outcome."""
        return self.path / "tuned.json"

    @property
    def best(self) -> Path:
        """The best settings, to be pasted into a recipe."""
        return self.path / "best.yaml"

    @property
    def references(self) -> Path:
        """Evaluations of the dense and the pruned model."""
        return self.path / "references"

    @property
    def states(self) -> Path:
        """Of ablated models, from which heads are scored for any r_max."""
        return self.path / "states"

    @property
    def statistics(self) -> Path:
        """What is gathered on D^s and D^u."""
        return self.path / "statistics.safetensors"

    @property
    def responses(self) -> Path:
        """What the dense model answered to calibration prompts, where it was to."""
        return self.path / "responses"

    def heads(self, r_max: int) -> Path:
        """Head scores."""
        return self.path / "heads" / f"r_max-{r_max}.safetensors"

    def ranking(self, name: str) -> Path:
        """Weights in the order in which they are restored; trials may share it."""
        return self.path / "rankings" / f"{name}.safetensors"

    def trial(self, number: int) -> Path:
        """Patches and answers of one trial."""
        return self.path / "trials" / f"{number:04d}"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know."""

    dense: Source
    pruned: Source
    tune_dir: TuneDir
    method: MethodSettings
    tuning: TuneSettings
    choice: SearchSettings
    scoring: HeadSettings
    calibration: CalibrationSettings
    evaluation: EvalSettings
    compute: ComputeSettings
    space: Space
    weights: int

    def trials(self) -> Trials:
        """The trials that all workers share."""
        return Trials(
            self.tune_dir.study,
            self.tune_dir.locks,
            self.space,
            self.tuning.sampler_seed,
            self.tuning.random_trials,
        )


def varied(method: MethodSettings, settings: Mapping[str, Any]) -> MethodSettings:
    """The method with a trial's settings.

    Raises:
        RegraftError: they do not go together.
    """
    own = {name: value for name, value in settings.items() if name != "r_max"}
    try:
        return type(method)(**method.model_dump(exclude_unset=True) | own)
    except ValidationError as error:
        raise RegraftError(f"These settings do not go together:\n{explain(error)}") from error
