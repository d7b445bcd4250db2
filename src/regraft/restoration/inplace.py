"""Put patches on a checkpoint, or take them off, in the folder where it lies.

Before the first byte changes, a journal is written into the folder: what is being done and a copy
of the patches. They hold both the restored values and the zeros, so whatever a kill leaves can be
finished or undone from the journal alone, as often as it takes: assigning twice is assigning once.
While the journal is there, `open_checkpoint` refuses the folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from regraft.errors import RegraftError
from regraft.files import (
    atomic_folder,
    discard_leftover,
    file_digest,
    in_threads,
    locked,
    one_at_a_time,
    read_json,
    require_space,
    sync,
    write_json,
)
from regraft.models.checkpoint import JOURNAL, Checkpoint, Progress
from regraft.restoration.apply import Operation, Plan, write_changes

_CONTENT = "journal.json"


@dataclass(frozen=True)
class Journal:
    """A change in place that has begun.

    `operation` is what was being done, `before` the JSON description that the checkpoint carried
    then, `files` the copies of the patches and `digests` those of their bytes, in order.
    """

    operation: Operation
    before: Mapping[str, Any] | None
    files: tuple[Path, ...]
    digests: tuple[str, ...]


@contextmanager
def owned(checkpoint: Checkpoint) -> Iterator[None]:
    """Hold the only right to write a checkpoint in place for the length of the block.

    Raises:
        RegraftError: another process has it, or a shard must not be written.
    """
    require_own_shards(checkpoint)
    with locked(checkpoint.folder / checkpoint.shards[0], checkpoint.folder):
        discard_leftover(checkpoint.folder / JOURNAL)
        yield


def require_own_shards(checkpoint: Checkpoint) -> None:
    """Raise unless every shard is a file of this folder alone that may be written."""
    for shard in checkpoint.shards:
        path = checkpoint.folder / shard
        shared = "a link" if path.is_symlink() else "hard-linked from elsewhere"
        if path.is_symlink() or path.stat().st_nlink > 1:
            raise RegraftError(
                f"{path} is {shared}: writing it in place would change the other checkpoint too. "
                "Use --out to write a new folder."
            )
        if not os.access(path, os.W_OK):
            raise RegraftError(f"No permission to write {path}. Use --out to write a new folder.")


def read_journal(folder: Path) -> Journal | None:
    """The journal in a checkpoint folder, None where no change is unfinished.

    Raises:
        RegraftError: it is damaged.
    """
    journal = folder / JOURNAL
    if not journal.exists():
        return None
    content = read_json(journal / _CONTENT)
    try:
        files = tuple(journal / name for name in content["patches"])
        digests = tuple(content["patches"].values())
        return Journal(content["operation"], content["before"], files, digests)
    except (KeyError, TypeError, AttributeError) as error:
        raise RegraftError(f"{journal / _CONTENT} is damaged: {error!r}.") from error


def write_journal(
    folder: Path, operation: Operation, before: Mapping[str, Any] | None, patches: Sequence[Path]
) -> None:
    """Write a journal, on the disk when this returns.

    Args:
        folder: The checkpoint.
        operation: What is going to be done.
        before: The description that the checkpoint carries now.
        patches: Files of the patches, which are copied.

    Raises:
        RegraftError: the disk is full.
    """
    require_space(folder, sum(path.stat().st_size for path in patches))
    with atomic_folder(folder / JOURNAL) as journal:
        names = [f"{number}.safetensors" for number in range(1, len(patches) + 1)]
        for name, path in zip(names, patches, strict=True):
            shutil.copyfile(path, journal / name)
        copies = {name: file_digest(journal / name) for name in names}
        content = {"operation": operation, "before": before, "patches": copies}
        write_json(journal / _CONTENT, content)


def remove_journal(folder: Path) -> None:
    """Declare the change finished, in one step, when all of it is on the disk."""
    gone = discard_leftover(folder / JOURNAL)
    sync(folder)
    (folder / JOURNAL).replace(gone)
    sync(folder)
    shutil.rmtree(gone)


def write_in_place(plan: Plan, progress: Progress | None = None) -> None:
    """Carry out a plan in its own folder, on the disk when this returns; a journal must be there.

    Args:
        plan: From `make_plan`.
        progress: Called with the number of bytes just written.

    Raises:
        RegraftError: there is no journal, or the disk does not take it.
    """
    folder = plan.checkpoint.folder
    if not (folder / JOURNAL).exists():
        raise RegraftError(f"{folder} has no journal. Write one before it is changed in place.")

    stop = Event()
    advance = one_at_a_time(progress, stop)

    def write(shard: str) -> None:
        changes = [change for change in plan.changes if change.record.shard == shard]
        write_changes(folder / shard, changes, progress=advance)

    try:
        in_threads(write, plan.shards, stop)
        in_threads(sync, [folder / shard for shard in plan.checkpoint.shards])
    except OSError as error:
        raise RegraftError(
            f"{folder} could not be written to the end: {error.strerror}. It is patched only in "
            "part; when the cause is gone, the same command finishes it."
        ) from error
