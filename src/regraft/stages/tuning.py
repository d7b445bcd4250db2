"""Tune a method: its settings searched on validation prompts, by trials that workers share."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from pydantic import ValidationError
from torch import nn

from regraft import ranks
from regraft.checks import check_r_max, check_top_heads, draw_calibration
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import Point, choose
from regraft.evaluation.tuned import NOTE, Cost, Tried, Tuned, best_first
from regraft.files import digest, disk_errors, require_empty, write_json, write_text
from regraft.keys import describe, holds
from regraft.models.load import Source, pick_device
from regraft.recipe import (
    TUNABLE,
    CalibrationSettings,
    ComputeSettings,
    EvalSettings,
    HeadSettings,
    RealignSettings,
    SearchSettings,
    StatisticsSettings,
    TuneSettings,
    VariantSettings,
    explain,
)
from regraft.restoration.gain import Constraint
from regraft.restoration.realign import check_pair, survey
from regraft.stages.evaluating import read_evaluation
from regraft.stages.gathering import statistics
from regraft.stages.optimising import Between, Space, Task, Trials, require_optuna
from regraft.stages.ranking import rank
from regraft.stages.realigning import needs_statistics, realign
from regraft.stages.scoring import heads
from regraft.stages.searching import (
    bounds_by,
    check_search,
    evaluate_point,
    plain,
    point_of,
    read_curve,
    search,
)
from regraft.stages.session import Session
from regraft.watch import Advance, Silent, Watch

_PAUSE = 0.5  # seconds between looks at what others do


@dataclass(frozen=True)
class TuneFolder:
    """Where tuning keeps what."""

    path: Path

    @property
    def about(self) -> Path:
        """What is tuned, on which data."""
        return self.path / "tune.json"

    @property
    def study(self) -> Path:
        """All trials (SQLite)."""
        return self.path / "study.db"

    @property
    def locks(self) -> Path:
        """Who is at what."""
        return self.path / "locks"

    @property
    def tuned(self) -> Path:
        """The outcome."""
        return self.path / "tuned.json"

    @property
    def best(self) -> Path:
        """The best settings, to be pasted into a recipe."""
        return self.path / "best.yaml"

    @property
    def references(self) -> Path:
        """Evaluations of the dense and the pruned model."""
        return self.path / "references"

    @property
    def states(self) -> Path:
        """Of ablated models, from which heads are scored for any r_max."""
        return self.path / "states"

    @property
    def statistics(self) -> Path:
        """What is gathered on D^s and D^u."""
        return self.path / "statistics.safetensors"

    @property
    def responses(self) -> Path:
        """What the dense model answered to calibration prompts, where it was to."""
        return self.path / "responses"

    def heads(self, r_max: int) -> Path:
        """Head scores."""
        return self.path / "heads" / f"r_max-{r_max}.safetensors"

    def ranking(self, name: str) -> Path:
        """Weights in the order in which they come back; trials may share it."""
        return self.path / "rankings" / f"{name}.safetensors"

    def trial(self, number: int) -> Path:
        """Patches and answers of one trial."""
        return self.path / "trials" / f"{number:04d}"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know."""

    dense: Source
    pruned: Source
    place: TuneFolder
    method: RealignSettings
    tuning: TuneSettings
    choice: SearchSettings
    scoring: HeadSettings
    calibration: CalibrationSettings
    evaluation: EvalSettings
    compute: ComputeSettings
    space: Space
    weights: int

    def trials(self) -> Trials:
        """The trials that all workers share."""
        return Trials(
            self.place.study,
            self.place.locks,
            self.space,
            self.tuning.sampler_seed,
            self.tuning.random_trials,
        )


