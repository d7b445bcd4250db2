"""The report on a finished run from its artifacts; no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft import stages
from regraft.costs import read_costs, read_pass
from regraft.data.readers.demo import CAVEAT, is_demo
from regraft.data.sources import DataSource, join_suites
from regraft.defence import DEFENCE_PROMPT, Direction, load_defence
from regraft.disk.artifact import about_in
from regraft.disk.descriptions import about_of
from regraft.disk.files import file_digest
from regraft.disk.paths import require_file
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import read_curve
from regraft.heads.score import HeadScores, load_heads
from regraft.models.architecture import Architecture, LayerArchitecture
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import is_changed, restored_by_module
from regraft.pruning.statistics import load_statistics
from regraft.recipes.file import read_recipe
from regraft.recipes.parts import PruningSettings, VariantSettings
from regraft.recipes.recipe import Recipe
from regraft.report.pooling import study_of
from regraft.report.run import DataAccount, HeadMap, Run, SharedPath, Variant
from regraft.report.study import Study
from regraft.report.write import write_report
from regraft.restoration.base import method_of, needs_of
from regraft.restoration.methods.fine_tune import TRAINED_VALUES, is_trained
from regraft.restoration.methods.gain.path import read_path
from regraft.restoration.ranking import load_ranking
from regraft.runs.passes import MethodPasses
from regraft.runs.run_dir import RECIPE_FILE, RunDir, evaluation_folders, runs_of
from regraft.settings.defending import RefusalDirectionSettings
from regraft.stages import Evaluation


def report_run(folder: Path) -> Study:
    """Write the report on a finished run, from its artifacts alone.

    Raises:
        RegraftError: the folder holds no run, or one that is not finished.
    """
    study = study_of([read_run(folder)])
    write_report(study, RunDir(folder).report)
    return study


def open_run(folder: Path) -> tuple[RunDir, Recipe]:
    """The paths of a run, and its recipe.

    Raises:
        RegraftError: the folder holds no run.
    """
    file = RunDir(folder).recipe
    if not file.exists():
        found = sorted(str(one.parent) for one in folder.glob("**/results.json"))[:5]
        hint = f" `regraft report` takes the evaluations in it: {', '.join(found)}."
        raise RegraftError(
            f"{folder} holds no run: there is no {RECIPE_FILE} in it.{hint if found else ''}"
        )
    recipe = read_recipe(file)
    return RunDir.for_recipe(folder, recipe), recipe


def run_folders(folder: Path, recipe: Recipe) -> list[Path]:
    """The folders of the runs of a recipe in `folder`: one per seed or model, or itself.

    Raises:
        RegraftError: one of the runs was not started.
    """
    runs = list(runs_of(recipe, folder))
    if missing := [run.name for run in runs if not RunDir(run).recipe.exists()]:
        raise not_finished(folder, f"{missing[0]} has not been run")
    return runs


def not_finished(folder: Path, why: str) -> RegraftError:
    """The error about a run that has to be continued."""
    return RegraftError(
        f"The run in {folder} is not finished: {why}. Continue it with "
        f"`regraft run {folder / RECIPE_FILE} --out {folder}`."
    )


def read_run(folder: Path, name: str = "") -> Run:
    """Read a finished run from its artifacts; `name` names its model if a recipe has several.

    Raises:
        RegraftError: the folder holds no run, or one that is not finished.
    """
    run_dir, recipe = open_run(folder)
    return _Artifacts(run_dir, recipe).run(name)


@dataclass(frozen=True)
class _Artifacts:
    """Reads the artifacts of a finished run."""

    run_dir: RunDir
    recipe: Recipe

    def run(self, name: str) -> Run:
        recipe, heads = self.recipe, self.heads
        variants = [_variant("dense", self.evaluations["dense"])]
        for pruning in recipe.prune:
            variants += self.group(pruning)
        abouts = list(self.abouts())
        return Run(
            title=recipe.title,
            model=recipe.model,
            variants=tuple(variants),
            head_maps=() if heads is None else _head_maps(heads),
            data=tuple(accounts_of(abouts)),
            recipe=recipe.model_dump(mode="json"),
            costs=tuple(self.passes.costs),
            images=partial(images_of, self.evaluations["dense"]),
            paths=tuple(self.paths()),
            one_pass=self.passes.unit,
            versions=abouts[0]["versions"] | {"device": abouts[0]["compute"]["device"]},
            notes=tuple(f"{one.label}: {TRAINED_VALUES}" for one in variants if one.trained),
            caveat=CAVEAT if is_demo(recipe.model) else "",
            seed=recipe.calibration.seed,
            name=name,
        )

    @cached_property
    def passes(self) -> MethodPasses:
        """The compute of choosing the weights of methods."""
        costs, one_pass = read_costs(self.run_dir.costs), read_pass(self.run_dir.calibration_pass)
        return MethodPasses(self.recipe, self.run_dir, costs, one_pass)

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        folders = evaluation_folders(self.run_dir, self.recipe)
        for name, folder in folders.items():
            if not folder.exists():
                raise RegraftError(
                    f"The run in {self.run_dir.path} is not finished: {name} has not been "
                    "evaluated, though prune, realign or defend in its recipe list it. Continue it "
                    f"with `regraft run {self.run_dir.recipe} --out {self.run_dir.path}`."
                )
        return {name: stages.read_evaluation(folder) for name, folder in folders.items()}

    @cached_property
    def heads(self) -> HeadScores | None:
        """The scores of heads, if the run has any."""
        if not self.run_dir.heads.exists():
            return None
        return load_heads(self.run_dir.heads, self.architecture(self.recipe.model))

    def architecture(self, model: str | Path) -> Architecture:
        """The architecture of a model, read without its weights."""
        return self.recipe.compute.opened(model).architecture

    def abouts(self) -> Iterator[Mapping[str, Any]]:
        """The `about` of every artifact that used data, the dense model's evaluation first."""
        run_dir, recipe = self.run_dir, self.recipe
        yield self.evaluations["dense"].about
        for pruning in recipe.prune:
            for defence in recipe.defences_of(pruning):
                yield load_defence(run_dir.defence(pruning.name, defence.name)).about
        for pruning in recipe.prune:
            for one in recipe.variants_of(pruning):
                curve = run_dir.curve(pruning.name, one.name)
                if curve.exists():
                    yield about_of(curve)
                ranking = run_dir.ranking(pruning.name, recipe.ranking_name(one))
                if ranking.exists():
                    yield load_ranking(ranking).about
        if self.heads is not None:
            yield self.heads.about
        kinds = [kind for one in recipe.realign if (kind := needs_of(one).statistics)]
        gathered = [path for kind in kinds if (path := run_dir.statistics(kind)).exists()]
        if gathered:
            yield load_statistics(gathered[0]).about
            return
        yield from filter(None, (about_in(run_dir.pruned(one.name)) for one in recipe.prune))

    def group(self, pruning: PruningSettings) -> Iterator[Variant]:
        """One pruned model, then the variants realigned from it and its defences."""
        recipe, run_dir = self.recipe, self.run_dir
        variants = recipe.variants_of(pruning)
        patches = {
            one.name: load_patch(self.evaluated("patch", run_dir.patch, pruning.name, one.name))
            for one in variants
        }
        own, dense = self.evaluations[pruning.name], self.evaluations["dense"]
        zeroed = own.about["zeros"] - dense.about["zeros"]
        yield _variant(
            pruning.name,
            own,
            base="dense",
            checkpoint=recipe.pruned or str(run_dir.pruned(pruning.name).relative_to(run_dir.path)),
            pruned=next((patch.about["pruned"] for patch in patches.values()), zeroed),
            changed=any(map(is_changed, patches.values())),
        )
        layers = self.architecture(recipe.pruned or run_dir.pruned(pruning.name)).layers
        for one in variants:
            yield self.realigned(pruning, one, patches[one.name], layers)
        for defence in recipe.defences_of(pruning):
            name = run_dir.name(pruning.name, defence.name)
            file = self.evaluated("defence", run_dir.defence, pruning.name, defence.name)
            how = _defence_label(file)
            by_prompt = not isinstance(defence, RefusalDirectionSettings)
            yield _variant(
                name,
                self.evaluations[f"{pruning.name}/{defence.name}"],
                method=f"{how}, at inference",
                base=pruning.name,
                inference_time=True,
                passes=self.passes.of_defence(name, by_prompt=by_prompt),
            )

    def evaluated(self, role: str, of: Callable[[str, str], Path], pruning: str, name: str) -> Path:
        """The file of a variant's patch or defence, if it is that of the variant's evaluation."""
        file = of(pruning, name)
        require_file(file, f"It should hold a {role}.")
        used = self.evaluations[f"{pruning}/{name}"].about["inputs"].get(role)
        applied = about_in(self.run_dir.realigned(pruning, name))
        if used is None and applied:  # a checkpoint was evaluated
            used = applied["inputs"].get(role)
        if used not in (None, file_digest(file)):
            raise RegraftError(
                f"{file} is not the {role} with which {self.run_dir.name(pruning, name)} was "
                "evaluated. Put that one back, or remove this one and continue with "
                f"`regraft run {self.run_dir.recipe} --out {self.run_dir.path}`."
            )
        return file

    def realigned(
        self,
        pruning: PruningSettings,
        one: VariantSettings,
        patch: Patch,
        layers: Sequence[LayerArchitecture],
    ) -> Variant:
        run_dir = self.run_dir
        name, curve = run_dir.name(pruning.name, one.name), run_dir.curve(pruning.name, one.name)
        heads = tuple((layer, head) for layer, head in patch.about["heads"])
        how = method_of(one).label(one)
        return _variant(
            name,
            self.evaluations[f"{pruning.name}/{one.name}"],
            method="" if how == one.name else how,
            base=pruning.name,
            patch=str(run_dir.patch(pruning.name, one.name).relative_to(run_dir.path)),
            restored=patch.restored,
            trained=is_trained(patch),
            pruned=patch.about["pruned"],
            changed=is_changed(patch),
            restored_by_module=restored_by_module(patch, layers),
            heads=() if len(heads) == sum(layer.heads for layer in layers) else heads,
            n_m=patch.about.get("n_m"),
            violated_groups=patch.about.get("violated_groups", 0),
            groups=patch.about.get("groups", 0),
            curve=read_curve(curve) if curve.exists() else None,
            passes=self.passes.of_variant(pruning, one),
        )

    def paths(self) -> Iterator[SharedPath]:
        """The path of each ranking by gain, with the variants that restore a part of it."""
        for pruning in self.recipe.prune:
            sharing: dict[str, list[VariantSettings]] = {}
            for one in self.recipe.variants_of(pruning):
                sharing.setdefault(self.recipe.ranking_name(one), []).append(one)
            for name, variants in sharing.items():
                file = self.run_dir.ranking(pruning.name, name)
                about = load_ranking(file).about if file.exists() else {}
                if (path := read_path(about)) is not None:
                    names = tuple(one.name for one in variants)
                    allowed = {
                        one.name: most
                        for one in variants
                        if one.search is None
                        and (most := one.how_many(about["pruned"])) is not None
                    }
                    yield SharedPath(pruning.name, names, path, allowed)


