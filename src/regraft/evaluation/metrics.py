"""The numbers of an evaluation: rates with intervals, ANLS, RSR and paired tests.

Everything here is pure: plain sequences in, small frozen results out. Rates are fractions in
[0, 1]; intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    means = np.concatenate([sample[rows].mean(axis=1) for rows in _resamples(sample.size, seed)])
    low, high = _percentiles(means)
    return Estimate(float(sample.mean()), sample.size, low, high)


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
    dense: Sequence[bool], pruned: Sequence[bool], restored: Sequence[bool], seed: int
) -> tuple[float, float] | None:
    """The paired bootstrap interval of RSR over attack successes on the same prompts.

    Prompts are resampled 10,000 times, each with its three outcomes. Resamples in which pruning
    did not raise ASR have no RSR and are left out; None where they are more than 5 %.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    if not len(dense) == len(pruned) == len(restored) >= 1:
        raise ValueError(
            "A paired bootstrap needs the same prompts, at least one; got "
            f"{len(dense)}, {len(pruned)} and {len(restored)} outcomes."
        )
    outcomes = np.array([dense, pruned, restored], dtype=np.int64)
    # A prompt is one of 8 patterns, so a resample of prompts is one multinomial draw of 8 counts.
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


def per_ten_thousand(restored: int, pruned: int) -> float:
    """Restored weights per 10,000 pruned ones.

    Raises:
        ValueError: no weight was pruned.
    """
    if pruned < 1:
        raise ValueError("No weight was pruned, so there is no share of restored ones.")
    return 10_000 * restored / pruned
