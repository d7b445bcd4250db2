"""The paths of a run's artifacts."""

from __future__ import annotations

import re
from pathlib import Path

from regraft.stages.setup import ArtifactPaths

RECIPE_FILE = "recipe.yaml"


class RunDir:
    """The paths of a run; if it has `several` prunings, each kind has a folder per pruning."""

    def __init__(self, path: Path, several: bool = False) -> None:
        self.path, self._several = path, several
        self.recipe = path / RECIPE_FILE  # defaults included
        self.heads = path / "heads.safetensors"
        self.responses = path / "responses"  # of the dense model to calibration prompts
        self.report = path / "report"  # report.json, report.md, report.html
        self.costs = path / "costs.json"  # time, FLOPs and memory of every stage
        self.calibration_pass = path / "calibration-pass.json"  # its prompts, tokens and FLOPs
        self.dense_evaluation = path / "evaluation" / "dense"

    def statistics(self, score: str) -> Path:
        """Statistics on D^s and D^u for one kind of importance."""
        name = "statistics" if score == "wanda" else f"statistics-{score}"
        return self.path / f"{name}.safetensors"

    def pruned(self, pruning: str) -> Path:
        """A pruned checkpoint, unless the recipe names an existing one."""
        return self._of("pruned", pruning)

    def patch(self, pruning: str, variant: str) -> Path:
        """The patch of one realigned variant of a pruning."""
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
        """The ranking of a pruning's weights for restoration; variants may share it."""
        return self._of("rankings", pruning) / f"{name}.safetensors"

    def curve(self, pruning: str, variant: str) -> Path:
        """Validation results of one variant by number of restored weights."""
        return self._of("curves", pruning) / f"{variant}.json"

    def points(self, pruning: str, name: str) -> Path:
        """Patches and answers behind validation curves; variants may share them."""
        return self._of("curves", pruning) / f"points-{name}"

    def of(self, pruning: str, variant: str, ranking: str) -> ArtifactPaths:
        """The paths of the artifacts of one realigned variant."""
        return ArtifactPaths(
            heads=self.heads,
            statistics=self.statistics,
            responses=self.responses,
            ranking=self.ranking(pruning, ranking),
            patch=self.patch(pruning, variant),
            curve=self.curve(pruning, variant),
        )

    def name(self, pruning: str, variant: str) -> str:
        """The name of a realigned variant among all models of the run."""
        return f"{pruning}/{variant}" if self._several else variant

    def _of(self, kind: str, pruning: str) -> Path:
        folder = self.path / kind
        return folder / pruning if self._several else folder


def seed_folder(study: Path, seed: int) -> Path:
    """The folder of the run of one calibration seed in a study."""
    return study / f"seed-{seed}"


def folder_of_model(several: Path, name: str) -> Path:
    """The folder of the run of one model in a run of several models."""
    return several / f"model-{name}"


def study_runs(folder: Path) -> tuple[Path, ...]:
    """The folders of a study's runs, sorted by seed; empty if `folder` is not a study."""
    found = [(re.fullmatch("seed-(-?[0-9]+)", path.name), path) for path in folder.glob("seed-*")]
    seeds = {int(match[1]): path for match, path in found if match and path.is_dir()}
    return tuple(seeds[seed] for seed in sorted(seeds))
