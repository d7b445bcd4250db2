"""The path of gain: losses, numbers tried, what limited each step and why the path ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from regraft.errors import RegraftError
from regraft.restoration.methods.gain.objective import Try, numbers_tried

End = Literal["steps", "weights", "held-out", "candidates"]
REASONS: Mapping[End, str] = {
    "steps": "a path takes no more steps",
    "weights": "a path takes no more weights",
    "held-out": "more weights hardly lower the loss on held-out prompts",
    "candidates": "no other pruned weight is predicted to help",
}
# Why a step restored no more weights, or no fewer.
StepLimit = Literal[
    "first-order", "doubling", "weights", "candidates", "held-out", "fewest", "nothing"
]
LIMITS: Mapping[StepLimit, str] = {
    "first-order": "more are predicted to do more than halve the loss",
    "doubling": "twice as many as the step before",
    "weights": "a path takes no more weights",
    "candidates": "no other weight is predicted to help",
    "held-out": "fewer were better on held-out prompts",
    "fewest": "fewer were better, and no fewer are tried",
    "nothing": "no number that was tried helped on held-out prompts",
}


MOST_STEPS = 5  # cost about ten forward and backward passes over all prompts, answers included


class Room(NamedTuple):
    """How many weights a step may restore, and which of two limits that is."""

    weights: int
    by: Literal["doubling", "weights"]


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
        limit: Why it restored as many as it did.
    """

    restored: int
    gradient: Losses
    held_out: Losses
    candidates: int
    tries: tuple[Try, ...]
    limit: StepLimit


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

    @property
    def expected_tries(self) -> int:
        """How many numbers the next line search may try, going by those before; two at first."""
        tried = [len(step.tries) for step in self.steps]
        return max(1, round(sum(tried) / len(tried))) if tried else 2


def limit_of(taken: int, most: int, candidates: int, room: Room) -> StepLimit:
    """Why a step restored as many weights as it did.

    Args:
        taken: So many.
        most: The largest number tried, 0 without candidates.
        candidates: Weights that were predicted to help, counted up to the room.
        room: How many the step was allowed.
    """
    if not candidates:
        return "candidates"
    if not taken:
        return "nothing"
    if taken < most:
        return "fewest" if taken == numbers_tried(most)[-1] else "held-out"
    if most < candidates:
        return "first-order"
    return room.by if candidates == room.weights else "candidates"


def short_of(path: GainPath, restored: int, allowed: int | None) -> str:
    """ "394 of 3,222 weights allowed by the budget: ..." where a path ended below its budget.

    Empty text otherwise. `allowed` is None where no budget says how many.
    """
    if path.end is None or allowed is None or restored >= allowed:
        return ""
    return f"{restored:,} of {allowed:,} weights allowed by the budget: {REASONS[path.end]}"


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
