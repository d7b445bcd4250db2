"""Which point of a trade-off curve to take: safety as asked for, helpfulness within bounds.

All rates here are of validation prompts. What is reported of the chosen point must come from
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from regraft.evaluation.results import Estimate, EvalResult


@dataclass(frozen=True)
class Point:
    """A model with `restored` weights back, on validation prompts.

    `degenerate` is the share of all degenerate answers.
    """

    restored: int
    asr: Estimate
    over_refusal: Estimate
    utility: Estimate | None
    degenerate: float = 0.0

    @classmethod
    def of(cls, restored: int, result: EvalResult) -> Point:
        """Of an evaluation with harmful and harmless prompts."""
        assert result.asr is not None and result.over_refusal is not None
        return cls(restored, result.asr, result.over_refusal, result.utility, silent_share(result))


@dataclass(frozen=True)
class Bounds:
    """What a point must keep to; rates are fractions.

    `asr` is what is aimed at, None for as low as can be; `over_refusal`, `utility` and `degenerate`
    (None: any) are the bounds. A degenerate answer is neither an attack nor a refusal, so
    that a model of gibberish would be the safest within the other two.
    """

    asr: float | None
    over_refusal: float
    utility: float | None
    degenerate: float | None = None

    def keeps(self, point: Point) -> bool:
        """Whether a point is within the bounds."""
        return not any(self.excess(point).values())

    def meets(self, point: Point) -> bool:
        """Whether a point within the bounds reaches the ASR aimed at; nothing does without one."""
        return self.keeps(point) and self.asr is not None and point.asr.value <= self.asr + _SLACK

    def excess(self, point: Point) -> dict[str, float]:
        """How far a point is beyond each bound, by the bound's name; 0 within."""
        over = {"over_refusal": point.over_refusal.value - self.over_refusal, "utility": 0.0}
        if self.utility is not None and point.utility is not None:
            over["utility"] = self.utility - point.utility.value
        if self.degenerate is not None:
            over["degenerate"] = point.degenerate - self.degenerate
        return {name: value if value > _SLACK else 0.0 for name, value in over.items()}


_SLACK = 1e-9
Reference = Literal["pruned", "dense", "higher"]


def bounds_of(
    dense: Point,
    pruned: Point,
    *,
    target_asr: float | None = None,
    target_rsr: float | None = None,
    over_refusal: float = 0.01,
    utility: float = 0.0,
    reference: Reference = "higher",
) -> Bounds:
    """Bounds relative to the dense and the pruned model.

    Args:
        dense: The dense model on the same prompts.
        pruned: The pruned one.
        target_asr: The ASR aimed at.
        target_rsr: Or the RSR, as a fraction. Where pruning did not raise ASR there is none, and
            the aim is an ASR no higher than the pruned model's.
        over_refusal: How far above the reference over-refusal may be, and how far the share of
            degenerate answers above the larger of both models'.
        utility: How far below the pruned model's utility may be.
        reference: Whose over-refusal that is: the dense model's, the pruned one's, or the higher.
    """
    if target_rsr is not None:
        lost = max(0.0, pruned.asr.value - dense.asr.value)
        target_asr = pruned.asr.value - target_rsr * lost
    rates = {"dense": dense.over_refusal.value, "pruned": pruned.over_refusal.value}
    rates["higher"] = max(rates.values())
    return Bounds(
        target_asr,
        rates[reference] + over_refusal,
        None if pruned.utility is None else pruned.utility.value - utility,
        max(dense.degenerate, pruned.degenerate) + over_refusal,
    )


def silent_share(result: EvalResult) -> float:
    """The share of all degenerate answers (and do not refuse)."""
    silent = sum(result.degenerate.get(kind, 0) for kind in ("harmful", "harmless"))
    return silent / len(result.answers) if result.answers else 0.0


def choose(points: Sequence[Point], bounds: Bounds) -> int | None:
    """Index of the point to take, None where none is within the bounds.

    Of those within: the one with the fewest restored weights that meets the target, and where none
    does, or there is no target, the one with the lowest ASR (of equal ones the fewest weights).
    """
    meeting = [i for i, point in enumerate(points) if bounds.meets(point)]
    if meeting:
        return min(meeting, key=lambda i: points[i].restored)
    within = [i for i, point in enumerate(points) if bounds.keeps(point)]
    return min(within, key=lambda i: (points[i].asr.value, points[i].restored), default=None)


@dataclass(frozen=True)
class Searched:
    """A trade-off curve and what was taken of it.

    `points` begin with the pruned model, `chosen` is how many weights are restored (None: no point,
    not even the pruned model, is within the bounds), `pruned` how many were pruned.
    """

    dense: Point
    points: tuple[Point, ...]
    bounds: Bounds
    chosen: int | None
    pruned: int

    @property
    def taken(self) -> Point | None:
        """The point that was chosen, None where nothing is restored."""
        return next((one for one in self.points if one.restored == (self.chosen or -1)), None)

    def rsr(self, point: Point) -> float | None:
        """RSR of a point on the validation prompts; None where pruning did not raise ASR."""
        from regraft.evaluation.metrics import rsr  # scipy, slow to import

        return rsr(self.dense.asr.value, self.points[0].asr.value, point.asr.value).value


def nearest(points: Sequence[Point], bounds: Bounds) -> Point:
    """The point that is least far beyond the bounds, the first of equal ones."""
    return min(points, key=lambda point: sum(bounds.excess(point).values()))
