"""A defence at inference to compare with: `regraft analyse defence METHOD`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App

from regraft.cli.options import (
    Calibration,
    Compute,
    Flat,
    Model,
    OutFile,
    Trust,
    watching,
)
from regraft.models.load import open_source
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import (
    AdaShieldSettings,
    AnyDefenceSettings,
    RefusalDirectionSettings,
    SafetyPromptSettings,
)

app = App(
    name="defence",
    help="Make a defence at inference to compare with: a prompt or a refusal direction.\n\n"
    "Evaluate under it with `regraft eval MODEL --defence FILE`.",
)


@app.command(name="adashield")
def adashield(
    pruned: Model,
    *,
    out: OutFile,
    settings: Annotated[AdaShieldSettings, Flat] = AdaShieldSettings(),
    trust_remote_code: Trust = False,
) -> None:
    """Put a defence prompt between two copies of the user's text, after AdaShield-S."""
    _write(pruned, out, settings, ComputeSettings(trust_remote_code=trust_remote_code))


@app.command(name="safety-prompt")
def safety_prompt(
    pruned: Model,
    *,
    out: OutFile,
    settings: Annotated[SafetyPromptSettings, Flat] = SafetyPromptSettings(),
    trust_remote_code: Trust = False,
) -> None:
    """Put a safety prompt before the user's text, as Safety-Potential Pruning does."""
    _write(pruned, out, settings, ComputeSettings(trust_remote_code=trust_remote_code))


@app.command(name="refusal-direction")
def refusal_direction(
    pruned: Model,
    *,
    out: OutFile,
    settings: Annotated[RefusalDirectionSettings, Flat] = RefusalDirectionSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Add the difference of means of harmful and harmless prompts to the hidden states.

    Example: regraft analyse defence refusal-direction pruned --data prompts.jsonl --validation
    validation.jsonl --out direction.safetensors
    """
    _write(pruned, out, settings, compute, calibration)


def _write(
    pruned: str,
    out: Path,
    settings: AnyDefenceSettings,
    compute: ComputeSettings,
    calibration: CalibrationSettings = CalibrationSettings(),
) -> None:
    from regraft import stages
    from regraft.defence.artifact import Direction

    with watching() as progress:
        source = open_source(pruned, trust_remote_code=compute.trust_remote_code)
        target = stages.Target(source, compute, progress=progress)
        made = stages.write_defence(target, out, settings, calibration)
        if isinstance(made, Direction):
            progress.note(
                f"{out}: {made.strength:g} differences of means behind layer {made.layer}."
            )
        progress.note(f"Evaluate under it with `regraft eval {pruned} --defence {out} ...`.")
