"""Jobs in processes of their own, which end when the process that started them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from regraft.errors import RegraftError

PAUSE = 0.5  # seconds between polls of other workers
Job = Callable[[], object]


def run_jobs(jobs: Sequence[Job], watch: Callable[[], None]) -> None:
    """Run every job in a process of its own and wait for all; call `watch` again and again.

    Raises:
        Exception: the first that a job raised.
        RegraftError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    workers = [context.Process(target=_main, args=(job, errors), daemon=True) for job in jobs]
    try:
        with _interrupts_held():
            for worker in workers:
                worker.start()
        found: list[Exception] = []
        while any(worker.is_alive() for worker in workers):
            time.sleep(PAUSE)
            found += _told(errors)  # a long one keeps its process from ending
            watch()
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    if found := [*found, *_told(errors)]:
        raise found[0]
    if codes := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RegraftError(
            f"{len(codes)} of {len(workers)} workers have ended with exit code {codes[0]}. The "
            "same command continues from here."
        )


def _told(errors: Any) -> Iterator[Exception]:
    while not errors.empty():
        yield errors.get()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back SIGINT, for good in processes that the block starts.

    A terminal sends it to all of them, and this process ends the others.
    """
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _main(job: Job, errors: Any) -> None:
    """Main function of a worker process, which ends when the process that started it does."""

    def follow(parent: Any) -> None:
        parent.join()  # returns however it ends, by `kill -9` too
        os._exit(1)

    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        job()
    except Exception as error:  # multiprocessing would print its traceback
        if not isinstance(error, RegraftError):
            error.add_note(f"In a worker:\n{traceback.format_exc()}")  # for the report of a fault
        errors.put(error)
