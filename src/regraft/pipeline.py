"""The order of the stages: one recipe, one folder, one report. Resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft import ranks, stages
from regraft.checks import warn_of_bundled
from regraft.costs import Ledger, Metered
from regraft.errors import RegraftError
from regraft.files import digest, discard_leftover, require_empty, write_text
from regraft.folder import RunFolder
from regraft.keys import but_for_rounding, difference
from regraft.methods.base import needs_of
from regraft.models.load import Source, open_source, pick_device
from regraft.passes import SEARCH_REFERENCES, count_pass, learns_from_both
from regraft.preflight import check, seen_before_in, unread_in
from regraft.recipe import (
    NamedDefenceSettings,
    PruningSettings,
    Recipe,
    VariantSettings,
    read_recipe,
    write_recipe,
)
from regraft.report.model import Report
from regraft.reporting import report
from regraft.settings.searching import SearchSettings
from regraft.watch import Silent, Watch

__all__ = ["RunFolder", "check", "report", "run"]


def run(
    recipe: Recipe,
    folder: Path,
    watch: Watch | None = None,
    session: stages.Session | None = None,
) -> Report:
    """Prune, score heads, realign, evaluate and report; finished stages are not repeated.

    Args:
        recipe: All settings.
        folder: A new folder, or that of an earlier run of the same recipe or a part of it.
        watch: Progress.
        session: What evaluations share, if other runs share it too.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    watch = watch or Silent()
    place = RunFolder(folder, several=len(recipe.prune) > 1)
    session = session or stages.Session()
    dense, existing = check(recipe, folder, session)
    claim(folder, recipe)
    for line in (*unread_in(recipe), *seen_before_in(recipe, dense, session)):
        watch.note(f"Warning: {line}.")
    for suite in recipe.evaluate.suite:
        warn_of_bundled(dense, suite, watch.note)
    job = _Job(place, dense, recipe, session, watch)
    pruned = {one.name: existing or job.prune(one) for one in recipe.prune}
    watch.note("Evaluating the dense model")
    job.evaluate("dense", dense, place.dense_evaluation)
    for name, source in pruned.items():
        watch.note(f"Evaluating the {name} model")
        job.evaluate(name, source, place.evaluation(name))
    session.unload()
    job.gather()
    for pruning in recipe.prune:
        name, source = pruning.name, pruned[pruning.name]
        for variant in recipe.variants_of(pruning):
            watch.note(f"Realigning: {place.name(name, variant.name)}")
            job.realign(name, source, variant)
        for defence in recipe.defences_of(pruning):
            watch.note(f"Defending: {place.name(name, defence.name)}")
            job.defend(name, source, defence)
    session.unload()
    if learns_from_both(recipe):
        count_pass(dense, recipe.calibration, place.calibration_pass, session, watch)
    return report(folder)


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or check that the folder is of this recipe.

    Raises:
        RegraftError: the folder holds something else.
    """
    if ranks.first():
        _claim(RunFolder(folder), recipe)
    ranks.barrier()


class _Job:
    """A run's stages on its models, each with what it costs."""

    def __init__(
        self,
        place: RunFolder,
        dense: Source,
        recipe: Recipe,
        session: stages.Session,
        watch: Watch,
    ) -> None:
        self.place, self.dense, self.recipe, self.session = place, dense, recipe, session
        self.watch = Metered(watch)
        self.costs = Ledger(place.costs, self.watch, pick_device(recipe.compute.device))

    def prune(self, pruning: PruningSettings) -> Source:
        """A pruned checkpoint."""
        with self.costs.of("prune", pruning.name):
            return stages.prune(
                self.dense,
                self.place.pruned(pruning.name),
                pruning.only(),
                self.recipe.calibration,
                self.recipe.compute,
                self.watch,
                self.place.responses,
            )

    def gather(self) -> None:
        """What several variants are realigned by: scores of heads, answers, statistics."""
        needs = [needs_of(one) for one in self.recipe.realign]
        name = self.recipe.prune[0].name
        self._restoration.gather(needs, self.place.of(name, "", ""), stages.Inputs())

    @cached_property
    def _restoration(self) -> stages.Restoration:
        recipe = self.recipe
        return stages.Restoration(
            self.dense,
            recipe.calibration,
            recipe.compute,
            recipe.heads,
            recipe.evaluate.only().in_memory(),
            self.watch,
            self.session,
            self.costs.of,
        )

    def evaluate(
        self,
        name: str,
        model: Source,
        out: Path,
        patch: Path | None = None,
        defence: Path | None = None,
    ) -> None:
        """Answers to the test prompts, and how likely ordinary text is where that is named."""
        text = None
        if (file := self.recipe.evaluate.text) is not None:
            dense = self.place.dense_evaluation
            text = stages.OnText(file, None if out == dense else dense)
        with self.costs.of("evaluate", name):
            stages.evaluate(
                model,
                out,
                self.recipe.evaluate.suite,
                self.recipe.evaluate.only(),
                self.recipe.compute,
                patch,
                processor_from=self.dense,
                watch=self.watch,
                session=self.session,
                defence_file=defence,
                text=text,
            )

    def realign(self, pruning: str, pruned: Source, settings: VariantSettings) -> None:
        """A patch, a checkpoint with it if one is wanted, and its answers."""
        place, recipe, name = self.place, self.recipe, self.place.name(pruning, settings.name)
        places = place.of(pruning, settings.name, recipe.ranking_name(settings))
        if (source := recipe.positions_of(settings)) is not None:
            positions = place.ranking(pruning, recipe.ranking_name(source))
            places = replace(places, positions=positions)
        if (search := settings.search) is not None:
            places = self._references(pruning, pruned, settings, search, places)
        self._restoration.restore(pruned, settings, places, choice=search, name=name)
        out = place.evaluation(pruning, settings.name)
        if not recipe.on_disk(settings):
            self.evaluate(name, pruned, out, places.patch)
            return
        with self.costs.of("apply", name):
            written = stages.apply(
                pruned.folder, places.patch, place.realigned(pruning, settings.name), self.watch
            )
        trust = recipe.compute.trust_remote_code
        self.evaluate(name, open_source(written, trust_remote_code=trust), out)

    def _references(
        self,
        pruning: str,
        pruned: Source,
        settings: VariantSettings,
        search: SearchSettings,
        places: stages.Places,
    ) -> stages.Places:
        """Evaluate what all searches on these prompts share; returns where that lies."""
        prompts = _prompts_name(search)
        references = self.place.points(pruning, prompts)
        if not places.curve.exists():
            with self.costs.of(SEARCH_REFERENCES, pruning):
                stages.evaluate_references(
                    self.dense,
                    pruned,
                    references,
                    search,
                    self.recipe.evaluate.only().in_memory(),
                    self.recipe.compute,
                    self.watch,
                    self.session,
                )
        points = self.place.points(pruning, f"{places.ranking.stem}-{prompts}")
        return replace(places, references=references, points=points)

    def defend(self, pruning: str, pruned: Source, settings: NamedDefenceSettings) -> None:
        """A defence at inference, and the answers under it."""
        name = self.place.name(pruning, settings.name)
        file = self.place.defence(pruning, settings.name)
        if settings.method == "refusal-direction" and not file.exists():
            self.session.unload()
        with self.costs.of("defend", name):
            stages.defend(
                pruned,
                file,
                settings.only(),
                self.recipe.calibration,
                self.recipe.compute,
                self.watch,
                self.dense,
                self.recipe.evaluate.keyword_judge(),
            )
        out = self.place.evaluation(pruning, settings.name)
        self.evaluate(name, pruned, out, defence=file)


def _prompts_name(search: SearchSettings) -> str:
    """Searches that differ in what they choose by share what they try."""
    return digest(search.model_dump_json(include={"validation", "validation_limit"}))[:8]


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


def _claim(place: RunFolder, recipe: Recipe) -> None:
    if place.recipe.exists():
        before = read_recipe(place.recipe)
        found, wanted = _fixed(before), _fixed(recipe)
        if found != (wanted := _known(wanted, found)):
            raise RegraftError(
                f"{place.path} holds a run of another recipe "
                f"({difference(found, wanted)}). Choose another output folder."
            )
        if before != recipe:
            write_text(place.recipe, write_recipe(recipe))
        return
    discard_leftover(place.recipe)
    require_empty(place.path)
    write_text(place.recipe, write_recipe(recipe))
