"""Compare evaluations of the same prompts: check that they match, and paired tests.

Exact permutation test (McNemar's for single runs), Holm's correction and Cohen's kappa, for methods
or judges.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial.polynomial import polypow
from numpy.typing import ArrayLike, NDArray

from regraft.disk.parsing import shown
from regraft.errors import RegraftError
from regraft.evaluation.results import Answer, EvalResult

_PROMPT_FIELDS = (
    *("harmful", "category", "system", "instruction", "request", "image", "reference"),
    *("scored_by", "group"),
)


def on_the_same(first: str, ours: EvalResult, name: str, theirs: EvalResult) -> EvalResult:
    """Return `theirs` with its suites named as in `ours`, which may have other paths.

    `first` and `name` are what errors call the two.

    Raises:
        RegraftError: they have different judges or different prompts.
    """
    cannot = f"{name} and {first} cannot be compared"
    if ours.judge != theirs.judge:
        raise RegraftError(
            f"{cannot}: one was judged by {theirs.judge}, the other by {ours.judge}. Evaluate both "
            "with the same --judge."
        )
    by_id = {answer.id: answer for answer in ours.answers}
    if unmatched := sorted(by_id.keys() ^ {answer.id for answer in theirs.answers}):
        raise RegraftError(
            f"{cannot}: the prompt {unmatched[0]!r} ({len(unmatched)} in all) was answered by only "
            f"one of them. The one is on {theirs.suite}, the other on {ours.suite}."
        )
    for answer in theirs.answers:
        for field in _PROMPT_FIELDS:
            our_value, their_value = getattr(by_id[answer.id], field), getattr(answer, field)
            if our_value != their_value:
                raise RegraftError(
                    f"{cannot}: the prompt {answer.id!r} has another {field} in each, "
                    f"{shown(their_value)} and {shown(our_value)}. Evaluate both on the same data."
                )
        known = {by_id[answer.id].image_digest, answer.image_digest} - {""}
        if len(known) > 1:
            raise RegraftError(
                f"{cannot}: the image {answer.image} of the prompt {answer.id!r} is another file "
                "in each. Evaluate both on the same data."
            )
    our_suite = {answer.suite: by_id[answer.id].suite for answer in theirs.answers}
    return replace(
        theirs,
        suite=ours.suite,
        by_suite={our_suite.get(suite, suite): rates for suite, rates in theirs.by_suite.items()},
        answers=tuple(replace(a, suite=our_suite[a.suite]) for a in theirs.answers),
    )


def asking(answer: Answer) -> Hashable:
    """Identify what a prompt asks, in whatever words or image: by group, request or instruction.

    The instruction counts together with its image; a request is what the image shows. Prompts that
    ask the same are not independent draws.
    """
    if answer.group:
        return "group", answer.suite, answer.group
    text = " ".join((answer.request or answer.instruction).split()).casefold()
    return "prompt", text, "" if answer.request else answer.image_digest or answer.image or ""


def cohen_kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Agreement of two yes/no judges beyond chance (Cohen 1960): 1 is perfect, 0 is chance.

    None if both give all answers one and the same verdict: agreement by chance is then certain.

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
    """Mean count of a minus that of b (in runs, not a rate), prompts that differ, two-sided p."""

    difference: float
    differing: int
    p: float


def paired_exact(a: ArrayLike, b: ArrayLike) -> PermutationTest:
    """Exact permutation test of an event under two methods on the same prompts (Fisher 1935).

    A method may have several draws (of a random control); a draw's answers to a prompt in all runs
    form one cluster. Under the null hypothesis a prompt's outcomes could have come from any draw of
    either method, so a's total is a sum over prompts of as many outcomes as a has draws, taken
    without replacement; `p` is twice the smaller tail of its exact distribution. With one draw of
    each this is the sign-flip test; with a single run as well, McNemar's.

    Args:
        a: In how many runs the event occurred, `[draws, prompts]` integers.
        b: The same for the other method, over as many runs; it may have more or fewer draws.

    Raises:
        ValueError: the numbers of prompts differ, or a method has no draw.
    """
    ours, theirs = (np.asarray(one, dtype=np.int64) for one in (a, b))
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"A paired test needs the same prompts; got {ours.shape}, {theirs.shape}.")
    if not len(ours) or not len(theirs):
        raise ValueError("A paired test needs a draw of each method.")
    both = np.sort(np.concatenate([ours, theirs]), axis=0)  # [draws of both, prompts]
    differing = both[0] < both[-1]
    outcomes, counts = np.unique(both[:, differing], axis=1, return_counts=True)
    distribution = np.ones(1)  # of a's total over the differing prompts: [total] -> probability
    for values, count in zip(outcomes.T, counts, strict=True):
        alike = polypow(_sums(values, len(ours)), int(count), maxpower=None)
        distribution = np.convolve(distribution, alike)  # of a sum, as products of polynomials are
    total = int(ours[:, differing].sum())
    tails = distribution[: total + 1].sum(), distribution[total:].sum()
    difference = float(ours.mean() - theirs.mean()) if ours.size else 0.0
    return PermutationTest(difference, int(differing.sum()), min(1.0, 2 * float(min(tails))))


def _sums(values: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Distribution of the sum of `count` of the values, drawn without replacement."""
    ways = np.zeros((count + 1, int(values.sum()) + 1))  # [how many drawn, their sum]
    ways[0, 0] = 1
    for value in values.tolist():
        drawn = np.roll(ways[:-1], value, axis=1)  # nothing wraps: the last index is the full sum
        ways[1:] += drawn
    distribution: NDArray[np.float64] = ways[count] / math.comb(len(values), count)
    return distribution


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p values (1979), in the order given.

    Rejecting those below a level keeps the probability of any false rejection below it, however the
    tests depend on each other.

    Raises:
        ValueError: a value is not in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p values lie between 0 and 1; got {list(p_values)}.")
    order = p.argsort(kind="stable")
    steps = np.minimum(1, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return tuple(adjusted.tolist())
