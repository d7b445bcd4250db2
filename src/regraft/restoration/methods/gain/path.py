"""The path of gain: losses before and after each step, the numbers tried, and why it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from regraft.errors import RegraftError
from regraft.restoration.methods.gain.objective import Try

End = Literal["limit", "held-out", "candidates"]
REASONS: Mapping[End, str] = {
    "limit": "a path takes no more steps or weights",
    "held-out": "more weights hardly lower the loss on held-out prompts",
    "candidates": "no other pruned weight is predicted to help",
}


@dataclass(frozen=True)
class Losses:
    """Mean losses, in nats, of harmful prompts (safety) and harmless ones (utility)."""

    safety: float
    utility: float

    @property
    def sum(self) -> float:
        """What a step is to lower."""
        return self.safety + self.utility


@dataclass(frozen=True)
class StepRecord:
    """What is kept of a finished step.

    Attributes:
        restored: How many weights are restored after it, in all.
        gradient: Losses on the gradient prompts, those not held out, before it.
        held_out: Losses on the held-out prompts after it.
        candidates: How many weights were predicted to help and not to raise the loss on harmless
            prompts, counted up to as many as the step may restore.
        tries: Numbers of weights that were tried, besides those restored before, with the sum of
            the held-out losses.
    """

    restored: int
    gradient: Losses
    held_out: Losses
    candidates: int
    tries: tuple[Try, ...]


@dataclass(frozen=True)
class GainPath:
    """All steps so far.

    Attributes:
        start: Losses of the pruned model on the held-out prompts.
        steps: In order.
        end: Why there is no further step; None while there may be one.
    """

    start: Losses
    steps: tuple[StepRecord, ...] = ()
    end: End | None = None

    @property
    def restored(self) -> int:
        return self.steps[-1].restored if self.steps else 0

    @property
    def held_out(self) -> Losses:
        """Losses on the held-out prompts now."""
        return self.steps[-1].held_out if self.steps else self.start

    @property
    def taken(self) -> tuple[int, ...]:
        """How many weights each step restored."""
        after = [step.restored for step in self.steps]
        return tuple(now - before for before, now in zip([0, *after], after, strict=False))


_JSON = TypeAdapter(GainPath)


def path_to_json(path: GainPath) -> dict[str, Any]:
    """As a ranking's `about` keeps it: `start`, `steps` and, where it has ended, `end`."""
    kept: dict[str, Any] = _JSON.dump_python(path, mode="json", exclude_none=True)
    return kept


def read_path(about: Mapping[str, Any]) -> GainPath | None:
    """From what `path_to_json` made of it, whatever else is there; None of a method without a path.

    Raises:
        RegraftError: a step lacks a number, or it ended for another reason than there are.
    """
    if "steps" not in about:
        return None
    try:
        return _JSON.validate_python(about)
    except ValidationError as error:
        raise RegraftError(
            f"A ranking by gain does not hold the path that it was found along ({error}). Remove "
            "the ranking to have it made again."
        ) from error
