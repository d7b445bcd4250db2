"""By how much a mean rises from one model to another on the same prompts, with limits that hold.

A rise is that of a prompt, or of prompts that ask the same: in {-1, 0, 1} where outcomes are yes or
no, else a number in a range. Each limit of the mean rise is one-sided, at 95 %: at most one sample
of prompts in twenty has its true mean beyond it, so that "the rise is less than the margin", said
where the upper limit is, is wrong at most once in twenty.

- Yes or no: Tango's score statistic (1998) of the prompts on which the models differ, referred to
  its exact distribution, the worst over how often they differ at all (Hsueh, Liu and Chen 2001,
  Sidik 2003). By the normal distribution in its stead up to 6 % pass at the margin.
- Numbers in a range: Gaffke's limit (2005), as Learned-Miller and Thomas (arXiv 1905.06208) have
  it: a quantile of the mean under random weights, the worst possible number added to the sample.
  Clopper and Pearson's limit is a special case. It is proven for that one and has stood every test
  beyond it. Limits by t or bootstrap are too close where few prompts lose all: of a loss that the
  sample has none of they know nothing.
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
CHANCE = 0.8  # with which as many prompts as `prompts_needed` says decide
MOST_PROMPTS = 1_000_000  # more is no answer
_TIE = 1e-9  # by which equal numbers may differ
_GRID = np.sin(np.linspace(0, np.pi / 2, 181)) ** 2  # closer at the ends: chances change fast there
_PEAKS = 3  # of those on the grid that are looked at closer
_NOTHING = 1e-12  # a chance that adds nothing
_STEP = 0.1
_PATH = np.arange(0, 20, _STEP).reshape(-1, 10)  # along the contour of `_above`, in stretches
_NO_HEIGHT = 1e-17  # of the first, that adds nothing

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
        values: Of the units; those of several prompts count by their number.
        most: How large a rise, and a fall, can be.
        yes_no: Whether every unit is one prompt whose outcomes are yes or no.
        prompts: How many there are in all units.

    Raises:
        ValueError: there is none, or one is out of range.
    """

    values: Floats
    most: float
    yes_no: bool
    prompts: int

    def __post_init__(self) -> None:
        most = 1.0 if self.yes_no else self.most * (1 + _TIE)
        whole = not self.yes_no or bool(np.isin(self.values, (-1, 0, 1)).all())
        if not self.values.size or not whole or not (np.abs(self.values) <= most).all():
            raise ValueError("A mean rise needs at least one unit, and every rise in its range.")

    @classmethod
    def of(cls, before: ArrayLike, after: ArrayLike, asking: Sequence[Hashable]) -> Rises:
        """Of outcomes in [0, 1] with the one and the other model, one a prompt.

        Prompts with the same `asking` are one unit, since they are no independent draws. A unit's
        mean is weighted by its prompts, so that the mean over units is that over prompts.

        Raises:
            ValueError: as above.
        """
        a, b = (np.asarray(one, dtype=np.float64) for one in (before, after))
        places = {one: i for i, one in enumerate(dict.fromkeys(asking))}
        units = np.array([places[one] for one in asking], dtype=np.int64)
        sizes = np.bincount(units)
        if not sizes.size:
            raise ValueError("A mean rise needs at least one prompt.")
        yes_no = bool(np.isin([a, b], (0, 1)).all()) and len(places) == len(units)
        values = np.bincount(units, b - a) / sizes.mean()
        return cls(values, float(np.max(sizes) / sizes.mean()), yes_no, len(units))

    def mean(self, margin: float) -> Rise:
        """The mean rise with its limits, exact on which side of the margin each of them is."""
        if not self.yes_no:
            return self.repeated(1)
        high, low = (exact_limit(sign * self.values, sign * margin) for sign in (1, -1))
        return replace(self.repeated(1), low=-low, high=high)

    def repeated(self, times: float) -> Rise:
        """The same, were each unit there so many `times`; by Gaffke's limits, which are quick."""
        n = times * self.values.size
        high, low = (gaffke_limit(sign * self.values, n, self.most) for sign in (1, -1))
        value, error = float(self.values.mean()), float(self.values.std()) / math.sqrt(n)
        return Rise(value, round(n), -low, high, error)


