"""Apply, revert, export and upload patches: `regraft apply`, `export`, `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from regraft.cli.options import OutFolder, Trust
from regraft.console import live_progress, say, show_table
from regraft.disk.paths import real
from regraft.errors import RegraftError
from regraft.patch.apply import Operation, Plan

Tool = Annotated[
    Literal["peft", "vllm"],
    Parameter(help="peft: a SHiRA adapter; vllm: weight patches for a running Python engine."),
]
Evaluations = Annotated[tuple[Path, ...], Parameter(consume_multiple=True)]


def apply(
    checkpoint: Path, *patch: Path, out: OutFolder, revert: bool = False, dry_run: bool = False
) -> None:
    """Apply patches to a pruned checkpoint, or remove them again with --revert.

    Example: regraft apply pruned hsr.safetensors --out realigned; regraft apply realigned
    hsr.safetensors --revert --out pruned-again

    Parameters
    ----------
    checkpoint
        Folder of the pruned checkpoint; with --revert of the realigned one.
    patch
        Files from `regraft realign`, in any order; or OWNER/NAME of a patch that `regraft push`
        uploaded to the hub.
    revert
        Remove the patches, which gives back the exact bytes of the pruned checkpoint.
    dry_run
        Check the patches and the weights that they change, and show what would be written; write
        nothing.
    """
    from regraft.stages import patching

    if out.exists() and real(out) == real(checkpoint):
        raise RegraftError(f"{out} is the checkpoint itself. Name a new folder with --out.")
    operation: Operation = "revert" if revert else "apply"
    progress = live_progress()
    if dry_run:
        plan, size = patching.preview(operation, checkpoint, patch, out, progress)
        _show_preview(progress.console, plan, size, out)
        return
    patching.patch_checkpoint(operation, checkpoint, patch, out, progress)
    progress.note(f"Checkpoint: {out}")


def _show_preview(console: Console, plan: Plan, size: int, out: Path) -> None:
    show_table(
        console,
        ("patch", "tensors", "restored weights", "pruned in exchange", "already applied"),
        (
            (one.name, len(one.tensors), one.restored, one.removed, applied)
            for one, applied in zip(plan.patches, plan.applied, strict=True)
        ),
    )
    say(
        console,
        f"{plan.weights:,} weights would change, in {len(plan.shards)} of "
        f"{len(plan.checkpoint.shards)} shards; {size:,} bytes would be written to {out}. "
        "Nothing was written.",
        soft_wrap=True,
    )


def export(
    pruned: str, *patch: Path, to: Tool, out: OutFolder, trust_remote_code: Trust = False
) -> None:
    """Convert a patch for another tool: a PEFT adapter or vLLM weight patches.

    The resulting weights are bit for bit those that `regraft apply` writes. A README in the folder
    has the code that loads them.

    Example: regraft export pruned gain.safetensors --to peft --out adapter

    Parameters
    ----------
    pruned
        Folder or hub id of the pruned checkpoint.
    patch
        Patches as for `regraft apply`, in any order.
    """
    from regraft.stages import patching

    progress = live_progress()
    patching.export_patches(pruned, patch, out, to, progress, trust_remote_code=trust_remote_code)
    progress.note(f"Export: {out}")


def push(
    patch: Path,
    repository: str,
    *,
    dense: str | None = None,
    pruned: str | None = None,
    evaluation: Evaluations = (),
    public: bool = False,
    replace: bool = False,
    dry_run: Path | None = None,
) -> None:
    """Upload a patch to the hub with a card: what it is for, how it was made, what it does.

    Only the patch and the card are uploaded; the repository is created if it does not exist. Log in
    to the hub with `hf auth login` or HF_TOKEN. `regraft apply pruned OWNER/NAME` applies the
    uploaded patch.

    Example: regraft push gain.safetensors me/model-gain --dense org/model --dry-run folder

    Parameters
    ----------
    patch
        File from `regraft realign`.
    repository
        OWNER/NAME on the hub.
    dense
        Hub id of the dense model.
    pruned
        Hub id of the pruned checkpoint, if it is on the hub.
    evaluation
        Folders of `regraft eval` whose rates go into the card; the others are compared with the
        first.
    public
        Make a new repository public instead of private.
    replace
        Upload even to a repository that holds files: replace the patch and card in it.
    dry_run
        New folder to write the files to instead of uploading them.
    """
    from regraft.runs import publishing

    card = publishing.render(patch, repository, dense=dense, pruned=pruned, evaluated=evaluation)
    progress = live_progress()
    if dry_run is not None:
        publishing.write(patch, card, dry_run)
        progress.note(f"Nothing was uploaded. The files are in {dry_run}")
        return
    address = publishing.upload(patch, card, repository, public=public, replace=replace)
    progress.note(f"Uploaded: {address}")