def _variant(name: str, evaluation: Evaluation, **fields: Any) -> Variant:
    sparsity = float(evaluation.about["zeros"] / evaluation.about["prunable"])
    return Variant(name, evaluation.result, sparsity=sparsity, **fields)


def _defence_label(file: Path) -> str:
    defence = load_defence(file)
    if isinstance(defence, Direction):
        return f"refusal direction, layer {defence.layer}, strength {defence.strength:g}"
    if defence.before:
        return "safety prompt"
    if defence.prompt == DEFENCE_PROMPT:
        return "prompt after AdaShield-S"
    return "AdaShield with a given prompt"


def _head_maps(scores: HeadScores) -> tuple[HeadMap, ...]:
    def rows(values: Any) -> tuple[tuple[float | None, ...], ...]:
        return tuple(tuple(None if math.isnan(v) else v for v in row) for row in values.tolist())

    return (
        HeadMap("Ships", "radians", rows(scores.ships)),
        HeadMap("KL", "nats", rows(scores.kl)),
    )


def accounts_of(abouts: Sequence[Mapping[str, Any]]) -> Iterator[DataAccount]:
    """The rows of every source that artifacts used, without repeats."""
    names = {
        "suite": "evaluation",
        "safety": "calibration D^s",
        "utility": "calibration D^u",
        "validation": "validation",
    }
    merged = {
        (role, data["source"], data["used"]): data
        for about in abouts
        for role, data in about.get("data", {}).items()
    }
    for (role, source, used), data in merged.items():
        if role not in names:
            raise RegraftError(f"{data.where}: {role!r} is none of {', '.join(names)}.")
        yield DataAccount(names[role], source, data["read"], used, data["skipped"])


def images_of(evaluation: Evaluation) -> dict[str, Path]:
    """The image of each prompt as its data set has it now, which may have changed since."""
    try:
        sources = [DataSource.model_validate(suite) for suite in evaluation.result.suites]
        examples = join_suites(sources, evaluation.about["settings"].get("limit")).examples
    except (RegraftError, ValidationError):
        return {}
    return {one.id: one.image for one in examples if one.image}
