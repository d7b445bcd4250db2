"""Sweeps: one setting at several values, such as sparsity, q, the number of heads or the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.analysis import write_analysis
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.progress import Progress
from regraft.recipes.parts import parse_pruning, parse_variant
from regraft.recipes.recipe import Recipe
from regraft.report.drawing import INK, LOOKS, ceiling, to_svg
from regraft.report.run import Run, Variant
from regraft.restoration.base import method_of
from regraft.runs import pipeline

_RATES = (("asr", "ASR"), ("over_refusal", "over-refusal"), ("utility", "utility"))


@dataclass(frozen=True)
class SweepPoint:
    """Rates of the model at one value; `restored` is its number of restored weights, or 0."""

    value: float
    restored: int
    asr: Estimate | None
    over_refusal: Estimate | None
    utility: Estimate | None


@dataclass(frozen=True)
class Sweep:
    """All points, and the models they are compared with: "dense", and "pruned" if it is fixed."""

    setting: str
    judge: str
    points: tuple[SweepPoint, ...]
    references: dict[str, SweepPoint]


def run_sweep(
    recipe: Recipe, setting: str, values: Sequence[float], folder: Path, progress: Progress
) -> Sweep:
    """Run the swept recipe in `folder`, or resume it, and read the points from its report.

    Writes sweep.json and sweep.svg beside the run's own files.
    """
    study = pipeline.run_one(swept(recipe, setting, values), folder, progress)
    sweep = _read(study.runs[0], setting, values)
    write_analysis(folder, "sweep", asdict(sweep), _figure(sweep))
    return sweep


def swept(recipe: Recipe, setting: str, values: Sequence[float]) -> Recipe:
    """The recipe with one pruning, or one realigned variant, for each value.

    "sparsity" varies the recipe's first pruning, without variants. Any other setting is one of the
    recipe's first variant, on its first pruning. Its defences are left out.

    Raises:
        RegraftError: values are missing or equal, a value is invalid for the setting, or the recipe
            has nothing to vary.
    """
    by_name = {_name(setting, value): value for value in values}
    if not values or len(by_name) < len(values):
        raise RegraftError(f"A sweep needs values that differ, not {list(values)}.")
    if recipe.models:
        raise RegraftError("A sweep takes one model: give the recipe `model` instead of `models`.")
    if recipe.seeds:
        raise RegraftError(
            "A sweep takes one calibration seed: give the recipe `calibration.seed` instead of "
            "`seeds`."
        )
    vary = _sparsities if setting == "sparsity" else _variants
    alone = {"defend": ()}
    return Recipe.model_validate(recipe.model_dump() | vary(recipe, setting, by_name) | alone)


def _sparsities(recipe: Recipe, _: str, values: dict[str, float]) -> dict[str, Any]:
    if recipe.pruned is not None:
        raise RegraftError("The recipe names a pruned checkpoint, so its sparsity is fixed.")
    base = recipe.prune[0].model_dump() | {"n_m": None}
    prunings = [
        parse_pruning(base | {"sparsity": value, "name": name}) for name, value in values.items()
    ]
    return {"prune": prunings, "realign": ()}


def _variants(recipe: Recipe, setting: str, values: dict[str, float]) -> dict[str, Any]:
    if not recipe.realign:
        raise RegraftError(f"The recipe realigns nothing, so there is no {setting} to vary.")
    first, field = recipe.realign[0], setting.replace("-", "_")
    if field not in method_of(first).settings_type.model_fields or field == "method":
        raise RegraftError(
            f"{setting} is no setting of {first.name!r}, the recipe's first variant, by "
            f"{first.method}. Put another variant first, or sweep another setting."
        )
    base = first.model_dump(exclude_unset=True)
    base |= {"checkpoint": False, "prunings": (), "repeats": 1, "method": first.method}
    if field in ("budget", "count"):  # they exclude each other
        base = {name: value for name, value in base.items() if name not in ("budget", "count")}
    variants = []
    for name, value in values.items():
        number = int(value) if value == int(value) else value  # some settings are integers
        variants.append(parse_variant(base | {field: number, "name": name}))
    pruning = recipe.prune[0].model_copy(update={"realign": True})
    return {"prune": [pruning], "realign": variants}


def _read(run: Run, setting: str, values: Sequence[float]) -> Sweep:
    by_name = {variant.name.rpartition("/")[2]: variant for variant in run.variants}
    points = tuple(_point(by_name[_name(setting, value)], value) for value in sorted(values))
    references = {"dense": _point(run.dense, 0)}
    if setting != "sparsity":
        references["pruned"] = _point(run.groups[0][0], 0)
    return Sweep(setting, run.dense.result.judge, points, references)


def _point(variant: Variant, value: float) -> SweepPoint:
    result = variant.result
    rates = result.asr, result.over_refusal, result.utility
    return SweepPoint(value, variant.restored or 0, *rates)


def _name(setting: str, value: float) -> str:
    return f"{setting}-{value:g}"


def _figure(sweep: Sweep) -> str:
    """Plot ASR, over-refusal and utility by value, with intervals; references as lines."""

    def draw(axes: Any) -> None:
        for panel, (field, label), look in zip(axes, _RATES, LOOKS, strict=False):
            panel.set_ylabel(f"{label}, %")
            panel.grid(axis="y")
            _draw_rate(panel, sweep, field, look)
        axes[0].legend(loc="best")
        axes[-1].set_xlabel(sweep.setting)

    title = f"{sweep.setting} against ASR, over-refusal and utility"
    return to_svg(5.6, title, draw, panels=len(_RATES))


def _draw_rate(panel: Any, sweep: Sweep, field: str, look: tuple[str, str, str]) -> None:
    rates: dict[float, Estimate] = {
        one.value: rate for one in sweep.points if (rate := getattr(one, field)) is not None
    }
    if not rates:
        return
    colour, marker, line = look
    style = {"color": colour, "marker": marker, "ls": line, "ms": 4, "lw": 1.2, "elinewidth": 0.8}
    below = [100 * (one.value - one.low) for one in rates.values()]
    above = [100 * (one.high - one.value) for one in rates.values()]
    values = [100 * one.value for one in rates.values()]
    panel.errorbar(list(rates), values, yerr=[below, above], **style)
    references: dict[str, Estimate] = {
        name: rate
        for name, one in sweep.references.items()
        if (rate := getattr(one, field)) is not None
    }
    for name, rate in references.items():
        dashes = ":" if name == "dense" else "--"
        panel.axhline(100 * rate.value, color=INK, lw=0.8, ls=dashes, label=name)
    panel.set_ylim(0, ceiling([*rates.values(), *references.values()]))