def mean_rise(means: Sequence[Rise]) -> Rise:
    """The mean over parts, each counting the same, however many units it has; see `macro_average`.

    Raises:
        ValueError: there is none.
    """
    if len(means) < 2:
        (only,) = means
        return only
    mean = macro_average([Estimate(one.value, one.n, one.low, one.high) for one in means])
    error = math.hypot(*(one.error for one in means)) / len(means)
    return Rise(mean.value, mean.n, mean.low, mean.high, error)


def prompts_needed(parts: Sequence[Rises], margin: float) -> float | None:
    """How many times as many prompts would decide whether the rise is less than the margin.

    So many that, were the mean and the variance of rises what they are in these, another sample
    would decide with a chance of 80 %: its limit is as far from its mean as ours would be with as
    many prompts, and its mean is normal. None where that is more than a million units, as it is
    for a rise at the margin.
    """
    z, times = float(ndtri(CHANCE)), 1.0
    units = sum(one.values.size for one in parts)
    for _ in range(12):
        if times * units > MOST_PROMPTS:
            return None
        rise = mean_rise([one.repeated(times) for one in parts])
        gap = margin - rise.value
        width = rise.high - rise.value if gap > 0 else rise.value - rise.low
        if abs(gap) < _TIE:
            return None
        wanted = times * ((width + z * rise.error) / gap) ** 2
        if abs(wanted / times - 1) < 0.02:
            break
        # widths shrink as 1 / sqrt(n) or, where hardly a prompt differs, as 1 / n: halfway serves
        times = math.sqrt(times * wanted)
    return times if times * units <= MOST_PROMPTS else None


def exact_limit(values: Floats, margin: float) -> float:
    """The upper limit of the mean of rises in {-1, 0, 1}: where their p value is 5 %.

    That is in several places close to each other, as p values of counts go up and down. Where the p
    value at the margin is 5 % or less the limit is one below it, and else one above it.
    """
    n, value = values.size, float(values.mean())
    more, less = (int((values == one).sum()) for one in (1, -1))
    about = gaffke_limit(values, n, 1.0)
    if more == n:
        return about
    step = (about - value) / 4
    near = margin, about - step, about + step
    return _crossing(lambda at: exact_p(more, less, n, at), value, 1.0, near)


def exact_p(more: int, less: int, n: int, margin: float) -> float:
    """The exact p value of "the mean rise is `margin` or more", small where it is less.

    Args:
        more: Units that rise by 1.
        less: Units that fall by 1.
        n: All units.
        margin: In (-1, 1).
    """
    seen = float(score(more, less, n, margin)) + _TIE
    rising = np.arange(n + 1)
    least = _least_falling(rising, n, margin, seen)
    low, high = max(0.0, -margin), (1 - margin) / 2
    grid = low + (high - low) * _GRID
    chances = _chance(rising, least, n, grid, margin)
    best = np.argsort(chances)[-_PEAKS:]
    before, behind = (np.clip(best + step, 0, len(grid) - 1) for step in (-1, 1))
    close = np.linspace(grid[before], grid[behind], 21).ravel()
    closer = _chance(rising, least, n, close, margin)
    return min(1.0, max(float(np.max(chances)), float(np.max(closer))))


