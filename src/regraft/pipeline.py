"""The order of the stages: one recipe, one folder, one report. Resumes where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import stages
from regraft.checks import (
    check_pattern,
    check_r_max,
    check_top_heads,
    draw_calibration,
    read_suites,
)
from regraft.data.demo import demo_model
from regraft.data.sources import read
from regraft.errors import RegraftError
from regraft.files import discard_leftover, read_json, require_empty, require_space, write_text
from regraft.heads.score import HeadScores, load_heads
from regraft.importance.statistics import load_statistics
from regraft.keys import difference
from regraft.models.load import Source, open_source, pick_device
from regraft.recipe import Recipe, VariantSettings, read_recipe, write_recipe
from regraft.report.model import DataAccount, HeadMap, Report, Variant
from regraft.report.write import write_report
from regraft.restoration.patch import Patch, load_patch
from regraft.restoration.realign import check_pair, restored_by_module
from regraft.stages import Evaluation
from regraft.watch import Silent, Watch

RECIPE_FILE = "recipe.yaml"
CONTROL_LABELS = {"random": "random heads", "all": "all heads"}


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its artifacts."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe, defaults included."""
        return self.path / RECIPE_FILE

    @property
    def pruned(self) -> Path:
        """The pruned checkpoint, unless the recipe names an existing one."""
        return self.path / "pruned"

    @property
    def heads(self) -> Path:
        """Head scores."""
        return self.path / "heads.safetensors"

    @property
    def statistics(self) -> Path:
        """Input statistics on D^s and D^u."""
        return self.path / "statistics.safetensors"

    @property
    def report(self) -> Path:
        """report.json, report.md, report.html."""
        return self.path / "report"

    def patch(self, name: str) -> Path:
        """The patch of one realigned variant."""
        return self.path / "patches" / f"{name}.safetensors"

    def realigned(self, name: str) -> Path:
        """The checkpoint of one realigned variant."""
        return self.path / "realigned" / name

    def evaluation(self, name: str) -> Path:
        """Answers and results of "dense", "pruned" or a realigned variant."""
        return self.path / "evaluation" / name


