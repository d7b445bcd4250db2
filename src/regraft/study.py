"""One recipe calibrated by several seeds: a run each, and one comparison over all of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from regraft import distributed, pipeline, stages
from regraft.comparing import compare
from regraft.errors import RegraftError
from regraft.files import atomic_folder, require_space
from regraft.preflight import bytes_needed
from regraft.progress import Progress, Silent
from regraft.recipe import Recipe
from regraft.recipe_file import read_recipe
from regraft.report.study import Study
from regraft.run_dir import RunDir, seed_folder


def runs_of(recipe: Recipe, folder: Path) -> dict[Path, Recipe]:
    """The run of each seed of a recipe, by its folder."""
    return {seed_folder(folder, seed): recipe.for_seed(seed) for seed in recipe.seeds}


def run(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Study:
    """One `pipeline.run` for every seed in its own folder, then the comparison in `report`.

    The dense model answers once, since no seed changes it: later runs start with a copy of its
    evaluation. Finished stages are not repeated.

    Args:
        recipe: With `seeds`.
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.
        progress: Progress.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    progress = progress or Silent()
    runs = runs_of(recipe, folder)
    cache = stages.EvaluationCache()
    check_runs(folder, runs, cache)
    pipeline.claim(folder, recipe)
    for run_dir, one in runs.items():
        progress.note(f"Calibration seed {one.calibration.seed}")
        pipeline.claim(run_dir, one)
        if distributed.first():
            _share_dense(next(iter(runs)), run_dir)
        distributed.barrier()
        pipeline.run(one, run_dir, progress, cache)
    return report(folder)


def check_runs(folder: Path, runs: Mapping[Path, Recipe], cache: stages.EvaluationCache) -> None:
    """Find what would stop one of several runs, room for all their checkpoints included.

    Args:
        folder: That the runs lie in.
        runs: Folder of each -> its recipe.
        cache: What they share.

    Raises:
        RegraftError: bad input, or too little room.
    """
    needed = [
        bytes_needed(one, pipeline.check(one, run_dir, cache)[0], run_dir)
        for run_dir, one in runs.items()
    ]
    kept = sum(one for one, _ in needed)
    require_space(folder, kept + max(most - own for own, most in needed))


def report(folder: Path) -> Study:
    """Write the comparison of a finished study again.

    Raises:
        RegraftError: the folder holds no study, or one that is not finished.
    """
    run_dir = RunDir(folder)
    recipe = read_recipe(run_dir.recipe)
    for seed in recipe.seeds:
        if not seed_folder(folder, seed).exists():
            raise RegraftError(
                f"The study in {folder} is not finished: seed {seed} has not been run. Continue it "
                f"with `regraft run {run_dir.recipe} --out {folder}`."
            )
    runs = [seed_folder(folder, seed) for seed in recipe.seeds]
    return compare(runs, run_dir.report, recipe.against)


def is_study(folder: Path) -> bool:
    """Whether the folder holds runs of several seeds."""
    recipe = RunDir(folder).recipe
    return recipe.exists() and bool(read_recipe(recipe).seeds)


def _share_dense(first: Path, run_dir: Path) -> None:
    done, wanted = (RunDir(one).dense_evaluation for one in (first, run_dir))
    if done.exists() and not wanted.exists():
        with atomic_folder(wanted) as copy:
            shutil.copytree(done, copy, dirs_exist_ok=True)
