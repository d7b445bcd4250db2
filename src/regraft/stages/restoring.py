"""The chain from two checkpoints to a patch: what a method needs, ranking, search, patch.

Written once, for the command line, for runs of a recipe and for tuning, which say where each
artifact lies and may measure or lock a step while it is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from regraft.evaluation.tradeoff import read_curve
from regraft.heads.ships import HeadSettings
from regraft.models.load import Source, check_split
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import check_pair
from regraft.pruning.base import PRUNERS
from regraft.restoration.base import MethodSettings, Needs, method_of, needs_of, own_settings
from regraft.restoration.ranking import load_ranking
from regraft.settings.evaluating import EvalSettings
from regraft.settings.scoring import StatisticsSettings
from regraft.settings.searching import SearchSettings
from regraft.stages.answering import imitation_data
from regraft.stages.checks import (
    check_budget,
    check_gradients,
    check_heads,
    check_r_max,
    check_restorable,
)
from regraft.stages.gathering import statistics
from regraft.stages.ranking import Inputs, read_inputs, write_ranking
from regraft.stages.realigning import check_made_by, realign
from regraft.stages.scoring import heads
from regraft.stages.searching import Search, remarks
from regraft.stages.setup import Setup
from regraft.stages.steps import PromptUse, Step, StepGuard, check_all, unguarded


@dataclass(frozen=True)
class ArtifactPaths:
    """Where the artifacts of a restoration lie.

    Attributes:
        heads: Head scores.
        statistics: Kind of importance -> statistics of D^s and D^u.
        responses: Folder for the dense model's answers to calibration prompts.
        ranking: The ranking, which methods that differ in what they take of it share.
        patch: The patch.
        curve: Results of a search.
        references: Evaluations of the dense and the pruned model, which searches share.
        points: Patches and answers of a search.
        states: Of ablated models, from which heads are scored for any r_max.
        given: What was made elsewhere and is taken instead.
    """

    heads: Path
    statistics: Callable[[str], Path]
    responses: Path
    ranking: Path
    patch: Path
    curve: Path
    references: Path | None = None
    points: Path | None = None
    states: Path | None = None
    given: Inputs = field(default_factory=Inputs)

    @classmethod
    def beside(cls, out: Path, given: Inputs | None = None) -> ArtifactPaths:
        """All beside the patch `out`, named after it."""
        return cls(
            heads=_beside(out, "heads.safetensors"),
            statistics=lambda _: _beside(out, "statistics.safetensors"),
            responses=_beside(out, "responses"),
            ranking=_beside(out, "ranking.safetensors"),
            patch=out,
            curve=curve_beside(out),
            given=given or Inputs(),
        )

    def inputs(self, needs: Needs) -> Inputs:
        """What a ranking is made from."""
        heads = self.heads if needs.heads else None
        statistics = self.statistics(needs.statistics) if needs.statistics else None
        return Inputs(
            heads=self.given.heads or heads,
            statistics=self.given.statistics or statistics,
            positions=self.given.positions,
            responses=self.responses,
        )


@dataclass(frozen=True)
class Restoration(Setup):
    """What every step needs, and the steps.

    Attributes:
        scoring: Of heads.
        evaluation: How validation prompts are answered and judged.
        guard: Surrounds every step.
    """

    scoring: HeadSettings = HeadSettings()
    evaluation: EvalSettings = EvalSettings(full_answers=False)
    guard: StepGuard = unguarded

    def restore(
        self,
        pruned: Source,
        settings: MethodSettings,
        paths: ArtifactPaths,
        choice: SearchSettings | None = None,
    ) -> Patch:
        """Make all that a method needs, its ranking and the patch.

        Args:
            pruned: The same network pruned, by whomever.
            settings: The method.
            paths: Where artifacts lie.
            choice: Search how much of the ranking is restored.

        Raises:
            RegraftError: bad input of any step, found before any long work.
        """
        steps = [
            *self.gathering([needs_of(settings)], paths),
            *self.steps(lambda: pruned, settings, paths, choice),
        ]
        check_pair(self.dense, pruned)
        check_restorable(settings, self.cache.survey(self.dense, pruned))
        _check_given(self.dense, pruned, settings, paths.given)
        for line in check_all(steps).warnings():
            self.progress.note(f"Warning: {line}.")
        if paths.patch.exists():
            searched = choice is not None
            check_made_by(paths.patch, self.dense, pruned, settings, searched=searched)
        self.make(steps)
        return load_patch(paths.patch)

    def make(self, steps: Iterable[Step]) -> None:
        """Make steps in order, each under the guard."""
        for step in steps:
            if step.title:
                self.progress.note(step.title)
            if step.alone and not step.done:
                self.cache.unload()
            with self.guard(step.stage, step.of):
                step.make()

    def gathering(self, needs: Iterable[Needs], paths: ArtifactPaths) -> Iterator[Step]:
        """All that any of the methods needs and that is not given: scores, answers, statistics."""
        wanted = list(needs)
        by_heads = [one for one in wanted if one.heads]
        if by_heads and paths.given.heads is None:
            yield self._heads(by_heads, paths)
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
        """From what was gathered to the patch.

        Args:
            pruned: Gives the same network pruned, by whomever, once it is there.
            settings: The method.
            paths: Where artifacts lie.
            choice: Search how much of the ranking is restored.
            name: What the model is called.
        """
        own = own_settings(settings)
        yield self._rank(pruned, own, paths, name)
        if choice is not None:
            yield Step(
                "search",
                name,
                paths.curve,
                lambda: self.search(pruned(), own, paths, choice),
                lambda: self.check_search(choice),
                answers=choice.points * (choice.validation_limit or 0) * 2,
            )
        yield Step(
            "realign",
            name,
            paths.patch,
            lambda: realign(
                self.dense,
                pruned(),
                paths.patch,
                own,
                paths.ranking,
                None if choice is None else read_curve(paths.curve).chosen or 0,
            ),
        )

    def searching(self, choice: SearchSettings) -> Search:
        """Models on validation prompts."""
        return Search(self.dense, choice, self.evaluation, self.compute, self.progress, self.cache)

    def search(
        self, pruned: Source, settings: MethodSettings, paths: ArtifactPaths, choice: SearchSettings
    ) -> None:
        """Choose how much of the ranking is restored, and note what could not be had."""
        found = self.searching(choice).curve(
            pruned, settings, paths.ranking, paths.curve, paths.references, paths.points
        )
        for line in remarks(found):
            self.progress.note(f"{paths.curve.stem}: {line}")

    def _heads(self, wanted: Sequence[Needs], paths: ArtifactPaths) -> Step:
        def check() -> PromptUse:
            for needs in wanted:
                check_heads(self.dense, needs, self.scoring)
            check_r_max(self.dense, self.scoring, self.drawn(harmful=True))
            return PromptUse(learnt=self.learnt_from([True]))

        def make() -> object:
            common = self.scoring, self.calibration, self.compute, self.progress
            return heads(self.dense, paths.heads, *common, paths.states)

        samples = self.calibration.samples
        return Step("score heads", "", paths.heads, make, check, learns=samples, alone=True)

    def _answer(self, folder: Path) -> Step:
        def check() -> PromptUse:
            roles = ("harmful calibration (imitated)", "harmless calibration (imitated)")
            return PromptUse(learnt=dict(zip(roles, self.imitated().values(), strict=True)))

        answers = 2 * self.calibration.samples
        make = partial(imitation_data, self, folder)
        return Step("answer", "", folder, make, check, answers=answers, alone=True)

    def _statistics(self, score: str, paths: ArtifactPaths) -> Step:
        by_gradients = PRUNERS.get(score).by_gradients
        out = paths.statistics(score)

        def check() -> PromptUse:
            return PromptUse(learnt=self.learnt_from([True, False]))

        def states() -> int:  # of one kind after the other
            kinds = [self.drawn(harmful=harmful) for harmful in (True, False)]
            return max(self.state_bytes([one]) for one in kinds) if by_gradients else 0

        return Step(
            f"statistics for {score}",
            "",
            out,
            lambda: statistics(self, out, StatisticsSettings(score=score), paths.responses),
            check,
            learns=2 * self.calibration.samples,
            alone=True,
            bytes_beside=states,
        )

    def _rank(
        self,
        pruned: Callable[[], Source],
        settings: MethodSettings,
        paths: ArtifactPaths,
        name: str,
    ) -> Step:
        method, needs = method_of(settings), needs_of(settings)

        def check() -> PromptUse:
            check_heads(self.dense, needs, None)
            check_budget(self.dense, settings)
            if needs.positions is not None and paths.given.positions is None:
                load_ranking(Path(needs.positions))
            if needs.answers or (needs.gradients and paths.given.statistics is None):
                check_gradients(self.dense, self.compute, f"Realigning by {settings.method}")
            if needs.answers:
                check_split(self.compute.device, self.compute.placement)
            prompts = self.imitated() if needs.answers else {}
            method.check(settings, self.dense, self.calibration.seed, self.compute, prompts)
            return PromptUse()

        def states() -> int:  # of both kinds together
            return self.state_bytes(self.imitated().values()) if needs.answers else 0

        return Step(
            "rank",
            name,
            paths.ranking,
            lambda: write_ranking(self, pruned(), paths.ranking, settings, paths.inputs(needs)),
            check,
            learns=2 * self.calibration.samples if needs.answers else 0,
            alone=True,
            bytes_beside=states,
        )

    def check_search(self, choice: SearchSettings) -> PromptUse:
        """Read the validation prompts, and see that models can be evaluated on them."""
        role = f"validation ({choice.validation}, {choice.validation_limit or 'all'})"
        return PromptUse(chosen_on={role: self.searching(choice).check()})


def _check_given(dense: Source, pruned: Source, settings: MethodSettings, given: Inputs) -> None:
    """See that files made elsewhere are of these checkpoints and have what the method needs."""
    needs = needs_of(settings)
    there = replace(
        needs,
        heads=needs.heads if given.heads else None,
        statistics=needs.statistics if given.statistics else None,
    )
    read_inputs(dense, pruned, settings, there, given)


def curve_beside(out: Path) -> Path:
    """Where the search for the patch `out` leaves its validation results."""
    return _beside(out, "curve.json")


def _beside(out: Path, what: str) -> Path:
    """A file beside a patch, named after it: of x.safetensors and of x alone x.WHAT."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.{what}")
