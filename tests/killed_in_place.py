"""One change in place in a process of its own that kills itself at a chosen moment.

Processes are forked by a server that has imported everything and computes nothing.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from regraft import stages
from regraft.restoration import apply, inplace


def change(
    operation: str, folder: Path, patches: list[Path], kill_at: int | None = None
) -> tuple[int, int]:
    """Apply or revert in place, killed at the `kill_at`-th step if there is one.

    Returns:
        (exit status, -9 where it was killed; steps that it took, 0 where it was killed).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["regraft.stages"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(operation, folder, patches, kill_at, send))
    process.start()
    send.close()
    try:
        steps = receive.recv()
    except EOFError:
        steps = 0
    process.join()
    assert process.exitcode is not None
    return process.exitcode, steps


def _child(
    operation: str, folder: Path, patches: list[Path], kill_at: int | None, send: Connection
) -> None:
    """A step is a change of a name in the folder, an fsync, or half a write to a shard."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changing = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")
        if event == "open":
            changing = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changing and str(folder) in str(arguments[0]):
            step()

    def write_in_halves(handle: io.FileIO, place: int, data: memoryview) -> None:
        half = len(data) // 2
        for start, part in ((0, data[:half]), (half, data[half:])):
            step()
            whole(handle, place + start, part)

    def fsync(handle: int) -> None:
        step()
        flush(handle)

    whole, flush = apply.write_at, os.fsync
    apply.write_at, os.fsync = write_in_halves, fsync
    sys.addaudithook(watch)
    run = stages.apply_in_place if operation == "apply" else stages.revert_in_place
    run(folder, patches)
    send.send(steps)
    assert inplace.read_journal(folder) is None
