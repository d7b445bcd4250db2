"""Tune a method's settings on validation prompts, by trials that workers share.

A trial is one choice of settings by TPE. If the method ranks weights, `points` numbers of restored
weights are tried, and the best within the bounds counts. The folder contains

    tune.json         what is tuned, on which data
    study.db, locks/  all trials (Optuna), and which worker is at which trial or step
    references/       evaluations of the dense and the pruned model
    heads/, states/, statistics-*.safetensors, responses/, rankings/    artifacts that trials share
    trials/           patches and answers of each trial
    tuned.json        all trials, best first, and what they cost
    best.yaml         the best settings, as an item of a recipe's `realign`
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from regraft import distributed
from regraft.data.example import KINDS, Reading
from regraft.data.sources import distinct
from regraft.disk.files import digest, write_json, write_text
from regraft.disk.parsing import from_json
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import Cost, Point, Tried, Tuned, best_first, choose, nearest
from regraft.models.load import Source
from regraft.patch.format import load_patch
from regraft.patch.pair import check_pair
from regraft.recipes.file import recipe_item
from regraft.restoration.base import Between, MethodSettings, Space, needs_of
from regraft.settings.base import explain
from regraft.settings.searching import BoundSettings, SearchSettings, TuneSettings
from regraft.stages.provenance import describe, fingerprints
from regraft.stages.ranking import check_restorable
from regraft.stages.restoring import gathering_steps, patch_steps
from regraft.stages.searching import Search, bounds_of
from regraft.stages.setup import ArtifactPaths, Setup
from regraft.stages.steps import PromptUse, plan_steps
from regraft.stages.trials import Trials, claim, exclusive, one_at_a_time, require_optuna, space_of

if TYPE_CHECKING:
    from optuna.trial import Trial

_PAUSE = 0.5  # seconds between polls of other workers


def tune_method(
    setup: Setup,
    pruned: Source,
    out: Path,
    method: MethodSettings,
    tuning: TuneSettings = TuneSettings(),
    bounds: BoundSettings = BoundSettings(),
) -> Tuned:
    """Search for a method's settings that give the lowest ASR within bounds on validation prompts.

    All processes that tune into the same folder share the trials; a second start completes
    `tuning.trials`. Writes `tuned.json`, and `best.yaml` if a trial within the bounds lowers ASR.

    Args:
        out: A new folder, or that of the same tuning.
        method: The method's settings; those that are not tuned, such as the budget, stay as given.
        bounds: Within them the lowest ASR is looked for.

    Raises:
        RegraftError: bad input, the folder is of another tuning, or Optuna is missing.
    """
    _check_processes()
    dense = setup.dense
    choice, setup = setup.choosing(SearchSettings(**bounds.model_dump()))
    check_pair(dense, pruned)
    survey = setup.cache.surveyed(dense, pruned, setup.progress)
    if method.searchable or survey.kind == "changed":
        check_restorable(method, survey)
    work = _Tuning(setup, pruned, out, method, tuning, choice)
    kept, samples = survey.kept / dense.architecture.prunable, distinct(setup.drawn("safety"))
    space = space_of(dense, method, tuning, setup.scoring, kept, samples)
    about = work.describe(work.check(space))
    claim(out, about)
    trials = Trials(out, space, tuning)
    work.try_all(trials)
    return work.conclude(trials, about, survey.restorable)


def finished(trials: Trials) -> list[Tried]:
    """The outcomes of the finished trials.

    Raises:
        RegraftError: one is damaged in their file.
    """
    return [
        from_json(Tried, tried, f"{trials.file}, trial {number}")
        for number, tried in trials.finished().items()
    ]


def _check_processes() -> None:
    require_optuna()
    if distributed.world() > 1:
        raise RegraftError(
            "Tuning shares its trials between several starts, not between the processes of "
            "torchrun: start it without, several times."
        )


@dataclass(frozen=True)
class _Tuning:
    """The arguments of `tune_method`."""

    setup: Setup
    pruned: Source
    out: Path
    method: MethodSettings
    tuning: TuneSettings
    choice: SearchSettings

    def check(self, space: Space) -> dict[str, Reading]:
        """Check the steps of a trial; returns calibration and validation prompts by role.

        The trial has the lowest number, or the first name, of everything tuned: what is refused for
        the given settings no trial can do.
        """
        first = {name: of.low if isinstance(of, Between) else of[0] for name, of in space.items()}
        setup, method = self._with(first)
        paths = self._paths(method, setup.scoring.r_max, 0)
        rank, _ = patch_steps(setup, lambda: self.pruned, method, paths)
        steps = [*gathering_steps(setup, [needs_of(method)], paths), rank]
        search = Search(setup, self.choice)
        used = plan_steps(setup, steps).prompts | search.check()
        for line in (used | PromptUse(learnt=setup.learnt_from())).warnings():
            setup.progress.note(f"Warning: {line}.")
        drawn = {kind: setup.drawn(kind) for kind in KINDS}
        return {**drawn, "validation": search.prompts()}

    def describe(self, data: Mapping[str, Reading]) -> dict[str, Any]:
        """Everything that determines the trials; see `describe`."""
        own = self.setup
        inputs = fingerprints(own.progress, dense=own.dense, pruned=self.pruned)
        about = describe("tune", inputs, None, own.compute, data)
        about["settings"] = {
            "method": self.method.model_dump(mode="json"),
            "tuning": self.tuning.model_dump(mode="json", exclude={"trials"}),
            "search": self.choice.model_dump(mode="json", exclude={"validation"}),
            "heads": own.scoring.model_dump(mode="json"),
            "calibration": own.calibration.model_dump(mode="json", exclude={"data"}),
            "evaluation": own.evaluation.model_dump(mode="json"),
        }
        return about

    def try_all(self, trials: Trials) -> None:
        """Run trials until enough are finished."""
        progress = self.setup.progress
        while len(finished(trials)) < self.tuning.trials:  # a damaged one stops it here
            with trials.take(self.tuning.trials) as trial:
                if trial is None:  # wait: if another worker dies, this one takes its trial over
                    self.setup.cache.unload()
                    time.sleep(_PAUSE)
                    continue
                settings = ", ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in trial.params.items()
                )
                progress.note(f"Trial {trial.number}: {settings}")
                tried = self._try(trial)
                trials.finish(trial, tried.point.asr.value, tried.excess, asdict(tried))
                progress.note(
                    f"Trial {trial.number}: ASR {100 * tried.point.asr.value:.1f} % with "
                    f"{tried.point.restored:,} weights restored"
                    + ("" if tried.within else ", out of bounds")
                )

    def _try(self, trial: Trial) -> Tried:
        """Restore with a trial's settings, evaluate, and take the best point."""
        settings, seconds = dict(trial.params), dict[str, float]()
        setup, method = self._with(settings)
        setup = replace(setup, guard=partial(one_at_a_time, self.out, seconds))
        search, references = Search(setup, self.choice), self.out / "references"
        with setup.guard("references", ""):
            evaluations = 0 if (references / "pruned").exists() else 2
            full, before = search.references(self.pruned, references)
        tried = self._points(setup, search, method, trial.number)
        points, bounds = tried or [before], bounds_of(self.choice, full, before)
        point = choose(points, bounds) or nearest(points, bounds)
        evaluations += len(tried)
        cost = Cost(seconds, evaluations, evaluations * (full.asr.n + full.over_refusal.n))
        return Tried(trial.number, settings, point, bounds.excess(point), cost)

    def _with(self, settings: Mapping[str, Any]) -> tuple[Setup, MethodSettings]:
        """How heads are scored, and the method's settings, with those of a trial.

        Raises:
            RegraftError: they do not fit together.
        """
        given = self.method.model_dump(exclude_unset=True) | dict(settings)
        r_max = int(given.pop("r_max", self.setup.scoring.r_max))
        scoring = self.setup.scoring.model_copy(update={"r_max": r_max})
        try:
            return replace(self.setup, scoring=scoring), type(self.method)(**given)
        except ValidationError as error:
            raise RegraftError(f"These settings do not fit together:\n{explain(error)}") from error

    def _points(
        self, setup: Setup, search: Search, method: MethodSettings, number: int
    ) -> list[Point]:
        """The points with restored weights; none if there is nothing to restore."""
        paths = self._paths(method, setup.scoring.r_max, number)
        gathered = gathering_steps(setup, [needs_of(method)], paths)
        name = paths.ranking.stem
        rank, realign = patch_steps(setup, lambda: self.pruned, method, paths, name=name)
        steps = [*gathered, rank] if method.searchable else [*gathered, rank, realign]
        plan_steps(setup, steps).carry_out()
        with setup.guard("evaluate", str(number)):
            if method.searchable:
                return list(search.curve(self.pruned, method, paths).points[1:])
            restored, own = load_patch(paths.patch).restored, paths.patch.with_name("evaluation")
            return [search.point(self.pruned, own, restored, paths.patch)] if restored else []

    def _paths(self, method: MethodSettings, r_max: int, number: int) -> ArtifactPaths:
        """Paths of a trial's artifacts; trials share those that are the same for their settings."""
        of_heads = f"r_max-{r_max}" if needs_of(method).heads else ""
        ranking = f"{method.method}-{digest(method.model_dump_json(), of_heads)[:8]}"
        own = self.out / "trials" / f"{number:04d}"
        return ArtifactPaths(
            heads=self.out / "heads" / f"r_max-{r_max}.safetensors",
            statistics=lambda score: self.out / f"statistics-{score}.safetensors",
            responses=self.out / "responses",
            ranking=self.out / "rankings" / f"{ranking}.safetensors",
            patch=own / "patch.safetensors",
            curve=own / "curve.json",
            references=self.out / "references",
            states=self.out / "states",
        )

    def conclude(self, trials: Trials, about: Mapping[str, Any], weights: int) -> Tuned:
        """Read all trials and write the outcome; `weights` is how many can be restored."""
        search = Search(self.setup, self.choice)
        with exclusive(self.out, "outcome"):
            full, before = search.references(self.pruned, self.out / "references")
            tuned = Tuned(
                self.method.method,
                best_first(finished(trials)),
                bounds_of(self.choice, full, before),
                full,
                before,
                weights,
                trials.failed(),
            )
            write_json(self.out / "tuned.json", {"about": about, **tuned.to_json()})
            if tuned.best is None:
                (self.out / "best.yaml").unlink(missing_ok=True)
            else:
                _, method = self._with(tuned.best.settings)
                calibration, answers = self.setup.calibration, self.setup.evaluation
                item = recipe_item(tuned, tuned.best, method, calibration, answers.max_new_tokens)
                write_text(self.out / "best.yaml", item)
        return tuned
