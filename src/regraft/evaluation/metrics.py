"""The numbers of an evaluation: rates with intervals, ANLS, RSR and paired tests.

Everything here is pure: plain sequences in, small frozen results out. Rates are fractions in
[0, 1]; intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, binomtest, norm

from regraft.evaluation.results import Estimate

RESAMPLES = 10_000
_DRAWS_AT_ONCE = 2**22  # 32 MiB of indices
_TAIL = (0.025, 0.975)
_Z = float(norm.ppf(_TAIL[1]))


def wilson(count: int, n: int) -> Estimate:
    """The rate `count / n` with its Wilson score interval (Wilson 1927).

    Raises:
        ValueError: unless 0 <= count <= n and n >= 1.
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"A rate needs 0 <= count <= n and n >= 1; got count {count}, n {n}.")
    rate, z2 = count / n, _Z**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    low = 0.0 if count == 0 else centre - half
    high = 1.0 if count == n else centre + half
    return Estimate(rate, n, low, high, count)


def bootstrap_mean(values: Sequence[float], seed: int) -> Estimate:
    """The mean of `values` with its percentile bootstrap interval (10,000 resamples).

    Raises:
        ValueError: `values` is empty or holds a value that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError("A mean needs at least one value, all of them finite.")
    low, high = resampled(sample.size, seed, lambda rows: sample[rows].mean(axis=1))
    return Estimate(float(sample.mean()), sample.size, low, high)


def mean_similarity(values: Sequence[float], seed: int) -> Estimate:
    """The mean of similarities in [0, 1], with Wilson's interval where each is 0 or 1.

    Otherwise see `bootstrap_mean`, whose interval has no width where all values are equal.

    Raises:
        ValueError: as `bootstrap_mean`.
    """
    if values and set(values) <= {0, 1}:
        return replace(wilson(round(sum(values)), len(values)), count=None)
    return bootstrap_mean(values, seed)


def macro_average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, each counting the same, however large its sample.

    Their distances to the ends of their intervals add up in squares, as standard errors do (MOVER,
    Zou and Donner 2008); `n` is the sum. One estimate is its own average.

    Raises:
        ValueError: there is none.
    """
    if len(estimates) < 2:
        (only,) = estimates
        return only
    k = len(estimates)
    value = sum(one.value for one in estimates) / k
    below = math.hypot(*(one.value - one.low for one in estimates)) / k
    above = math.hypot(*(one.high - one.value for one in estimates)) / k
    return Estimate(value, sum(one.n for one in estimates), value - below, value + above)


def resampled(
    n: int, seed: int, statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]]
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic (10,000 resamples).

    Args:
        n: How many are drawn from, and drawn.
        seed: Of the draws.
        statistic: From resamples, indices `[k, n]`, to their values `[k]`.
    """
    return _percentiles(np.concatenate([statistic(rows) for rows in _resamples(n, seed)]))


def clustered_rate(events: Sequence[int], answers: int, seed: int) -> Estimate:
    """The rate of an event where each prompt has as many answers, of as many models.

    Answers to one prompt are no independent draws, so `n` is the number of prompts. The interval is
    the percentile bootstrap's over prompts (10,000 resamples); where all answers to each prompt
    agree, as one answer does, it is Wilson's and `count` is given.

    Args:
        events: How many of a prompt's answers had the event.
        answers: How many answers each prompt has.
        seed: Of the bootstrap.

    Raises:
        ValueError: there is no prompt, or a count is not between 0 and `answers`.
    """
    counts = np.asarray(events, dtype=np.int64)
    if counts.size == 0 or answers < 1 or counts.min() < 0 or counts.max() > answers:
        raise ValueError(f"A rate needs prompts with 0 to {answers} events; got {list(events)}.")
    if np.isin(counts, (0, answers)).all():
        return wilson(int((counts > 0).sum()), counts.size)
    levels, sizes = np.unique(counts, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.size, sizes / counts.size, RESAMPLES)
    whole = answers * counts.size
    low, high = _percentiles(draws @ levels / whole)
    return Estimate(int(counts.sum()) / whole, counts.size, low, high)


def _resamples(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield `RESAMPLES` rows of `n` indices drawn with replacement, a bounded block at a time."""
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, RESAMPLES, block):
        yield generator.integers(n, size=(min(block, RESAMPLES - start), n))


