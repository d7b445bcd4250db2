"""The steps from two checkpoints to a patch: inputs of the method, ranking, search, patch.

Shared by the command line, recipe runs and tuning, which choose the paths of the artifacts and may
time or lock every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from regraft.data.example import KINDS
from regraft.evaluation.tradeoff import read_curve
from regraft.heads.ships import HeadSettings
from regraft.models.load import Source, check_split
from regraft.patch.pair import check_pair
from regraft.pruning.base import PRUNERS
from regraft.pruning.statistics import StatisticsSettings
from regraft.restoration.base import MethodSettings, Needs, method_of, needs_of, own_settings
from regraft.restoration.ranking import load_ranking
from regraft.settings.searching import SearchSettings, with_held_out
from regraft.stages.answering import imitation_data
from regraft.stages.gathering import (
    check_heads,
    check_r_max,
    check_scoring,
    gathering_passes,
    write_head_scores,
    write_statistics,
)
from regraft.stages.ranking import (
    check_budget,
    check_made_by,
    check_restorable,
    read_inputs,
    write_patch,
    write_ranking,
)
from regraft.stages.searching import Search, remarks
from regraft.stages.setup import ArtifactPaths, Setup
from regraft.stages.steps import Planned, PromptUse, Step, StepGuard, plan_steps


@dataclass(frozen=True)
class Restoration(Setup):
    """The steps of restorations, and what they share.

    Attributes:
        scoring: How heads are scored.
        guard: Context in which every step is made.
    """

    scoring: HeadSettings = HeadSettings()
    guard: StepGuard = lambda _stage, _of: nullcontext()

    def make(self, steps: Iterable[Step]) -> None:
        """Make steps in order, each in the context of the guard."""
        for step in steps:
            if step.title:
                self.progress.note(step.title)
            if step.loads_model and not step.done:
                self.cache.unload()
            with self.guard(step.stage, step.of):
                step.make()

    def choosing(self, choice: SearchSettings) -> tuple[SearchSettings, Restoration]:
        """The choice with validation prompts, held out of the calibration if none are named."""
        note, folder = self.progress.note, self.dense.folder
        choice, calibration = with_held_out(choice, folder, self.calibration, note)
        return choice, replace(self, calibration=calibration)

    def gathering(self, needs: Iterable[Needs], paths: ArtifactPaths) -> Iterator[Step]:
        """Inputs of the methods that are not given: head scores, answers, statistics."""
        wanted = list(needs)
        if any(one.heads for one in wanted) and paths.given.heads is None:
            yield self._heads(paths)
        if any(one.answers for one in wanted):
            yield self._answer(paths.responses)
        if paths.given.statistics is None:
            for score in dict.fromkeys(one.statistics for one in wanted if one.statistics):
                yield self._statistics(score, paths)

    def steps(
        self,
        pruned: Callable[[], Source],
        settings: MethodSettings,
        paths: ArtifactPaths,
        choice: SearchSettings | None = None,
        name: str = "",
    ) -> Iterator[Step]:
        """From a method's inputs to its patch: ranking, search if there is a `choice`, patch.

        Args:
            pruned: Returns the pruned model; called when a step is made, not before.
        """
        own = own_settings(settings)
        yield self._rank(pruned, own, paths, name)
        if choice is not None:
            yield Step(
                "search",
                name,
                paths.curve,
                lambda: self.search(pruned(), own, paths, choice),
                Search(self, choice).check,
                answers=choice.points * (choice.validation_limit or 0) * 2,
            )
        yield Step(
            "realign",
            name,
            paths.patch,
            lambda: write_patch(
                self.dense,
                pruned(),
                paths.patch,
                own,
                paths.ranking,
                None if choice is None else read_curve(paths.curve).chosen or 0,
            ),
        )

    def search(
        self, pruned: Source, settings: MethodSettings, paths: ArtifactPaths, choice: SearchSettings
    ) -> None:
        """Choose how many weights to restore, and note what could not be achieved."""
        found = Search(self, choice).curve(pruned, settings, paths)
        for line in remarks(found):
            self.progress.note(f"{paths.curve.stem}: {line}")

    def _heads(self, paths: ArtifactPaths) -> Step:
        def check() -> PromptUse:
            check_scoring(self.dense, self.scoring)
            check_r_max(self.dense, self.scoring, self.drawn("safety"))
            return PromptUse(learnt=self.learnt_from(["safety"]))

        return Step(
            "score heads",
            "",
            paths.heads,
            partial(write_head_scores, self, paths.heads, self.scoring, paths.states),
            check,
            learns=self.calibration.samples,
            passes=self.scoring.passes(sum(one.heads for one in self.dense.architecture.layers)),
            loads_model=True,
        )

    def _answer(self, folder: Path) -> Step:
        def check() -> PromptUse:
            prompts = self.imitated().items()
            return PromptUse({f"{KINDS[k]} calibration (imitated)": one for k, one in prompts})

        answers = 2 * self.calibration.samples
        make = partial(imitation_data, self, folder)
        return Step("answer", "", folder, make, check, answers=answers, loads_model=True)

    def _statistics(self, score: str, paths: ArtifactPaths) -> Step:
        by_gradients = PRUNERS.get(score).by_gradients
        out = paths.statistics(score)

        def check() -> PromptUse:
            return PromptUse(learnt=self.learnt_from())

        def states() -> int:  # the kinds are read one after the other
            if not by_gradients:
                return 0
            return max(self.state_bytes([self.drawn(kind)]) for kind in KINDS)

        return Step(
            f"statistics for {score}",
            "",
            out,
            lambda: write_statistics(self, out, StatisticsSettings(score=score), paths.responses),
            check,
            learns=2 * self.calibration.samples,
            passes=gathering_passes(PRUNERS.get(score)),
            loads_model=True,
            temporary_bytes=states,
        )

    def _rank(
        self,
        pruned: Callable[[], Source],
        settings: MethodSettings,
        paths: ArtifactPaths,
        name: str,
    ) -> Step:
        method, needs = method_of(settings), needs_of(settings)
        gathered = None if paths.given.statistics else needs.statistics

        def check() -> PromptUse:
            check_heads(self.dense, needs, None if paths.given.heads else self.scoring)
            check_budget(self.dense, settings)
            if needs.positions is not None and paths.given.positions is None:
                load_ranking(Path(needs.positions))
            if needs.answers or (gathered and PRUNERS.get(gathered).by_gradients):
                self.check_gradients(f"Realigning by {settings.method}")
            if needs.answers:
                check_split(self.compute.device, self.compute.placement)
            prompts = self.imitated() if needs.answers else {}
            method.check(settings, self.dense, self.calibration.seed, self.compute, prompts)
            return PromptUse()

        def states() -> int:  # both kinds are read together
            return self.state_bytes(self.imitated().values()) if needs.answers else 0

        return Step(
            "rank",
            name,
            paths.ranking,
            lambda: write_ranking(self, pruned(), paths.ranking, settings, paths.inputs(needs)),
            check,
            learns=2 * self.calibration.samples if needs.answers else 0,
            passes=needs.passes,
            loads_model=True,
            temporary_bytes=states,
        )


def plan_restoration(
    setup: Restoration,
    pruned: Source,
    settings: MethodSettings,
    paths: ArtifactPaths,
    choice: SearchSettings | None = None,
) -> Planned:
    """The steps of a method's inputs, its ranking and the patch; writes nothing.

    Validation prompts of a search that are not named are held out of the calibration data.

    Raises:
        RegraftError: bad input of any step, found before any long work.
    """
    dense, progress, needs, given = setup.dense, setup.progress, needs_of(settings), paths.given
    if choice is not None:
        choice, setup = setup.choosing(choice)
    steps = [
        *setup.gathering([needs], paths),
        *setup.steps(lambda: pruned, settings, paths, choice),
    ]
    check_pair(dense, pruned)
    check_restorable(settings, setup.cache.surveyed(dense, pruned, progress))
    supplied = replace(
        needs,
        heads=needs.heads if given.heads else None,
        statistics=needs.statistics if given.statistics else None,
    )
    read_inputs(dense, pruned, settings, supplied, given)
    plan = plan_steps(setup, steps)
    for line in plan.prompts.warnings():
        progress.note(f"Warning: {line}.")
    if paths.patch.exists():
        searched = choice is not None
        check_made_by(paths.patch, dense, pruned, settings, progress, searched=searched)
    return plan