def tune(
    dense: Source,
    pruned: Source,
    out: Path,
    method: RealignSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    tuning: TuneSettings | None = None,
    choice: SearchSettings | None = None,
    scoring: HeadSettings | None = None,
    evaluation: EvalSettings | None = None,
    watch: Watch | None = None,
) -> Tuned:
    """Search for a method's settings that give the lowest ASR within bounds on validation prompts.

    A trial is one choice of settings by TPE. Of a ranking with `choice.points` prefixes the best
    one within the bounds counts. Trials are shared by all processes that tune into the same folder;
    a second start finishes what is missing of `tuning.trials`. Writes `tuned.json`, and `best.yaml`
    where a trial keeps to the bounds.

    Args:
        dense: The dense checkpoint.
        pruned: The pruned one.
        out: A new folder, or that of the same tuning.
        method: The method; what is not tuned stays as it is here, the budget above all.
        calibration: D^s and D^u.
        compute: Device, dtype, batch size.
        tuning: How many trials, the space, workers.
        choice: Validation prompts, bounds and points of a ranking.
        scoring: How heads are scored.
        evaluation: How to answer and judge.
        watch: Progress.

    Raises:
        RegraftError: bad input, the folder is of another tuning, or Optuna is missing.
    """
    watch = watch or Silent()
    tuning, choice = tuning or TuneSettings(), choice or SearchSettings()
    scoring = scoring or HeadSettings()
    evaluation = evaluation or EvalSettings(full_answers=False)
    compute = compute.model_copy(update={"device": (*tuning.devices, compute.device)[0]})
    _check(method, tuning, choice)
    check_pair(dense, pruned)
    looked = survey(dense, pruned)
    if method.ranked and not method.how_many(looked.restorable):
        raise RegraftError(
            f"A budget of {method.budget} per 10,000 of {looked.restorable:,} pruned weights is "
            "less than one weight. Raise it, or give a count."
        )
    data = {
        "safety": draw_calibration(dense, calibration, harmful=True),
        "utility": draw_calibration(dense, calibration, harmful=False),
        "validation": check_search(dense, choice, compute, Session(0)),
    }
    samples = len(data["safety"].examples)
    check_r_max(dense, scoring, samples)
    kept = 1 - looked.restorable / dense.anatomy.prunable
    if method.method == "gain" and "within" not in tuning.keep:
        check_top_heads(dense, method.model_copy(update={"within": "heads"}))
    space = space_of(dense, method, tuning, scoring, kept, samples)
    place = TuneFolder(out)
    job = Job(
        dense,
        pruned,
        place,
        method,
        tuning,
        choice,
        scoring,
        calibration,
        evaluation,
        compute,
        space,
        looked.restorable,
    )
    inputs = {"dense": dense.checkpoint.fingerprint, "pruned": pruned.checkpoint.fingerprint}
    about = describe("tune", inputs, None, compute, data) | {"settings": _settings(job)}
    _claim(place, about)
    if tuning.workers == 1:
        _work(job, watch)
    else:
        _share(job, watch)
    return _conclude(job, about)


def space_of(
    dense: Source,
    method: RealignSettings,
    tuning: TuneSettings,
    scoring: HeadSettings,
    kept: float,
    samples: int,
) -> Space:
    """What is varied: fields of `RealignSettings`, and r_max of `HeadSettings`.

    Args:
        dense: Whose heads bound their number.
        method: The method.
        tuning: The ranges.
        scoring: Of heads; of screened ones, only the candidates may be taken.
        kept: Share of weights that pruning kept.
        samples: Of D^s, which bound r_max.

    Raises:
        RegraftError: `tuning.keep` names something else, or leaves nothing.
    """
    p = kept if method.p is None else method.p
    space: dict[str, Between | tuple[str, ...]] = {}
    if method.method == "gain":
        space |= {
            "utility_weight": Between(*tuning.utility_weight_range, log=True),
            "trust": Between(*tuning.trust_range, log=True),
            "steps": Between(*tuning.steps_range, log=True, whole=True),
            "within": ("all", "attention", "heads"),
            "constraint": get_args(Constraint),
            "utility_share": Between(*tuning.utility_share_range),
        }
    elif method.method == "set-difference":
        space |= {"p": _from(kept, tuning.p_range, 0.999), "scope": ("row", "matrix")}
    else:
        if not method.ranked:
            space["q"] = Between(*tuning.q_range, log=True)
        space |= {
            "p_max": _from(p, tuning.p_max_range, 1.0),
            "scope": ("row", "matrix", "head"),
        }
        if method.heads != "all":
            most = sum(layer.heads for layer in dense.anatomy.layers)
            if scoring.mode == "screened" and method.by_heads:
                most = min(most, scoring.candidates)
            space["top_heads"] = _up_to(tuning.top_heads_range, most)
        if method.by_heads:
            space["criterion"] = ("ships", "kl")
            most = min(samples, dense.anatomy.hidden_size)
            space["r_max"] = _up_to(tuning.r_max_range, most)
    if unknown := sorted(set(tuning.keep) - space.keys()):
        raise RegraftError(
            f"keep: {unknown[0]!r} is not tuned here; {method.method} tunes {', '.join(space)}."
        )
    left = {name: of for name, of in space.items() if name not in tuning.keep}
    if not left:
        raise RegraftError("keep names every setting, which leaves nothing to tune.")
    return left


