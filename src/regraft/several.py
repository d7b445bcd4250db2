"""One recipe on several models: a run each, and one table over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from regraft import distributed, pipeline, stages
from regraft.analysis.relation import ModelPoint, correlation, estimates, model_points
from regraft.errors import RegraftError
from regraft.progress import Progress, Silent
from regraft.recipe import Recipe
from regraft.recipe_file import read_recipe
from regraft.report.pooling import study_of
from regraft.report.published import read_published
from regraft.report.study import Correlation, Study
from regraft.report.write import write_report
from regraft.reporting import read_run
from regraft.run_dir import RunDir, folder_of_model
from regraft.study import check_runs

_FEWEST = 3  # models of which ranks are correlated


def runs_of(recipe: Recipe, folder: Path) -> dict[Path, Recipe]:
    """The run of each model of a recipe, by its folder."""
    return {folder_of_model(folder, one.name): recipe.for_model(one) for one in recipe.models}


def run(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Study:
    """One `pipeline.run` for every model in its own folder, then the table in `report`.

    All models are opened and checked before the first is run, so that one that cannot be downloaded
    stops nothing after hours. Finished stages are not repeated.

    Args:
        recipe: With `models`.
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.
        progress: Progress.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    progress = progress or Silent()
    if recipe.published is not None:
        read_published(recipe.published)
    runs = runs_of(recipe, folder)
    cache = stages.EvaluationCache()
    check_runs(folder, runs, cache)
    pipeline.claim(folder, recipe)
    for model, (run_dir, one) in zip(recipe.models, runs.items(), strict=True):
        progress.note(f"Model {model.name}: {model.model}")
        pipeline.run(one, run_dir, progress, cache)
        cache.forget_prompts()
    return report(folder)


def report(folder: Path) -> Study:
    """Write the table of finished runs again.

    Raises:
        RegraftError: a run is not finished, or the published figures cannot be read.
    """
    study = _read(folder)
    if distributed.first():
        write_report(study, RunDir(folder).report)
    return study


def is_several(folder: Path) -> bool:
    """Whether the folder holds runs of several models."""
    recipe = RunDir(folder).recipe
    return recipe.exists() and bool(read_recipe(recipe).models)


def _read(folder: Path) -> Study:
    run_dir = RunDir(folder)
    recipe = read_recipe(run_dir.recipe)
    run_dirs = {one.name: folder_of_model(folder, one.name) for one in recipe.models}
    for name, run_folder in run_dirs.items():
        if not RunDir(run_folder).recipe.exists():
            raise RegraftError(
                f"The run in {folder} is not finished: {name} has not been run. Continue it with "
                f"`regraft run {run_dir.recipe} --out {folder}`."
            )
    runs = [read_run(run_folder, name) for name, run_folder in run_dirs.items()]
    published = None if recipe.published is None else read_published(recipe.published)
    study = study_of(runs, title=recipe.title, published=published)
    pruning = recipe.prune[0].name
    points = tuple(_points(run_dirs, study, pruning))
    if len(points) < _FEWEST:
        return study
    return replace(study, correlation=_correlation(pruning, points))


def _points(run_dirs: Mapping[str, Path], study: Study, pruning: str) -> Iterator[ModelPoint]:
    """Of every model with head scores that was pruned so: total Ships, rise in mean ASR."""
    for table in study.tables:
        run_dir = run_dirs[table.model]
        if table.pruning == pruning and RunDir(run_dir).heads.exists():
            dense, pruned = (row.mean_asr or row.asr for row in table.rows[:2])
            if dense is not None and pruned is not None:
                rise = round(pruned.value - dense.value, 12)  # so that equal rises stay ties
                yield from model_points(run_dir, {table.model: rise})


def _correlation(pruning: str, points: tuple[ModelPoint, ...]) -> Correlation:
    found = correlation(points)
    return Correlation(
        pruning,
        tuple((one.name, one.ships, one.degradation) for one in points),
        None if found is None else found.rho,
        None if found is None else found.p,
        estimates(points),
    )
