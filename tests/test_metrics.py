"""The numbers against their definitions, written out a second way."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from regraft.evaluation.metrics import (
    bootstrap_mean,
    clustered_difference,
    clustered_mean,
    clustered_rate,
    macro_average,
    paired_difference,
    rsr,
    rsr_interval,
    wilson,
)
from regraft.evaluation.pairing import holm, paired_exact
from regraft.evaluation.results import Estimate
from regraft.evaluation.similarity import anls, levenshtein
from truth import mcnemar, paired_rsr

words = st.text(alphabet="abc é", max_size=12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipys(pair: tuple[int, int]) -> None:
    count, n = pair
    estimate = wilson(count, n)
    truth = binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert (estimate.value, estimate.n, estimate.count) == (count / n, n, count)
    assert (estimate.low, estimate.high) == pytest.approx((truth.low, truth.high), abs=1e-12)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


@pytest.mark.parametrize(("count", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_rejects_impossible_counts(count: int, n: int) -> None:
    with pytest.raises(ValueError, match="count"):
        wilson(count, n)


def test_bootstrap_mean_agrees_with_the_normal_interval_on_a_large_sample() -> None:
    values = np.random.default_rng(1).uniform(size=2000)
    estimate = bootstrap_mean(values.tolist())
    half = norm.ppf(0.975) * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert estimate.count is None


def test_bootstrap_mean_of_one_value_is_that_value() -> None:
    estimate = bootstrap_mean([0.25])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.25, 0.25, 0.25, 1)


def test_bootstrap_mean_stays_within_its_memory() -> None:
    tracemalloc.start()
    bootstrap_mean([0.5] * 5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20, f"peak {peak / 2**20:.0f} MiB; all at once would be 400"


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_bootstrap_mean_rejects_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def table_distance(a: str, b: str) -> int:
    """The textbook recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=300)
@given(words, words)
def test_levenshtein_equals_the_textbook_table(a: str, b: str) -> None:
    assert levenshtein(a, b) == table_distance(a, b)


def test_levenshtein_beyond_a_machine_word() -> None:
    generator = np.random.default_rng(0)
    a, b = ("".join(generator.choice(list("abcd "), size=n)) for n in (300, 217))
    assert levenshtein(a, b) == table_distance(a, b)


def test_levenshtein_of_a_long_and_a_short_text_takes_little_memory() -> None:
    """Bits for each of a million letters would take minutes."""
    long = "ab" * 50_000
    tracemalloc.start()
    assert levenshtein(long, "ba") == len(long) - 2
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Paris", ["paris"], 1.0),
        ("  New\n York ", ["new york"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["dog", "mitten"], 1 - 1 / 6),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),
        ("", [""], 1.0),
        ("", ["something"], 0.0),
    ],
)
def test_anls_by_hand(answer: str, references: list[str], expected: float) -> None:
    assert anls(answer, references) == pytest.approx(expected)


def test_rsr_reproduces_the_papers_headline() -> None:
    found = rsr(full=1.88, pruned=14.47, restored=11.02)
    assert found is not None
    assert round(100 * found, 2) == 27.40


@pytest.mark.parametrize("restored", [0.50, 0.36, 0.20, 0.144, 0.10])
@pytest.mark.parametrize("scale", [1, 100])
def test_rsr_is_the_share_of_the_rise(restored: float, scale: int) -> None:
    found = rsr(scale * 0.144, scale * 0.36, scale * restored)
    assert found == pytest.approx((0.36 - restored) / 0.216)


@pytest.mark.parametrize("pruned", [0.1, 0.2])
def test_rsr_is_undefined_where_pruning_did_no_harm(pruned: float) -> None:
    assert rsr(full=0.2, pruned=pruned, restored=0.05) is None


