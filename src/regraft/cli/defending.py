"""A defence at inference to compare with: `regraft analyse defence`."""

from __future__ import annotations

from typing import Annotated

from regraft.cli.options import Calibration, Compute, Flat, Model, OutFile, open_model, watching
from regraft.flags import check_data, refuse_unread
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import DefenceSettings


def defence(
    pruned: Model,
    *,
    out: OutFile,
    settings: Annotated[DefenceSettings, Flat] = DefenceSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Make a defence at inference to compare with: a prompt or a refusal direction.

    Example: regraft analyse defence pruned --method refusal-direction --out direction.safetensors
    """
    from regraft import stages
    from regraft.defence.artifact import Direction

    with watching() as progress:
        refuse_unread(settings)
        check_data(settings.method, calibration, reads=settings.method == "refusal-direction")
        source = open_model(pruned, compute.trust_remote_code)
        made = stages.write_defence(
            stages.Target(source, compute, progress=progress), out, settings, calibration
        )
        if isinstance(made, Direction):
            progress.note(
                f"{out}: {made.strength:g} differences of means behind layer {made.layer}."
            )
        progress.note(f"Evaluate under it with `regraft eval {pruned} --defence {out} ...`.")
