"""The path of gain: losses before and after each step, the numbers tried, and why it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from regraft.errors import RegraftError
from regraft.restoration.methods.gain.objective import Try
from regraft.restoration.methods.gain.step import Losses, Step

End = Literal["limit", "held-out", "candidates"]
REASONS: Mapping[End, str] = {
    "limit": "a path takes no more steps or weights",
    "held-out": "more weights hardly lower the loss on held-out prompts",
    "candidates": "no other pruned weight is predicted to help",
}


@dataclass(frozen=True)
class Passed:
    """One step.

    Attributes:
        restored: How many weights are restored after it, in all.
        fit: Losses on the calibration prompts before it, in nats.
        held_out: Losses on the held-out prompts after it, in nats.
        candidates: As `Step.candidates`.
        tries: Numbers of weights that were tried, besides those restored before, with the sum of
            the held-out losses.
    """

    restored: int
    fit: Losses
    held_out: Losses
    candidates: int
    tries: tuple[Try, ...]

    @classmethod
    def of(cls, restored: int, new: Step) -> Passed:
        """A step with which `restored` weights are restored in all."""
        return cls(restored, new.fit, new.held_out, new.candidates, new.tries)


@dataclass(frozen=True)
class GainPath:
    """All steps so far.

    Attributes:
        start: Losses of the pruned model on the held-out prompts, in nats.
        steps: In order.
        end: Why there is no further step; None while there may be one.
    """

    start: Losses
    steps: tuple[Passed, ...] = ()
    end: End | None = None

    @property
    def restored(self) -> int:
        """How many weights are restored."""
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


def path_to_json(path: GainPath) -> dict[str, Any]:
    """As a ranking's `about` keeps it: `start`, `steps` and, where it has ended, `end`."""
    steps = [
        {**asdict(step), "tries": [[one.restored, one.loss] for one in step.tries]}
        for step in path.steps
    ]
    kept = {"start": asdict(path.start), "steps": steps}
    return kept if path.end is None else {**kept, "end": path.end}


def read_path(about: Mapping[str, Any]) -> GainPath | None:
    """From what `path_to_json` made of it, whatever else is there; None of a method without a path.

    Raises:
        RegraftError: a step lacks a number, or it ended for another reason than there are.
    """
    if "steps" not in about:
        return None
    try:
        end = about.get("end")
        if end is not None and end not in get_args(End):
            raise ValueError(f"end {end!r}")
        steps = tuple(_step(kept) for kept in about["steps"])
        return GainPath(Losses(**about["start"]), steps, end)
    except (KeyError, TypeError, ValueError) as error:
        raise RegraftError(
            f"A ranking by gain does not hold the path that it was found along ({error!r}). Remove "
            "the ranking to have it made again."
        ) from error


def _step(kept: Mapping[str, Any]) -> Passed:
    return Passed(
        restored=int(kept["restored"]),
        fit=Losses(**kept["fit"]),
        held_out=Losses(**kept["held_out"]),
        candidates=int(kept["candidates"]),
        tries=tuple(Try(int(count), float(loss)) for count, loss in kept["tries"]),
    )