def _from(start: float, span: tuple[float, float], most: float) -> Between:
    return Between(min(start + span[0], most), min(start + span[1], most))


def _up_to(span: tuple[int, int], most: int) -> Between:
    return Between(min(span[0], most), min(span[1], most), whole=True)


def _check(method: RealignSettings, tuning: TuneSettings, choice: SearchSettings) -> None:
    require_optuna()
    if ranks.world() > 1:
        raise RegraftError(
            "Tuning shares its trials between workers, not between the processes of torchrun: "
            "start it without, and give --workers or start it several times."
        )
    if method.method not in TUNABLE:
        raise RegraftError(
            f"There is nothing to tune of {method.method}; the method must be one of "
            f"{', '.join(TUNABLE)}."
        )
    if choice.target_asr is not None or choice.target_rsr is not None:
        raise RegraftError(
            "Tuning looks for the lowest ASR within the bounds: leave target_asr and target_rsr "
            "out."
        )
    if len(kinds := {pick_device(device).type for device in tuning.devices}) > 1:
        raise RegraftError(f"devices must be of one kind, not {', '.join(sorted(kinds))}.")


def _settings(job: Job) -> dict[str, Any]:
    """What decides the trials; data are described by their contents."""
    tuning = job.tuning.model_dump(mode="json", exclude={"trials", "workers", "devices"})
    return {
        "method": job.method.model_dump(mode="json"),
        "tuning": tuning,
        "search": job.choice.model_dump(mode="json", exclude={"validation"}),
        "heads": job.scoring.model_dump(mode="json"),
        "calibration": job.calibration.model_dump(mode="json", exclude={"data"}),
        "evaluation": job.evaluation.model_dump(mode="json"),
    }


def _claim(place: TuneFolder, about: Mapping[str, Any]) -> None:
    if not place.locks.exists():  # else another worker is here, perhaps at this moment
        require_empty(place.path)
    with disk_errors(place.locks):
        place.locks.mkdir(parents=True, exist_ok=True)
    with Trials.alone(place.locks, "claim"):
        if not place.about.exists():
            write_json(place.about, about)
        holds(place.path, place.about, about)


def _share(job: Job, watch: Watch) -> None:
    """Start the workers, wait for them and tell of finished trials."""
    devices = job.tuning.devices or (job.compute.device,)
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    workers: list[BaseProcess] = []
    trials = job.trials()
    done = len(trials.finished())
    with watch.task("Tuning", job.tuning.trials - done, "trials") as advance:
        try:
            for index in range(job.tuning.workers):
                device = devices[index % len(devices)]
                own = replace(job, compute=job.compute.model_copy(update={"device": device}))
                workers.append(context.Process(target=_work_alone, args=(own, errors), daemon=True))
                workers[-1].start()
            while any(worker.is_alive() for worker in workers):
                time.sleep(_PAUSE)
                now = len(trials.finished())
                advance(now - done)
                done = now
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
    if not errors.empty():
        raise RegraftError(errors.get())
    if codes := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RegraftError(
            f"{len(codes)} of {len(workers)} workers have ended with exit code {codes[0]}. The "
            "same command continues with what is missing."
        )


