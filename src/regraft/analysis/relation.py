"""Do models that owe more to single heads lose more safety? Total Ships against the rise in ASR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, t

_EXACT = 8  # models up to which p is exact: 40,320 orders


@dataclass(frozen=True)
class ModelPoint:
    """A pruned model: the Ships of all heads of its dense model together, and what pruning did.

    `model`, the fingerprint of its checkpoint, tells dense models apart. `ships` in radians;
    `degradation` is ASR pruned less ASR dense, in [-1, 1]. Of `heads` that were scored, the Ships
    of `estimated` are estimates.
    """

    name: str
    model: str
    ships: float
    degradation: float
    heads: int = 0
    estimated: int = 0


@dataclass(frozen=True)
class TotalShips:
    """Of a dense model; see `ModelPoint`."""

    model: str
    ships: float
    heads: int
    estimated: int

    def point(self, name: str, degradation: float) -> ModelPoint:
        """With what one pruning did to the model's safety."""
        return ModelPoint(name, self.model, self.ships, degradation, self.heads, self.estimated)


def estimates(points: Sequence[ModelPoint]) -> str | None:
    """One line on totals that are not sums of exact Ships; None where all are exact."""
    some = [
        f"{one.estimated} of {one.heads} heads of {one.name}" for one in points if one.estimated
    ]
    if not some:
        return None
    return (
        f"Ships are estimates for {', '.join(some)}, as `regraft analyse heads --mode screened` "
        "leaves them: these totals are not sums of exact scores. Score all heads with --mode exact "
        "(in a recipe heads.mode) to relate exact ones."
    )


@dataclass(frozen=True)
class Spearman:
    """The rank correlation, and its two-sided p value where all points are independent."""

    rho: float
    p: float | None
    n: int


def correlation(points: Sequence[ModelPoint]) -> Spearman | None:
    """Total Ships against the rise in ASR; without p where several points are of one model.

    Several prunings of a model share its Ships, so that their orders are not equally likely.

    Raises:
        ValueError: see `spearman`.
    """
    found = spearman([p.ships for p in points], [p.degradation for p in points])
    independent = len({point.model for point in points}) == len(points)
    return found if found is None or independent else replace(found, p=None)


def spearman(x: Sequence[float], y: Sequence[float]) -> Spearman | None:
    """Spearman's rho (1904); equal values share the mean of their ranks.

    p is exact, over all orders, for up to 8 points, and by Student's t beyond.
    None where all values of one are equal.

    Raises:
        ValueError: the lengths differ, or there are fewer than 3.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"A rank correlation needs 3 pairs or more; got {len(x)} and {len(y)}.")
    first, second = rankdata(x), rankdata(y)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    rho, n = _pearson(first, second), len(x)
    if n <= _EXACT:
        orders = np.array(list(permutations(second)))
        reached = np.abs(_pearson(first, orders)) >= abs(rho) - 1e-12
        return Spearman(float(rho), float(reached.mean()), n)
    if abs(rho) > 1 - 1e-12:
        return Spearman(float(rho), 0.0, n)
    statistic = abs(rho) * np.sqrt((n - 2) / (1 - rho**2))
    return Spearman(float(rho), float(2 * t.sf(statistic, n - 2)), n)


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of `[n]` with each row of `[..., n]`."""
    a, b = a - a.mean(), b - b.mean(axis=-1, keepdims=True)
    found: NDArray[np.float64] = (a * b).sum(axis=-1) / np.sqrt((a**2).sum() * (b**2).sum(axis=-1))
    return found