def score(more: ArrayLike, less: ArrayLike, n: int, margin: float) -> Floats:
    """Tango's statistic (1998): (rise - margin) / its standard error were the margin true.

    0 / 0, where no unit changes and the margin is 0, is 0.
    """
    b, c = (np.asarray(one, dtype=np.float64) for one in (more, less))
    linear = (2 * n - b + c) * margin - b - c
    constant = -c * margin * (1 - margin)
    falling = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = n * np.maximum(2 * falling + margin * (1 - margin), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.nan_to_num((b - c - n * margin) / np.sqrt(variance), nan=0.0)
    return found


def _least_falling(
    rising: NDArray[np.int64], n: int, margin: float, seen: float
) -> NDArray[np.int64]:
    """Beside so many rising units, how many must fall for a statistic of at most `seen`.

    The statistic falls with every falling unit, so that bisection finds it; one more than there
    can be where none is enough.
    """
    low, high = np.zeros_like(rising), n - rising + 1
    while (low < high).any():
        middle = (low + high) // 2
        enough = (middle > n - rising) | (score(rising, middle, n, margin) <= seen)
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return low


def _chance(
    rising: NDArray[np.int64], least: NDArray[np.int64], n: int, falls: Floats, margin: float
) -> Floats:
    """The chance that as many fall beside those that rise, for chances `falls` of one to fall."""
    b, fall = rising[None], falls[:, None]
    rise = np.clip(fall + margin, 0, 1)
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(n - b + 1)
    mass = np.exp(ways + xlogy(b, rise) + xlog1py(n - b, -rise))
    mass, fewest = mass * (least <= n - rising), np.broadcast_to(least[None], mass.shape)
    rows, places = np.nonzero(mass > _NOTHING)
    share = np.clip(falls[rows] / np.maximum(1 - rise[rows, 0], _NOTHING), 0, 1)
    tails = bdtrc(fewest[rows, places] - 1.0, n - rising[places], share)
    parts = mass[rows, places] * tails
    return np.bincount(rows, parts, minlength=len(falls)).astype(np.float64)


def gaffke_limit(values: Floats, n: float, most: float) -> float:
    """The upper limit of the mean of rises of at most `most`, were there `n` such units."""
    least = float(np.min(values))
    if least >= most * (1 - _TIE):
        return most
    value, error = float(values.mean()), float(values.std()) / math.sqrt(n)
    near = [value + times * error for times in (1.64, 1.8, 2.5)]  # the normal limit and above it
    return _crossing(lambda at: gaffke_p(values, n, most, at), least, most, near)


def gaffke_p(values: Floats, n: float, most: float, margin: float) -> float:
    """The p value of "the mean rise is `margin` or more", small where it is less.

    The chance that the mean of the values and of `most`, under weights drawn evenly from all that
    sum to 1, is at least the margin. Such weights are exponential draws over their sum, so it is
    that of a sum of exponentials, each times its distance to the margin, to be above 0.
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
    """The chance that a sum of gamma draws, each times its distance, is above 0; its mean is not.

    The integral of M(s) / s over a contour, M(s) the product of (1 - s distance) ** -weight. The
    contour is a hyperbola through the saddle point c, bent as the steepest descent is there: the
    integrand hardly turns on it, however many draws there are (Rice 1980). Sums of a smooth
    function that falls to 0 at both ends converge at once.
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
    found, first = 0.0, math.inf
    for at in _PATH:
        s = c + bend * (np.cosh(at) - 1) + 1j * width * np.sinh(at)
        along = bend * np.sinh(at) + 1j * width * np.cosh(at)
        heights = np.exp(-np.log(1 - s[:, None] * distance) @ weight) / s * along
        if not at[0]:
            first = abs(heights[0])
            heights[0] /= 2
        found += float(heights.imag.sum())
        if abs(heights[-1]) < _NO_HEIGHT * first:
            break
    return found * _STEP / math.pi


def _crossing(
    p: Callable[[float], float], low: float, high: float, near: Sequence[float] = ()
) -> float:
    """Where a p value falls to the level from `low` to `high`, tried first at `near`.

    An end where it is below the level at `low` already, or above it at `high` still.
    """
    p = cache(p)
    high -= 1e-9 * (high - low)
    for at in near:
        if low < at < high:
            low, high = (at, high) if p(at) > LEVEL else (low, at)
    if p(low) <= LEVEL:
        return low
    if p(high) > LEVEL:
        return high
    return float(brentq(lambda at: p(at) - LEVEL, low, high, xtol=1e-9))
