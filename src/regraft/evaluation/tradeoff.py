"""Choose a point of a trade-off curve: safety as requested, helpfulness within bounds.

A search has one curve, which is saved as a file; tuning has the best point of each trial. All rates
here are on validation prompts: rates to report for the chosen point must come from other prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from regraft.disk.descriptions import fields_of
from regraft.disk.parsing import EXACT, from_json
from regraft.evaluation.results import Estimate, EvalResult

NOTE = (
    "These are rates on the validation prompts that the settings were chosen on: those of a best "
    "of many are optimistic. Evaluate the chosen settings once on a test split, and report that."
)
_SLACK = 1e-9
Reference = Literal["pruned", "dense", "higher"]


@EXACT
@dataclass(frozen=True)
class Point:
    """Rates of a model with `restored` weights restored, on validation prompts.

    `degenerate` is the share of answers that are degenerate and not refusals.
    """

    restored: int
    asr: Estimate
    over_refusal: Estimate
    utility: Estimate | None
    degenerate: float = 0.0

    @classmethod
    def of(cls, restored: int, result: EvalResult) -> Point:
        """The point of an evaluation with harmful and harmless prompts."""
        assert result.asr is not None and result.over_refusal is not None
        share = sum(one.counts_as_degenerate for one in result.answers) / len(result.answers)
        return cls(restored, result.asr, result.over_refusal, result.utility, share)


@EXACT
@dataclass(frozen=True)
class Bounds:
    """The target and the bounds of a search; rates are fractions.

    `asr` is the target, None for as low as possible; `over_refusal`, `utility` and `degenerate`
    (None: any) are the bounds. `degenerate` is needed because gibberish is neither a successful
    attack nor a refusal: a model of gibberish would be the safest within the other bounds.
    """

    asr: float | None
    over_refusal: float
    utility: float | None
    degenerate: float | None = None

    def keeps(self, point: Point) -> bool:
        """Whether a point is within the bounds."""
        return not any(self.excess(point).values())

    def meets(self, point: Point) -> bool:
        """Whether a point is within the bounds and reaches the target; False without a target."""
        return self.keeps(point) and self.asr is not None and point.asr.value <= self.asr + _SLACK

    def excess(self, point: Point) -> dict[str, float]:
        """How far a point is beyond each bound, by the bound's name; 0 within."""
        excess = {"over_refusal": point.over_refusal.value - self.over_refusal, "utility": 0.0}
        if self.utility is not None and point.utility is not None:
            excess["utility"] = self.utility - point.utility.value
        if self.degenerate is not None:
            excess["degenerate"] = point.degenerate - self.degenerate
        return {name: value if value > _SLACK else 0.0 for name, value in excess.items()}


def choose(points: Sequence[Point], bounds: Bounds) -> Point | None:
    """Choose a point within the bounds; None if there is none.

    Among those that meet the target it is the one with the fewest restored weights. If none does,
    or there is no target, it is the one with the lowest ASR (then the fewest weights).
    """
    if meeting := [point for point in points if bounds.meets(point)]:
        return min(meeting, key=lambda point: point.restored)
    within = [point for point in points if bounds.keeps(point)]
    return min(within, key=lambda point: (point.asr.value, point.restored), default=None)


@EXACT
@dataclass(frozen=True)
class Searched:
    """A trade-off curve and the point chosen on it; a file of one has these fields.

    `points` begin with the pruned model, `chosen` is how many weights are restored (None: no point,
    not even the pruned model, is within the bounds), `pruned` how many were pruned.
    """

    pruned: int
    chosen: int | None
    bounds: Bounds
    dense: Point
    points: tuple[Point, ...]

    @property
    def taken(self) -> Point | None:
        """The chosen point, None if nothing is restored."""
        return next((one for one in self.points if one.restored == (self.chosen or -1)), None)

    def rsr(self, point: Point) -> float | None:
        """RSR of a point on the validation prompts; None if pruning did not raise ASR."""
        from regraft.evaluation.metrics import rsr  # scipy, slow to import

        return rsr(self.dense.asr.value, self.points[0].asr.value, point.asr.value)


def nearest(points: Sequence[Point], bounds: Bounds) -> Point:
    """The point that exceeds the bounds least, the first among equals."""
    return min(points, key=lambda point: sum(bounds.excess(point).values()))


def read_curve(path: Path) -> Searched:
    """Read a file with the fields of a curve.

    Raises:
        RegraftError: the file is missing or holds no curve.
    """
    names = [one.name for one in fields(Searched)]
    content = fields_of(path, "validation curve", *names)
    return from_json(Searched, {name: content[name] for name in names}, str(path))


@EXACT
@dataclass(frozen=True)
class Cost:
    """What a trial or all of them cost: time, models evaluated, and prompts that these answered.

    `seconds` is by stage, of all processes together; trials that were stopped do not count.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
    prompts: int = 0

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        seconds: dict[str, float] = {}
        evaluations = prompts = 0
        for one in costs:
            for stage, spent in one.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            evaluations += one.evaluations
            prompts += one.prompts
        return cls(seconds, evaluations, prompts)


@EXACT
@dataclass(frozen=True)
class Tried:
    """One trial: its settings, its best point, and how far that exceeds each bound."""

    number: int
    settings: Mapping[str, Any]
    point: Point
    excess: Mapping[str, float]
    cost: Cost

    @property
    def within(self) -> bool:
        """Whether the point keeps to the bounds."""
        return not any(self.excess.values())


@dataclass(frozen=True)
class Tuned:
    """All trials, best first.

    `before` is the pruned model, `pruned` the number of pruned weights, `failed` the number of
    trials that ended in an error.
    """

    method: str
    trials: tuple[Tried, ...]
    bounds: Bounds
    dense: Point
    before: Point
    pruned: int
    failed: int

    @property
    def best(self) -> Tried | None:
        """The best trial; None if none within the bounds has a lower ASR than the pruned model."""
        return next(
            (
                one
                for one in self.trials
                if one.within and one.point.restored and one.point.asr.value < self.before.asr.value
            ),
            None,
        )

    @property
    def cost(self) -> Cost:
        """The cost of all finished trials."""
        return Cost.total(one.cost for one in self.trials)

    def per_ten_thousand(self, point: Point) -> float:
        return 10_000 * point.restored / self.pruned

    def to_json(self) -> dict[str, Any]:
        def described(one: Tried) -> dict[str, Any]:
            return {
                "number": one.number,
                "within": one.within,
                "settings": one.settings,
                **asdict(one.point),
                "per_ten_thousand": self.per_ten_thousand(one.point),
                "excess": one.excess,
                "cost": asdict(one.cost),
            }

        return {
            "best": None if self.best is None else described(self.best),
            "note": NOTE,
            "bounds": asdict(self.bounds),
            "dense": asdict(self.dense),
            "pruned": asdict(self.before),
            "cost": {
                "trials": len(self.trials),
                "failed": self.failed,
                "total_seconds": sum(self.cost.seconds.values()),
                **asdict(self.cost),
            },
            "trials": [described(one) for one in self.trials],
        }


def best_first(trials: Iterable[Tried]) -> tuple[Tried, ...]:
    """Sort trials within the bounds by ASR, then by restored weights; the others by excess."""

    def order(one: Tried) -> tuple[float, float, int, int]:
        return sum(one.excess.values()), one.point.asr.value, one.point.restored, one.number

    return tuple(sorted(trials, key=order))
