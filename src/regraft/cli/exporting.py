"""A patch for other tools: `regraft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from regraft.cli.options import OutFolder, watching

Tool = Annotated[
    Literal["peft", "vllm"],
    Parameter(help="peft: a SHiRA adapter; vllm: weight patches that are loaded while it serves."),
]


def export(
    pruned: str, *patch: Path, to: Tool, out: OutFolder, trust_remote_code: bool = False
) -> None:
    """Write a patch for another tool: an adapter of PEFT, or weight patches of vLLM.

    The weights are those that `regraft apply` would write, to the bit. A README in the folder has
    the lines that load it.

    Example: regraft export pruned gain.safetensors --to peft --out adapter

    Parameters
    ----------
    pruned
        Folder or hub id of the pruned checkpoint.
    patch
        As for `regraft apply`, one or several, in any order.
    trust_remote_code
        Run Python code that comes with the checkpoint.
    """
    from regraft import stages

    with watching() as progress:
        stages.export_patches(pruned, patch, out, to, progress, trust_remote_code=trust_remote_code)
        progress.note(f"Export: {out}")
