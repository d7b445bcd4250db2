"""One trial of tuning: the method with other settings, on validation prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
from regraft.progress import Progress
from regraft.restoration.base import MethodSettings, needs_of
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.optimising import Task, Trials
from regraft.stages.realigning import realign
from regraft.stages.restoring import ArtifactPaths, Restoration
from regraft.stages.searching import (
    bounds_by,
    evaluate_point,
)
from regraft.stages.tuning_job import Job, varied


@dataclass(frozen=True)
class Worker:
    """One process at the trials."""

    job: Job
    trials: Trials
    cache: EvaluationCache
    progress: Progress

    def attempt(self, task: Task) -> Tried:
        """Do a trial and record it."""
        job, clock = self.job, _Clock()
        method = varied(job.method, task.settings)
        r_max = int(task.settings.get("r_max", job.scoring.r_max))
        with self.trials.exclusive("references"), clock.of("references"):
            references = 0 if (job.tune_dir.references / "pruned").exists() else 2
            full = self._point(job.tune_dir.references / "dense", job.dense)
            before = self._point(job.tune_dir.references / "pruned", job.pruned)
        points = self._points(task.number, method, r_max, before, clock)
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

    def _points(
        self, number: int, method: MethodSettings, r_max: int, before: Point, clock: _Clock
    ) -> list[Point]:
        """With weights back; the pruned model, `before`, where none can be restored."""
        job = self.job
        paths = self._places(number, method, r_max)
        restoration = self._restoration(r_max, clock)
        restoration.make(restoration.gathering([needs_of(method)], paths))
        name = paths.ranking.stem
        ranking, *_ = restoration.steps(lambda: job.pruned, method, paths, name=name)
        restoration.make([ranking])
        if not method.searchable:
            with clock.of("realign"):
                made = realign(job.dense, job.pruned, paths.patch, method, paths.ranking)
            if not made.restored:
                return [before]
            with clock.of("evaluate"):
                out = job.tune_dir.trial(number) / "evaluation"
                return [self._point(out, job.pruned, made.restored, paths.patch)]
        with clock.of("evaluate"):
            restoration.search(job.pruned, method, paths, job.choice, tell=False)
        return list(read_curve(paths.curve).points[1:]) or [before]

    def _places(self, number: int, method: MethodSettings, r_max: int) -> ArtifactPaths:
        tune_dir, own = self.job.tune_dir, self.job.tune_dir.trial(number)
        of_heads = f"r_max-{r_max}" if needs_of(method).heads else ""
        name = f"{method.method}-{digest(method.model_dump_json(), of_heads)[:8]}"
        return ArtifactPaths(
            heads=tune_dir.heads(r_max),
            statistics=lambda _: tune_dir.statistics,
            responses=tune_dir.responses,
            ranking=tune_dir.ranking(name),
            patch=own / "patch.safetensors",
            curve=own / "curve.json",
            references=tune_dir.references,
            states=tune_dir.states,
        )

    def _restoration(self, r_max: int, clock: _Clock) -> Restoration:
        """Steps that several trials share are locked while one worker is at them."""
        job = self.job

        @contextmanager
        def guard(step: str, of: str) -> Iterator[None]:
            with self.trials.exclusive(f"{step} {of}".strip().replace(" ", "-")), clock.of(step):
                yield

        scoring = job.scoring.model_copy(update={"r_max": r_max})
        return Restoration(
            job.dense,
            job.calibration,
            job.compute,
            self.progress,
            self.cache,
            scoring,
            job.evaluation,
            guard,
        )

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
            self.progress,
            self.cache,
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
