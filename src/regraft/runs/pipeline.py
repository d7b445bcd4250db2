"""The runs of a recipe: one, or one per calibration seed or model, and the report over all.

The steps of a run are checked, made in order and resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft import distributed, stages
from regraft.analysis.relation import FEWEST, ModelPoint, correlate, model_points
from regraft.costs import Ledger, Metered
from regraft.disk.descriptions import about_of
from regraft.disk.files import (
    atomic_folder,
    disk_errors,
    lock_of,
    new_folders,
    require_empty,
    require_space,
    write_text,
)
from regraft.disk.locks import in_turn
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.models.load import pick_device
from regraft.patch.pair import check_pair
from regraft.progress import SILENT, Progress
from regraft.pruning.base import prune_settings
from regraft.recipes.file import read_recipe, write_recipe
from regraft.recipes.recipe import Recipe
from regraft.report.pooling import study_of
from regraft.report.published import read_published
from regraft.report.study import Study
from regraft.report.write import write_report
from regraft.restoration.base import needs_of
from regraft.runs.comparing import compare_runs
from regraft.runs.passes import count_pass, has_passes
from regraft.runs.plan import Planner
from regraft.runs.reporting import not_finished, open_run, read_run, report_run, run_folders
from regraft.runs.run_dir import RunDir, chosen_runs, folder_of_model, runs_of
from regraft.settings.compute import ComputeSettings
from regraft.stages.provenance import but_for_rounding, difference, made_alike
from regraft.stages.ranking import check_restorable
from regraft.stages.steps import Planned, plan_steps


def run_recipe(
    recipe: Recipe, folder: Path, progress: Progress = SILENT, only: str | None = None
) -> Study:
    """Make the run of every seed or model in its own folder, then the report over all.

    All runs are checked before the first one starts, so that bad input does not stop them after
    hours. The dense model answers once for all seeds, since they do not change it: a run starts
    with a copy of its evaluation if another one has finished it. Finished stages are not repeated.

    Args:
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.
        only: Name of the only run to make, see `chosen_runs`; the report is then on it alone.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    runs = chosen_runs(recipe, folder, only)
    if folder in runs:
        return run_one(recipe, folder, progress)
    cache = stages.EvaluationCache()
    plan_recipe(recipe, folder, cache, progress, only)
    claim(folder, recipe)
    for run_folder, one in runs.items():
        progress.note(f"{run_folder.name}: {one.model}, calibration seed {one.calibration.seed}")
        claim(run_folder, one)
        if recipe.seeds:
            _share_dense(runs_of(recipe, folder), run_folder, one.compute)
        study = run_one(one, run_folder, progress, cache)
        if recipe.models:
            cache.forget_prompts()
    return report_recipe(folder) if only is None else study


def plan_recipe(
    recipe: Recipe,
    folder: Path,
    cache: stages.EvaluationCache | None = None,
    progress: Progress = SILENT,
    only: str | None = None,
) -> dict[Path, Planned]:
    """Plan the runs of a recipe, by their folders, and check all that `run_recipe` checks.

    `only` names the only run to plan.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    if recipe.published is not None:
        read_published(recipe.published)
    runs, cache = chosen_runs(recipe, folder, only), cache or stages.EvaluationCache()
    if distributed.first():  # it may write its recipe while the others are still here
        for path, one in {folder: recipe, **runs}.items():
            recipe_before(path, one)
    plans = {path: plan_run(one, path, cache, progress) for path, one in runs.items()}
    written = sum(one.to_write for one in plans.values())
    require_space(folder, written + max(one.peak - one.to_write for one in plans.values()))
    return plans


def report_recipe(folder: Path) -> Study:
    """Write the report on a finished run, or over all runs of a recipe, again.

    Raises:
        RegraftError: the folder holds no run, a run is not finished, or the published figures
            cannot be read.
    """
    run_dir, recipe = open_run(folder)
    runs = run_folders(folder, recipe)
    if runs == [folder]:
        return report_run(folder)
    for run, one in runs_of(recipe, folder).items():
        if (older := _fixed(open_run(run)[1])) != (wanted := _fixed(one)):
            why = f"{run.name} is of an earlier recipe ({difference(older, wanted)})"
            raise not_finished(folder, why)
    if recipe.seeds:
        return compare_runs(runs, run_dir.report, recipe.against)
    study = _over_models(recipe, folder)
    write_report(study, run_dir.report)
    return study


def _share_dense(runs: Iterable[Path], run_folder: Path, compute: ComputeSettings) -> None:
    """Copy the dense model's evaluation from a run whose versions and kind of device were these."""
    wanted = RunDir(run_folder).dense_evaluation
    if distributed.first() and not wanted.exists():
        done = (RunDir(run).dense_evaluation / "results.json" for run in runs)
        made = (one.parent for one in done if one.exists() and made_alike(about_of(one), compute))
        if (found := next(made, None)) is not None:
            with atomic_folder(wanted) as copy:
                shutil.copytree(found, copy, dirs_exist_ok=True)
    distributed.barrier()


