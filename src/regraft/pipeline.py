"""The order of the stages: one recipe, one folder, one report. Resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft import distributed, stages
from regraft.checks import warn_of_bundled
from regraft.costs import Ledger, Metered
from regraft.errors import RegraftError
from regraft.estimate import seconds
from regraft.files import discard_leftover, require_empty, write_text
from regraft.models.load import pick_device
from regraft.passes import count_pass, learns_from_both
from regraft.plan import plan
from regraft.preflight import bytes_needed, check, seen_before_in, unread_in
from regraft.progress import Progress, Silent
from regraft.provenance import but_for_rounding, difference
from regraft.recipe import Recipe
from regraft.recipe_file import read_recipe, write_recipe
from regraft.report.study import Study
from regraft.reporting import report
from regraft.run_dir import RunDir
from regraft.stages.steps import Step, make_all

__all__ = ["Preview", "RunDir", "check", "preview", "report", "run"]


def run(
    recipe: Recipe,
    folder: Path,
    progress: Progress | None = None,
    cache: stages.EvaluationCache | None = None,
) -> Study:
    """Prune, score heads, realign, evaluate and report; finished stages are not repeated.

    Args:
        recipe: All settings.
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.
        progress: Progress.
        cache: What evaluations share, if other runs share it too.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    progress = progress or Silent()
    run_dir = RunDir(folder, several=len(recipe.prune) > 1)
    cache = cache or stages.EvaluationCache()
    dense, existing = check(recipe, folder, cache)
    claim(folder, recipe)
    for line in (*unread_in(recipe), *seen_before_in(recipe, dense, cache)):
        progress.note(f"Warning: {line}.")
    for suite in recipe.evaluate.suite:
        warn_of_bundled(dense, suite, progress.note)
    metered = Metered(progress)
    costs = Ledger(run_dir.costs, metered, pick_device(recipe.compute.device))
    steps = plan(recipe, run_dir, dense, existing, metered, cache)
    make_all(steps, costs.of, cache, progress)
    cache.unload()
    if learns_from_both(recipe):
        count_pass(dense, recipe.calibration, run_dir.calibration_pass, cache, progress)
    return report(folder)


def preview(recipe: Recipe, folder: Path) -> Preview:
    """What a run would do, having looked for bad input as it would; writes nothing.

    Raises:
        RegraftError: as `run`.
    """
    run_dir, cache = RunDir(folder, several=len(recipe.prune) > 1), stages.EvaluationCache()
    dense, existing = check(recipe, folder, cache)
    steps = plan(recipe, run_dir, dense, existing, Silent(), cache)
    tests = cache.reading(dense, recipe.evaluate.suite, recipe.evaluate.limit).examples
    time = seconds(steps, dense, tests, recipe.evaluate.max_new_tokens, recipe.compute)
    dtype = getattr(torch, recipe.compute.dtype_of(dense))
    return Preview(
        tuple(steps),
        bytes=bytes_needed(recipe, dense, folder)[1],
        weights=dense.architecture.parameters * dtype.itemsize,
        seconds=time,
    )


@dataclass(frozen=True)
class Preview:
    """The steps of a run, and what they take.

    Attributes:
        steps: In order.
        bytes: On disk, at most.
        weights: Bytes of one model in memory.
        seconds: For what is not done, a rough guess.
    """

    steps: tuple[Step, ...]
    bytes: int
    weights: int
    seconds: float


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or check that the folder is of this recipe.

    Raises:
        RegraftError: the folder holds something else.
    """
    if distributed.first():
        _claim(RunDir(folder), recipe)
    distributed.barrier()


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe that a run must keep to.

    Not its tests and what it is set beside, which are of finished models, nor what changes rounding
    alone.
    """
    content: dict[str, Any] = but_for_rounding(
        recipe.model_dump(mode="json", exclude={"against", "published"})
    )
    return content


def _known(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of what an earlier one had too, since a run may grow.

    By methods, defences, seeds and models, and by prunings where there are several, with a folder
    each.
    """
    known = dict(wanted)
    several = isinstance(found["prune"], list) and isinstance(wanted["prune"], list)
    growing = ["realign", "defend"]
    growing += ["prune"] if several else []
    growing += ["models"] if found["models"] else []
    for kind in growing:
        named = {one["name"]: one for one in wanted[kind]}
        known[kind] = [named[one["name"]] for one in found[kind] if one["name"] in named]
    if found["seeds"]:
        known["seeds"] = [seed for seed in found["seeds"] if seed in wanted["seeds"]]
    return known


def _claim(run_dir: RunDir, recipe: Recipe) -> None:
    if run_dir.recipe.exists():
        before = read_recipe(run_dir.recipe)
        found, wanted = _fixed(before), _fixed(recipe)
        if found != (wanted := _known(wanted, found)):
            raise RegraftError(
                f"{run_dir.path} holds a run of another recipe "
                f"({difference(found, wanted)}). Choose another output folder."
            )
        if before != recipe:
            write_text(run_dir.recipe, write_recipe(recipe))
        return
    discard_leftover(run_dir.recipe)
    require_empty(run_dir.path)
    write_text(run_dir.recipe, write_recipe(recipe))
