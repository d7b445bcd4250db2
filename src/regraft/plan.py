"""The steps of a recipe's run, in order: what is made from what, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from regraft import stages
from regraft.files import digest
from regraft.models.load import Source, open_source
from regraft.passes import SEARCH_REFERENCES
from regraft.progress import Progress
from regraft.recipe import Recipe
from regraft.recipe_parts import NamedDefenceSettings, PruningSettings, VariantSettings
from regraft.restoration.base import needs_of
from regraft.run_dir import RunDir
from regraft.settings.searching import SearchSettings
from regraft.stages.steps import Step


def plan(
    recipe: Recipe,
    run_dir: RunDir,
    dense: Source,
    existing: Source | None,
    progress: Progress,
    cache: stages.EvaluationCache,
) -> list[Step]:
    """All steps but the report.

    Args:
        recipe: All settings.
        run_dir: The folder of the run.
        dense: The dense model.
        existing: The pruned one, where the recipe names it.
        progress: Progress.
        cache: Has read the test prompts already.
    """
    count = len(cache.reading(dense, recipe.evaluate.suite, recipe.evaluate.limit).examples)
    return list(_Planner(recipe, run_dir, dense, existing, progress, cache, count).steps())


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    run_dir: RunDir
    dense: Source
    existing: Source | None
    progress: Progress
    cache: stages.EvaluationCache
    prompts: int

    def steps(self) -> Iterator[Step]:
        """In the order in which they are made: models that cost little to know come first."""
        recipe, run_dir = self.recipe, self.run_dir
        if self.existing is None:
            yield from (self._prune(one) for one in recipe.prune)
        dense = run_dir.dense_evaluation
        yield self._evaluate("dense", lambda: self.dense, dense, title="Evaluating the dense model")
        for one in recipe.prune:
            title = f"Evaluating the {one.name} model"
            source, out = partial(self.pruned, one.name), run_dir.evaluation(one.name)
            yield self._evaluate(one.name, source, out, title=title)
        needs = [needs_of(one) for one in recipe.realign]
        shared = run_dir.of(recipe.prune[0].name, "", "")
        yield from self.restoration.gathering(needs, shared, stages.Inputs())
        for pruning in recipe.prune:
            for variant in recipe.variants_of(pruning):
                yield from _titled("Realigning", self._realign(pruning.name, variant))
            for defence in recipe.defences_of(pruning):
                yield from _titled("Defending", self._defend(pruning.name, defence))

    def pruned(self, name: str) -> Source:
        """A pruned checkpoint, which must be there."""
        return self.existing or self._open(self.run_dir.pruned(name))

    def _open(self, folder: Path) -> Source:
        return open_source(folder, trust_remote_code=self.recipe.compute.trust_remote_code)

    @property
    def restoration(self) -> stages.Restoration:
        """What restorations of this run share."""
        recipe = self.recipe
        return stages.Restoration(
            self.dense,
            recipe.calibration,
            recipe.compute,
            recipe.heads,
            recipe.evaluate.only().in_memory(),
            self.progress,
            self.cache,
        )

    def _prune(self, pruning: PruningSettings) -> Step:
        recipe, out = self.recipe, self.run_dir.pruned(pruning.name)
        make = partial(
            stages.prune,
            self.dense,
            out,
            pruning.only(),
            recipe.calibration,
            recipe.compute,
            self.progress,
            self.run_dir.responses,
        )
        return Step("prune", pruning.name, out, make, learns=recipe.calibration.samples)

    def _evaluate(
        self,
        name: str,
        model: Callable[[], Source],
        out: Path,
        patch: Path | None = None,
        defence: Path | None = None,
        title: str = "",
    ) -> Step:
        """Answers to the test prompts, and how likely ordinary text is where that is named."""
        recipe, text = self.recipe, None
        if (file := recipe.evaluate.text) is not None:
            dense = self.run_dir.dense_evaluation
            text = stages.OnText(file, None if out == dense else dense)

        def make() -> object:
            return stages.evaluate(
                model(),
                out,
                recipe.evaluate.suite,
                recipe.evaluate.only(),
                recipe.compute,
                patch,
                processor_from=self.dense,
                progress=self.progress,
                cache=self.cache,
                defence_file=defence,
                text=text,
            )

        return Step("evaluate", name, out, make, title, answers=self.prompts)

    def _realign(self, pruning: str, settings: VariantSettings) -> Iterator[Step]:
        """A patch, a checkpoint with it if one is wanted, and its answers."""
        run_dir, recipe, name = self.run_dir, self.recipe, self.run_dir.name(pruning, settings.name)
        paths = run_dir.of(pruning, settings.name, recipe.ranking_name(settings))
        pruned = partial(self.pruned, pruning)
        if (source := recipe.positions_of(settings)) is not None:
            positions = run_dir.ranking(pruning, recipe.ranking_name(source))
            paths = replace(paths, positions=positions)
        if (search := settings.search) is not None:
            prompts = _prompts_name(search)
            paths = replace(
                paths,
                references=run_dir.points(pruning, prompts),
                points=run_dir.points(pruning, f"{paths.ranking.stem}-{prompts}"),
            )
            yield self._references(pruning, search, paths)
        yield from self.restoration.steps(pruned, settings, paths, choice=search, name=name)
        out = run_dir.evaluation(pruning, settings.name)
        if not recipe.on_disk(settings):
            yield self._evaluate(name, pruned, out, paths.patch)
            return
        written = run_dir.realigned(pruning, settings.name)

        def apply() -> object:
            return stages.apply(pruned().folder, paths.patch, written, self.progress)

        yield Step("apply", name, written, apply)
        yield self._evaluate(name, lambda: self._open(written), out)

    def _references(
        self, pruning: str, search: SearchSettings, paths: stages.ArtifactPaths
    ) -> Step:
        """Evaluate what all searches on these prompts share."""
        references = paths.references or paths.curve.with_suffix("")

        def make() -> object:
            if paths.curve.exists():
                return None
            return self.restoration.searching(search).references(self.pruned(pruning), references)

        return Step(SEARCH_REFERENCES, pruning, references / "pruned", make)

    def _defend(self, pruning: str, settings: NamedDefenceSettings) -> Iterator[Step]:
        """A defence at inference, and the answers under it."""
        name, recipe = self.run_dir.name(pruning, settings.name), self.recipe
        file = self.run_dir.defence(pruning, settings.name)
        pruned = partial(self.pruned, pruning)

        def make() -> object:
            return stages.defend(
                pruned(),
                file,
                settings.only(),
                recipe.calibration,
                recipe.compute,
                self.progress,
                self.dense,
                recipe.evaluate.text_judge(),
            )

        yield Step("defend", name, file, make, alone=settings.method == "refusal-direction")
        out = self.run_dir.evaluation(pruning, settings.name)
        yield self._evaluate(name, pruned, out, defence=file)


def _titled(what: str, steps: Iterator[Step]) -> Iterator[Step]:
    """The first of them says what begins."""
    first, *others = steps
    yield replace(first, title=f"{what}: {others[-1].of}")
    yield from others


def _prompts_name(search: SearchSettings) -> str:
    """Searches that differ in what they choose by share what they try."""
    return digest(search.model_dump_json(include={"validation", "validation_limit"}))[:8]
