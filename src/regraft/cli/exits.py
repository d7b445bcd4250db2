"""How the program ends where it fails: words on standard error, and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

from rich.console import Console

from regraft import ranks


def fail(console: Console, message: str) -> NoReturn:
    """Say what is wrong and end with 2."""
    console.print("[bold red]Error:[/] ", end="")
    console.print(message.strip(), markup=False, highlight=False, soft_wrap=True)
    leave(2)


def crash(console: Console) -> NoReturn:
    """Raise what was not foreseen; one of several processes says it and is gone."""
    if ranks.world() > 1:
        console.print_exception()
        leave(1)
    raise


def leave(code: int) -> NoReturn:
    """End this process with all it printed flushed."""
    sys.stdout.flush()
    sys.stderr.flush()
    ranks.leave(code)
