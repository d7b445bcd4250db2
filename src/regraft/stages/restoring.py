"""The chain from two checkpoints to a patch: what a method needs, ranking, search, patch.

Written once, for the command line, for runs of a recipe and for tuning, which say where each
artifact lies and may measure or lock a step while it is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from regraft.evaluation.tradeoff import read_curve
from regraft.models.load import Source, check_split
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import check_pair
from regraft.progress import Progress, Silent
from regraft.restoration.base import MethodSettings, Needs, needs_of, own_settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.scoring import HeadSettings, StatisticsSettings
from regraft.settings.searching import SearchSettings
from regraft.stages.answering import imitation_data
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.gathering import statistics
from regraft.stages.needing import check_method, learnt_by
from regraft.stages.ranking import Inputs, rank, read_inputs
from regraft.stages.realigning import check_made_by, realign
from regraft.stages.scoring import heads
from regraft.stages.searching import Search, remarks
from regraft.stages.steps import Step, StepGuard, make_all, unguarded


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
        positions: Another ranking, where the method needs one that a run has made.
        states: Of ablated models, from which heads are scored for any r_max.
    """

    heads: Path
    statistics: Callable[[str], Path]
    responses: Path
    ranking: Path
    patch: Path
    curve: Path
    references: Path | None = None
    points: Path | None = None
    positions: Path | None = None
    states: Path | None = None

    @classmethod
    def beside(cls, out: Path) -> ArtifactPaths:
        """All beside the patch `out`, named after it."""
        return cls(
            heads=_beside(out, "heads.safetensors"),
            statistics=lambda _: _beside(out, "statistics.safetensors"),
            responses=_beside(out, "responses"),
            ranking=_beside(out, "ranking.safetensors"),
            patch=out,
            curve=curve_beside(out),
        )


@dataclass(frozen=True)
class Restoration:
    """What every step needs.

    Attributes:
        dense: The dense checkpoint.
        calibration: Prompts of both kinds, with responses where a method learns from them.
        compute: Device, dtype, batch size, placement.
        scoring: Of heads.
        evaluation: How validation prompts are answered and judged.
        progress: Progress.
        cache: What evaluations share.
        guard: Surrounds every step.
    """

    dense: Source
    calibration: CalibrationSettings
    compute: ComputeSettings = ComputeSettings()
    scoring: HeadSettings = HeadSettings()
    evaluation: EvalSettings = EvalSettings(full_answers=False)
    progress: Progress = field(default_factory=Silent)
    cache: EvaluationCache = field(default_factory=EvaluationCache)
    guard: StepGuard = unguarded

    def check(
        self,
        pruned: Source,
        settings: MethodSettings,
        choice: SearchSettings | None,
        paths: ArtifactPaths,
        given: Inputs,
    ) -> None:
        """Find bad input before any long work.

        Raises:
            RegraftError: see the steps.
        """
        needs = needs_of(settings)
        check_pair(self.dense, pruned)
        made = Needs(
            heads=needs.heads if given.heads else None,
            statistics=needs.statistics if given.statistics else None,
            positions=needs.positions,
        )
        read_inputs(self.dense, pruned, settings, made, given)
        scored, gathered = given.heads is not None, given.statistics is not None
        check_method(
            self.dense,
            settings,
            self.calibration,
            self.compute,
            self.cache,
            None if scored else self.scoring,
            gathers=not gathered,
        )
        if choice is not None:
            learnt = learnt_by(
                self.dense,
                needs,
                self.calibration,
                self.cache,
                scored=scored,
                gathered=gathered,
            )
            self.searching(choice).check(learnt)
        if needs.answers:
            check_split(self.compute.device, self.compute.placement)
        if paths.patch.exists():
            searched = choice is not None
            check_made_by(paths.patch, self.dense, pruned, settings, searched=searched)

    def gathering(
        self, needs: Iterable[Needs], paths: ArtifactPaths, given: Inputs
    ) -> Iterator[Step]:
        """All that any of the methods needs and that is not given: scores, answers, statistics."""
        wanted, samples = list(needs), self.calibration.samples
        common = self.calibration, self.compute
        if any(one.heads for one in wanted) and given.heads is None:
            yield Step(
                "score heads",
                "",
                paths.heads,
                lambda: heads(
                    self.dense, paths.heads, self.scoring, *common, self.progress, paths.states
                ),
                learns=samples,
                alone=True,
            )
        if any(one.answers for one in wanted):
            yield Step(
                "answer",
                "",
                paths.responses,
                lambda: imitation_data(self.dense, *common, paths.responses, self.progress),
                answers=2 * samples,
            )
        scores = dict.fromkeys(one.statistics for one in wanted if one.statistics)
        for score in scores if given.statistics is None else ():
            out, settings = paths.statistics(score), StatisticsSettings(score=score)
            yield Step(
                f"statistics for {score}",
                "",
                out,
                partial(
                    statistics, self.dense, out, *common, settings, self.progress, paths.responses
                ),
                learns=2 * samples,
                alone=True,
            )

    def steps(
        self,
        pruned: Callable[[], Source],
        settings: MethodSettings,
        paths: ArtifactPaths,
        *,
        choice: SearchSettings | None = None,
        given: Inputs | None = None,
        name: str = "",
    ) -> Iterator[Step]:
        """From what was gathered to the patch.

        Args:
            pruned: Gives the same network pruned, by whomever, once it is there.
            settings: The method.
            paths: Where artifacts lie.
            choice: Search how much of the ranking is restored.
            given: What has been made elsewhere.
            name: What the model is called.
        """
        own, needs = own_settings(settings), needs_of(settings)
        given = given or Inputs()
        inputs = Inputs(
            heads=given.heads or (paths.heads if needs.heads else None),
            statistics=given.statistics
            or (paths.statistics(needs.statistics) if needs.statistics else None),
            positions=given.positions or paths.positions,
            responses=paths.responses,
        )
        yield Step(
            "rank",
            name,
            paths.ranking,
            lambda: rank(
                self.dense,
                pruned(),
                paths.ranking,
                own,
                self.calibration,
                inputs,
                self.compute,
                self.progress,
            ),
            learns=2 * self.calibration.samples if needs.answers else 0,
            alone=True,
        )
        if choice is not None:
            yield Step(
                "search",
                name,
                paths.curve,
                lambda: self.search(pruned(), own, paths, choice),
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

    def make(self, steps: Iterable[Step]) -> None:
        """Make steps in order, each under the guard."""
        make_all(steps, self.guard, self.cache, self.progress)

    def restore(
        self,
        pruned: Source,
        settings: MethodSettings,
        paths: ArtifactPaths,
        *,
        choice: SearchSettings | None = None,
        given: Inputs | None = None,
    ) -> Patch:
        """All steps, and then the patch; arguments as for `steps`."""
        given = given or Inputs()
        self.make(self.gathering([needs_of(settings)], paths, given))
        self.make(self.steps(lambda: pruned, settings, paths, choice=choice, given=given))
        return load_patch(paths.patch)


def curve_beside(out: Path) -> Path:
    """Where the search for the patch `out` leaves its validation results."""
    return _beside(out, "curve.json")


def _beside(out: Path, what: str) -> Path:
    """A file beside a patch, named after it: of x.safetensors and of x alone x.WHAT."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.{what}")
