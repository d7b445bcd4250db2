"""A patch on and off a checkpoint: `regraft apply` and `regraft revert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regraft.cli.options import MaybeOutFolder, watching
from regraft.errors import RegraftError
from regraft.restoration.apply import Operation

if TYPE_CHECKING:
    from regraft.stages import Preview


def apply(
    pruned: Path,
    *patch: Path,
    out: MaybeOutFolder = None,
    in_place: bool = False,
    dry_run: bool = False,
) -> None:
    """Put one or several patches on a pruned checkpoint.

    Example: regraft apply pruned hsr.safetensors --out realigned

    Parameters
    ----------
    pruned
        Folder of the pruned checkpoint.
    patch
        From `regraft realign`, in any order.
    in_place
        Change the folder itself. A stopped run leaves a journal in it, with which the same
        command finishes and `regraft revert` undoes.
    dry_run
        Check everything and show what would be written, by --out or --in-place; write nothing.
    """
    _patch("apply", pruned, patch, out, in_place, dry_run)


def revert(
    realigned: Path,
    *patch: Path,
    out: MaybeOutFolder = None,
    in_place: bool = False,
    dry_run: bool = False,
) -> None:
    """Take one or several patches off a realigned checkpoint; gives the pruned bytes back.

    Example: regraft revert realigned hsr.safetensors --out pruned-again

    Parameters
    ----------
    realigned
        Folder of the realigned checkpoint.
    patch
        Those that were applied and are to go, in any order.
    in_place
        Change the folder itself; see `regraft apply`.
    dry_run
        Check everything and show what would be written, by --out or --in-place; write nothing.
    """
    _patch("revert", realigned, patch, out, in_place, dry_run)


def _patch(
    operation: Operation,
    folder: Path,
    patches: Sequence[Path],
    out: Path | None,
    in_place: bool,
    dry_run: bool,
) -> None:
    from regraft import stages

    if in_place == (out is not None):
        raise RegraftError(
            f"Say where to {operation}: either --out FOLDER for a new folder, or --in-place."
        )
    with watching() as watch:
        if dry_run:
            _show_preview(
                watch.console, stages.preview(operation, folder, patches, out, watch), out
            )
        elif out is not None:
            if out.exists() and out.resolve() == folder.resolve():
                raise RegraftError(f"{out} is the checkpoint itself: use --in-place to change it.")
            write = stages.apply if operation == "apply" else stages.revert
            write(folder, patches, out, watch)
            watch.note(f"Checkpoint: {out}")
        else:
            change = stages.apply_in_place if operation == "apply" else stages.revert_in_place
            changed = change(folder, patches, watch)
            nothing = f"Nothing to do: {folder} is as it should be."
            watch.note(f"Changed {folder}" if changed else nothing)


def _show_preview(console: Console, preview: Preview, out: Path | None) -> None:
    table = Table("patch", "tensors", "restored weights", "pruned in exchange", "already on")
    for state in preview.plan.states:
        counts = (state.tensors, state.restored, state.removed, state.on)
        table.add_row(Text(state.name), *(f"{count:,}" for count in counts))
    console.print(table)
    shards = len(preview.plan.shards)
    console.print(
        f"{preview.plan.weights:,} weights would change, in {shards} of "
        f"{len(preview.plan.checkpoint.shards)} shards; {preview.bytes:,} bytes would be written "
        f"{'in place' if out is None else f'to {out}'}. Nothing was written.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
