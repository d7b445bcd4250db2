"""Where a run keeps its artifacts."""

from __future__ import annotations

import re
from pathlib import Path

from regraft.stages.setup import ArtifactPaths

RECIPE_FILE = "recipe.yaml"


class RunDir:
    """The paths of a run. One of several prunings has its own folder in each folder of a kind."""

    def __init__(self, path: Path, several: bool = False) -> None:
        self.path, self._several = path, several
        self.recipe = path / RECIPE_FILE  # defaults included
        self.heads = path / "heads.safetensors"
        self.responses = path / "responses"  # of the dense model to calibration prompts
        self.report = path / "report"  # report.json, report.md, report.html
        self.costs = path / "costs.json"  # time, FLOPs and memory of every stage
        self.calibration_pass = path / "calibration-pass.json"  # in tokens and FLOPs
        self.dense_evaluation = path / "evaluation" / "dense"

    def statistics(self, score: str) -> Path:
        """What is gathered on D^s and D^u for one kind of importance."""
        name = "statistics" if score == "wanda" else f"statistics-{score}"
        return self.path / f"{name}.safetensors"

    def pruned(self, pruning: str) -> Path:
        """A pruned checkpoint, unless the recipe names an existing one."""
        return self._of("pruned", pruning)

    def patch(self, pruning: str, variant: str) -> Path:
        """The restored weights of one realigned variant of a pruning."""
        return self._of("patches", pruning) / f"{variant}.safetensors"

    def realigned(self, pruning: str, variant: str) -> Path:
        """The checkpoint of one realigned variant of a pruning."""
        return self._of("realigned", pruning) / variant

    def defence(self, pruning: str, defence: str) -> Path:
        """A defence prompt or refusal direction for a pruning."""
        return self._of("defences", pruning) / f"{defence}.safetensors"

    def evaluation(self, pruning: str, variant: str = "pruned") -> Path:
        """Answers and results of a pruning, or of one realigned variant of it."""
        return self._of("evaluation", pruning) / variant

    def ranking(self, pruning: str, name: str) -> Path:
        """Weights of a pruning in the order in which they are restored; variants may share it."""
        return self._of("rankings", pruning) / f"{name}.safetensors"

    def curve(self, pruning: str, variant: str) -> Path:
        """Validation results of one variant by restored weights, where it has any."""
        return self._of("curves", pruning) / f"{variant}.json"

    def points(self, pruning: str, name: str) -> Path:
        """Patches and answers behind validation curves; variants may share them."""
        return self._of("curves", pruning) / f"points-{name}"

    def of(self, pruning: str, variant: str, ranking: str) -> ArtifactPaths:
        """Where the artifacts of one realigned variant lie."""
        return ArtifactPaths(
            heads=self.heads,
            statistics=self.statistics,
            responses=self.responses,
            ranking=self.ranking(pruning, ranking),
            patch=self.patch(pruning, variant),
            curve=self.curve(pruning, variant),
        )

    def name(self, pruning: str, variant: str) -> str:
        """What a realigned variant is called among all models of the run."""
        return f"{pruning}/{variant}" if self._several else variant

    def _of(self, kind: str, pruning: str) -> Path:
        folder = self.path / kind
        return folder / pruning if self._several else folder


def seed_folder(study: Path, seed: int) -> Path:
    """Where a study keeps the run of one calibration seed."""
    return study / f"seed-{seed}"


def folder_of_model(several: Path, name: str) -> Path:
    """Where a run of several models keeps the run of one of them."""
    return several / f"model-{name}"


def study_runs(folder: Path) -> tuple[Path, ...]:
    """The runs of a study by their seeds; none where `folder` is no study."""
    found = [(re.fullmatch("seed-(-?[0-9]+)", path.name), path) for path in folder.glob("seed-*")]
    seeds = {int(match[1]): path for match, path in found if match and path.is_dir()}
    return tuple(seeds[seed] for seed in sorted(seeds))
