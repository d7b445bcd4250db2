"""The best settings that tuning found, as a recipe takes them."""

from __future__ import annotations

from typing import Any

import yaml

from regraft.evaluation.tradeoff import NOTE, Point, Tried, Tuned
from regraft.recipes.parts import variant
from regraft.restoration.base import MethodSettings
from regraft.stages.restoring import Restoration


def recipe_item(tuned: Tuned, best: Tried, method: MethodSettings, restoration: Restoration) -> str:
    """The best trial as an item of a recipe's `realign`, YAML.

    Where its point is a prefix of the ranking, `count` says how many weights are restored.
    """
    content: dict[str, Any] = {"name": f"{method.method}-tuned", "method": method.method}
    content |= method.model_dump(mode="json", exclude_defaults=True) | dict(best.settings)
    content.pop("r_max", None)  # which a recipe says once, of the scoring of heads
    whole = method.how_many(tuned.pruned)
    if whole is not None and best.point.restored < whole:
        content |= {"budget": None, "count": best.point.restored}
    content = {name: value for name, value in content.items() if value is not None}
    variant(**content)  # which sees that it is one
    calibration, r_max = restoration.calibration, best.settings.get("r_max")
    lines = [
        f"Trial {best.number}, the best of {len(tuned.trials)}: an item of a recipe's `realign`.",
        f"On validation prompts: {_rates(best.point)}.",
        f"It was found with evaluate.max_new_tokens {restoration.evaluation.max_new_tokens}, "
        f"calibration.samples {calibration.samples}, calibration.seed {calibration.seed}"
        + ("." if r_max is None else f", heads.r_max {r_max}."),
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