def _work_alone(job: Job, errors: Any) -> None:
    """A worker in a process of its own."""
    if pick_device(job.compute.device).type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.tuning.workers))
    try:
        _work(job, Silent())
    except RegraftError as error:
        errors.put(str(error))


def _work(job: Job, watch: Watch) -> None:
    """Do trials until there are enough."""
    worker = _Worker(job, job.trials(), Session(), watch)
    parent = multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        with worker.trials.take(job.tuning.trials) as task:
            if task is None and len(worker.trials.finished()) >= job.tuning.trials:
                return
            if task is None:  # should another worker die, its trial is left for this one
                worker.session.unload()
                time.sleep(_PAUSE)
                continue
            told = ", ".join(f"{name} {_short(value)}" for name, value in task.settings.items())
            watch.note(f"Trial {task.number}: {told}")
            tried = worker.attempt(task)
            watch.note(
                f"Trial {task.number}: ASR {100 * tried.point.asr.value:.1f} % with "
                f"{tried.point.restored:,} weights back"
                + ("" if tried.within else ", out of bounds")
            )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Worker:
    """One process at the trials."""

    job: Job
    trials: Trials
    session: Session
    watch: Watch

    def attempt(self, task: Task) -> Tried:
        """Do a trial and record it."""
        job, clock = self.job, _Clock()
        method = _varied(job.method, task.settings)
        files = self._files(method, int(task.settings.get("r_max", job.scoring.r_max)), clock)
        with self.trials.exclusive("references"), clock.of("references"):
            references = 0 if (job.place.references / "pruned").exists() else 2
            full = self._point(job.place.references / "dense", job.dense)
            before = self._point(job.place.references / "pruned", job.pruned)
        counting = _Counting(self.watch)
        points = self._points(task.number, method, files, before, counting, clock)
        bounds = bounds_by(job.choice, full, before)
        chosen = choose(points, bounds)
        point = (
            min(points, key=lambda one: sum(bounds.excess(one).values()))
            if chosen is None
            else points[chosen]
        )
        prompts = full.asr.n + full.over_refusal.n
        evaluations = references + sum(one.restored > 0 for one in points)
        cost = Cost(
            clock.seconds,
            evaluations,
            prompts * evaluations,
            counting.samples // (2 * len(job.dense.anatomy.layers)),
        )
        tried = Tried(task.number, task.settings, point, bounds.excess(point), cost)
        task.constraints.update(tried.excess)
        task.record.update({"point": plain(point), "cost": asdict(cost)})
        self.trials.finish(task, point.asr.value)
        return tried

    def _points(
        self,
        number: int,
        method: RealignSettings,
        files: tuple[Path | None, Path | None],
        before: Point,
        counting: Watch,
        clock: _Clock,
    ) -> list[Point]:
        """With weights back; the pruned model, `before`, where none can come back."""
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
            if method.method == "gain" and not ranking.exists():
                self.session.unload()
            rank(
                job.dense,
                job.pruned,
                ranking,
                method,
                job.calibration,
                *files,
                job.compute,
                counting,
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
            )
        return read_curve(curve)[1:] or [before]

    def _files(
        self, method: RealignSettings, r_max: int, clock: _Clock
    ) -> tuple[Path | None, Path | None]:
        """(head scores, statistics), where the method goes by them."""
        job, place = self.job, self.job.place
        scores, gathered = None, None
        if needs_statistics(method):
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


@dataclass
class _Counting:
    """A watch that counts how many samples a layer has seen, forward and backward."""

    watch: Watch
    samples: int = 0

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        inner = self.watch.task(what, total, unit)
        return self._counted(inner) if what == "Restoring by gain" else inner

    def note(self, text: str) -> None:
        self.watch.note(text)

    def loaded(self, network: nn.Module) -> None:
        self.watch.loaded(network)

    @contextmanager
    def _counted(self, inner: AbstractContextManager[Advance]) -> Iterator[Advance]:
        with inner as advance:

            def counted(steps: int) -> None:
                self.samples += steps
                advance(steps)

            yield counted