def _over_models(recipe: Recipe, folder: Path) -> Study:
    folders = {one.name: folder_of_model(folder, one.name) for one in recipe.models}
    runs = [read_run(run_folder, name) for name, run_folder in folders.items()]
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


def plan_run(
    recipe: Recipe,
    folder: Path,
    cache: stages.EvaluationCache | None = None,
    progress: Progress = SILENT,
) -> Planned:
    """Plan a run, and check before anything is written all that could stop it hours later.

    Raises:
        RegraftError: bad input.
    """
    run_dir = RunDir.for_recipe(folder, recipe)
    dense, existing = recipe.compute.opened(recipe.model), None
    if recipe.pruned is not None:
        existing = recipe.compute.opened(recipe.pruned)
        check_pair(dense, existing)
    setup = stages.Setup(
        dense,
        recipe.calibration,
        recipe.compute,
        progress,
        cache or stages.EvaluationCache(),
        scoring=recipe.heads,
        evaluation=recipe.evaluate.only(),
    )
    if existing is not None:
        survey = setup.cache.surveyed(dense, existing, progress)
        for one in recipe.realign:
            check_restorable(one, survey)
    return plan_steps(setup, Planner(recipe, run_dir, setup, existing).steps())


def run_one(
    recipe: Recipe,
    folder: Path,
    progress: Progress = SILENT,
    cache: stages.EvaluationCache | None = None,
) -> Study:
    """Prune, score heads, realign, evaluate and report; finished stages are not repeated.

    Args:
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    metered = Metered(progress)
    plan, run_dir = plan_run(recipe, folder, cache, metered), RunDir.for_recipe(folder, recipe)
    setup = plan.setup
    claim(folder, recipe)
    for line in (*unused_in(recipe), *plan.prompts.warnings()):
        progress.note(f"Warning: {line}.")
    setup.target(setup.dense).warn(recipe.evaluate.suite)
    costs = Ledger(run_dir.costs, metered, pick_device(recipe.compute.device))
    # The steps hold `setup` as it was; nothing but `carry_out` reads the guard.
    replace(plan, setup=replace(setup, guard=costs.measure)).carry_out()
    setup.cache.unload()
    if has_passes(recipe, setup.dense.architecture):
        count_pass(setup, run_dir.calibration_pass)
    return report_run(folder)


def unused_in(recipe: Recipe) -> list[str]:
    """Warnings of parts of the recipe that have no effect."""
    found = []
    if recipe.pruned and recipe.prune[0].only() != prune_settings():
        found.append(f"prune: it has no effect, since `pruned` is {recipe.pruned}")
    if recipe.heads != HeadSettings() and not any(needs_of(one).heads for one in recipe.realign):
        found.append("heads: they have no effect, since no method uses scores of heads")
    return found


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe to a new folder, or check that the folder holds a run of this recipe.

    Raises:
        RegraftError: the folder holds something else.
    """
    file = RunDir(folder).recipe
    if distributed.first():
        # Runs of the recipe that are made at once all write it.
        with new_folders(file), disk_errors(file), in_turn(lock_of(file), file):
            if recipe_before(folder, recipe) != recipe:
                write_text(file, write_recipe(recipe))
    distributed.barrier()


def recipe_before(folder: Path, recipe: Recipe) -> Recipe | None:
    """The recipe of an earlier run in the folder, of which `recipe` may be a continuation.

    Raises:
        RegraftError: it is another one, or the folder holds something else.
    """
    file = RunDir(folder).recipe
    if not file.exists():
        require_empty(folder, file)
        if not file.exists():  # else another process has just written it
            return None
    before = read_recipe(file)
    found, wanted = _fixed(before), _fixed(recipe)
    if found != (wanted := _without_additions(wanted, found)):
        raise RegraftError(
            f"{folder} holds a run of another recipe ({difference(found, wanted)}). Choose "
            "another output folder."
        )
    return before


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must not change while its run grows; its items by their names.

    Left out are comparisons of finished models, and settings that only change rounding.
    """
    content: dict[str, Any] = but_for_rounding(
        recipe.model_dump(mode="json", exclude={"against", "published"})
    )
    named = ("models", "prune", "realign", "defend")
    return content | {kind: {one["name"]: one for one in content[kind]} for kind in named}


def _without_additions(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe `wanted` without the items that `found` lacks, since a run may grow.

    It may grow by methods, defences, seeds and models, and by prunings if each has its own folder.
    """
    growing = ["realign", "defend"]
    growing += ["prune"] if len(found["prune"]) > 1 and len(wanted["prune"]) > 1 else []
    growing += ["models"] if found["models"] else []
    known = dict(wanted)
    for kind in growing:
        known[kind] = {name: one for name, one in wanted[kind].items() if name in found[kind]}
    if found["seeds"]:
        known["seeds"] = [seed for seed in found["seeds"] if seed in wanted["seeds"]]
    return known
