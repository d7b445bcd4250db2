"""The steps of a recipe's run, in order, with their inputs and paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from regraft import stages
from regraft.data.example import Reading
from regraft.evaluation.perplexity import read_documents
from regraft.models.load import Source, check_split
from regraft.recipes.parts import NamedDefenceSettings, PruningSettings, VariantSettings
from regraft.recipes.recipe import Recipe
from regraft.restoration.base import needs_of
from regraft.runs.passes import SEARCH_REFERENCES, prompts_name
from regraft.runs.run_dir import RunDir
from regraft.settings.searching import SearchSettings
from regraft.stages.defending import defence_step
from regraft.stages.pruning import prune_step
from regraft.stages.restoring import gathering_steps, patch_steps
from regraft.stages.searching import Search
from regraft.stages.steps import PromptUse, Step


@dataclass(frozen=True)
class Planner:
    """Lays out the steps of a run.

    Attributes:
        existing: The pruned model, if the recipe names one.
    """

    recipe: Recipe
    run_dir: RunDir
    setup: stages.Setup
    existing: Source | None

    def steps(self) -> Iterator[Step]:
        """All steps but the report; those that cost little come first."""
        recipe, run_dir, dense = self.recipe, self.run_dir, self.setup.dense
        if self.existing is None:
            yield from map(self._prune, recipe.prune)
        step = self._evaluate("dense", lambda: dense, run_dir.dense_evaluation)
        yield replace(step, title="Evaluating the dense model")
        for one in recipe.prune:
            source, out = partial(self.pruned, one.name), run_dir.evaluation(one.name)
            step = self._evaluate(one.name, source, out)
            yield replace(step, title=f"Evaluating the {one.name} model")
        needs = [needs_of(one) for one in recipe.realign]
        yield from gathering_steps(self.setup, needs, run_dir.of(recipe.prune[0].name, "", ""))
        for pruning in recipe.prune:
            for variant in recipe.variants_of(pruning):
                yield from _titled("Realigning", self._realign(pruning.name, variant))
            for defence in recipe.defences_of(pruning):
                yield from _titled("Defending", self._defend(pruning.name, defence))

    def pruned(self, name: str) -> Source:
        """A pruned checkpoint, which must exist and is not changed any more."""
        folder, opened = self.run_dir.pruned(name), self.setup.compute.opened
        return self.existing or self.setup.cache.once(("pruned", folder), lambda: opened(folder))

    def _prune(self, pruning: PruningSettings) -> Step:
        out, responses = self.run_dir.pruned(pruning.name), self.run_dir.responses
        return prune_step(self.setup, pruning.only(), out, responses, pruning.name)

    def _evaluate(
        self,
        name: str,
        model: Callable[[], Source],
        out: Path,
        *,
        patch: Path | None = None,
        defence: Path | None = None,
    ) -> Step:
        """Answer the test prompts and, if a text is named, measure perplexity on it."""
        setup, settings, text = self.setup, self.recipe.evaluate, None
        dense = self.run_dir.dense_evaluation
        if settings.text is not None:
            text = stages.OnText(settings.text, None if out == dense else dense)

        def check() -> PromptUse:
            check_split(setup.compute.device, setup.compute.placement)
            if out == dense and settings.text is not None:  # reading it once is enough
                read_documents(settings.text)
            tests, length = self._tests(), settings.max_new_tokens
            setup.cache.check_lengths_once(setup.dense, setup.dense, tests.examples, length)
            return PromptUse(evaluated=tests)

        def make() -> object:
            target = setup.target(model(), patch=patch, defence=defence, text=text)
            return stages.evaluate_target(target, out, settings.suite, settings.only())

        def answers() -> int:
            return len(self._tests().examples)

        return Step("evaluate", name, out, make, check, answers=answers)

    def _tests(self) -> Reading:
        setup, settings = self.setup, self.recipe.evaluate
        return setup.cache.reading(setup.dense, settings.suite, settings.limit)

    def _realign(self, pruning: str, settings: VariantSettings) -> Iterator[Step]:
        """Make a patch, apply it to a checkpoint if one is wanted, and evaluate the result."""
        run_dir, recipe, name = self.run_dir, self.recipe, self.run_dir.name(pruning, settings.name)
        paths = run_dir.of(pruning, settings.name, recipe.ranking_name(settings))
        pruned = partial(self.pruned, pruning)
        if (source := recipe.source_of_positions(settings)) is not None:
            positions = run_dir.ranking(pruning, recipe.ranking_name(source))
            paths = replace(paths, given=stages.Inputs(positions=positions))
        if (search := settings.search) is not None:
            prompts = prompts_name(search)
            references = run_dir.points(pruning, prompts)
            points = run_dir.points(pruning, f"{paths.ranking.stem}-{prompts}")
            paths = replace(paths, references=references, points=points)
            yield self._references(pruning, search, references, paths.curve)
        yield from patch_steps(self.setup, pruned, settings, paths, search, name)
        out = run_dir.evaluation(pruning, settings.name)
        if not recipe.on_disk(settings):
            yield self._evaluate(name, pruned, out, patch=paths.patch)
            return
        written = run_dir.realigned(pruning, settings.name)

        def apply() -> object:
            folder, progress = pruned().folder, self.setup.progress
            return stages.patch_checkpoint("apply", folder, paths.patch, written, progress)

        yield Step("apply", name, written, apply, bytes=self.setup.dense.checkpoint.bytes)
        yield self._evaluate(name, partial(self.setup.compute.opened, written), out)

    def _references(
        self, pruning: str, search: SearchSettings, references: Path, curve: Path
    ) -> Step:
        """Evaluate the references that all searches on these prompts share."""
        setup = self.setup

        def make() -> object:
            if curve.exists():
                return None
            return Search(setup, search).references(self.pruned(pruning), references)

        return Step(SEARCH_REFERENCES, pruning, references / "pruned", make)

    def _defend(self, pruning: str, settings: NamedDefenceSettings) -> Iterator[Step]:
        """Make an inference-time defence and evaluate the model under it."""
        name = self.run_dir.name(pruning, settings.name)
        file = self.run_dir.defence(pruning, settings.name)
        pruned, judge = partial(self.pruned, pruning), self.recipe.evaluate.text_judge()
        yield defence_step(self.setup, pruned, file, settings.only(), judge, name)
        out = self.run_dir.evaluation(pruning, settings.name)
        yield self._evaluate(name, pruned, out, defence=file)


def _titled(what: str, steps: Iterator[Step]) -> Iterator[Step]:
    """Give the first step a title for all of them."""
    first, *others = steps
    yield replace(first, title=f"{what}: {others[-1].of}")
    yield from others
