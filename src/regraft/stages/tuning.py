"""Tune a method: its settings searched on validation prompts, by trials that workers share."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from regraft import distributed
from regraft.checks import check_r_max, check_restorable
from regraft.data.example import Reading
from regraft.data.suites import distinct
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import Tuned
from regraft.files import disk_errors, require_empty, write_json
from regraft.models.load import Source, pick_device
from regraft.patch.pair import check_pair, survey
from regraft.progress import Progress, Silent
from regraft.provenance import describe, holds
from regraft.reading import draw_calibration
from regraft.restoration.base import MethodSettings, needs_of
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import SearchSettings, TuneSettings
from regraft.settings.validation import with_validation
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.optimising import Trials, require_optuna
from regraft.stages.searching import check_search, warn_of_learnt
from regraft.stages.tuning_job import Job, TuneDir
from regraft.stages.tuning_outcome import conclude
from regraft.stages.tuning_space import space_of
from regraft.stages.tuning_trial import Worker

_PAUSE = 0.5  # seconds between looks at what others do


def tune(
    dense: Source,
    pruned: Source,
    out: Path,
    method: MethodSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    tuning: TuneSettings | None = None,
    choice: SearchSettings | None = None,
    scoring: HeadSettings | None = None,
    evaluation: EvalSettings | None = None,
    progress: Progress | None = None,
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
        progress: Progress.

    Raises:
        RegraftError: bad input, the folder is of another tuning, or Optuna is missing.
    """
    progress = progress or Silent()
    tuning = tuning or TuneSettings()
    choice = with_validation(choice or SearchSettings(), dense.folder, calibration)
    scoring = scoring or HeadSettings()
    evaluation = evaluation or EvalSettings(full_answers=False)
    compute = compute.model_copy(update={"device": (*tuning.devices, compute.device)[0]})
    _check(tuning, choice)
    check_pair(dense, pruned)
    looked = survey(dense, pruned)
    if method.searchable:
        check_restorable(method, looked.restorable)
    cache = EvaluationCache(0)
    data = {
        "safety": draw_calibration(dense, calibration, harmful=True),
        "utility": draw_calibration(dense, calibration, harmful=False),
        "validation": check_search(dense, choice, compute, cache),
    }
    learnt: dict[str, Reading] = {}
    for harmful in (True, False):
        learnt |= cache.learnt_from(dense, calibration, harmful=harmful)
    warn_of_learnt(data["validation"], learnt, progress)
    samples = distinct(data["safety"])
    kept = looked.kept / dense.architecture.prunable
    space = space_of(dense, method, tuning, scoring, kept, samples)
    if needs_of(method).heads and "r_max" not in space:
        check_r_max(dense, scoring, data["safety"])
    tune_dir = TuneDir(out)
    job = Job(
        dense,
        pruned,
        tune_dir,
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
    _claim(tune_dir, about)
    if tuning.workers == 1:
        _work(job, progress)
    else:
        _share(job, progress)
    return conclude(job, about)


def _check(tuning: TuneSettings, choice: SearchSettings) -> None:
    require_optuna()
    if distributed.world() > 1:
        raise RegraftError(
            "Tuning shares its trials between workers, not between the processes of torchrun: "
            "start it without, and give --workers or start it several times."
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


def _claim(tune_dir: TuneDir, about: Mapping[str, Any]) -> None:
    try:
        require_empty(tune_dir.path)
    except RegraftError:
        if not tune_dir.locks.exists():  # else another worker is here, perhaps at this moment
            raise
    with disk_errors(tune_dir.locks):
        tune_dir.locks.mkdir(parents=True, exist_ok=True)
    with Trials.alone(tune_dir.locks, "claim"):
        if not tune_dir.about.exists():
            write_json(tune_dir.about, about)
        holds(tune_dir.path, tune_dir.about, about)


def _share(job: Job, progress: Progress) -> None:
    """Start the workers, wait for them and tell of finished trials."""
    devices = job.tuning.devices or (job.compute.device,)
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    workers: list[BaseProcess] = []
    trials = job.trials()
    done = len(trials.finished())
    with progress.task("Tuning", job.tuning.trials - done, "trials") as advance:
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


def _work(job: Job, progress: Progress) -> None:
    """Do trials until there are enough."""
    worker = Worker(job, job.trials(), EvaluationCache(), progress)
    parent = multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        with worker.trials.take(job.tuning.trials) as task:
            if task is None and len(worker.trials.finished()) >= job.tuning.trials:
                return
            if task is None:  # should another worker die, its trial is left for this one
                worker.cache.unload()
                time.sleep(_PAUSE)
                continue
            text = ", ".join(f"{name} {_short(value)}" for name, value in task.settings.items())
            progress.note(f"Trial {task.number}: {text}")
            tried = worker.attempt(task)
            progress.note(
                f"Trial {task.number}: ASR {100 * tried.point.asr.value:.1f} % with "
                f"{tried.point.restored:,} weights back"
                + ("" if tried.within else ", out of bounds")
            )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
