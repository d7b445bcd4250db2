"""All runs of a recipe: one, or one per calibration seed or model, and the report over them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from regraft import distributed
from regraft.analysis.relation import FEWEST, ModelPoint, correlate, model_points
from regraft.disk.files import atomic_folder, require_space
from regraft.progress import SILENT, Progress
from regraft.recipes.recipe import Recipe
from regraft.report.pooling import study_of
from regraft.report.published import read_published
from regraft.report.study import Study
from regraft.report.write import write_report
from regraft.runs import pipeline, reporting
from regraft.runs.comparing import compare_runs
from regraft.runs.run_dir import RunDir, folder_of_model, runs_of
from regraft.stages import EvaluationCache


def run_recipe(recipe: Recipe, folder: Path, progress: Progress = SILENT) -> Study:
    """Make the run of every seed or model in its own folder, then the report over all.

    All runs are checked before the first one starts, so that bad input does not stop them after
    hours. The dense model answers once for all seeds, since they do not change it: later runs start
    with a copy of its evaluation. Finished stages are not repeated.

    Args:
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    runs = runs_of(recipe, folder)
    if folder in runs:
        return pipeline.run_one(recipe, folder, progress)
    if recipe.published is not None:
        read_published(recipe.published)
    cache = EvaluationCache()
    planned = [pipeline.plan_run(one, path, cache, progress) for path, one in runs.items()]
    kept = sum(one.kept for one in planned)
    require_space(folder, kept + max(one.most - one.kept for one in planned))
    pipeline.claim(folder, recipe)
    first = next(iter(runs))
    for run_folder, one in runs.items():
        progress.note(f"{run_folder.name}: {one.model}, calibration seed {one.calibration.seed}")
        pipeline.claim(run_folder, one)
        if recipe.seeds:
            _share_dense(first, run_folder)
        pipeline.run_one(one, run_folder, progress, cache)
        if recipe.models:
            cache.forget_prompts()
    return report_recipe(folder)


def report_recipe(folder: Path) -> Study:
    """Write the report on a finished run, or over all runs of a recipe, again.

    Raises:
        RegraftError: the folder holds no run, a run is not finished, or the published figures
            cannot be read.
    """
    run_dir, recipe = reporting.open_run(folder)
    runs = reporting.run_folders(folder, recipe)
    if runs == [folder]:
        return reporting.report_run(folder)
    if recipe.seeds:
        return compare_runs(runs, run_dir.report, recipe.against)
    study = _over_models(recipe, folder)
    write_report(study, run_dir.report)
    return study


def _share_dense(first: Path, run_folder: Path) -> None:
    done, wanted = (RunDir(one).dense_evaluation for one in (first, run_folder))
    if distributed.first() and done.exists() and not wanted.exists():
        with atomic_folder(wanted) as copy:
            shutil.copytree(done, copy, dirs_exist_ok=True)
    distributed.barrier()


def _over_models(recipe: Recipe, folder: Path) -> Study:
    folders = {one.name: folder_of_model(folder, one.name) for one in recipe.models}
    runs = [reporting.read_run(run_folder, name) for name, run_folder in folders.items()]
    published = None if recipe.published is None else read_published(recipe.published)
    study = study_of(runs, title=recipe.title, published=published)
    pruning = recipe.prune[0].name
    points = list(_points(folders, study, pruning))
    if len(points) < FEWEST:
        return study
    return replace(study, correlation=correlate(points, pruning))


def _points(folders: Mapping[str, Path], study: Study, pruning: str) -> Iterator[ModelPoint]:
    """Total Ships and rise in mean ASR of every model with head scores and this pruning."""
    for table in study.tables:
        folder = folders[table.model]
        if table.pruning == pruning and RunDir(folder).heads.exists():
            dense, pruned = (row.mean_asr or row.asr for row in table.rows[:2])
            if dense is not None and pruned is not None:
                rise = round(pruned.value - dense.value, 12)  # equal rises must be ties
                yield from model_points(folder, {table.model: rise})
