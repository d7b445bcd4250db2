"""The best settings of a method: `regraft tune`."""

from __future__ import annotations

from typing import Annotated

from regraft.cli.options import Calibration, Compute, Flat, Model, OutFolder, open_model, watching
from regraft.console import show_tuned
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.flags import DEFAULT_VALIDATION_TOKENS, check_tuning, refuse_unread
from regraft.settings.realigning import RealignSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import SearchSettings, TuneSettings


def tune(
    dense: Model,
    pruned: Model,
    *,
    out: OutFolder,
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    tuning: Annotated[TuneSettings, Flat] = TuneSettings(),
    settings: Annotated[RealignSettings, Flat] = RealignSettings(),
    choice: Annotated[SearchSettings, Flat] = SearchSettings(),
    scoring: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Search for a method's settings that give the lowest ASR within bounds, on validation prompts.

    Constrained TPE (Optuna: pip install 'regraft[tune]'). The same command continues after a kill,
    goes on to more --trials, and started twice at once shares them. Of a ranking the best prefix
    tried within the bounds counts. What is not tuned stays as given, the budget above all. Writes
    tuned.json and best.yaml, an item of a recipe's `realign`.

    Example: regraft tune MODEL pruned --method hsr --budget 2 --data vlguard VLGuard/train.json
    --validation validation.jsonl --trials 40 --points 3 --out tuned

    Parameters
    ----------
    dense
        The dense checkpoint.
    pruned
        The same model pruned, by regraft or by any other tool.
    max_new_tokens
        Length of an answer to a validation prompt.
    """
    from regraft import stages

    with watching() as watch:
        check_tuning(settings, tuning, choice, scoring, compute.device)
        refuse_unread(calibration)
        tuned = stages.tune(
            open_model(dense, compute.trust_remote_code),
            open_model(pruned, compute.trust_remote_code),
            out,
            settings,
            calibration,
            compute,
            tuning,
            choice,
            scoring,
            EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
            watch,
        )
        show_tuned(watch.console, tuned)
        watch.note(f"All trials: {out / 'tuned.json'}")
        if tuned.best is not None:
            watch.note(f"The best settings, for a recipe: {out / 'best.yaml'}")