def test_rsr_rejects_nan() -> None:
    with pytest.raises(ValueError, match="finite"):
        rsr(0.1, math.nan, 0.2)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_the_two_sided_coin_test(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    test = mcnemar(a, b)
    assert test.only_a == pairs.count((True, False))
    assert test.only_b == pairs.count((False, True))
    n, fewer = test.only_a + test.only_b, min(test.only_a, test.only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    assert test.p == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        mcnemar([True], [True, False])


def attacks(n: int, successes: int) -> list[bool]:
    return [i < successes for i in range(n)]


def test_rsr_interval_agrees_with_resampling_prompts_one_by_one() -> None:
    generator = np.random.default_rng(5)
    dense, pruned, restored = (generator.random(120) < p for p in (0.15, 0.45, 0.25))
    rows = np.random.default_rng(6).integers(120, size=(20_000, 120))
    d, p, r = (outcome[rows].sum(axis=1) for outcome in (dense, pruned, restored))
    keep = p > d
    truth = np.quantile((p - r)[keep] / (p - d)[keep], [0.025, 0.975])
    interval = paired_rsr(dense.tolist(), pruned.tolist(), restored.tolist())
    assert interval == pytest.approx(tuple(truth), abs=0.04)


def test_rsr_interval_of_perfect_recovery_has_a_width() -> None:
    dense, pruned = attacks(200, 20), attacks(200, 120)
    assert paired_rsr(dense, pruned, dense) == pytest.approx((0.98, 1.02), abs=0.001)
    assert paired_rsr(dense, pruned, pruned) == pytest.approx((-0.02, 0.02), abs=0.001)
    few = paired_rsr(attacks(60, 2), attacks(60, 12), attacks(60, 2))
    assert few is not None and few[0] < 0.9 < 1.0 < few[1]


@pytest.mark.parametrize(
    ("n", "lost", "true"), [(60, 0.1, 0.9), (250, 0.05, 0.95), (250, 0.3, 0.5)]
)
def test_the_interval_of_rsr_covers_the_truth(n: int, lost: float, true: float) -> None:
    """19 times of 20, or nearly so: with few lost prompts it did in less than half."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(150):
        dense = generator.random(n) < 0.1
        gone = (generator.random(n) < lost) & ~dense
        left = dense | (gone & (generator.random(n) > true))
        found = paired_rsr(dense.tolist(), (dense | gone).tolist(), left.tolist())
        if found is not None:
            covered.append(found[0] - 1e-9 <= true <= found[1] + 1e-9)
    assert len(covered) > 100
    assert np.mean(covered) > 0.9


def test_clustered_means_of_right_and_wrong_answers_are_rates() -> None:
    right = np.array([[1, 0, 1, 1], [1, 1, 0, 1]])
    found = clustered_mean(right)
    assert found == replace(clustered_rate([2, 1, 1, 2], 2), count=None)
    same = clustered_difference(right, right)
    assert same == paired_difference([0.0] * 4)
    assert same.low < 0 < same.high
    one = clustered_mean(right[:1])
    assert one == clustered_mean([1, 0, 1, 1]) == replace(wilson(3, 4), count=None)


def test_clustered_means_of_similarities_are_resampled_by_prompt() -> None:
    a, b = np.random.default_rng(0).random((2, 3, 50))
    assert clustered_mean(a) == bootstrap_mean(a.mean(axis=0))
    difference = a.mean(axis=0) - b[:2].mean(axis=0)
    assert clustered_difference(a, b[:2]) == bootstrap_mean(difference)
    right = np.round(b)  # one of the two right or wrong, the other in between
    difference = a.mean(axis=0) - right.mean(axis=0)
    assert clustered_difference(a, right) == bootstrap_mean(difference)
    assert clustered_difference(right, a) == bootstrap_mean(-difference)


def test_a_macro_average_adds_up_the_distances_to_the_limits_in_squares() -> None:
    one, other = Estimate(0.5, 100, 0.2, 0.6), Estimate(0.7, 10, 0.3, 0.94)
    found = macro_average([one, other])
    assert (found.value, found.n) == (pytest.approx(0.6), 110)
    assert (found.low, found.high) == pytest.approx((0.6 - 0.5 / 2, 0.6 + 0.26 / 2))
    assert macro_average([one]) is one


def test_the_interval_of_rsr_covers_a_truth_just_below_0() -> None:
    """One prompt in a hundred changes sides, as with random weights: an end at 0 covers 70 %."""
    n, generator = 150, np.random.default_rng(0)
    true = (0.01 - 2 * 0.01 * (0.8 * 0.94)) / (0.8 * 0.06)  # of the flips more are attacks
    covered = []
    for _ in range(100):
        dense = generator.random(n) < 0.2
        pruned = dense | (generator.random(n) < 0.06)
        back = pruned ^ (generator.random(n) < 0.01)
        found = paired_rsr(dense.tolist(), pruned.tolist(), back.tolist())
        if found is not None:
            covered.append(found[0] <= true <= found[1])
    assert len(covered) > 80
    assert np.mean(covered) > 0.9


def test_rsr_interval_is_none_where_the_loss_of_safety_is_uncertain() -> None:
    dense, pruned = attacks(50, 10), attacks(50, 11)
    assert paired_rsr(dense, pruned, dense) is None
    assert paired_rsr([0], [1], [0]) is paired_rsr([0, 0], [1, 1], [0, 1]) is None
    six, fifteen_others = attacks(100, 6), [6 <= i < 21 for i in range(100)]
    assert paired_rsr(six, fifteen_others, six) is None
    for suites in (1, 4, 10):  # what is added must not look like a rise
        assert rsr_interval([[(0, 0, 0)] * 100] * suites) is None


outcomes = st.tuples(*[st.integers(0, 1)] * 3)


@given(st.lists(outcomes, min_size=1, max_size=60))
def test_an_rsr_has_an_interval_where_the_rise_is_above_0(rows: list[tuple[int, ...]]) -> None:
    found = rsr_interval([rows])
    rise = paired_difference([pruned - dense for dense, pruned, _ in rows])
    assert (found is not None) == (rise.low > 0)
    if found is not None:
        value = rsr(*np.mean(rows, axis=0).tolist())
        assert value is not None
        assert found[0] - 1e-9 <= value <= found[1] + 1e-9


@given(st.lists(outcomes, min_size=20, max_size=60), st.integers(2, 6))
def test_the_mean_of_equal_data_sets_has_the_rsr_of_one(
    rows: list[tuple[int, ...]], suites: int
) -> None:
    one, several = rsr_interval([rows]), rsr_interval([rows] * suites)
    if one is not None:
        value = rsr(*np.mean(rows, axis=0).tolist())
        assert several is not None
        assert value is not None
        assert several[0] - 1e-9 <= value <= several[1] + 1e-9
        assert several[1] - several[0] < one[1] - one[0], "more prompts, in all"


@pytest.mark.parametrize(("gained", "lost", "restored", "more"), [(4, 15, 8, 0), (2, 9, 9, 9)])
def test_the_interval_of_rsr_is_fiellers_where_the_rise_is_small(
    gained: int, lost: int, restored: int, more: int
) -> None:
    """By the roots of its quadratic, over a sample with a quarter of a prompt of each outcome."""
    counts = {
        (1, 0, 0): gained, (0, 1, 0): restored, (0, 1, 1): lost - restored, (1, 1, 0): more,
        (1, 1, 1): 10, (0, 0, 0): 100 - 10 - gained - lost - more,
    }  # fmt: skip
    rows = [outcomes for outcomes, count in counts.items() for _ in range(count)]
    assert rsr_interval([rows]) == pytest.approx(interval_by_roots([rows]), rel=1e-6)
    strata = [rows, rows[::2]]
    assert rsr_interval(strata) == pytest.approx(interval_by_roots(strata), rel=1e-6)


def interval_by_roots(strata: list[list[tuple[int, ...]]]) -> list[float]:
    """Of the mean over data sets, which share the prompts that are added."""
    added, count = [*itertools.product((0, 1), repeat=3)], len(strata)
    means, moments = np.zeros(2), np.zeros((2, 2))
    for rows in strata:
        weights = np.array([*([1.0] * len(rows)), *([0.25 / count] * len(added))])
        dense, pruned, back = np.array([*rows, *added]).T
        changes = np.array([pruned - back, pruned - dense])
        means += np.average(changes, axis=1, weights=weights) / count
        moments += np.cov(changes, aweights=weights, ddof=0) / weights.sum() / count**2
    (part, whole), ((a, shared), (_, b)), z2 = means, moments, 1.959964**2
    return sorted(np.roots([whole**2 - z2 * b, 2 * (z2 * shared - part * whole), part**2 - z2 * a]))


def test_rsr_interval_of_several_runs_keeps_the_answers_to_a_prompt_together() -> None:
    """Three runs that agree tell no more than one; three that do not, as if resampled by hand."""
    generator = np.random.default_rng(5)
    dense, pruned, restored = (generator.random(120) < p for p in (0.15, 0.45, 0.25))
    one = paired_rsr(dense.tolist(), pruned.tolist(), restored.tolist())
    tripled = ((3 * x.astype(int)).tolist() for x in (dense, pruned, restored))
    thrice = paired_rsr(*tripled, 3)
    assert thrice == pytest.approx(one)
    runs = [(generator.random((3, 120)) < p).sum(axis=0) for p in (0.15, 0.45, 0.25)]
    rows = np.random.default_rng(6).integers(120, size=(20_000, 120))
    d, p, r = (outcome[rows].sum(axis=1) / 360 for outcome in runs)
    truth = np.quantile(((p - r) / (p - d))[p > d], [0.025, 0.975])
    interval = paired_rsr(*(x.tolist() for x in runs), answers=3)
    assert interval == pytest.approx(tuple(truth), abs=0.04)


def test_clustered_rate_of_answers_that_agree_is_wilsons() -> None:
    assert clustered_rate([0, 1, 1, 0, 1], 1) == wilson(3, 5)
    assert clustered_rate([0, 4, 4, 0, 4], 4) == wilson(3, 5)
    assert clustered_rate([0, 0, 0], 5) == wilson(0, 3)
    unequal = clustered_rate([2, 0], [2, 1])  # an answer counts as one, however many a prompt has
    assert (unequal.value, unequal.n, unequal.count) == (pytest.approx(2 / 3), 2, None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300))
def test_clustered_rate_counts_prompts_and_not_answers(events: list[int]) -> None:
    estimate = clustered_rate(events, 3)
    n, rate = len(events), sum(events) / 3 / len(events)
    assert (estimate.value, estimate.n) == (pytest.approx(rate), n)
    for end in (estimate.low, estimate.high):  # where the score test just rejects (Wilson 1927)
        if 0 < end < 1:
            assert (rate - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-4)
    assert (estimate.count is None) == bool(set(events) - {0, 3})


def test_clustered_rate_of_more_events_is_bounded_higher() -> None:
    """One refusal in one of three runs allows no lower rate than none at all."""
    none, one = (clustered_rate([k] + [0] * 199, 3) for k in (0, 1))
    assert one.high > none.high > 0.018


def test_clustered_rate_of_unequal_prompts_covers_the_rate() -> None:
    """All answers to a prompt agree, which makes rates vary most."""
    generator, rate = np.random.default_rng(3), 0.3
    answers = generator.integers(1, 5, size=60)
    found = [clustered_rate(answers * (generator.random(60) < rate), answers) for _ in range(800)]
    assert 0.93 < np.mean([one.low <= rate <= one.high for one in found]) < 0.975
    assert {one.n for one in found} == {60}
    widths = [one.high - one.low for one in found]
    equal = wilson(18, 60)
    assert min(widths) > 0
    assert np.mean(widths) > equal.high - equal.low, "unequal prompts tell less than equal ones"


@pytest.mark.parametrize(
    ("events", "answers"),
    [([], 1), ([2], 1), ([-1], 2), ([0], 0), ([1, 2], [1, 1]), ([0, 0], [1, 0])],
)
def test_clustered_rate_rejects_impossible_counts(
    events: list[int], answers: int | list[int]
) -> None:
    with pytest.raises(ValueError, match="events"):
        clustered_rate(events, answers)


@given(*(st.integers(0, 40) for _ in range(4)))
@example(0, 1, 0, 0)  # an interval that would end beyond 1
@example(0, 0, 1, 0)
def test_paired_difference_is_agresti_and_mins(both: int, a: int, b: int, neither: int) -> None:
    """By the table of outcomes, as they write it."""
    if not both + a + b + neither:
        return
    found = paired_difference([0.0] * (both + neither) + [1.0] * a + [-1.0] * b)
    n, p12, p21 = both + a + b + neither + 2, a + 0.5, b + 0.5
    centre = (p12 - p21) / n
    half = norm.ppf(0.975) * math.sqrt((p12 + p21) - (p12 - p21) ** 2 / n) / n
    assert found.value == pytest.approx((a - b) / (n - 2))
    assert found.low == pytest.approx(max(-1, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1, centre + half), abs=1e-9)
    assert found.low < found.value < found.high or abs(found.value) == 1


def test_paired_difference_covers_what_it_should() -> None:
    """Rare refusals, of which most samples see none that differ."""
    draws = np.random.default_rng(0).random((2000, 200, 1))
    outcomes = (draws < 0.01).astype(int) - ((draws >= 0.01) & (draws < 0.014)).astype(int)
    found = [paired_difference(one[:, 0].tolist()) for one in outcomes]
    assert sum(one.low <= 0.006 <= one.high for one in found) / len(found) > 0.94


@pytest.mark.parametrize("differences", [[], [1.5], [math.nan]])
def test_paired_difference_rejects_what_is_none(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="difference"):
        paired_difference(differences)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_paired_exact_of_one_run_is_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    test, truth = paired_exact([a], [b]), mcnemar(a, b)
    assert test.difference * max(1, len(pairs)) == pytest.approx(truth.only_a - truth.only_b)
    assert test.differing == truth.only_a + truth.only_b
    assert test.p == pytest.approx(truth.p, rel=1e-9)


@given(
    st.integers(1, 2).flatmap(
        lambda ours: st.tuples(
            st.just(ours),
            st.integers(1, 3).flatmap(
                lambda theirs: st.lists(
                    st.tuples(*[st.integers(0, 3)] * (ours + theirs)), min_size=1, max_size=4
                )
            ),
        )
    )
)
def test_paired_exact_equals_all_draws_written_out(case: tuple[int, list[tuple[int, ...]]]) -> None:
    draws, prompts = case
    values = np.array(prompts).T  # [draws of both, prompts]
    test = paired_exact(values[:draws], values[draws:])
    found = int(values[:draws].sum())
    ways = [list(itertools.combinations(prompt, draws)) for prompt in prompts]
    sums = [sum(map(sum, chosen)) for chosen in itertools.product(*ways)]
    tails = sum(one <= found for one in sums), sum(one >= found for one in sums)
    assert test.p == pytest.approx(min(1, 2 * min(tails) / len(sums)), rel=1e-9)
    assert test.differing == sum(len(set(prompt)) > 1 for prompt in prompts)


def test_paired_exact_against_more_draws_is_fair() -> None:
    """A method that is one more draw is called better no oftener than it should, nor worse."""
    generator, called = np.random.default_rng(5), [0, 0]
    for _ in range(1500):
        seen = (generator.random((6, 100)) < 0.05).astype(int)
        test = paired_exact(seen[:1], seen[1:])
        if test.p < 0.05:
            called[test.difference > 0] += 1
    assert max(called) / 1500 < 0.035  # of at most 2.5 % each


def test_paired_exact_of_many_prompts_against_exact_fractions() -> None:
    """No underflow: 1500 prompts, by integers that do not round."""
    differences = np.random.default_rng(3).integers(-3, 4, size=1500).tolist()
    differences += [1] * 60
    counts = {0: 1}
    for size in filter(None, map(abs, differences)):
        after: dict[int, int] = {}
        for at, ways in counts.items():
            for step in (-size, size):
                after[at + step] = after.get(at + step, 0) + ways
        counts = after
    tail = sum(ways for at, ways in counts.items() if abs(at) >= abs(sum(differences)))
    truth = float(Fraction(tail, 2 ** sum(d != 0 for d in differences)))
    assert 0 < truth < 1
    a, b = np.maximum(differences, 0), np.maximum(-np.array(differences), 0)
    assert paired_exact([a], [b]).p == pytest.approx(truth, rel=1e-9)
    assert paired_exact([[1] * 1000], [[0] * 1000]).p == pytest.approx(2.0**-999)


@pytest.mark.parametrize(("a", "b"), [([[1]], [[1, 0]]), ([1], [1]), (np.zeros((0, 2)), [[1, 0]])])
def test_paired_exact_rejects_what_is_not_paired(a: object, b: object) -> None:
    with pytest.raises(ValueError, match="paired test"):
        paired_exact(a, b)  # type: ignore[arg-type]


def step_down(p_values: list[float], level: float) -> set[int]:
    """Holm's procedure as he gives it: reject the smallest while p <= level / those left."""
    left = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected: set[int] = set()
    while left and p_values[left[0]] <= level / len(left):
        rejected.add(left.pop(0))
    return rejected


p_lists = st.lists(st.integers(0, 1000).map(lambda k: k / 1000), max_size=8)


@given(p_lists, st.integers(1, 96).map(lambda k: k / 97))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], level: float) -> None:
    adjusted = holm(p_values)
    assert {i for i, p in enumerate(adjusted) if p <= level} == step_down(p_values, level)


@given(p_lists, st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_lowers_nothing(p_values: list[float], random: object) -> None:
    adjusted = holm(p_values)
    assert all(raw <= new <= 1 for raw, new in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [new for _, new in pairs] == sorted(adjusted)
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p_values[i] for i in order]) == tuple(adjusted[i] for i in order)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.5])
