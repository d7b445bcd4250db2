"""Two evaluations of the same prompts: whether they can be compared, and paired tests.

McNemar's test, tests over seeds, Holm's correction and Cohen's kappa, of methods or of judges.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regraft.errors import RegraftError
from regraft.evaluation.results import Answer, EvalResult

_ASKED = (
    "harmful", "category", "instruction", "request", "image", "reference", "scored_by", "group"
)  # fmt: skip


def on_the_same(first: str, ours: EvalResult, name: str, theirs: EvalResult) -> EvalResult:
    """The other's result, its suites addressed as the first's, wherever their files lay.

    Raises:
        RegraftError: it is by another judge or on other prompts.
    """
    cannot = f"{name} and {first} cannot be compared"
    if ours.judge != theirs.judge:
        raise RegraftError(
            f"{cannot}: one was judged by {theirs.judge}, the other by {ours.judge}. Evaluate both "
            "with the same --judge."
        )
    asked = {answer.id: answer for answer in ours.answers}
    if odd := sorted(asked.keys() ^ {answer.id for answer in theirs.answers}):
        raise RegraftError(
            f"{cannot}: the prompt {odd[0]!r} ({len(odd)} in all) was answered by only one of "
            f"them. The one is on {theirs.suite}, the other on {ours.suite}."
        )
    for answer in theirs.answers:
        for field in _ASKED:
            said, other = getattr(asked[answer.id], field), getattr(answer, field)
            if said != other:
                raise RegraftError(
                    f"{cannot}: the prompt {answer.id!r} has another {field} in each, {other!r} "
                    f"and {said!r}. Evaluate both on the same data."
                )
        if not _same_image(asked[answer.id], answer):
            raise RegraftError(
                f"{cannot}: the image {answer.image} of the prompt {answer.id!r} is another file "
                "in each. Evaluate both on the same data."
            )
    called = {answer.suite: asked[answer.id].suite for answer in theirs.answers}
    return replace(
        theirs,
        suite=ours.suite,
        by_suite={called.get(suite, suite): rates for suite, rates in theirs.by_suite.items()},
        answers=tuple(replace(a, suite=called[a.suite]) for a in theirs.answers),
    )


def _same_image(one: Answer, other: Answer) -> bool:
    """False only where both digests are known."""
    return one.image_digest == other.image_digest or not (one.image_digest and other.image_digest)


def asking(answer: Answer) -> Hashable:
    """What its prompt asks: equal for those that ask the same in other words, or by another image.

    That is the group, or the request, which the image shows, or else the instruction together with
    its image. Prompts that ask the same are no independent draws.
    """
    if answer.group:
        return "group", answer.suite, answer.group
    asked = " ".join((answer.request or answer.instruction).split()).casefold()
    return "prompt", asked, "" if answer.request else answer.image_digest or answer.image or ""


def cohen_kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Agreement of two yes/no judges beyond chance (Cohen 1960): 1 is perfect, 0 is chance.

    None where both give all answers one and the same verdict: chance is then certain to agree.

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
    """The mean count of a less that of b (in runs, no rate), prompts that differ, two-sided p."""

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
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p values lie between 0 and 1; got {list(p_values)}.")
    order = p.argsort(kind="stable")
    steps = np.minimum(1, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return tuple(adjusted.tolist())
