"""One setting at several values: sparsity, q ("how many neurons matter"), heads or budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import pipeline
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.progress import Progress
from regraft.recipe import Recipe
from regraft.recipe_parts import pruning_settings, variant
from regraft.report.run import Run, Variant
from regraft.restoration.base import method_of


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

    setting: str
    judge: str
    points: tuple[SweepPoint, ...]
    references: dict[str, SweepPoint]


def swept(recipe: Recipe, setting: str, values: Sequence[float]) -> Recipe:
    """The recipe with one pruning, or one realigned variant, for each value.

    Sparsity is that of the recipe's first pruning, alone; any other is a setting of the method of
    its first variant, on its first pruning.

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
            pruning_settings(**{**base, "sparsity": v, "name": _name(setting, v)}) for v in values
        ]
        varied: dict[str, Any] = {"prune": prunings, "realign": ()}
    else:
        if not recipe.realign:
            raise RegraftError(f"The recipe realigns nothing, so there is no {setting} to vary.")
        first = recipe.realign[0]
        field = setting.replace("-", "_")
        if field not in method_of(first).Settings.model_fields or field == "method":
            raise RegraftError(
                f"{setting} is no setting of {first.name!r}, the recipe's first variant, by "
                f"{first.method}. Put another variant first, or sweep another setting."
            )
        content_of = first.model_dump(exclude_unset=True)
        content_of |= {"checkpoint": False, "prunings": (), "repeats": 1, "method": first.method}
        for other in ("budget", "count") if field in ("budget", "count") else ():
            content_of.pop(other, None)
        variants = [
            variant(**{**content_of, field: _whole(v), "name": _name(setting, v)}) for v in values
        ]
        pruning = recipe.prune[0].model_dump() | {"realign": True}
        varied = {"prune": [pruning_settings(**pruning)], "realign": variants}
    return Recipe.model_validate(content | varied | {"seeds": (), "against": (), "defend": ()})


def run_sweep(
    recipe: Recipe, setting: str, values: Sequence[float], folder: Path, progress: Progress
) -> Sweep:
    """Run the swept recipe in `folder`, which resumes, and read its points from the report.

    Raises:
        RegraftError: see `swept` and `pipeline.run`.
    """
    study = pipeline.run(swept(recipe, setting, values), folder, progress)
    return read_sweep(study.runs[0], setting, values)


def read_sweep(run: Run, setting: str, values: Sequence[float]) -> Sweep:
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


def _whole(value: float) -> float:
    """A whole number as one, for settings that count something."""
    return int(value) if value == int(value) else value


def _name(setting: str, value: float) -> str:
    return f"{setting}-{value:g}"
