"""One trial of tuning: the method with other settings, on validation prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from regraft.checks import responses_are_given
from regraft.evaluation.tradeoff import (
    Cost,
    Point,
    Tried,
    choose,
    nearest,
    read_curve,
)
from regraft.files import digest
from regraft.models.load import Source
from regraft.settings.realigning import RealignSettings
from regraft.settings.scoring import StatisticsSettings
from regraft.stages.answering import calibration_data
from regraft.stages.gathering import statistics
from regraft.stages.optimising import Task, Trials
from regraft.stages.ranking import rank
from regraft.stages.realigning import realign
from regraft.stages.scoring import heads
from regraft.stages.searching import (
    bounds_by,
    evaluate_point,
    search,
)
from regraft.stages.session import Session
from regraft.stages.tuning_job import Job, varied
from regraft.watch import Watch


@dataclass(frozen=True)
class Worker:
    """One process at the trials."""

    job: Job
    trials: Trials
    session: Session
    watch: Watch

    def attempt(self, task: Task) -> Tried:
        """Do a trial and record it."""
        job, clock = self.job, _Clock()
        method = varied(job.method, task.settings)
        if method.needs_statistics:
            self._write_responses(clock)
        files = self._files(method, int(task.settings.get("r_max", job.scoring.r_max)), clock)
        with self.trials.exclusive("references"), clock.of("references"):
            references = 0 if (job.place.references / "pruned").exists() else 2
            full = self._point(job.place.references / "dense", job.dense)
            before = self._point(job.place.references / "pruned", job.pruned)
        points = self._points(task.number, method, files, before, clock)
        bounds = bounds_by(job.choice, full, before)
        chosen = choose(points, bounds)
        point = nearest(points, bounds) if chosen is None else points[chosen]
        prompts = full.asr.n + full.over_refusal.n
        evaluations = references + sum(one.restored > 0 for one in points)
        cost = Cost(clock.seconds, evaluations, prompts * evaluations)
        tried = Tried(task.number, task.settings, point, bounds.excess(point), cost)
        task.constraints.update(tried.excess)
        task.record.update({"point": asdict(point), "cost": asdict(cost)})
        self.trials.finish(task, point.asr.value)
        return tried

    def _write_responses(self, clock: _Clock) -> None:
        """The responses that all statistics and rankings share, whichever a worker is at."""
        job = self.job
        kinds = [
            one for one in (True, False) if not responses_are_given(job.calibration, harmful=one)
        ]
        if not kinds:
            return
        with self.trials.exclusive("responses"), clock.of("responses"):
            if not job.place.responses.exists():
                self.session.unload()
            for harmful in kinds:
                calibration_data(
                    job.dense,
                    job.calibration,
                    job.compute,
                    job.place.responses,
                    self.watch,
                    harmful=harmful,
                )

    def _points(
        self,
        number: int,
        method: RealignSettings,
        files: tuple[Path | None, Path | None],
        before: Point,
        clock: _Clock,
    ) -> list[Point]:
        """With weights back; the pruned model, `before`, where none can be restored."""
        job, own = self.job, self.job.place.trial(number)
        if not method.ranked:
            patch = own / "patch.safetensors"
            with clock.of("realign"):
                made = realign(
                    job.dense, job.pruned, patch, method, *files, job.compute, self.watch
                )
            if not made.restored:
                return [before]
            with clock.of("evaluate"):
                return [self._point(own / "evaluation", job.pruned, made.restored, patch)]
        of_heads = "" if files[0] is None else files[0].stem
        name = f"{method.method}-{digest(method.model_dump_json(), of_heads)[:8]}"
        ranking = job.place.ranking(name)
        with self.trials.exclusive(name), clock.of("rank"):
            rank(
                job.dense,
                job.pruned,
                ranking,
                method,
                job.calibration,
                *files,
                job.compute,
                self.watch,
                job.place.responses,
            )
        curve = own / "curve.json"
        with clock.of("evaluate"):
            search(
                job.dense,
                job.pruned,
                ranking,
                curve,
                job.choice,
                method,
                job.evaluation,
                job.compute,
                self.watch,
                self.session,
                job.place.references,
                tell=False,
            )
        return list(read_curve(curve).points[1:]) or [before]

    def _files(
        self, method: RealignSettings, r_max: int, clock: _Clock
    ) -> tuple[Path | None, Path | None]:
        """(head scores, statistics), where the method goes by them."""
        job, place = self.job, self.job.place
        scores, gathered = None, None
        if method.needs_statistics:
            gathered = place.statistics
            with self.trials.exclusive("statistics"), clock.of("statistics"):
                if not gathered.exists():
                    self.session.unload()
                wanted = StatisticsSettings(score=method.score)
                statistics(
                    job.dense,
                    gathered,
                    job.calibration,
                    job.compute,
                    wanted,
                    self.watch,
                    place.responses,
                )
        if method.by_heads:
            scores = place.heads(r_max)
            scoring = job.scoring.model_copy(update={"r_max": r_max})
            with self.trials.exclusive("heads"), clock.of("heads"):
                if not scores.exists():
                    self.session.unload()
                heads(
                    job.dense,
                    scores,
                    scoring,
                    job.calibration,
                    job.compute,
                    self.watch,
                    place.states,
                )
        return scores, gathered

    def _point(
        self, out: Path, model: Source, restored: int = 0, patch: Path | None = None
    ) -> Point:
        job = self.job
        return evaluate_point(
            job.dense,
            model,
            out,
            restored,
            job.choice,
            job.evaluation,
            job.compute,
            self.watch,
            self.session,
            patch,
        )


@dataclass(frozen=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
