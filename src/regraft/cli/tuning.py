"""Tune the settings of a restoration method: `regraft tune`."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from cyclopts import App, Group, Parameter

from regraft.cli.options import OutFolder, live_progress
from regraft.cli.realigning import (
    AnswerLength,
    Choice,
    Dense,
    Prompts,
    Pruned,
    Scoring,
    Where,
    for_method,
)
from regraft.console import show_tuned
from regraft.flags import DEFAULT_VALIDATION_TOKENS, check_tuning
from regraft.heads.ships import HeadSettings
from regraft.restoration.base import METHODS, MethodSettings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings, TuneSettings, with_held_out

Trials = Annotated[TuneSettings, Parameter(name="*", group=Group("Trials", sort_key=0))]
_ABOUT_TUNING = (
    "Search for a method's settings that give the lowest ASR within bounds, on validation "
    "prompts.\n\n"
    "Uses constrained TPE (Optuna: pip install 'regraft[tune]'). The same command resumes after a "
    "kill, continues with more --trials, and shares the trials if started several times at once. A "
    "trial is rated by its best number of weights within the bounds. Settings that are not tuned "
    "stay as given, such as the budget. Writes tuned.json and best.yaml, an item for a recipe's "
    "`realign`.\n\n"
    "Example: regraft tune hsr MODEL pruned --budget 2 --data vlguard VLGuard/train.json "
    "--validation validation.jsonl --trials 40 --points 3 --out tuned"
)


def tune(
    name: str,
    dense: Dense,
    pruned: Pruned,
    *,
    out: OutFolder,
    settings: MethodSettings,
    tuning: Trials = TuneSettings(),
    calibration: Prompts = CalibrationSettings(),
    choice: Choice = SearchSettings(),
    max_new_tokens: AnswerLength = DEFAULT_VALIDATION_TOKENS,
    scoring: Scoring = HeadSettings(),
    compute: Where = ComputeSettings(),
) -> None:
    from regraft import stages
    from regraft.stages.tuning import tune_method

    calibration = calibration.with_responses()
    progress = live_progress()
    check_tuning(settings, choice, scoring)
    source = compute.opened(dense)
    choice, calibration = with_held_out(choice, source.folder, calibration, progress.note)
    restoration = stages.Restoration(
        source,
        calibration,
        compute,
        progress,
        scoring=scoring,
        evaluation=EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
    )
    other = compute.opened(pruned)
    tuned = tune_method(restoration, other, out, settings, tuning, choice)
    show_tuned(progress.console, tuned)
    progress.note(f"All trials: {out / 'tuned.json'}")
    if tuned.best is not None:
        progress.note(f"The best settings, for a recipe: {out / 'best.yaml'}")


app = App(name="tune", help=_ABOUT_TUNING)
for _name in METHODS.working():
    if METHODS.get(_name).tunes:
        _text = f"Tune {_name}: {(METHODS.get(_name).settings_type.__doc__ or '').strip()}"
        with suppress(Exception):  # a package's method; `realign` says what is wrong with it
            app.command(for_method(tune, _name, _text), name=_name)
