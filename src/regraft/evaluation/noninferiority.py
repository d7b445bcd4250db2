"""The mean rise of a metric from one model to another on the same prompts, with valid limits.

Each unit, a prompt or several that ask the same, has a rise: in {-1, 0, 1} if outcomes are yes or
no, otherwise a number in a range. Each limit of the mean rise is one-sided, at 95 %: for at most
one sample of prompts in twenty is the true mean beyond it. To conclude "the rise is less than the
margin" whenever its upper limit is less is therefore wrong at most once in twenty.

- Yes or no: Tango's score statistic (1998) of the prompts on which the models differ, with its
  exact distribution, the worst case over how often they differ at all (Hsueh, Liu and Chen 2001,
  Sidik 2003). With the normal distribution instead, up to 6 % would pass at the margin.
- Numbers in a range: Gaffke's limit (2005), in the form of Learned-Miller and Thomas (arXiv
  1905.06208): a quantile of the mean under random weights, with the worst possible number added to
  the sample. Clopper and Pearson's limit is a special case; coverage is proven for it and has held
  in every test of the others. Limits by t or bootstrap are too narrow if few prompts lose
  everything: they ignore losses that the sample happens not to contain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import bdtrc, gammaln, ndtri, xlog1py, xlogy

from regraft.evaluation.metrics import macro_average
from regraft.evaluation.results import Estimate

LEVEL = 0.05
CHANCE = 0.8  # that the prompts of `prompts_needed` decide
MOST_PROMPTS = 1_000_000  # more are not reported as needed
_TIE = 1e-9  # rounding error between equal numbers
_SETTLED = 1e-4  # relative step at which `prompts_needed` ends: 58 instead of 59 would not decide
_GRID = np.sin(np.linspace(0, np.pi / 2, 181)) ** 2  # dense at the ends: the p value is steep there
_PEAKS = 3  # highest points of the grid, around which a finer one is searched
_NEGLIGIBLE = 1e-12  # a probability
_STEP = 0.1
_PATH = np.arange(0, 20, _STEP).reshape(-1, 10)  # along the contour of `_above`, in blocks
_NEGLIGIBLE_HEIGHT = 1e-17  # of an integrand, relative to its first height

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rise:
    """A mean rise over `n` units with its one-sided 95 % limits, together a 90 % interval.

    `error` is its standard error.
    """

    value: float
    n: int
    low: float
    high: float
    error: float


@dataclass(frozen=True)
class Rises:
    """The rise of each unit, a prompt or several that ask the same.

    Args:
        values: One per unit, weighted by its number of prompts.
        most: The largest possible rise or fall.
        yes_no: Whether every unit is one prompt whose outcomes are yes or no.
        prompts: The number of prompts in all units.

    Raises:
        ValueError: there is no unit, or a rise is out of range.
    """

    values: Floats
    most: float
    yes_no: bool
    prompts: int

    def __post_init__(self) -> None:
        most = 1.0 if self.yes_no else self.most * (1 + _TIE)
        valid = not self.yes_no or bool(np.isin(self.values, (-1, 0, 1)).all())
        if not self.values.size or not valid or not (np.abs(self.values) <= most).all():
            raise ValueError("A mean rise needs at least one unit, and every rise in its range.")

    @classmethod
    def of(cls, before: ArrayLike, after: ArrayLike, asking: Sequence[Hashable]) -> Rises:
        """The rises of outcomes in [0, 1], one per prompt, from the one model to the other.

        Prompts with the same `asking` are one unit, since they are not independent draws. A unit's
        mean is weighted by its number of prompts, so that the mean over units is that over prompts.

        Raises:
            ValueError: as above.
        """
        a, b = (np.asarray(one, dtype=np.float64) for one in (before, after))
        unit_of = {one: i for i, one in enumerate(dict.fromkeys(asking))}
        units = np.array([unit_of[one] for one in asking], dtype=np.int64)
        sizes = np.bincount(units)
        if not sizes.size:
            raise ValueError("A mean rise needs at least one prompt.")
        yes_no = bool(np.isin([a, b], (0, 1)).all()) and len(unit_of) == len(units)
        values = np.bincount(units, b - a) / sizes.mean()
        return cls(values, float(np.max(sizes) / sizes.mean()), yes_no, len(units))

    def mean(self, margin: float) -> Rise:
        """The mean rise with its limits; on which side of the margin each of them is, is exact."""
        if not self.yes_no:
            return self.repeated(1)
        high, low = (exact_limit(sign * self.values, sign * margin) for sign in (1, -1))
        return replace(self.repeated(1), low=-low, high=high)

    def repeated(self, times: float) -> Rise:
        """The mean rise as if each unit occurred so many `times`, with Gaffke's limits (fast)."""
        n = times * self.values.size
        high, low = (gaffke_limit(sign * self.values, n, self.most) for sign in (1, -1))
        value, error = float(self.values.mean()), float(self.values.std()) / math.sqrt(n)
        return Rise(value, round(n), -low, high, error)


