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
from scipy.stats import binomtest, norm

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
    return Estimate(count / n, n, *_score_interval(count / n, n), count)


def _score_interval(rate: float, n: int) -> tuple[float, float]:
    z2 = _Z**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return (0.0 if rate == 0 else centre - half), (1.0 if rate == 1 else centre + half)


def bootstrap_mean(values: ArrayLike, seed: int) -> Estimate:
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


def clustered_mean(values: ArrayLike, seed: int) -> Estimate:
    """The mean of similarities where each prompt has as many answers: `[answers, prompts]`.

    With the interval of `clustered_rate` where every answer is right or wrong, and otherwise that
    of `bootstrap_mean` over the prompts' means.

    Raises:
        ValueError: as `bootstrap_mean`.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.size and np.isin(found, (0, 1)).all():
        return replace(clustered_rate(found.sum(axis=0).astype(int), len(found)), count=None)
    return bootstrap_mean(found.mean(axis=0), seed)


def clustered_difference(ours: ArrayLike, theirs: ArrayLike, seed: int) -> Estimate:
    """The mean of a method's similarities less another's, both `[answers, prompts]`.

    With the interval of `paired_difference` where every answer is right or wrong, and otherwise
    that of `bootstrap_mean`; how many answers a prompt has may differ.

    Raises:
        ValueError: as `bootstrap_mean`; the prompts are not as many.
    """
    a, b = (np.asarray(one, dtype=np.float64) for one in (ours, theirs))
    differences = a.mean(axis=0) - b.mean(axis=0)
    if differences.size and all(np.isin(one, (0, 1)).all() for one in (a, b)):
        return paired_difference(differences)
    return bootstrap_mean(differences, seed)


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


def clustered_rate(events: ArrayLike, answers: int) -> Estimate:
    """The rate of an event where each prompt has as many answers, of as many models.

    Answers to one prompt are no independent draws, so `n` is the number of prompts, and the
    interval is Wilson's of the mean rate at that n. It is never too narrow for that: a prompt's
    share of events varies most, between prompts, where all of its answers agree. `count` is given
    where they do.

    Args:
        events: How many of a prompt's answers had the event.
        answers: How many answers each prompt has.

    Raises:
        ValueError: there is no prompt, or a count is not between 0 and `answers`.
    """
    counts = np.asarray(events, dtype=np.int64)
    if counts.size == 0 or answers < 1 or counts.min() < 0 or counts.max() > answers:
        raise ValueError(f"A rate needs prompts with 0 to {answers} events; got {counts.tolist()}.")
    if np.isin(counts, (0, answers)).all():
        return wilson(int((counts > 0).sum()), counts.size)
    rate = int(counts.sum()) / (answers * counts.size)
    return Estimate(rate, counts.size, *_score_interval(rate, counts.size))


def paired_difference(differences: ArrayLike) -> Estimate:
    """The mean difference of two rates on the same prompts, with a 95 % interval.

    Agresti and Min's interval (2005): Wald's after half a prompt is added to each of the four ways
    in which two yes/no outcomes can fall. It has a width where no prompt differs too. Where a
    prompt has several answers, its difference is that of its shares of events.

    Args:
        differences: One a prompt, in [-1, 1].

    Raises:
        ValueError: there is none, or one is out of range.
    """
    found = np.asarray(differences, dtype=np.float64)
    if found.size == 0 or not (np.abs(found) <= 1).all():
        raise ValueError("A difference of rates needs at least one prompt, each in [-1, 1].")
    n, total = found.size + 2, float(found.sum())
    squares = float((found**2).sum()) + 1
    half = _Z * math.sqrt(max(0.0, squares - total**2 / n)) / n
    low, high = max(-1.0, total / n - half), min(1.0, total / n + half)
    return Estimate(float(found.mean()), found.size, low, high)


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

    The maximum over `references` of `1 - distance / length of the longer text`: the distance after
    lower-casing and collapsing whitespace, the length as written, both like the benchmark's own
    script and lmms-eval. A similarity below 0.5 counts 0. Two empty texts are equal: 1.

    Raises:
        ValueError: `references` is empty.
    """
    if not references:
        raise ValueError("ANLS needs at least one reference.")
    best = max(_similarity(answer, text) for text in references)
    return best if best >= 0.5 else 0.0


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a.upper()), len(b.upper()))
    return 1 - levenshtein(_normalise(a), _normalise(b)) / longer if longer else 1.0


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
    dense: Sequence[int],
    pruned: Sequence[int],
    restored: Sequence[int],
    seed: int,
    answers: int = 1,
) -> tuple[float, float] | None:
    """The paired bootstrap interval of RSR over attack successes on the same prompts.

    Each outcome says whether the attack by a prompt succeeded; where runs by several calibration
    seeds are pooled, in how many of `answers` it did, all three out of as many. Prompts are
    resampled 10,000 times, each with its three outcomes, so that a prompt's answers stay together.
    Among those drawn from are half a prompt that was lost and restored and half a prompt that was
    lost for good, as Agresti and Min (2005) add to paired differences: without them the interval
    has no width where all or none were restored, and is too narrow near that. Resamples in which
    pruning did not raise ASR have no RSR and are left out; None where they are more than 5 %.

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
    added = np.array([[0, 0], [answers, answers], [0, answers]])  # restored, and not
    patterns = np.concatenate([patterns, added], axis=1)
    weights = np.concatenate([counts, [0.5, 0.5]])
    draws = np.random.default_rng(seed).multinomial(len(dense), weights / weights.sum(), RESAMPLES)
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
class PermutationTest:
    """The mean outcome of a less that of b, how many prompts tell them apart, two-sided p."""

    difference: float
    differing: int
    p: float


def paired_exact(a: ArrayLike, b: ArrayLike) -> PermutationTest:
    """The exact permutation test of events that two methods had on the same prompts (Fisher 1935).

    A method may have several draws (of a random control), and a draw's answers to a prompt in all
    runs are one cluster. Under the null hypothesis a prompt's outcomes could as well have come
    from any draw of either method, so the sum of a's is one of as many outcomes of every prompt,
    drawn without replacement; `p` is twice the smaller tail of its exact distribution. With one
    draw of each this is the sign-flip test, and with one run as well McNemar's.

    Args:
        a: In how many runs the event was seen, `[draws, prompts]` integers.
        b: Of the other method, from as many runs; its number of draws may be another.

    Raises:
        ValueError: the prompts are not as many, or there is no draw.
    """
    ours, theirs = (np.asarray(one, dtype=np.int64) for one in (a, b))
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"A paired test needs the same prompts; got {ours.shape}, {theirs.shape}.")
    if not len(ours) or not len(theirs):
        raise ValueError("A paired test needs a draw of each method.")
    both = np.sort(np.concatenate([ours, theirs]), axis=0)  # [draws of both, prompts]
    telling = both[0] < both[-1]
    outcomes, counts = np.unique(both[:, telling], axis=1, return_counts=True)
    chances = np.ones(1)  # of a's sum over the telling prompts, which is its index
    for values, count in zip(outcomes.T, counts, strict=True):
        chances = np.convolve(chances, _of_several(_sums(values, len(ours)), int(count)))
    total = int(ours[:, telling].sum())
    tails = chances[: total + 1].sum(), chances[total:].sum()
    difference = float(ours.mean() - theirs.mean()) if ours.size else 0.0
    return PermutationTest(difference, int(telling.sum()), min(1.0, 2 * float(min(tails))))


def _sums(values: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """The chances of every sum of `count` of the values, drawn without replacement."""
    ways = np.zeros((count + 1, int(values.sum()) + 1))  # [how many drawn, their sum]
    ways[0, 0] = 1
    for value in values.tolist():
        drawn = np.roll(ways[:-1], value, axis=1)  # no sum wraps: the last place is all of them
        ways[1:] += drawn
    chances: NDArray[np.float64] = ways[count] / math.comb(len(values), count)
    return chances


def _of_several(chances: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The chances of the sum of `count` draws, by squaring; without loss in the tails."""
    found, power = np.ones(1), chances
    while count:
        if count & 1:
            found = np.convolve(found, power)
        count >>= 1
        power = np.convolve(power, power) if count else power
    return found


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
