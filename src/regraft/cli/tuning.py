"""The best settings of a method: `regraft tune METHOD`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

from cyclopts import Group

from regraft.cli.flags import DEFAULT_VALIDATION_TOKENS, check_tuning, refuse_unread
from regraft.cli.options import Flat, OutFolder, open_model, watching
from regraft.cli.realigning import (
    by_method,
    calibrated,
    command,
    computed,
    flags_of,
    grouped,
    keyword,
    pair,
    scored,
    searched,
)
from regraft.console import show_tuned
from regraft.heads.ships import HeadSettings
from regraft.restoration.base import METHODS, MethodSettings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, PromptSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings, TuneSettings

TRIALS = Group("Trials", sort_key=0)
ABOUT = (
    "Search for a method's settings that give the lowest ASR within bounds, on validation "
    "prompts.\n\n"
    "Constrained TPE (Optuna: pip install 'regraft[tune]'). The same command continues after a "
    "kill, goes on to more --trials, and started twice at once shares them. Of a ranking the best "
    "prefix tried within the bounds counts. What is not tuned stays as given, the budget above "
    "all. Writes tuned.json and best.yaml, an item of a recipe's `realign`.\n\n"
    "Example: regraft tune hsr MODEL pruned --budget 2 --data vlguard VLGuard/train.json "
    "--validation validation.jsonl --trials 40 --points 3 --out tuned"
)


def tune(
    name: str,
    dense: str,
    pruned: str,
    *,
    out: Path,
    settings: MethodSettings | None = None,
    tuning: TuneSettings = TuneSettings(),
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    choice: SearchSettings = SearchSettings(),
    scoring: HeadSettings = HeadSettings(),
    calibration: PromptSettings = CalibrationSettings(),
    compute: ComputeSettings = ComputeSettings(),
) -> None:
    """Tune a method on a dense and a pruned model."""
    from regraft import stages

    settings = settings or METHODS.get(name).Settings(method=name)
    calibration = calibration.with_responses()
    with watching() as progress:
        check_tuning(settings, tuning, choice, scoring, compute.device)
        refuse_unread(calibration)
        restoration = stages.Restoration(
            open_model(dense, compute.trust_remote_code),
            calibration,
            compute,
            progress,
            scoring=scoring,
            evaluation=EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
        )
        other = open_model(pruned, compute.trust_remote_code)
        tuned = stages.tune(restoration, other, out, settings, tuning, choice)
        show_tuned(progress.console, tuned)
        progress.note(f"All trials: {out / 'tuned.json'}")
        if tuned.best is not None:
            progress.note(f"The best settings, for a recipe: {out / 'best.yaml'}")


def _parameters(name: str) -> list[inspect.Parameter]:
    found = [
        *pair(),
        keyword("out", OutFolder),
        keyword("settings", Annotated[flags_of(name), Flat], None),
        keyword("tuning", Annotated[TuneSettings, grouped(TRIALS)], TuneSettings()),
        *searched(),
    ]
    if METHODS.get(name).reads_heads:
        found.append(scored())
    return [*found, calibrated(name), computed()]


app = by_method("tune", ABOUT)
for _name in METHODS.working():
    if METHODS.get(_name).tunes:
        _text = f"Tune {_name}: {(METHODS.get(_name).Settings.__doc__ or '').strip()}"
        app.command(command(_name, _parameters(_name), tune, _text), name=_name)
