"""What tuning tried, best first, and what it cost. All rates are of validation prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.evaluation.tradeoff import Bounds, Point

NOTE = (
    "These are rates on the validation prompts that the settings were chosen on: those of a best "
    "of many are optimistic. Evaluate the chosen settings once on a test split, and report that."
)


@dataclass(frozen=True)
class Cost:
    """What work took.

    Attributes:
        seconds: By stage, of all processes together; without those of trials that were stopped.
        evaluations: Models that were evaluated.
        prompts: Prompts that they answered.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
    prompts: int = 0

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """All of them together."""
        costs = list(costs)
        stages = dict.fromkeys(stage for one in costs for stage in one.seconds)
        return cls(
            {stage: sum(one.seconds.get(stage, 0.0) for one in costs) for stage in stages},
            sum(one.evaluations for one in costs),
            sum(one.prompts for one in costs),
        )


@dataclass(frozen=True)
class Tried:
    """One trial: its settings, its best point, and how far that is beyond each bound."""

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

    `pruned` is how many weights pruning took, `failed` how many trials ended in an error.
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
        """The best trial, None where none within the bounds has less ASR than the pruned model."""
        return next((one for one in self.trials if one.within and self._helps(one.point)), None)

    def _helps(self, point: Point) -> bool:
        return point.restored > 0 and point.asr.value < self.before.asr.value

    @property
    def cost(self) -> Cost:
        """Of all finished trials."""
        return Cost.total(one.cost for one in self.trials)

    def per_ten_thousand(self, point: Point) -> float:
        """Restored weights per 10,000 pruned ones."""
        return 10_000 * point.restored / self.pruned


def best_first(trials: Iterable[Tried]) -> tuple[Tried, ...]:
    """Those within the bounds by ASR, of equal ones the fewest weights first; then the others.

    Trials out of bounds follow by how far they are out.
    """
    return tuple(
        sorted(
            trials,
            key=lambda one: (
                sum(one.excess.values()),
                one.point.asr.value,
                one.point.restored,
                one.number,
            ),
        )
    )