def mean_rise(means: Sequence[Rise]) -> Rise:
    """The unweighted mean over parts, however many units they have; see `macro_average`.

    Raises:
        ValueError: there is no part.
    """
    if len(means) < 2:
        (only,) = means
        return only
    mean = macro_average([Estimate(one.value, one.n, one.low, one.high) for one in means])
    error = math.hypot(*(one.error for one in means)) / len(means)
    return Rise(mean.value, mean.n, mean.low, mean.high, error)


def prompts_needed(parts: Sequence[Rises], margin: float) -> float | None:
    """The factor by which prompts must grow to decide whether the rise is less than the margin.

    A new sample of that size decides with a probability of 80 %, if rises keep their mean and
    variance: its mean is taken as normal, and its limit as far from it as ours would be at that
    size. None if more than a million units are needed, as for a rise at the margin.
    """
    z, times = float(ndtri(CHANCE)), 1.0
    units = sum(one.values.size for one in parts)
    for _ in range(20):
        if times * units > MOST_PROMPTS:
            return None
        rise = mean_rise([one.repeated(times) for one in parts])
        gap = margin - rise.value
        width = rise.high - rise.value if gap > 0 else rise.value - rise.low
        if abs(gap) < _TIE:
            return None
        wanted = times * ((width + z * rise.error) / gap) ** 2
        # widths shrink as 1 / sqrt(n) or, if hardly any prompt differs, as 1 / n: go halfway
        before, times = times, math.sqrt(times * wanted)
        if abs(times / before - 1) < _SETTLED:
            break
    return times if times * units <= MOST_PROMPTS else None


def exact_limit(values: Floats, margin: float) -> float:
    """The upper limit of the mean of rises in {-1, 0, 1}: where the p value is 5 %.

    The p value of counts is not monotonic, so it may be 5 % at several points close to each other.
    The limit is one below the margin if the p value at the margin is 5 % or less, otherwise one
    above it.
    """
    n, value = values.size, float(values.mean())
    more, less = (int((values == one).sum()) for one in (1, -1))
    estimate = gaffke_limit(values, n, 1.0)
    if more == n:
        return estimate
    step = (estimate - value) / 4
    near = margin, estimate - step, estimate + step
    return _crossing(lambda at: exact_p(more, less, n, at), value, 1.0, near)


def exact_p(more: int, less: int, n: int, margin: float) -> float:
    """The exact p value of "the mean rise is `margin` or more", small if it is less.

    Of `n` units `more` rise by 1 and `less` fall by 1; the margin is in (-1, 1).
    """
    observed = float(score(more, less, n, margin)) + _TIE
    rising = np.arange(n + 1)
    least = _least_falling(rising, n, margin, observed)
    low, high = max(0.0, -margin), (1 - margin) / 2
    grid = low + (high - low) * _GRID
    coarse = _chance(rising, least, n, grid, margin)
    peaks = np.argsort(coarse)[-_PEAKS:]
    before, after = (np.clip(peaks + step, 0, len(grid) - 1) for step in (-1, 1))
    fine_grid = np.linspace(grid[before], grid[after], 21).ravel()
    fine = _chance(rising, least, n, fine_grid, margin)
    return min(1.0, max(float(np.max(coarse)), float(np.max(fine))))


