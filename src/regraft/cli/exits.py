"""How the program ends where it fails: words on standard error, and an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from rich.console import Console


def joined() -> AbstractContextManager[None]:
    """Join the other processes, if a launcher started this one as one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return nullcontext()  # without importing torch, so that help is there at once
    from regraft import distributed

    return distributed.joined()


def fail(console: Console, message: str) -> NoReturn:
    """Say what is wrong and end with 2."""
    console.print("[bold red]Error:[/] ", end="")
    console.print(message.strip(), markup=False, highlight=False, soft_wrap=True)
    leave(2)


def crash(console: Console) -> NoReturn:
    """Raise what was not foreseen; one of several processes says it and is gone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        console.print_exception()
        leave(1)
    raise


def leave(code: int) -> NoReturn:
    """End this process with all it printed flushed."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise SystemExit(code)
    from regraft import distributed

    distributed.leave(code)
