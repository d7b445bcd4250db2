"""The order of the stages: one recipe, one folder, one report. Resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft import ranks, stages
from regraft.checks import warn_of_bundled
from regraft.costs import Ledger, Metered
from regraft.errors import RegraftError
from regraft.files import digest, discard_leftover, require_empty, write_text
from regraft.folder import RunFolder
from regraft.keys import but_for_rounding, difference
from regraft.models.load import Source, open_source, pick_device
from regraft.passes import SEARCH_REFERENCES, count_pass, learns_from_both
from regraft.preflight import check, scores_needed, seen_before_in, unread_in
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
from regraft.settings.realigning import RANDOM
from regraft.settings.scoring import StatisticsSettings
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
        """What several variants are realigned by: scores of heads, statistics of D^s and D^u."""
        calibration, compute = self.recipe.calibration, self.recipe.compute
        if any(one.by_heads for one in self.recipe.realign):
            with self.costs.of("score heads"):
                stages.heads(
                    self.dense,
                    self.place.heads,
                    self.recipe.heads,
                    calibration,
                    compute,
                    self.watch,
                )
        if any(one.imitates for one in self.recipe.realign):
            with self.costs.of("answer"):
                stages.imitation_data(
                    self.dense, calibration, compute, self.place.responses, self.watch
                )
        for score in scores_needed(self.recipe):
            with self.costs.of(f"statistics for {score}"):
                stages.statistics(
                    self.dense,
                    self.place.statistics(score),
                    calibration,
                    compute,
                    StatisticsSettings(score=score),
                    self.watch,
                    self.place.responses,
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
        place, name = self.place, self.place.name(pruning, settings.name)
        patch, method = place.patch(pruning, settings.name), settings.selection()
        files = (
            place.heads if settings.by_heads else None,
            place.statistics(settings.score) if settings.needs_statistics else None,
        )
        ranking, count = None, None
        if settings.method == "fine-tune":
            self._fine_tune(name, pruning, pruned, settings)
        if settings.ranked:
            ranking = self._rank(name, pruning, pruned, settings, files)
            if settings.search is not None:
                count = self._search(name, pruning, pruned, settings, settings.search, ranking)
        if settings.method != "fine-tune":
            with self.costs.of("realign", name):
                stages.realign(
                    self.dense,
                    pruned,
                    patch,
                    method,
                    *files,
                    self.recipe.compute,
                    self.watch,
                    ranking_file=ranking,
                    count=count,
                )
        out = place.evaluation(pruning, settings.name)
        if not self.recipe.on_disk(settings):
            self.evaluate(name, pruned, out, patch)
            return
        with self.costs.of("apply", name):
            written = stages.apply(
                pruned.folder, patch, place.realigned(pruning, settings.name), self.watch
            )
        trust = self.recipe.compute.trust_remote_code
        self.evaluate(name, open_source(written, trust_remote_code=trust), out)

    def _fine_tune(
        self, name: str, pruning: str, pruned: Source, settings: VariantSettings
    ) -> None:
        """Train a patch, at the positions of a method before it if that is named."""
        patch = self.place.patch(pruning, settings.name)
        source = self.recipe.positions_of(settings)
        positions = None if settings.positions == RANDOM else Path(settings.positions)
        if source is not None:
            positions = self.place.ranking(pruning, self.recipe.ranking_name(source))
        if not patch.exists():
            self.session.unload()
        with self.costs.of("fine-tune", name):
            stages.fine_tune(
                self.dense,
                pruned,
                patch,
                settings.selection(),
                self.recipe.calibration,
                self.recipe.compute,
                self.watch,
                ranking_file=positions,
                responses=self.place.responses,
            )

    def _rank(
        self,
        name: str,
        pruning: str,
        pruned: Source,
        settings: VariantSettings,
        files: tuple[Path | None, Path | None],
    ) -> Path:
        calibration = self.recipe.calibration
        ranking = self.place.ranking(pruning, self.recipe.ranking_name(settings))
        if not ranking.exists():
            self.session.unload()
        with self.costs.of("rank", name):
            stages.rank(
                self.dense,
                pruned,
                ranking,
                settings.selection(),
                calibration,
                *files,
                self.recipe.compute,
                self.watch,
                self.place.responses,
            )
        return ranking

    def _search(
        self,
        name: str,
        pruning: str,
        pruned: Source,
        settings: VariantSettings,
        search: SearchSettings,
        ranking: Path,
    ) -> int:
        place, prompts = self.place, _prompts_name(search)
        references, answering = place.points(pruning, prompts), self.recipe.evaluate.only()
        if not place.curve(pruning, settings.name).exists():
            with self.costs.of(SEARCH_REFERENCES, pruning):  # which all searches share
                stages.evaluate_references(
                    self.dense,
                    pruned,
                    references,
                    search,
                    answering.in_memory(),
                    self.recipe.compute,
                    self.watch,
                    self.session,
                )
        with self.costs.of("search", name):
            return stages.search(
                self.dense,
                pruned,
                ranking,
                place.curve(pruning, settings.name),
                search,
                settings.selection(),
                answering.in_memory(),
                self.recipe.compute,
                self.watch,
                self.session,
                references=references,
                points_folder=place.points(pruning, f"{ranking.stem}-{prompts}"),
            )

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
                self.recipe.evaluate.text_judge(),
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
