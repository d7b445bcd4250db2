"""What tuning found: all trials best first, and the best settings for a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from regraft.evaluation.tradeoff import (
    NOTE,
    Cost,
    Point,
    Tried,
    Tuned,
    best_first,
    point_from_json,
)
from regraft.files import write_json, write_text
from regraft.recipe_parts import variant
from regraft.stages.evaluating import read_evaluation
from regraft.stages.searching import bounds_by
from regraft.stages.tuning_job import Job, varied


def conclude(job: Job, about: Mapping[str, Any]) -> Tuned:
    """Read all trials and write the outcome."""
    trials = job.trials()
    with trials.exclusive("outcome"):
        tried = [
            Tried(
                one.number,
                one.settings,
                point_from_json(one.record["point"], f"trial {one.number}"),
                one.constraints,
                Cost(**one.record["cost"]),
            )
            for one in trials.finished()
        ]
        full, before = (
            Point.of(0, read_evaluation(job.tune_dir.references / name).result)
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
        write_json(job.tune_dir.tuned, {"about": about, **_told(tuned)})
        if tuned.best is None:
            job.tune_dir.best.unlink(missing_ok=True)
        else:
            write_text(job.tune_dir.best, snippet(job, tuned.best, len(tried)))
    return tuned


def _told(tuned: Tuned) -> dict[str, Any]:
    def described(one: Tried) -> dict[str, Any]:
        return {
            "number": one.number,
            "within": one.within,
            "settings": dict(one.settings),
            **asdict(one.point),
            "per_ten_thousand": tuned.per_ten_thousand(one.point),
            "excess": dict(one.excess),
            "cost": asdict(one.cost),
        }

    cost = tuned.cost
    return {
        "best": None if tuned.best is None else described(tuned.best),
        "note": NOTE,
        "bounds": asdict(tuned.bounds),
        "dense": asdict(tuned.dense),
        "pruned": asdict(tuned.before),
        "cost": {
            "trials": len(tuned.trials),
            "failed": tuned.failed,
            "total_seconds": sum(cost.seconds.values()),
            **asdict(cost),
        },
        "trials": [described(one) for one in tuned.trials],
    }


def snippet(job: Job, best: Tried, trials: int) -> str:
    """The best settings as an item of a recipe's `realign`, YAML.

    Where the best point is a prefix of the ranking, `count` says how many weights are restored.
    """
    method = varied(job.method, best.settings)
    update: dict[str, Any] = {}
    whole = method.how_many(job.weights)
    if whole is not None and best.point.restored < whole:
        update = {"budget": None, "count": best.point.restored}
    content = {"name": f"{method.method}-tuned", "method": method.method}
    content |= method.model_dump(mode="json", exclude_defaults=True)
    content |= {**best.settings, **update}
    content = {name: value for name, value in content.items() if value is not None}
    content.pop("r_max", None)
    variant(**content)  # which sees that it is one
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
