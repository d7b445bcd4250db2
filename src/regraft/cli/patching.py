"""A patch on and off a checkpoint: `regraft apply` and `regraft revert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regraft.cli.options import OutFolder, watching
from regraft.errors import RegraftError
from regraft.patch.apply import Operation

if TYPE_CHECKING:
    from regraft.stages import Preview


def apply(pruned: Path, *patch: Path, out: OutFolder, dry_run: bool = False) -> None:
    """Put one or several patches on a pruned checkpoint.

    Example: regraft apply pruned hsr.safetensors --out realigned

    Parameters
    ----------
    pruned
        Folder of the pruned checkpoint.
    patch
        From `regraft realign`, in any order; or OWNER/NAME of one that `regraft push` put on the
        hub.
    dry_run
        Check everything and show what would be written; write nothing.
    """
    _patch("apply", pruned, patch, out, dry_run)


def revert(realigned: Path, *patch: Path, out: OutFolder, dry_run: bool = False) -> None:
    """Take one or several patches off a realigned checkpoint; gives the pruned bytes back.

    Example: regraft revert realigned hsr.safetensors --out pruned-again

    Parameters
    ----------
    realigned
        Folder of the realigned checkpoint.
    patch
        Those that were applied and are to go, in any order.
    dry_run
        Check everything and show what would be written; write nothing.
    """
    _patch("revert", realigned, patch, out, dry_run)


def _patch(
    operation: Operation, folder: Path, patches: Sequence[Path], out: Path, dry_run: bool
) -> None:
    from regraft import stages

    if out.exists() and out.resolve() == folder.resolve():
        raise RegraftError(f"{out} is the checkpoint itself. Name a new folder with --out.")
    with watching() as progress:
        if dry_run:
            preview = stages.preview(operation, folder, patches, out, progress)
            _show_preview(progress.console, preview, out)
            return
        stages.patch_checkpoint(operation, folder, patches, out, progress)
        progress.note(f"Checkpoint: {out}")


def _show_preview(console: Console, preview: Preview, out: Path) -> None:
    table = Table("patch", "tensors", "restored weights", "pruned in exchange", "already on")
    for state in preview.plan.states:
        counts = (state.tensors, state.restored, state.removed, state.on)
        table.add_row(Text(state.name), *(f"{count:,}" for count in counts))
    console.print(table)
    shards = len(preview.plan.shards)
    console.print(
        f"{preview.plan.weights:,} weights would change, in {shards} of "
        f"{len(preview.plan.checkpoint.shards)} shards; {preview.bytes:,} bytes would be written "
        f"to {out}. Nothing was written.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