def _percentiles(values: ArrayLike) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values, dtype=np.float64), _TAIL)
    return float(low), float(high)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, in [0, 1] (Biten et al. 2019).

    The maximum over `references` of `1 - distance / length of the longer text`, after lower-casing
    and collapsing whitespace; a similarity below 0.5 counts 0. Two empty texts are equal: 1.

    Raises:
        ValueError: `references` is empty.
    """
    if not references:
        raise ValueError("ANLS needs at least one reference.")
    best = max(_similarity(_normalise(answer), _normalise(text)) for text in references)
    return best if best >= 0.5 else 0.0


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return 1 - levenshtein(a, b) / longer if longer else 1.0


def levenshtein(a: str, b: str) -> int:
    """Edit distance: the fewest insertions, deletions and substitutions that turn `a` into `b`.

    Myers' bit-vector algorithm (1999) in Hyyrö's form: one column of the table is two integers of
    `len(a)` bits, the places where it steps up and where it steps down.
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for letter in b:
        match = places.get(letter, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right_up = down | ~(diagonal | up)
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = right_up << 1 | 1
        up = (right_down << 1 | ~(diagonal | right_up)) & every
        down = right_up & diagonal & every
    return distance


@dataclass(frozen=True)
class Recovery:
    """The restored safety rate (RSR) as a fraction, and its case in words.

    `value` is None where pruning did not raise ASR, since nothing was lost then.
    """

    value: float | None
    verdict: str


def rsr(full: float, pruned: float, restored: float) -> Recovery:
    """RSR = (ASR_pruned - ASR_restored) / (ASR_pruned - ASR_full), Li et al. 2025.

    The three ASRs may be fractions or per cent, as long as all are the same; RSR is a fraction:
    1 is complete recovery.

    Raises:
        ValueError: an ASR is not finite.
    """
    if not all(map(math.isfinite, (full, pruned, restored))):
        raise ValueError(f"RSR needs finite ASRs; got {full}, {pruned}, {restored}.")
    if pruned <= full:
        return Recovery(None, "undefined: pruning did not raise ASR")
    value = (pruned - restored) / (pruned - full)
    if restored > pruned:
        return Recovery(value, "negative")
    if restored == pruned:
        return Recovery(value, "none")
    if restored > full:
        return Recovery(value, "partial")
    if restored == full:
        return Recovery(value, "complete")
    return Recovery(value, "beyond the dense model")


def bootstrap_rsr(
    dense: Sequence[int], pruned: Sequence[int], restored: Sequence[int], seed: int
) -> tuple[float, float] | None:
    """The paired bootstrap interval of RSR over attack successes on the same prompts.

    Each outcome says whether the attack by a prompt succeeded; where runs by several calibration
    seeds are pooled, in how many of them it did, all three out of as many. Prompts are resampled
    10,000 times, each with its three outcomes, so that a prompt's answers stay together. Resamples
    in which pruning did not raise ASR have no RSR and are left out; None where they are more than
    5 %.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    if not len(dense) == len(pruned) == len(restored) >= 1:
        raise ValueError(
            "A paired bootstrap needs the same prompts, at least one; got "
            f"{len(dense)}, {len(pruned)} and {len(restored)} outcomes."
        )
    outcomes = np.array([dense, pruned, restored], dtype=np.int64)
    # A prompt is one of few patterns (8 for one run), so a resample of prompts is one multinomial
    # draw of their counts.
    patterns, counts = np.unique(outcomes, axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(dense), counts / counts.sum(), RESAMPLES)
    in_dense, in_pruned, in_restored = patterns @ draws.T
    lost = in_pruned - in_dense
    defined = lost > 0
    if defined.mean() < 0.95:
        return None
    return _percentiles((in_pruned - in_restored)[defined] / lost[defined])


@dataclass(frozen=True)
class PairedTest:
    """McNemar's test: outcomes true only for a, only for b, and the two-sided p value."""

    only_a: int
    only_b: int
    p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """McNemar's exact test of two yes/no outcomes on the same prompts (McNemar 1947).

    Under the null hypothesis each discordant prompt is a fair coin, so `p` is the two-sided
    binomial tail; 1 where no prompt is discordant.

    Raises:
        ValueError: the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"A paired test needs the same prompts; got {len(a)} and {len(b)}.")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    p = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return PairedTest(only_a, only_b, p)


def cohen_kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Agreement of two yes/no judges beyond chance (Cohen 1960): 1 is perfect, 0 is chance.

    None where both say the same of every answer: chance then agrees as well.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    if not len(a) == len(b) >= 1:
        raise ValueError(f"Two judges need the same answers; got {len(a)} and {len(b)}.")
    n = len(a)
    yes_a, yes_b = sum(a) / n, sum(b) / n
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


@dataclass(frozen=True)
class SignFlipTest:
    """The sum of the differences a - b, how many prompts differ, and the two-sided p value."""

    total: int
    differing: int
    p: float


def paired_exact(differences: Sequence[int]) -> SignFlipTest:
    """The exact sign-flip test of paired outcomes that are pooled over runs (Fisher 1935).

    A prompt's answers in all runs are one cluster. Under the null hypothesis that a and b are
    exchangeable, its difference is as likely as its opposite, so the sum is one of fair signs, and
    `p` the probability that it is as far from 0 as the one found; 1 where no prompt differs. With
    one run this is McNemar's exact test.

    Args:
        differences: One a prompt: the runs in which the event was seen for a, less those for b.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.int64))
    sizes = sizes[sizes > 0]
    total = sum(int(d) for d in differences)
    if total == 0:
        return SignFlipTest(0, len(sizes), 1.0)
    unit = int(np.gcd.reduce(sizes))
    # n signs of one size k sum up to k * (2 * heads - n), so their sum plus n * k is 2 * k * heads.
    chances = np.ones(1)  # that half of the sum, shifted to start at 0, is its index
    for size, count in zip(*np.unique(sizes // unit, return_counts=True), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spread)
    # |total| is reached from index (whole + |total|) / 2 on, and on the other side as often.
    start = (int(sizes.sum()) + abs(total)) // (2 * unit)
    return SignFlipTest(total, len(sizes), min(1.0, 2 * float(chances[start:].sum())))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p values (1979), in the order given.

    Rejecting those below a level keeps the chance of any false rejection among all of them below
    it, however the tests depend on each other.

    Raises:
        ValueError: a value is not in [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p values lie between 0 and 1; got {list(p_values)}.")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return tuple(adjusted)


def per_ten_thousand(restored: int, pruned: int) -> float:
    """Restored weights per 10,000 pruned ones.

    Raises:
        ValueError: no weight was pruned.
    """
    if pruned < 1:
        raise ValueError("No weight was pruned, so there is no share of restored ones.")
    return 10_000 * restored / pruned
