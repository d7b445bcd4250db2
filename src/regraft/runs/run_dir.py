"""The folders of a recipe's runs, and the paths of a run's artifacts."""

from __future__ import annotations

from pathlib import Path

from regraft.errors import RegraftError
from regraft.recipes.recipe import Recipe
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

    @classmethod
    def for_recipe(cls, path: Path, recipe: Recipe) -> RunDir:
        """The paths of a recipe's run in the folder `path`."""
        return cls(path, several=len(recipe.prune) > 1)

    def statistics(self, score: str) -> Path:
        """Statistics on D^s and D^u for one kind of importance."""
        name = "statistics" if score == "wanda" else f"statistics-{score}"
        return self.path / f"{name}.safetensors"

    def pruned(self, pruning: str) -> Path:
        """A pruned checkpoint, unless the recipe names an existing one."""
        return self._of("pruned", pruning)

    def patch(self, pruning: str, variant: str) -> Path:
        return self._of("patches", pruning) / f"{variant}.safetensors"

    def realigned(self, pruning: str, variant: str) -> Path:
        return self._of("realigned", pruning) / variant

    def defence(self, pruning: str, defence: str) -> Path:
        """A defence prompt or refusal direction for a pruning."""
        return self._of("defences", pruning) / f"{defence}.safetensors"

    def evaluation(self, pruning: str, variant: str = "pruned") -> Path:
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


def evaluation_folders(run_dir: RunDir, recipe: Recipe) -> dict[str, Path]:
    """The evaluation folder of every model: "dense", "wanda-50", "wanda-50/hsr" ..."""
    found = {"dense": run_dir.dense_evaluation}
    for pruning in recipe.prune:
        found[pruning.name] = run_dir.evaluation(pruning.name)
        names = [one.name for one in recipe.variants_of(pruning)]
        for name in (*names, *(one.name for one in recipe.defences_of(pruning))):
            found[f"{pruning.name}/{name}"] = run_dir.evaluation(pruning.name, name)
    return found


def folder_of_model(several: Path, name: str) -> Path:
    """The folder of the run of one model in a run of several models."""
    return several / f"model-{name}"


def runs_of(recipe: Recipe, folder: Path) -> dict[Path, Recipe]:
    """The runs of a recipe by their folders; a single run is in `folder` itself."""
    if recipe.seeds:
        return {folder / f"seed-{seed}": recipe.for_seed(seed) for seed in recipe.seeds}
    if recipe.models:
        return {folder_of_model(folder, one.name): recipe.for_model(one) for one in recipe.models}
    return {folder: recipe}


def chosen_runs(recipe: Recipe, folder: Path, only: str | None) -> dict[Path, Recipe]:
    """The runs of a recipe by their folders; with `only`, that of the folder with this name.

    Raises:
        RegraftError: the recipe has no run of that name.
    """
    runs = runs_of(recipe, folder)
    if only is None:
        return runs
    if folder in runs:
        raise RegraftError(
            f"--only {only} is for a recipe with `seeds` or `models`; this one has a single run."
        )
    if (one := folder / only) not in runs:
        names = ", ".join(run.name for run in runs)
        raise RegraftError(f"The recipe has no run {only!r}; --only takes one of {names}.")
    return {one: runs[one]}
