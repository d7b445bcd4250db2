"""One setting at several values: sparsity, q ("how many neurons matter"), heads or budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import pipeline
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.recipe import PruningSettings, Recipe, VariantSettings
from regraft.report.run import Run, Variant
from regraft.settings.realigning import SELECTING
from regraft.settings.searching import Swept
from regraft.watch import Watch


@dataclass(frozen=True)
class SweepPoint:
    """The model at one value. `restored` counts weights; 0 for one that is only pruned."""

    value: float
    restored: int
    asr: Estimate | None
    over_refusal: Estimate | None
    utility: Estimate | None


@dataclass(frozen=True)
class Sweep:
    """All points, and the models they are compared with: "dense", and "pruned" if one is fixed."""

    setting: Swept
    judge: str
    points: tuple[SweepPoint, ...]
    references: dict[str, SweepPoint]


def swept(recipe: Recipe, setting: Swept, values: Sequence[float]) -> Recipe:
    """The recipe with one pruning, or one realigned variant, for each value.

    Sparsity is that of the recipe's first pruning, alone; the others are settings of its first
    variant, on its first pruning.

    Raises:
        RegraftError: no value or two equal ones, a value that the setting cannot have, or the
            recipe has nothing to vary.
    """
    if not values or len(set(values)) < len(values):
        raise RegraftError(f"A sweep needs values that differ, not {list(values)}.")
    if recipe.models:
        raise RegraftError("A sweep is of one model: give the recipe `model` in place of `models`.")
    content = recipe.model_dump()
    if setting == "sparsity":
        if recipe.pruned is not None:
            raise RegraftError("The recipe names a pruned checkpoint, so its sparsity is given.")
        base = recipe.prune[0].model_dump() | {"n_m": None}
        prunings = [
            PruningSettings.model_validate({**base, "sparsity": v, "name": _name(setting, v)})
            for v in values
        ]
        varied: dict[str, Any] = {"prune": prunings, "realign": ()}
    else:
        if not recipe.realign:
            raise RegraftError(f"The recipe realigns nothing, so there is no {setting} to vary.")
        _check_used(recipe.realign[0], setting)
        fixed: dict[str, Any] = {"checkpoint": False, "prunings": (), "repeats": 1}
        if setting == "budget":
            fixed["count"] = None
        first = recipe.realign[0].model_dump() | fixed
        changes = [{**_change(setting, v), "name": _name(setting, v)} for v in values]
        variants = [VariantSettings.model_validate({**first, **change}) for change in changes]
        pruning = recipe.prune[0].model_dump() | {"realign": True}
        varied = {"prune": [PruningSettings.model_validate(pruning)], "realign": variants}
    return Recipe.model_validate(content | varied | {"seeds": (), "against": (), "defend": ()})


def _check_used(variant: VariantSettings, setting: Swept) -> None:
    """Raise where a setting decides nothing, so that all points would be the same."""
    unused = {
        "q": variant.method not in SELECTING or variant.ranked,
        "top-heads": not (variant.by_heads or (variant.in_heads and variant.heads == "random")),
        "budget": variant.method == "hsr-a",
        "sparsity": False,
    }[setting]
    if unused:
        raise RegraftError(
            f"The recipe's first variant, {variant.name!r} by {variant.method}, does not go by "
            f"{setting}, so that all points would be the same. Put another variant first"
            + (
                " or leave out its budget."
                if setting == "q" and variant.method in SELECTING
                else "."
            )
        )


def run_sweep(
    recipe: Recipe, setting: Swept, values: Sequence[float], folder: Path, watch: Watch
) -> Sweep:
    """Run the swept recipe in `folder`, which resumes, and read its points from the report.

    Raises:
        RegraftError: see `swept` and `pipeline.run`.
    """
    study = pipeline.run(swept(recipe, setting, values), folder, watch)
    return read_sweep(study.runs[0], setting, values)


def read_sweep(run: Run, setting: Swept, values: Sequence[float]) -> Sweep:
    """The points of a finished sweep."""
    found = {variant.name.rpartition("/")[2]: variant for variant in run.variants}
    points = tuple(_point(found[_name(setting, value)], value) for value in sorted(values))
    references = {"dense": _point(run.dense, 0)}
    if setting != "sparsity":
        references["pruned"] = _point(run.groups[0][0], 0)
    return Sweep(setting, run.dense.result.judge, points, references)


def _point(variant: Variant, value: float) -> SweepPoint:
    result = variant.result
    return SweepPoint(value, variant.restored, result.asr, result.over_refusal, result.utility)


def _change(setting: Swept, value: float) -> dict[str, Any]:
    if setting != "top-heads":
        return {setting: value}
    if value != int(value):
        raise RegraftError(f"top-heads is a whole number, not {value}.")
    return {"top_heads": int(value)}


def _name(setting: Swept, value: float) -> str:
    return f"{setting}-{value:g}"