def _varied(method: RealignSettings, settings: Mapping[str, Any]) -> RealignSettings:
    own = {name: value for name, value in settings.items() if name != "r_max"}
    try:
        return RealignSettings(**method.model_dump() | own)
    except ValidationError as error:
        raise RegraftError(f"These settings do not go together:\n{explain(error)}") from error


def _conclude(job: Job, about: Mapping[str, Any]) -> Tuned:
    """Read all trials and write the outcome."""
    trials = job.trials()
    with trials.exclusive("outcome"):
        tried = [
            Tried(
                one.number,
                one.settings,
                point_of(one.record["point"]),
                one.constraints,
                Cost(**one.record["cost"]),
            )
            for one in trials.finished()
        ]
        full, before = (
            Point.of(0, read_evaluation(job.place.references / name).result)
            for name in ("dense", "pruned")
        )
        tuned = Tuned(
            job.method.method,
            best_first(tried),
            bounds_by(job.choice, full, before),
            full,
            before,
            job.weights,
            trials.failed(),
        )
        write_json(job.place.tuned, {"about": about, **_told(tuned)})
        if tuned.best is None:
            job.place.best.unlink(missing_ok=True)
        else:
            write_text(job.place.best, snippet(job, tuned.best, len(tried)))
    return tuned


def _told(tuned: Tuned) -> dict[str, Any]:
    def told(one: Tried) -> dict[str, Any]:
        return {
            "number": one.number,
            "within": one.within,
            "settings": dict(one.settings),
            **plain(one.point),
            "per_ten_thousand": tuned.per_ten_thousand(one.point),
            "excess": dict(one.excess),
            "cost": asdict(one.cost),
        }

    cost = tuned.cost
    return {
        "best": None if tuned.best is None else told(tuned.best),
        "note": NOTE,
        "bounds": asdict(tuned.bounds),
        "dense": plain(tuned.dense),
        "pruned": plain(tuned.before),
        "cost": {
            "trials": len(tuned.trials),
            "failed": tuned.failed,
            "total_seconds": sum(cost.seconds.values()),
            **asdict(cost),
        },
        "trials": [told(one) for one in tuned.trials],
    }


def snippet(job: Job, best: Tried, trials: int) -> str:
    """The best settings as an item of a recipe's `realign`, YAML.

    Where the best point is a prefix of the ranking: `count` says how many weights come back, or
    with gain, whose steps depend on how many are wanted, the same search on the same prompts.
    """
    method = _varied(job.method, best.settings)
    update: dict[str, Any] = {"name": f"{method.method}-tuned"}
    whole = method.how_many(job.weights)
    if method.ranked and (best.point.restored < whole or method.pushes):
        if method.method == "gain":
            validation = job.choice.validation
            if validation.path is not None:
                path = validation.path.expanduser().absolute()
                validation = validation.model_copy(update={"path": path})
            update["search"] = job.choice.model_copy(update={"validation": validation})
        else:
            update |= {"budget": None, "count": best.point.restored}
    if method.method == "gain" and job.calibration.responses != "given":
        update["responses"] = job.calibration.responses
    variant = VariantSettings(**method.model_dump() | update)
    content = {"name": variant.name, "method": variant.method}
    content |= variant.model_dump(mode="json", exclude_defaults=True)
    content |= {name: value for name, value in best.settings.items() if name != "r_max"}
    lines = [
        f"Trial {best.number}, the best of {trials}: an item of a recipe's `realign`.",
        f"On validation prompts: {_rates(best.point)}.",
        f"It was found with evaluate.max_new_tokens {job.evaluation.max_new_tokens}, "
        f"calibration.samples {job.calibration.samples}, calibration.seed {job.calibration.seed}"
        + (f", heads.r_max {best.settings['r_max']}." if "r_max" in best.settings else "."),
        NOTE,
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump([content], sort_keys=False)


def _rates(point: Point) -> str:
    rates = {"ASR": point.asr, "over-refusal": point.over_refusal, "utility": point.utility}
    return ", ".join(
        f"{name} {100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}] (n {one.n})"
        for name, one in rates.items()
        if one is not None
    )
