"""Write a checkpoint with a patch put on or taken off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from regraft.files import file_digest
from regraft.keys import describe, is_done, to_json, working
from regraft.models.checkpoint import Checkpoint, check_target, open_checkpoint
from regraft.restoration.apply import (
    apply_patch,
    revert_patch,
)
from regraft.restoration.patch import load_patch
from regraft.stages.common import ABOUT_FILE
from regraft.watch import Silent, Watch


def apply(pruned: Path, patch_file: Path, out: Path, watch: Watch | None = None) -> Path:
    """Write the checkpoint `pruned` with the patch to the folder `out`.

    Raises:
        RegraftError: the patch is for another base, or `out` is not empty.
    """
    return _write_with(apply_patch, "apply", "pruned", pruned, patch_file, out, watch)


def revert(realigned: Path, patch_file: Path, out: Path, watch: Watch | None = None) -> Path:
    """Write the checkpoint `realigned` without the patch to the folder `out`.

    Raises:
        RegraftError: the patch is for another base, or `out` is not empty.
    """
    return _write_with(revert_patch, "revert", "realigned", realigned, patch_file, out, watch)


def _write_with(
    write: Callable[..., Checkpoint],
    stage: str,
    role: str,
    folder: Path,
    patch_file: Path,
    out: Path,
    watch: Watch | None,
) -> Path:
    watch = watch or Silent()
    checkpoint, patch = open_checkpoint(folder), load_patch(patch_file)
    inputs = {role: checkpoint.fingerprint, "patch": file_digest(patch_file)}
    about = describe(stage, inputs)
    if not is_done(out, out / ABOUT_FILE, about):
        check_target(checkpoint, out)
        writing = watch.task(f"Writing {out}", checkpoint.bytes, "bytes")
        with working(out, about), writing as done:
            write(checkpoint, patch, out, files={ABOUT_FILE: to_json(about)}, progress=done)
    return out
