"""The chain from two checkpoints to a patch: what a method needs, ranking, search, patch.

Written once, for the command line, for runs of a recipe and for tuning, which say where each
artifact lies and may measure or lock a step while it is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from regraft.methods.base import MethodSettings, Needs, needs_of, own_settings
from regraft.models.load import Source, check_split
from regraft.patch.format import Patch
from regraft.patch.pair import check_pair
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.scoring import HeadSettings, StatisticsSettings
from regraft.settings.searching import SearchSettings
from regraft.stages.answering import imitation_data
from regraft.stages.gathering import statistics
from regraft.stages.needing import check_method, learnt_by
from regraft.stages.ranking import Inputs, rank, read_inputs
from regraft.stages.realigning import check_made_by, realign
from regraft.stages.scoring import heads
from regraft.stages.searching import check_search, search, warn_of_learnt
from regraft.stages.session import Session
from regraft.watch import Silent, Watch

StepGuard = Callable[[str, str], AbstractContextManager[None]]
"""(step, name of what it is for) -> what surrounds the step."""


@dataclass(frozen=True)
class Places:
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
    def beside(cls, out: Path) -> Places:
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
        watch: Progress.
        session: What evaluations share.
        guard: Surrounds every step.
    """

    dense: Source
    calibration: CalibrationSettings
    compute: ComputeSettings = ComputeSettings()
    scoring: HeadSettings = HeadSettings()
    evaluation: EvalSettings = EvalSettings(full_answers=False)
    watch: Watch = field(default_factory=Silent)
    session: Session = field(default_factory=Session)
    guard: StepGuard = lambda _step, _of: nullcontext()

    def check(
        self,
        pruned: Source,
        settings: MethodSettings,
        choice: SearchSettings | None,
        places: Places,
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
            self.session,
            None if scored else self.scoring,
            gathers=not gathered,
        )
        if choice is not None:
            validation = check_search(self.dense, choice, self.compute, self.session)
            learnt = learnt_by(
                self.dense,
                needs,
                self.calibration,
                self.session,
                scored=scored,
                gathered=gathered,
            )
            warn_of_learnt(validation, learnt, self.watch)
        if needs.answers:
            check_split(self.compute.device, self.compute.placement)
        if places.patch.exists():
            searched = choice is not None
            check_made_by(places.patch, self.dense, pruned, settings, searched=searched)

    def gather(self, needs: Iterable[Needs], places: Places, given: Inputs) -> None:
        """All that any of the methods needs and that is not given: scores, answers, statistics."""
        wanted = list(needs)
        if any(one.heads for one in wanted) and given.heads is None:
            self._unload_before(places.heads)
            with self.guard("score heads", ""):
                heads(
                    self.dense,
                    places.heads,
                    self.scoring,
                    self.calibration,
                    self.compute,
                    self.watch,
                    places.states,
                )
        if any(one.answers for one in wanted):
            with self.guard("answer", ""):
                imitation_data(
                    self.dense, self.calibration, self.compute, places.responses, self.watch
                )
        scores = dict.fromkeys(one.statistics for one in wanted if one.statistics)
        for score in scores if given.statistics is None else ():
            out = places.statistics(score)
            self._unload_before(out)
            with self.guard(f"statistics for {score}", ""):
                statistics(
                    self.dense,
                    out,
                    self.calibration,
                    self.compute,
                    StatisticsSettings(score=score),
                    self.watch,
                    places.responses,
                )

    def rank(
        self, pruned: Source, settings: MethodSettings, places: Places, given: Inputs, name: str
    ) -> Inputs:
        """The ranking, from what was gathered or is given; returns what it was made from."""
        needs = needs_of(settings)
        self._unload_before(places.ranking)
        made = Inputs(
            heads=given.heads or (places.heads if needs.heads else None),
            statistics=given.statistics
            or (places.statistics(needs.statistics) if needs.statistics else None),
            positions=given.positions or places.positions,
            responses=places.responses,
        )
        with self.guard("rank", name):
            rank(
                self.dense,
                pruned,
                places.ranking,
                own_settings(settings),
                self.calibration,
                made,
                self.compute,
                self.watch,
            )
        return made

    def restore(
        self,
        pruned: Source,
        settings: MethodSettings,
        places: Places,
        *,
        choice: SearchSettings | None = None,
        given: Inputs | None = None,
        name: str = "",
    ) -> Patch:
        """All steps, each an artifact, and then the patch.

        Args:
            pruned: The same network pruned, by whomever.
            settings: The method.
            places: Where artifacts lie.
            choice: Search how much of the ranking is restored.
            given: What has been made elsewhere.
            name: What `guard` is told of the steps of this model alone.
        """
        given = given or Inputs()
        self.gather([needs_of(settings)], places, given)
        self.rank(pruned, settings, places, given, name)
        count = None
        if choice is not None:
            with self.guard("search", name):
                count = search(
                    self.dense,
                    pruned,
                    places.ranking,
                    places.curve,
                    choice,
                    own_settings(settings),
                    self.evaluation,
                    self.compute,
                    self.watch,
                    self.session,
                    references=places.references,
                    points_folder=places.points,
                )
        with self.guard("realign", name):
            return realign(
                self.dense, pruned, places.patch, own_settings(settings), places.ranking, count
            )

    def _unload_before(self, out: Path) -> None:
        """Give back the memory of the model last evaluated, where `out` is still to be made."""
        if not out.exists():
            self.session.unload()


def curve_beside(out: Path) -> Path:
    """Where the search for the patch `out` leaves its validation results."""
    return _beside(out, "curve.json")


def _beside(out: Path, what: str) -> Path:
    """A file beside a patch, named after it: of x.safetensors and of x alone x.WHAT."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.{what}")