def run(recipe: Recipe, folder: Path, watch: Watch | None = None) -> Report:
    """Prune, score heads, realign, evaluate and report; finished stages are not repeated.

    Args:
        recipe: All settings.
        folder: A new folder, or that of an earlier run of the same recipe.
        watch: Progress.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    watch = watch or Silent()
    place = RunFolder(folder)
    dense = open_source(
        _model_folder(recipe.model), trust_remote_code=recipe.compute.trust_remote_code
    )
    existing = None
    if recipe.pruned is not None:
        existing = open_source(recipe.pruned, trust_remote_code=recipe.compute.trust_remote_code)
        check_pair(dense, existing)
    _check(recipe, dense, place)
    _claim(place, recipe)
    pruned = existing or stages.prune(
        dense, place.pruned, recipe.prune, recipe.calibration, recipe.compute, watch
    )
    evaluate, compute = recipe.evaluate, recipe.compute
    for name, source in (("dense", dense), ("pruned", pruned)):
        watch.note(f"Evaluating the {name} model")
        stages.evaluate(
            source,
            place.evaluation(name),
            evaluate.suite,
            evaluate.only(),
            compute,
            processor_from=dense,
            watch=watch,
        )
    if any(one.heads == "top" for one in recipe.realign):
        stages.heads(dense, place.heads, recipe.heads, recipe.calibration, compute, watch)
    if any(one.method == "hsr" for one in recipe.realign):
        stages.statistics(dense, place.statistics, recipe.calibration, compute, watch)
    for one in recipe.realign:
        watch.note(f"Realigning: {one.name}")
        _realign(place, dense, pruned, one, recipe, watch)
    return report(folder)


def _check(recipe: Recipe, dense: Source, place: RunFolder) -> None:
    """Find now, before anything is written, what would stop the run hours later."""
    pick_device(recipe.compute.device)
    by_heads = any(one.heads == "top" for one in recipe.realign)
    by_importance = any(one.method == "hsr" for one in recipe.realign)
    if by_heads or by_importance:
        harmful = draw_calibration(dense, recipe.calibration, harmful=True)
        if by_heads:
            check_r_max(dense, recipe.heads, len(harmful.examples))
    if by_importance or recipe.pruned is None:
        draw_calibration(dense, recipe.calibration, harmful=False)
    read_suites(dense, recipe.evaluate.suite, recipe.evaluate.limit)
    checkpoints = [place.realigned(one.name) for one in recipe.realign if one.checkpoint]
    if recipe.pruned is None:
        check_pattern(dense, recipe.prune)
        checkpoints.append(place.pruned)
    for one in recipe.realign:
        check_top_heads(dense, one)
    for checkpoint in checkpoints:
        discard_leftover(checkpoint)
    missing = sum(not folder.exists() for folder in checkpoints)
    require_space(place.path, missing * dense.checkpoint.bytes)


def report(folder: Path) -> Report:
    """Write the report of a finished run from its artifacts alone; no model is loaded.

    Raises:
        RegraftError: the folder holds no run, or one that is not finished.
    """
    place = RunFolder(folder)
    if not place.recipe.exists():
        raise RegraftError(f"{folder} holds no run: there is no {RECIPE_FILE} in it.")
    recipe = read_recipe(place.recipe)
    for name in ("dense", "pruned", *(one.name for one in recipe.realign)):
        if not place.evaluation(name).exists():
            raise RegraftError(
                f"The run in {folder} is not finished: {name} has not been evaluated. Continue it "
                f"with `regraft run {place.recipe} --out {folder}`."
            )
    dense = open_source(
        _model_folder(recipe.model), trust_remote_code=recipe.compute.trust_remote_code
    )
    evaluations = {
        name: stages.read_evaluation(place.evaluation(name))
        for name in ("dense", "pruned", *(one.name for one in recipe.realign))
    }
    patches = {one.name: load_patch(place.patch(one.name)) for one in recipe.realign}
    taken = evaluations["pruned"].about["zeros"] - evaluations["dense"].about["zeros"]
    taken = next((patch.about["pruned"] for patch in patches.values()), taken)
    pruned = open_source(recipe.pruned or place.pruned)
    variants = [
        Variant(
            name,
            name,
            evaluations[name].result,
            sparsity=_sparsity(evaluations[name]),
            pruned=taken if name == "pruned" else 0,
        )
        for name in ("dense", "pruned")
    ]
    variants += [
        _variant(patches[one.name], pruned, one, evaluations[one.name]) for one in recipe.realign
    ]
    abouts = [evaluations["dense"].about]
    maps: tuple[HeadMap, ...] = ()
    if place.heads.exists():
        scores = load_heads(place.heads, dense.anatomy)
        maps = _head_maps(scores)
        abouts.append(scores.about)
    if place.statistics.exists():
        abouts.append(load_statistics(place.statistics).about)
    elif (place.pruned / stages.ABOUT_FILE).exists():
        abouts.append(read_json(place.pruned / stages.ABOUT_FILE))
    made = Report(
        title=recipe.title,
        model=recipe.model,
        variants=tuple(variants),
        head_maps=maps,
        data=tuple(_accounts(abouts)),
        recipe=recipe.model_dump(mode="json"),
        images=_images(recipe),
        versions=abouts[0]["versions"] | {"device": abouts[0]["compute"]["device"]},
    )
    write_report(made, place.report)
    return made


def _realign(
    place: RunFolder,
    dense: Source,
    pruned: Source,
    settings: VariantSettings,
    recipe: Recipe,
    watch: Watch,
) -> None:
    patch = place.patch(settings.name)
    stages.realign(
        dense,
        pruned,
        patch,
        settings.selection(),
        place.heads if settings.heads == "top" else None,
        place.statistics if settings.method == "hsr" else None,
        recipe.compute,
        watch,
    )
    model = pruned
    if settings.checkpoint:
        written = stages.apply(pruned.folder, patch, place.realigned(settings.name), watch)
        model = open_source(written, trust_remote_code=recipe.compute.trust_remote_code)
    stages.evaluate(
        model,
        place.evaluation(settings.name),
        recipe.evaluate.suite,
        recipe.evaluate.only(),
        recipe.compute,
        None if settings.checkpoint else patch,
        dense,
        watch,
    )


def _variant(
    patch: Patch, pruned: Source, settings: VariantSettings, evaluation: Evaluation
) -> Variant:
    heads = tuple((layer, head) for layer, head in patch.about["heads"])
    return Variant(
        settings.name,
        _label(settings),
        evaluation.result,
        sparsity=_sparsity(evaluation),
        restored=patch.restored,
        pruned=patch.about["pruned"],
        restored_by_module=restored_by_module(patch, pruned.anatomy.layers),
        heads=() if settings.heads == "all" else heads,
    )


def _label(settings: VariantSettings) -> str:
    heads = (
        f"top {settings.top_heads} by {settings.criterion}"
        if settings.heads == "top"
        else CONTROL_LABELS[settings.heads]
    )
    return f"{settings.name} ({settings.method.upper()}, {heads})"


def _head_maps(scores: HeadScores) -> tuple[HeadMap, ...]:
    def rows(values: Any) -> tuple[tuple[float | None, ...], ...]:
        return tuple(tuple(None if math.isnan(v) else v for v in row) for row in values.tolist())

    return (
        HeadMap("Ships", "radians", rows(scores.ships)),
        HeadMap("KL", "nats", rows(scores.kl)),
    )


def _accounts(abouts: list[Mapping[str, Any]]) -> Iterator[DataAccount]:
    names = {"suite": "evaluation", "safety": "calibration D^s", "utility": "calibration D^u"}
    merged = {role: data for about in abouts for role, data in about.get("data", {}).items()}
    for role, data in merged.items():
        yield DataAccount(names[role], data["source"], data["read"], data["used"], data["skipped"])


def _images(recipe: Recipe) -> dict[str, Path]:
    """Images of the suite by example id; none where the data set has moved since."""
    try:
        examples = [e for suite in recipe.evaluate.suite for e in read(suite).examples]
    except RegraftError:
        return {}
    return {example.id: example.image for example in examples if example.image}


def _sparsity(evaluation: Evaluation) -> float:
    return float(evaluation.about["zeros"] / evaluation.about["prunable"])


def _model_folder(model: str) -> str | Path:
    return demo_model() if model == "demo" else model


def _claim(place: RunFolder, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or check that the folder is of this recipe."""
    if place.recipe.exists():
        if read_recipe(place.recipe) != recipe:
            found, wanted = (
                one.model_dump(mode="json") for one in (read_recipe(place.recipe), recipe)
            )
            raise RegraftError(
                f"{place.path} holds a run of another recipe "
                f"({difference(found, wanted)}). Choose another output folder."
            )
        return
    discard_leftover(place.recipe)
    require_empty(place.path)
    write_text(place.recipe, write_recipe(recipe))
