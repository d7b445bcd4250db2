"""The record of gain's path: losses, numbers tried, what limited each step, why the path ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from regraft.disk.parsing import from_json
from regraft.restoration.methods.gain.objective import Try, numbers_tried

MOST_STEPS = 5  # cost about ten forward and backward passes over all prompts, answers included
End = Literal["steps", "weights", "held-out", "candidates"]
REASONS: Mapping[End, str] = {
    "steps": f"a path has at most {MOST_STEPS} steps",
    "weights": "a path has no room for more weights",
    "held-out": "more weights hardly lower the loss on held-out prompts",
    "candidates": "no other weight is predicted to help",
}
StepLimit = Literal[
    "first-order", "doubling", "weights", "candidates", "held-out", "fewest", "nothing"
]
LIMITS: Mapping[StepLimit, str] = {
    "first-order": "more would lower the predicted loss by more than half",
    "doubling": "at most twice as many as the step before",
    "weights": "a path has no room for more weights",
    "candidates": "no other weight is predicted to help",
    "held-out": "fewer were better on held-out prompts",
    "fewest": "fewer were better, and no smaller number is tried",
    "nothing": "no number that was tried helped on held-out prompts",
}


class Room(NamedTuple):
    """Maximum number of weights of a step, and which limit that is."""

    weights: int
    by: Literal["doubling", "weights"]


@dataclass(frozen=True)
class Losses:
    """Mean losses in nats on harmful prompts (safety) and on harmless ones (utility)."""

    safety: float
    utility: float

    @property
    def sum(self) -> float:
        """The loss that steps lower."""
        return self.safety + self.utility


@dataclass(frozen=True)
class StepRecord:
    """Record of a finished step.

    Attributes:
        restored: Total number of restored weights after it.
        gradient: Losses on the gradient prompts before it.
        held_out: Losses on the held-out prompts after it.
        candidates: Number of weights that were predicted to help without raising the loss on
            harmless prompts, counted up to the maximum of the step.
        tries: The numbers of further weights that were tried, each with the sum of the held-out
            losses.
        limit: What decided how many weights it restored.
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
        end: Why the path ended; None while it may continue.
    """

    start: Losses
    steps: tuple[StepRecord, ...] = ()
    end: End | None = None

    @property
    def restored(self) -> int:
        return self.steps[-1].restored if self.steps else 0

    @property
    def held_out(self) -> Losses:
        """Current losses on the held-out prompts."""
        return self.steps[-1].held_out if self.steps else self.start

    @property
    def taken(self) -> tuple[int, ...]:
        """Number of weights that each step restored."""
        after = [step.restored for step in self.steps]
        return tuple(now - before for before, now in zip([0, *after], after, strict=False))


def limit_of(taken: int, most: int, candidates: int, room: Room) -> StepLimit:
    """What decided that a step restored `taken` weights.

    `most` is the largest number tried, 0 without `candidates`, which are counted up to the room.
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
    """ "394 of 3,222 weights allowed by the budget: ..." if a path ended below its budget.

    Empty otherwise; `allowed` is None without a budget.
    """
    if path.end is None or allowed is None or restored >= allowed:
        return ""
    return f"{restored:,} of {allowed:,} weights allowed by the budget: {REASONS[path.end]}"


_JSON = TypeAdapter(GainPath)


def path_to_json(path: GainPath) -> dict[str, Any]:
    """The path as stored in a ranking's `about`: `start`, `steps` and, once it has ended, `end`."""
    content: dict[str, Any] = _JSON.dump_python(path, mode="json", exclude_none=True)
    return content


def read_path(about: Mapping[str, Any]) -> GainPath | None:
    """Read a path from a ranking's `about`; None for a method without a path.

    Raises:
        RegraftError: a number is missing or wrong, or the reason for the end is unknown.
    """
    if "steps" not in about:
        return None
    fields = {name: about[name] for name in ("start", "steps", "end") if name in about}
    where = "A ranking by gain has no valid record of its path; remove it to make it again"
    return from_json(GainPath, fields, where)
