"""What realigning goes by, computed beforehand: `regraft heads` and `regraft statistics`."""

from __future__ import annotations

from typing import Annotated

from regraft.cli.options import Calibration, Compute, Flat, Model, OutFile, open_model, watching
from regraft.console import show_heads
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.flags import refuse_unread
from regraft.settings.scoring import HeadSettings, StatisticsSettings


def heads(
    model: Model,
    *,
    out: OutFile,
    settings: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
    show: int = 10,
) -> None:
    """Score every head for safety on harmful prompts (D^s): Ships and KL by ablation.

    Example: regraft heads MODEL --data vlguard VLGuard/train.json --out heads.safetensors

    Parameters
    ----------
    show
        How many top heads to print.
    """
    from regraft import stages

    with watching() as watch:
        refuse_unread(settings, calibration)
        source = open_model(model, compute.trust_remote_code)
        scores = stages.heads(source, out, settings, calibration, compute, watch)
        show_heads(watch.console, scores, show)


def statistics(
    model: Model,
    *,
    out: OutFile,
    settings: Annotated[StatisticsSettings, Flat] = StatisticsSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Gather statistics on D^s and D^u, from which HSR ranks weights (Wanda: 9 MB for 7B)."""
    from regraft import stages

    with watching() as watch:
        refuse_unread(calibration)
        source = open_model(model, compute.trust_remote_code)
        stages.statistics(source, out, calibration, compute, settings, watch)
        watch.note(f"Wrote {out}")
