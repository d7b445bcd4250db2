"""Put patches on a checkpoint or take them off, into a new folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.descriptions import described
from regraft.disk.files import file_digest, read_json, to_json
from regraft.errors import RegraftError
from regraft.models.checkpoint import Checkpoint, open_checkpoint
from regraft.models.checkpoint_copy import check_target
from regraft.patch.apply import Operation, Plan, make_plan, write_plan
from regraft.patch.format import Patch, load_patch
from regraft.patch.hub import patch_file
from regraft.progress import Progress, Silent
from regraft.stages.provenance import describe, holds, is_done, working

_ROLE = {"apply": "pruned", "revert": "realigned"}
Description = Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """What a command would do: change what `plan` says, and write `bytes` bytes.

    `done` means that the output is there already and nothing is left to do.
    """

    plan: Plan
    bytes: int
    done: bool


def apply(
    pruned: Path, patch_file: Path | Sequence[Path], out: Path, progress: Progress | None = None
) -> Path:
    """Write the checkpoint `pruned` with one or several patches to the folder `out`.

    An output that is there already is taken for this one if it was made by the same operation,
    patches and versions from a checkpoint with the same past and outline (see
    `Checkpoint.outline`). The tensors that the patches touch are checked to be the patches' base
    every time; of the others only the layout and the first bytes are compared.

    Raises:
        RegraftError: a patch is for another base, patches disagree, or `out` is not empty.
    """
    return _write_new("apply", pruned, patch_file, out, progress)


def revert(
    realigned: Path, patch_file: Path | Sequence[Path], out: Path, progress: Progress | None = None
) -> Path:
    """Write the checkpoint `realigned` without one or several patches to the folder `out`.

    Raises:
        RegraftError: a patch is for another base, patches disagree, or `out` is not empty.
    """
    return _write_new("revert", realigned, patch_file, out, progress)


def preview(
    operation: Operation,
    folder: Path,
    patch_files: Sequence[Path],
    out: Path,
    progress: Progress | None = None,
) -> Preview:
    """Check all that a command checks and tell what it would do; writes nothing.

    Args:
        operation: "apply" or "revert".
        folder: The checkpoint.
        patch_files: The patches.
        out: The new folder.
        progress: Shows progress.

    Raises:
        RegraftError: as the command itself.
    """
    job = _Job.read(operation, open_checkpoint(folder), patch_files)
    done = holds(out, out / ABOUT_FILE, job.about())
    if not done:
        check_target(job.checkpoint, out)
    return Preview(job.plan(progress or Silent()), 0 if done else job.checkpoint.bytes, done)


@dataclass(frozen=True)
class _Job:
    """An operation, its checkpoint and its patches, read as far as no weight is needed."""

    operation: Operation
    checkpoint: Checkpoint
    digests: tuple[str, ...]
    patches: tuple[Patch, ...]

    @classmethod
    def read(
        cls, operation: Operation, checkpoint: Checkpoint, patch_files: Path | Sequence[Path]
    ) -> _Job:
        named = (patch_files,) if isinstance(patch_files, Path) else tuple(patch_files)
        if not named:
            raise RegraftError("No patch is named. Name one or more files of `regraft realign`.")
        files = tuple(map(patch_file, named))
        patches = tuple(load_patch(path) for path in files)
        digests = tuple(file_digest(path) for path in files)
        return cls(operation, checkpoint, digests, patches)

    def plan(self, progress: Progress) -> Plan:
        """Check the weights and list what has to change."""
        tensors = {name for patch in self.patches for name in patch.tensors}
        with progress.task("Checking the patched weights", len(tensors), "tensors") as done:
            return make_plan(self.checkpoint, self.patches, self.operation, advance=done)

    def about(self) -> Description:
        """The description of the output; `before` in it is that of the checkpoint itself."""
        touched = {name for patch in self.patches for name in patch.tensors}
        inputs = {
            _ROLE[self.operation]: self.checkpoint.outline(without={ABOUT_FILE, *touched}),
            "patch": " ".join(sorted(set(self.digests))),
        }
        return describe(self.operation, inputs) | {"before": _past(self.checkpoint.folder)}


def _write_new(
    operation: Operation,
    folder: Path,
    patch_files: Path | Sequence[Path],
    out: Path,
    progress: Progress | None,
) -> Path:
    progress = progress or Silent()
    job = _Job.read(operation, open_checkpoint(folder), patch_files)
    about = job.about()
    done = is_done(out, out / ABOUT_FILE, about)
    if not done and distributed.first():
        check_target(job.checkpoint, out)
    plan = job.plan(progress)
    if done:
        open_checkpoint(out)
        return out
    as_it_was = "nothing: the patches are already " + ("on" if operation == "apply" else "off")
    progress.note(f"Changes {f'{plan.weights:,} weights' if plan.weights else as_it_was}.")
    with working(out, about):
        if distributed.first():
            with progress.task(f"Writing {out}", job.checkpoint.bytes, "bytes") as advance:
                write_plan(plan, out, files={ABOUT_FILE: to_json(about)}, advance=advance)
    return out


def _past(folder: Path) -> Description | None:
    path = folder / ABOUT_FILE
    past: Description | None = described(read_json(path), str(path)) if path.exists() else None
    return past
