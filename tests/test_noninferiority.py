"""Limits of a mean rise against brute force, and how often they promise too much."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import beta, binom, multinomial, norm, t

from regraft.evaluation.noninferiority import (
    LEVEL,
    MOST_PROMPTS,
    Rises,
    exact_p,
    gaffke_limit,
    gaffke_p,
    mean_rise,
    prompts_needed,
    score,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import false_pass

TOO_MANY = 0.999  # of all seeds a simulation that keeps 5 % stays below this quantile


def rises(more: int, less: int, n: int) -> Rises:
    """Yes/no outcomes of which so many come, so many go, and the others stay."""
    before = [0] * more + [1] * less + [0] * (n - more - less)
    after = [1] * more + [0] * less + [0] * (n - more - less)
    return Rises.of(before, after, range(n))


def allowed(draws: int) -> float:
    return float(binom.ppf(TOO_MANY, draws, LEVEL)) / draws


@pytest.mark.parametrize("cell", [(3, 1, 20), (0, 4, 9), (5, 5, 10), (0, 0, 7), (12, 30, 100)])
@pytest.mark.parametrize("margin", [-0.2, 0.02, 0.1, 0.5])
def test_the_score_is_that_at_the_likeliest_chances_with_the_margin(
    cell: tuple[int, int, int], margin: float
) -> None:
    more, less, n = cell

    def unlikely(less_often: float) -> float:
        chances = np.array([less_often + margin, less_often, 1 - 2 * less_often - margin])
        counts = np.array([more, less, n - more - less])
        logs = np.log(np.maximum(chances, 1e-300), where=counts > 0, out=np.zeros(3))
        return -float((counts * logs).sum())

    low, high = max(0, -margin), (1 - margin) / 2
    found = minimize_scalar(
        unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    )
    best = min((low, high, found.x), key=unlikely)
    error = math.sqrt(n * (2 * best + margin - margin**2))
    expected = (more - less - n * margin) / error
    assert float(score(more, less, n, margin)) == pytest.approx(expected, rel=1e-4)


def test_nothing_differs_and_nothing_may() -> None:
    assert float(score(0, 0, 5, 0)) == 0
    assert exact_p(0, 0, 5, 0) == 1


@pytest.mark.parametrize(
    "more, less, n, margin",
    [(0, 0, 8, 0.2), (1, 2, 12, 0.1), (2, 5, 15, 0.05), (0, 6, 14, 0.0), (3, 3, 20, 0.3)],
)
def test_the_exact_p_is_the_most_over_all_chances(
    more: int, less: int, n: int, margin: float
) -> None:
    cells = [(b, c) for b in range(n + 1) for c in range(n - b + 1)]
    seen = float(score(more, less, n, margin))
    extreme = [cell for cell in cells if float(score(*cell, n, margin)) <= seen + 1e-9]
    counts = np.array([(b, c, n - b - c) for b, c in extreme])

    def chance(less_often: float) -> float:
        rest = 1 - 2 * less_often - margin
        return float(multinomial.pmf(counts, n, [less_often + margin, less_often, rest]).sum())

    brute = max(map(chance, np.linspace(0, (1 - margin) / 2, 401)))
    found = exact_p(more, less, n, margin)
    assert brute - 1e-9 <= found <= brute + 1e-3


@pytest.mark.parametrize("n", [5, 30, 59, 400])
def test_where_no_prompt_differs_the_limit_is_the_rule_of_three(n: int) -> None:
    expected = 1 - LEVEL ** (1 / n)
    found = rises(0, 0, n).mean(0.05)
    assert found.high == pytest.approx(expected, abs=1e-5)
    assert found.low == pytest.approx(-expected, abs=1e-5)


@pytest.mark.parametrize("fewest, margin", [(59, 0.05), (149, 0.02)])
def test_how_few_prompts_can_pass(fewest: int, margin: float) -> None:
    assert exact_p(0, 0, fewest, margin) <= LEVEL < exact_p(0, 0, fewest - 1, margin)


@pytest.mark.parametrize("count, n", [(0, 12), (3, 40), (39, 40), (40, 40)])
def test_gaffkes_limit_of_zeros_and_ones_is_clopper_pearsons(count: int, n: int) -> None:
    values = np.repeat([1.0, 0.0], [count, n - count])
    expected = 1.0 if count == n else beta.ppf(1 - LEVEL, count + 1, n - count)
    assert gaffke_limit(values, n, 1.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("most", [1.0, 1.7])
def test_gaffkes_p_is_the_chance_under_random_weights(most: float) -> None:
    random = np.random.default_rng(0)
    values = random.uniform(-1, 1, 15)
    weights = random.dirichlet(np.ones(16), 200_000)
    means = weights @ np.append(values, most)
    for margin in np.quantile(means, [0.05, 0.5, 0.97]):
        simulated = float((means >= margin).mean())
        assert gaffke_p(values, 15, most, float(margin)) == pytest.approx(simulated, abs=0.005)


@pytest.mark.parametrize("count, n", [(0, 1), (0, 58), (3, 400), (5, 20_000), (300_000, 10**6)])
def test_gaffkes_p_is_exact_however_far_from_the_limit(count: int, n: int) -> None:
    values = np.repeat([1.0, 0.0], [count, n - count])
    for margin in (1e-6, 1e-4, 0.01, 0.29, 0.3001, 0.9, 0.9999):
        expected = beta.sf(margin, count + 1, n - count)
        assert gaffke_p(values, n, 1.0, margin) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("n, off", [(20_000, 0.03), (50_000, 0.02), (1_000_000, 0.005)])
def test_gaffkes_limit_of_many_scores_is_the_normal_one(n: int, off: float) -> None:
    values = np.random.default_rng(0).normal(0.01, 0.2, n).clip(-1, 1).round(3)
    width = norm.ppf(1 - LEVEL) * values.std() / math.sqrt(n)
    found = (gaffke_limit(values, n, 1.0) - values.mean()) / width
    assert 1 < found < 1 + off


@pytest.mark.parametrize("n", [1, 5, 58, 150])
def test_every_outcome_has_limits_and_a_number_that_decides(n: int) -> None:
    """58 prompts of which 3 came, at a margin of 5 points, once had none."""
    few = [k for k in (0, 1, 3, n) if k <= n]
    cells = {(b, c) for b in few for c in few if b + c <= n}
    for more, less in cells:
        for margin in (0.02, 0.05):
            found = rises(more, less, n)
            rise = found.mean(margin)
            assert -1 <= rise.low <= rise.value <= rise.high <= 1
            needed = prompts_needed([found], margin)
            assert needed is None or 0 < needed * n <= MOST_PROMPTS


def test_gaffkes_p_at_the_ends() -> None:
    values = np.full(6, 0.25)
    assert gaffke_p(values, 6, 1.0, 0.25) == pytest.approx(1)
    assert gaffke_p(values, 6, 1.0, 0.2) == pytest.approx(1)
    assert gaffke_limit(np.ones(3), 3, 1.0) == 1
    alone = gaffke_p(values, 6, 1.0, 0.5)  # the weight of the worst must be a third: beta(1, 6)
    assert alone == pytest.approx(beta.sf(1 / 3, 1, 6), abs=1e-6)


CELLS = st.integers(1, 40).flatmap(
    lambda n: st.integers(0, n).flatmap(
        lambda more: st.tuples(st.just(more), st.integers(0, n - more), st.just(n))
    )
)


@settings(max_examples=30)
@given(CELLS, st.sampled_from([0.02, 0.05, 0.1, 0.3]))
@example((25, 6, 35), 0.2841)  # the p value is 5 % on either side of the margin
@example((6, 25, 35), -0.2841)
def test_limits_say_what_p_values_say(cell: tuple[int, int, int], margin: float) -> None:
    more, less, n = cell
    found = rises(more, less, n).mean(margin)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (found.high < margin) == (exact_p(more, less, n, margin) <= LEVEL)
    assert (found.low > margin) == (exact_p(less, more, n, -margin) <= LEVEL)
    mirrored = rises(less, more, n).mean(-margin)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-6)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_prompts_changes_nothing(scores: list[float], random: object) -> None:
    pairs = list(zip(scores, reversed(scores), range(len(scores)), strict=True))
    mixed = pairs.copy()
    random.shuffle(mixed)  # type: ignore[attr-defined]
    ours, theirs = (Rises.of(*zip(*one, strict=True)).mean(0.05) for one in (pairs, mixed))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


def test_prompts_that_ask_the_same_are_one_unit_with_the_mean_over_prompts() -> None:
    before, after = [0, 0, 0, 1, 1], [1, 1, 0, 0, 1]
    found = Rises.of(before, after, ["a", "a", "a", "b", "c"])
    assert not found.yes_no
    assert found.prompts == 5
    assert found.values.tolist() == pytest.approx([2 * 3 / 5, -3 / 5, 0])
    assert found.mean(0.1).value == pytest.approx(np.mean(after) - np.mean(before))
    assert not Rises.of([0.5, 0.3], [0.5, 0.3], "ab").yes_no, "equal scores are no yes or no"
    assert found.most == pytest.approx(3 * 3 / 5)


def test_copies_of_a_prompt_tell_no_more_than_one() -> None:
    before, after = np.array([0, 1, 0, 0] * 20), np.array([1, 1, 0, 0] * 20)
    once = Rises.of(before, after, range(80)).repeated(1)
    four = [np.repeat(one, 4) for one in (before, after, np.arange(80))]
    copied = Rises.of(*four).mean(0.1)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert copied.n == 80


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rises.of([], [], []),
        lambda: Rises.of([0], [2], ["a"]),
        lambda: Rises(np.array([0.5]), 1.0, True, 1),
        lambda: Rises(np.array([1.5]), 1.2, False, 1),
        lambda: mean_rise([]),
    ],
)
def test_what_is_no_rise(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_parts_count_the_same_however_large() -> None:
    small, large = rises(2, 1, 10), rises(10, 10, 200)
    one, other = small.mean(0.05), large.mean(0.05)
    found = mean_rise([one, other])
    assert found.value == pytest.approx((one.value + other.value) / 2)
    assert found.high - found.value == pytest.approx(
        math.hypot(one.high - one.value, other.high - other.value) / 2
    )
    assert found.n == 210
    assert found.error == pytest.approx(math.hypot(one.error, other.error) / 2)
    assert mean_rise([one]) == one


@pytest.mark.parametrize("more, less, n", [(4, 2, 60), (2, 2, 100), (0, 0, 30), (14, 2, 60)])
def test_as_many_prompts_as_are_said_to_decide_do_so_four_times_in_five(
    more: int, less: int, n: int
) -> None:
    margin = 0.1
    times = prompts_needed([rises(more, less, n)], margin)
    assert times is not None
    wanted = math.ceil(times * n)
    random = np.random.default_rng(0)
    chances = [more / n, less / n, 1 - (more + less) / n]
    decided = 0
    for b, c, _ in random.multinomial(wanted, chances, 100):
        better = more - less < margin * n
        cell = (b, c, wanted, margin) if better else (c, b, wanted, -margin)
        decided += exact_p(*map(int, cell[:3]), cell[3]) <= LEVEL
    assert decided >= 70
    if more:
        assert decided <= 95


@pytest.mark.parametrize("margin", [0.03, 0.05, 0.1])
def test_if_no_prompt_differs_the_number_needed_is_the_least_that_decides(margin: float) -> None:
    least = math.ceil(math.log(LEVEL) / math.log(1 - margin))
    assert exact_p(0, 0, least, margin) <= LEVEL < exact_p(0, 0, least - 1, margin)
    for n in (1, 2, 3, 4, 5, 8, least - 1):
        times = prompts_needed([rises(0, 0, n)], margin)
        assert times is not None and math.ceil(times * n) == least


def test_no_number_of_prompts_decides_at_the_margin() -> None:
    assert prompts_needed([rises(6, 1, 100)], 0.05) is None
    assert prompts_needed([rises(501, 1, 10_000)], 0.05 + 1e-7) is None


@settings(max_examples=30)
@given(CELLS, st.sampled_from([0.05, 0.1]))
def test_more_of_the_same_decides_more(cell: tuple[int, int, int], margin: float) -> None:
    more, less, n = cell
    assume(n > 3 and 0 < more < n)
    few, many = (rises(more, less, n).repeated(k) for k in (1, 3))
    assert many.high <= few.high + 1e-6
    assert many.low >= few.low - 1e-6


# The promise: where the compressed model is worse by the margin, at most 5 % of samples pass.


def test_at_the_margin_at_most_one_in_twenty_passes_whatever_the_rates() -> None:
    """Exact: every possible outcome of 50 prompts, weighted by its chance."""
    for margin in (0.05, 0.1):
        least = false_pass.passing(50, margin)
        assert 0.035 < false_pass.worst(least, 50, margin) <= LEVEL
        rates = dict(false_pass.on_grid(least, 50, margin))
        assert set(rates) == set(false_pass.BASES)
        assert max(rates.values()) <= LEVEL


def test_the_search_for_what_passes_finds_all_of_it() -> None:
    least = false_pass.passing(12, 0.3)
    for worse in range(13):
        for better in range(13 - worse):
            found = worse < len(least) and better >= least[worse]
            assert found == false_pass.by_exact(worse, better, 12, 0.3)


def test_the_normal_distribution_would_pass_more() -> None:
    """Why the exact one is taken."""
    least = false_pass.passing(100, 0.1, false_pass.by_normal)
    assert false_pass.worst(least, 100, 0.1) > 0.055


@pytest.mark.parametrize("name", false_pass.DRAWN)
def test_scores_and_clusters_at_the_margin(name: str) -> None:
    rate = false_pass.drawn(false_pass.DRAWN[name], 150, 0.05, draws=500)
    assert rate <= allowed(500)


@pytest.mark.parametrize("name", false_pass.DRAWN)
def test_what_is_drawn_is_worse_by_the_margin(name: str) -> None:
    found = false_pass.DRAWN[name](np.random.default_rng(0), 200_000, 0.05)
    assert float(found.values.mean()) == pytest.approx(0.05, abs=0.003)


def test_a_t_interval_would_pass_too_many_where_few_lose_all() -> None:
    """Why Gaffke's limit is taken."""
    random = np.random.default_rng(0)
    draws, n, passed = 2000, 50, 0
    for _ in range(draws):
        values = false_pass.DRAWN["scores: few prompts lose all"](random, n, 0.05).values
        high = values.mean() + t.ppf(1 - LEVEL, n - 1) * values.std(ddof=1) / math.sqrt(n)
        passed += high < 0.05
    assert passed / draws > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("margin", false_pass.MARGINS)
@pytest.mark.parametrize("n", false_pass.PROMPTS)
def test_the_whole_grid_of_rates(n: int, margin: float) -> None:
    least = false_pass.passing(n, margin)
    assert false_pass.worst(least, n, margin) <= LEVEL
    assert max(rate for _, rate in false_pass.on_grid(least, n, margin)) <= LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("name", false_pass.DRAWN)
@pytest.mark.parametrize("n", [50, 200, 500])
def test_scores_and_clusters_at_length(n: int, name: str) -> None:
    rate = false_pass.drawn(false_pass.DRAWN[name], n, 0.05, draws=1000)
    assert rate <= allowed(1000)
