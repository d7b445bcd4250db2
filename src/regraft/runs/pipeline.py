"""The run of one recipe in one folder: its steps are checked, made in order and resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from regraft import distributed, stages
from regraft.costs import Ledger, Metered
from regraft.disk.files import discard_leftover, require_empty, require_space, write_text
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.models.load import pick_device
from regraft.patch.pair import check_pair
from regraft.progress import SILENT, Progress
from regraft.pruning.base import prune_settings
from regraft.recipes.file import read_recipe, write_recipe
from regraft.recipes.recipe import Recipe
from regraft.report.study import Study
from regraft.restoration.base import needs_of
from regraft.runs.passes import count_pass, learns_from_both
from regraft.runs.plan import Planner
from regraft.runs.reporting import report_run
from regraft.runs.run_dir import RunDir
from regraft.stages.provenance import but_for_rounding, difference
from regraft.stages.ranking import check_restorable
from regraft.stages.reading import warn_of_bundled
from regraft.stages.steps import PromptUse, Step, check_all, disk_bytes, not_done

_SIDE = 2048  # of the square matrices of a large product, which measures the device's speed
_EFFICIENCY = {"cpu": 0.8}  # whole models reach this share of that speed: measured
_DEFAULT_EFFICIENCY = 0.3  # on devices where products wait for memory: a guess
_TRIES = 5  # the fastest product counts, since other programs may use the machine


@dataclass(frozen=True)
class PlannedRun:
    """A run whose input has been checked, with the resources it needs.

    Attributes:
        kept: Bytes of the checkpoints still to be written.
        most: Peak bytes of disk space, temporary files included.
    """

    recipe: Recipe
    run_dir: RunDir
    setup: stages.Restoration
    steps: tuple[Step, ...]
    prompts: PromptUse
    kept: int
    most: int

    @property
    def weights(self) -> int:
        """Bytes of one model in memory."""
        dtype: torch.dtype = getattr(torch, self.setup.compute.dtype_of(self.setup.dense))
        return self.setup.dense.architecture.parameters * dtype.itemsize

    def seconds(self) -> float:
        """Estimated seconds of the steps that are not done, within a factor of about three."""
        dense, tests = self.setup.dense, self.prompts.evaluated
        prompt = self.setup.cache.prompt_tokens(dense, tests.examples if tests else ())
        answered = prompt + self.recipe.evaluate.max_new_tokens
        tokens = sum(
            step.answers * answered + step.learns * step.passes * prompt
            for step in not_done(self.steps)
        )
        compute = self.setup.compute
        device = pick_device(compute.device)
        efficiency = _EFFICIENCY.get(device.type, _DEFAULT_EFFICIENCY)
        speed = efficiency * _speed(device, compute.dtype_of(dense))
        return 2 * dense.architecture.parameters * tokens / speed


def plan_run(
    recipe: Recipe,
    folder: Path,
    cache: stages.EvaluationCache | None = None,
    progress: Progress = SILENT,
) -> PlannedRun:
    """Plan a run, and check before anything is written all that could stop it hours later.

    Raises:
        RegraftError: bad input.
    """
    run_dir = RunDir(folder, several=len(recipe.prune) > 1)
    dense, existing = recipe.compute.opened(recipe.model), None
    if recipe.pruned is not None:
        existing = recipe.compute.opened(recipe.pruned)
        check_pair(dense, existing)
    setup = stages.Restoration(
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
    steps = tuple(Planner(recipe, run_dir, setup, existing).steps())
    prompts = check_all(steps)
    kept, most = disk_bytes(steps)
    require_space(folder, most)
    return PlannedRun(recipe, run_dir, setup, steps, prompts, kept, most)


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
    planned = plan_run(recipe, folder, cache, metered)
    setup = planned.setup
    claim(folder, recipe)
    for line in (*unused_in(recipe), *planned.prompts.warnings()):
        progress.note(f"Warning: {line}.")
    for suite in recipe.evaluate.suite:
        warn_of_bundled(setup.dense, suite, progress.note)
    costs = Ledger(planned.run_dir.costs, metered, pick_device(recipe.compute.device))
    # The steps hold `setup` as it was; nothing but `make` reads the guard.
    replace(setup, guard=costs.measure).make(planned.steps)
    setup.cache.unload()
    if learns_from_both(recipe):
        count_pass(setup, planned.run_dir.calibration_pass)
    return report_run(folder)


def unused_in(recipe: Recipe) -> list[str]:
    """Warnings of parts of the recipe that have no effect."""
    found = []
    if recipe.pruned and recipe.prune[0].only() != prune_settings():
        found.append(f"prune: it has no effect, since `pruned` is {recipe.pruned}")
    if recipe.heads != HeadSettings() and not any(needs_of(one).heads for one in recipe.realign):
        found.append("heads: they have no effect, since no method uses scores of heads")
    return found


@cache
def _speed(device: torch.device, dtype: str) -> float:
    """FLOPs per second of one large matrix product, measured once per device and dtype."""
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=getattr(torch, dtype))
    float((matrix @ matrix)[0, 0])
    seconds = []
    for _ in range(_TRIES):
        start = time.monotonic()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.monotonic() - start)
    return 2 * _SIDE**3 / max(min(seconds), 1e-6)


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe to a new folder, or check that the folder holds a run of this recipe.

    Raises:
        RegraftError: the folder holds something else.
    """
    file = RunDir(folder).recipe
    if not distributed.first():
        distributed.barrier()
        return
    if file.exists():
        before = read_recipe(file)
        found, wanted = _fixed(before), _fixed(recipe)
        if found != (wanted := _without_additions(wanted, found)):
            raise RegraftError(
                f"{folder} holds a run of another recipe ({difference(found, wanted)}). Choose "
                "another output folder."
            )
    else:
        before = None
        discard_leftover(file)
        require_empty(folder)
    if before != recipe:
        write_text(file, write_recipe(recipe))
    distributed.barrier()


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
