"""Put patches on a checkpoint or take them off: into a new folder, or in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import ranks
from regraft.errors import RegraftError
from regraft.files import file_digest, read_json, write_text
from regraft.keys import ABOUT_FILE, describe, holds, is_done, to_json, working
from regraft.models.checkpoint import Checkpoint, check_target, open_checkpoint
from regraft.restoration.apply import Operation, Plan, make_plan, write_plan
from regraft.restoration.inplace import (
    Journal,
    owned,
    read_journal,
    remove_journal,
    require_own_shards,
    write_in_place,
    write_journal,
)
from regraft.restoration.patch import Patch, load_patch
from regraft.watch import Silent, Watch

_ROLE = {"apply": "pruned", "revert": "realigned"}
Description = Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """What a command would do: change what `plan` says, and write `bytes` bytes.

    `done` means that nothing is left to do: the output is there, or the patches are already on
    (or off) in place.
    """

    plan: Plan
    bytes: int
    done: bool


def apply(
    pruned: Path, patch_file: Path | Sequence[Path], out: Path, watch: Watch | None = None
) -> Path:
    """Write the checkpoint `pruned` with one or several patches to the folder `out`.

    An output that is there already is taken for this one if it was made by the same operation,
    patches and versions from a checkpoint with the same past and outline (see
    `Checkpoint.outline`). The tensors that the patches touch are checked to be the patches' base
    every time; of the others only the layout and the first bytes are compared.

    Raises:
        RegraftError: a patch is for another base, patches disagree, or `out` is not empty.
    """
    return _write_new("apply", pruned, patch_file, out, watch)


def revert(
    realigned: Path, patch_file: Path | Sequence[Path], out: Path, watch: Watch | None = None
) -> Path:
    """Write the checkpoint `realigned` without one or several patches to the folder `out`.

    Raises:
        RegraftError: a patch is for another base, patches disagree, or `out` is not empty.
    """
    return _write_new("revert", realigned, patch_file, out, watch)


def apply_in_place(folder: Path, patch_files: Sequence[Path], watch: Watch | None = None) -> bool:
    """Put patches on the checkpoint in `folder` itself; finishes or undoes what a kill left.

    Args:
        folder: The pruned checkpoint.
        patch_files: The patches; may be empty to go on with those in the folder's journal.
        watch: Shows progress.

    Returns:
        False if they were on already and nothing was written.

    Raises:
        RegraftError: a patch is for another base, patches disagree, a shard is a link, another
            process is at it, or a change by other patches is unfinished.
    """
    return _write_in_place("apply", folder, patch_files, watch)


def revert_in_place(folder: Path, patch_files: Sequence[Path], watch: Watch | None = None) -> bool:
    """Take patches off the checkpoint in `folder` itself, to the byte; see `apply_in_place`."""
    return _write_in_place("revert", folder, patch_files, watch)


def preview(
    operation: Operation,
    folder: Path,
    patch_files: Sequence[Path],
    out: Path | None,
    watch: Watch | None = None,
) -> Preview:
    """Check all that a command checks and tell what it would do; writes nothing.

    Args:
        operation: "apply" or "revert".
        folder: The checkpoint.
        patch_files: The patches.
        out: The new folder, None for in place.
        watch: Shows progress.

    Raises:
        RegraftError: as the command itself.
    """
    watch = watch or Silent()
    if out is not None:
        job = _Job.read(operation, open_checkpoint(folder), patch_files)
        done = holds(out, out / ABOUT_FILE, job.about(operation, _past(folder)))
        if not done:
            check_target(job.checkpoint, out)
        return Preview(job.plan(watch), 0 if done else job.checkpoint.bytes, done)
    checkpoint = open_checkpoint(folder, unfinished=True)
    require_own_shards(checkpoint)
    journal = read_journal(folder)
    job = _Job.read(operation, checkpoint, patch_files, journal)
    plan = job.plan(watch)
    done = journal is None and not plan.changes
    copies = 0 if journal or done else sum(path.stat().st_size for path in job.files)
    return Preview(plan, plan.bytes + copies, done)


@dataclass(frozen=True)
class _Job:
    """An operation, its checkpoint and its patches, read as far as no weight is needed."""

    operation: Operation
    checkpoint: Checkpoint
    files: tuple[Path, ...]
    digests: tuple[str, ...]
    patches: tuple[Patch, ...]

    @classmethod
    def read(
        cls,
        operation: Operation,
        checkpoint: Checkpoint,
        patch_files: Path | Sequence[Path],
        journal: Journal | None = None,
    ) -> _Job:
        named = (patch_files,) if isinstance(patch_files, Path) else tuple(patch_files)
        files = named or (journal.files if journal else ())
        if not files:
            raise RegraftError("No patch is named. Name one or more files of `regraft realign`.")
        if journal is not None and (missing := [path for path in files if not path.is_file()]):
            raise RegraftError(
                f"{missing[0]} does not exist. Run the command without any patch: "
                f"{checkpoint.folder} keeps a copy of those it was being changed with."
            )
        patches = tuple(load_patch(path) for path in files)
        digests = tuple(file_digest(path) for path in files)
        if journal is not None and set(digests) != set(journal.digests):
            raise RegraftError(
                f"{checkpoint.folder} is patched only in part, with other patches. Run `regraft "
                f"{journal.operation} {checkpoint.folder} --in-place` first, which finishes that."
            )
        return cls(operation, checkpoint, files, digests, patches)

    def plan(self, watch: Watch, *, unfinished: bool = False) -> Plan:
        """Check the weights and list what has to change; all of it after an unfinished write."""
        tensors = {name for patch in self.patches for name in patch.tensors}
        with watch.task("Checking the patched weights", len(tensors), "tensors") as done:
            return make_plan(
                self.checkpoint,
                self.patches,
                self.operation,
                unfinished=unfinished,
                progress=done,
            )

    def about(self, operation: Operation, before: Description | None) -> Description:
        """The description of a checkpoint that carried `before`, after the operation."""
        touched = {name for patch in self.patches for name in patch.tensors}
        inputs = {
            _ROLE[operation]: self.checkpoint.outline(without={ABOUT_FILE, *touched}),
            "patch": " ".join(sorted(set(self.digests))),
        }
        return describe(operation, inputs) | {"before": before}

    def about_in_place(
        self, operation: Operation, before: Description | None
    ) -> Description | None:
        """The same in place, where taking off what was put on gives the old description back."""
        old = before
        while operation == "revert" and old is not None and self._put_on(old):
            old = old["before"]
        return self.about(operation, before) if old is before else old

    def _put_on(self, about: Description) -> bool:
        """Whether a checkpoint so described got these patches, or some of them, and no other."""
        applied = about.get("stage") == "apply" and "before" in about
        return applied and set(about["inputs"]["patch"].split()) <= set(self.digests)


def _write_new(
    operation: Operation,
    folder: Path,
    patch_files: Path | Sequence[Path],
    out: Path,
    watch: Watch | None,
) -> Path:
    watch = watch or Silent()
    job = _Job.read(operation, open_checkpoint(folder), patch_files)
    about = job.about(operation, _past(folder))
    done = is_done(out, out / ABOUT_FILE, about)
    if not done and ranks.first():
        check_target(job.checkpoint, out)
    plan = job.plan(watch)
    if done:
        open_checkpoint(out)
        return out
    as_it_was = "nothing: the patches are already " + ("on" if operation == "apply" else "off")
    watch.note(f"Changes {f'{plan.weights:,} weights' if plan.weights else as_it_was}.")
    with working(out, about):
        if ranks.first():
            with watch.task(f"Writing {out}", job.checkpoint.bytes, "bytes") as advance:
                write_plan(plan, out, files={ABOUT_FILE: to_json(about)}, progress=advance)
    return out


def _write_in_place(
    operation: Operation, folder: Path, patch_files: Sequence[Path], watch: Watch | None
) -> bool:
    """Process 0 alone writes."""
    return ranks.decided(lambda: _change(operation, folder, patch_files, watch or Silent()))


def _change(operation: Operation, folder: Path, patch_files: Sequence[Path], watch: Watch) -> bool:
    checkpoint = open_checkpoint(folder, unfinished=True)
    with owned(checkpoint):
        journal = read_journal(folder)
        job = _Job.read(operation, checkpoint, patch_files, journal)
        plan = job.plan(watch, unfinished=journal is not None)
        if journal is not None:
            before = journal.before
            if journal.operation != operation:
                before = job.about_in_place(journal.operation, before)
        elif plan.changes:
            before = _past(folder)
            write_journal(folder, operation, before, job.files)
        else:
            return False
        about = job.about_in_place(operation, before)
        with watch.task(f"Writing in {folder}", plan.bytes, "bytes") as advance:
            write_in_place(plan, advance)
        if about is None:
            (folder / ABOUT_FILE).unlink(missing_ok=True)
        else:
            write_text(folder / ABOUT_FILE, to_json(about))
        remove_journal(folder)
    return True


def _past(folder: Path) -> Description | None:
    path = folder / ABOUT_FILE
    past: Description | None = read_json(path) if path.exists() else None
    return past
