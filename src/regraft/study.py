"""One recipe calibrated by several seeds: a run each, and one comparison over all of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from regraft import distributed, pipeline, stages
from regraft.comparing import compare
from regraft.errors import RegraftError
from regraft.files import atomic_folder, require_space
from regraft.folder import RunFolder, seed_folder
from regraft.preflight import bytes_needed
from regraft.recipe import Recipe
from regraft.recipe_file import read_recipe
from regraft.report.study import Study
from regraft.watch import Silent, Watch


def runs_of(recipe: Recipe, folder: Path) -> dict[Path, Recipe]:
    """The run of each seed of a recipe, by its folder."""
    return {seed_folder(folder, seed): recipe.for_seed(seed) for seed in recipe.seeds}


def run(recipe: Recipe, folder: Path, watch: Watch | None = None) -> Study:
    """One `pipeline.run` for every seed in its own folder, then the comparison in `report`.

    The dense model answers once, since no seed changes it: later runs start with a copy of its
    evaluation. Finished stages are not repeated.

    Args:
        recipe: With `seeds`.
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.
        watch: Progress.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    watch = watch or Silent()
    runs = runs_of(recipe, folder)
    session = stages.Session()
    check_runs(folder, runs, session)
    pipeline.claim(folder, recipe)
    for place, one in runs.items():
        watch.note(f"Calibration seed {one.calibration.seed}")
        pipeline.claim(place, one)
        if distributed.first():
            _share_dense(next(iter(runs)), place)
        distributed.barrier()
        pipeline.run(one, place, watch, session)
    return report(folder)


def check_runs(folder: Path, runs: Mapping[Path, Recipe], session: stages.Session) -> None:
    """Find what would stop one of several runs, room for all their checkpoints included.

    Args:
        folder: That the runs lie in.
        runs: Folder of each -> its recipe.
        session: What they share.

    Raises:
        RegraftError: bad input, or too little room.
    """
    needed = [
        bytes_needed(one, pipeline.check(one, place, session)[0], place)
        for place, one in runs.items()
    ]
    kept = sum(one for one, _ in needed)
    require_space(folder, kept + max(most - own for own, most in needed))


def report(folder: Path) -> Study:
    """Write the comparison of a finished study again.

    Raises:
        RegraftError: the folder holds no study, or one that is not finished.
    """
    place = RunFolder(folder)
    recipe = read_recipe(place.recipe)
    for seed in recipe.seeds:
        if not seed_folder(folder, seed).exists():
            raise RegraftError(
                f"The study in {folder} is not finished: seed {seed} has not been run. Continue it "
                f"with `regraft run {place.recipe} --out {folder}`."
            )
    runs = [seed_folder(folder, seed) for seed in recipe.seeds]
    return compare(runs, place.report, recipe.against)


def is_study(folder: Path) -> bool:
    """Whether the folder holds runs of several seeds."""
    recipe = RunFolder(folder).recipe
    return recipe.exists() and bool(read_recipe(recipe).seeds)


def _share_dense(first: Path, place: Path) -> None:
    done, wanted = (RunFolder(one).dense_evaluation for one in (first, place))
    if done.exists() and not wanted.exists():
        with atomic_folder(wanted) as copy:
            shutil.copytree(done, copy, dirs_exist_ok=True)
