"""How long work tells of itself; the command line draws it, libraries may stay silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

Advance = Callable[[int], None]


class Progress(Protocol):
    """Something that shows progress."""

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """Announce `total` units of work; the yielded function is called with units done."""

    def note(self, text: str) -> None:
        """Say one thing."""

    def loaded(self, network: nn.Module) -> None:
        """A model is in memory and about to be used."""


class Silent:
    """Shows nothing."""

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        pass

    def loaded(self, network: nn.Module) -> None:
        pass


SILENT: Progress = Silent()