def score(more: ArrayLike, less: ArrayLike, n: int, margin: float) -> Floats:
    """Tango's statistic (1998): (rise - margin) / its standard error if the margin is the truth.

    0 / 0, if no unit changes and the margin is 0, is 0.
    """
    b, c = (np.asarray(one, dtype=np.float64) for one in (more, less))
    linear = (2 * n - b + c) * margin - b - c
    constant = -c * margin * (1 - margin)
    falling = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = n * np.maximum(2 * falling + margin * (1 - margin), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic: Floats = np.nan_to_num((b - c - n * margin) / np.sqrt(variance), nan=0.0)
    return statistic


def _least_falling(
    rising: NDArray[np.int64], n: int, margin: float, observed: float
) -> NDArray[np.int64]:
    """For each number of rising units, the fewest falling ones with a score of at most `observed`.

    The score decreases with every falling unit, so bisection finds it. It is one more than there
    can be if no number is enough.
    """
    low, high = np.zeros_like(rising), n - rising + 1
    while (low < high).any():
        middle = (low + high) // 2
        enough = (middle > n - rising) | (score(rising, middle, n, margin) <= observed)
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return low


def _chance(
    rising: NDArray[np.int64], least: NDArray[np.int64], n: int, falls: Floats, margin: float
) -> Floats:
    """Probability of at least `least` falling units, summed over `rising`, per rate of `falls`."""
    b, fall = rising[None], falls[:, None]
    rise = np.clip(fall + margin, 0, 1)
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(n - b + 1)
    mass = np.exp(ways + xlogy(b, rise) + xlog1py(n - b, -rise))
    mass, fewest = mass * (least <= n - rising), np.broadcast_to(least[None], mass.shape)
    rows, columns = np.nonzero(mass > _NEGLIGIBLE)
    share = np.clip(falls[rows] / np.maximum(1 - rise[rows, 0], _NEGLIGIBLE), 0, 1)
    tails = bdtrc(fewest[rows, columns] - 1.0, n - rising[columns], share)
    parts = mass[rows, columns] * tails
    return np.bincount(rows, parts, minlength=len(falls)).astype(np.float64)


def gaffke_limit(values: Floats, n: float, most: float) -> float:
    """The upper limit of the mean of rises of at most `most`, as if there were `n` units."""
    least = float(np.min(values))
    if least >= most * (1 - _TIE):
        return most
    value, error = float(values.mean()), float(values.std()) / math.sqrt(n)
    near = [value + times * error for times in (1.64, 1.8, 2.5)]  # the normal limit and above it
    return _crossing(lambda at: gaffke_p(values, n, most, at), least, most, near)


def gaffke_p(values: Floats, n: float, most: float, margin: float) -> float:
    """The p value of "the mean rise is `margin` or more", small if it is less.

    It is the probability that the mean of the values and of `most`, under weights drawn uniformly
    from all that sum to 1, is at least the margin. Such weights are exponential draws divided by
    their sum, so it is the probability that a sum of exponentials, each times its distance to the
    margin, is above 0.
    """
    kinds, counts = np.unique(values, return_counts=True)
    distance = np.append(kinds, most) - margin
    weight = np.append(counts * (n / values.size), 1.0)
    largest = float(np.abs(distance).max())
    if not largest:
        return 1.0
    distance /= largest
    rising = float(weight @ distance) > 0
    chance = min(1.0, max(0.0, _above(-distance if rising else distance, weight)))
    return 1 - chance if rising else chance


def _above(distance: Floats, weight: Floats) -> float:
    """Probability that a sum of gamma draws, each times its distance, is above 0; its mean is not.

    It is the integral of M(s) / s over a contour, where M(s) is the product of
    (1 - s distance) ** -weight. The contour is a hyperbola through the saddle point c with the
    curvature of the steepest descent there: the integrand hardly oscillates on it, however many
    draws there are (Rice 1980). The sum converges fast, as the integrand is smooth and falls to 0
    at both ends.
    """
    most = float(np.max(distance))
    if most < 1e-15 * float(-np.min(distance)):
        return 0.0

    def slope(c: float) -> float:
        return float((weight * (c * distance / (1 - c * distance))).sum()) - 1

    end = (1 - 1e-13) / most
    if slope(end) <= 0:
        return 0.0
    c = float(brentq(slope, 0, end, xtol=1e-12 * end))
    ratio = distance / (1 - c * distance)
    second = float((weight * ratio**2).sum()) + c**-2
    third = 2 * float((weight * ratio**3).sum()) - 2 * c**-3
    width, bend = second**-0.5, third / (3 * second**2)
    total, first = 0.0, math.inf
    for t in _PATH:
        s = c + bend * (np.cosh(t) - 1) + 1j * width * np.sinh(t)
        ds_dt = bend * np.sinh(t) + 1j * width * np.cosh(t)
        heights = np.exp(-np.log(1 - s[:, None] * distance) @ weight) / s * ds_dt
        if not t[0]:
            first = abs(heights[0])
            heights[0] /= 2
        total += float(heights.imag.sum())
        if abs(heights[-1]) < _NEGLIGIBLE_HEIGHT * first:
            break
    return total * _STEP / math.pi


def _crossing(
    p: Callable[[float], float], low: float, high: float, near: Sequence[float] = ()
) -> float:
    """Find where a p value falls to the level between `low` and `high`, trying `near` first.

    It is an end if p is below the level at `low` already, or still above it at `high`.
    """
    p = cache(p)
    high -= 1e-9 * (high - low)
    for x in near:
        if low < x < high:
            low, high = (x, high) if p(x) > LEVEL else (low, x)
    if p(low) <= LEVEL:
        return low
    if p(high) > LEVEL:
        return high
    return float(brentq(lambda x: p(x) - LEVEL, low, high, xtol=1e-9))
