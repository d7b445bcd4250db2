"""Jobs in processes of their own: what they raise, and an interrupt of all processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial

import pytest

from regraft.stages.workers import run_jobs

pytestmark = pytest.mark.slow  # a process imports torch


def test_an_error_of_a_job_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    """However long it is, and with its own traceback as a note."""
    job = partial(exec, "raise OSError('x' * 1_000_000)")
    with pytest.raises(OSError, match="xxx") as raised:
        run_jobs([job], lambda: None)
    assert "In a worker:" in raised.value.__notes__[0]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a terminal's interrupt of all processes")
def test_jobs_leave_an_interrupt_to_the_process_that_started_them(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Theirs would be tracebacks, also while they are still importing."""
    seen: list[int] = []

    def watch() -> None:
        alive = [one.pid for one in multiprocessing.active_children() if one.pid]
        seen.append(len(alive))
        for one in alive:
            os.kill(one, signal.SIGINT)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([partial(time.sleep, 1000)] * 2, watch)
    assert seen == [2] * 6
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err
