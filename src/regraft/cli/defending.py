"""A defence at inference to compare with: `regraft analyse defence METHOD`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App

from regraft.cli.methods import as_command
from regraft.cli.options import Compute, Flat, Model, OutFile, Trust, watching
from regraft.models.load import open_source
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import PromptSettings
from regraft.settings.defending import DEFENCES, AnyDefenceSettings, DefencePromptSettings


def defence(
    name: str,
    pruned: Model,
    *,
    out: OutFile,
    settings: AnyDefenceSettings,
    prompts: Annotated[PromptSettings, Flat] = PromptSettings(),
    compute: Compute = ComputeSettings(),
    trust_remote_code: Trust = False,
) -> None:
    """Make a defence for a model, by a method."""
    from regraft import stages
    from regraft.defence.artifact import Direction

    with watching() as progress:
        trust = trust_remote_code or compute.trust_remote_code
        target = stages.Target(
            open_source(pruned, trust_remote_code=trust), compute, progress=progress
        )
        made = stages.write_defence(target, out, settings, prompts.with_responses())
        if isinstance(made, Direction):
            progress.note(
                f"{out}: {made.strength:g} differences of means behind layer {made.layer}."
            )
        progress.note(f"Evaluate under it with `regraft eval {pruned} --defence {out} ...`.")


app = App(
    name="defence",
    help="Make a defence at inference to compare with: a prompt or a refusal direction.\n\n"
    "Example: regraft analyse defence refusal-direction pruned --data prompts.jsonl --validation "
    "validation.jsonl --out direction.safetensors",
)
for _name, _kind in DEFENCES.items():
    _is_prompt = issubclass(_kind, DefencePromptSettings)
    _unread = ("prompts", "compute") if _is_prompt else ("trust_remote_code",)
    app.command(as_command(defence, _name, _kind, _kind.__doc__ or "", _unread), name=_name)
