"""Patches: on and off a checkpoint, for other tools, on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from regraft.cli.options import OutFolder, Trust, watching
from regraft.console import say, show_table
from regraft.errors import RegraftError
from regraft.patch.apply import Operation

if TYPE_CHECKING:
    from regraft.stages import Preview

Tool = Annotated[
    Literal["peft", "vllm"],
    Parameter(help="peft: a SHiRA adapter; vllm: weight patches that are loaded while it serves."),
]
Evaluations = Annotated[tuple[Path, ...], Parameter(consume_multiple=True)]


def apply(
    checkpoint: Path, *patch: Path, out: OutFolder, revert: bool = False, dry_run: bool = False
) -> None:
    """Put one or several patches on a pruned checkpoint, or with --revert take them off again.

    Example: regraft apply pruned hsr.safetensors --out realigned; regraft apply realigned
    hsr.safetensors --revert --out pruned-again

    Parameters
    ----------
    checkpoint
        Folder of the pruned checkpoint; with --revert of the realigned one.
    patch
        From `regraft realign`, in any order; or OWNER/NAME of one that `regraft push` put on the
        hub.
    revert
        Take the patches off, which gives the pruned checkpoint's bytes back.
    dry_run
        Check the patches, and the weights that they touch, and show what would be written; write
        nothing.
    """
    from regraft import stages

    if out.exists() and out.resolve() == checkpoint.resolve():
        raise RegraftError(f"{out} is the checkpoint itself. Name a new folder with --out.")
    operation: Operation = "revert" if revert else "apply"
    with watching() as progress:
        if dry_run:
            preview = stages.preview(operation, checkpoint, patch, out, progress)
            _show_preview(progress.console, preview, out)
            return
        stages.patch_checkpoint(operation, checkpoint, patch, out, progress)
        progress.note(f"Checkpoint: {out}")


def _show_preview(console: Console, preview: Preview, out: Path) -> None:
    plan = preview.plan
    show_table(
        console,
        ("patch", "tensors", "restored weights", "pruned in exchange", "already on"),
        ((one.name, one.tensors, one.restored, one.removed, one.on) for one in plan.states),
    )
    say(
        console,
        f"{plan.weights:,} weights would change, in {len(plan.shards)} of "
        f"{len(plan.checkpoint.shards)} shards; {preview.bytes:,} bytes would be written to {out}. "
        "Nothing was written.",
        soft_wrap=True,
    )


def export(
    pruned: str, *patch: Path, to: Tool, out: OutFolder, trust_remote_code: Trust = False
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
    """
    from regraft import stages

    with watching() as progress:
        stages.export_patches(pruned, patch, out, to, progress, trust_remote_code=trust_remote_code)
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
    """Put a patch on the hub, with a card: what it is for, how it was made and what it does.

    Nothing but the patch and the card is uploaded, to a repository that is made if it is not there.
    The login is the hub's: `hf auth login` or HF_TOKEN. `regraft apply pruned OWNER/NAME` takes
    the patch from there.

    Example: regraft push gain.safetensors me/model-gain --dense org/model --dry-run folder

    Parameters
    ----------
    patch
        From `regraft realign`.
    repository
        OWNER/NAME on the hub.
    dense
        Hub id of the dense model.
    pruned
        Hub id of the pruned checkpoint, where it is on the hub.
    evaluation
        Folders of `regraft eval`, one or several, whose rates go into the card; all after the first
        are compared with it.
    public
        Make a new repository public; it is private otherwise.
    replace
        Put it in the place of a patch for another checkpoint, or among files of something else;
        such a repository is left as it is otherwise.
    dry_run
        Write what would be uploaded to this new folder; upload nothing.
    """
    from regraft.runs import publishing

    card = publishing.render(patch, repository, dense=dense, pruned=pruned, evaluated=evaluation)
    with watching() as progress:
        if dry_run is not None:
            publishing.write(patch, card, dry_run)
            progress.note(f"Nothing was uploaded. What would be: {dry_run}")
            return
        address = publishing.upload(patch, card, repository, public=public, replace=replace)
        progress.note(f"Uploaded: {address}")
