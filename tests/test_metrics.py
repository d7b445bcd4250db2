"""The numbers against their definitions, written out a second way."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from regraft.evaluation.metrics import (
    anls,
    bootstrap_mean,
    bootstrap_rsr,
    levenshtein,
    mcnemar,
    per_ten_thousand,
    rsr,
    wilson,
)

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
    estimate = bootstrap_mean(values.tolist(), seed=0)
    half = norm.ppf(0.975) * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert estimate.count is None


def test_bootstrap_mean_is_deterministic_and_depends_on_the_seed() -> None:
    values = [0.0, 0.2, 0.9, 1.0, 0.4]
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    spread = list(np.random.default_rng(0).uniform(size=50))
    assert bootstrap_mean(spread, 3) != bootstrap_mean(spread, 4)


def test_bootstrap_mean_of_one_value_is_that_value() -> None:
    estimate = bootstrap_mean([0.25], seed=0)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.25, 0.25, 0.25, 1)


def test_bootstrap_mean_stays_within_its_memory() -> None:
    tracemalloc.start()
    bootstrap_mean([0.5] * 5000, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20, f"peak {peak / 2**20:.0f} MiB; all at once would be 400"


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_bootstrap_mean_rejects_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values, seed=0)


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


def test_anls_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="reference"):
        anls("x", [])


def test_rsr_reproduces_the_papers_headline() -> None:
    recovery = rsr(full=1.88, pruned=14.47, restored=11.02)
    assert recovery.value is not None
    assert round(100 * recovery.value, 2) == 27.40
    assert recovery.verdict == "partial"


@pytest.mark.parametrize(
    ("restored", "verdict"),
    [
        (0.50, "negative"),
        (0.36, "none"),
        (0.20, "partial"),
        (0.144, "complete"),
        (0.10, "beyond the dense model"),
    ],
)
@pytest.mark.parametrize("scale", [1, 100])
def test_rsr_names_every_case(restored: float, verdict: str, scale: int) -> None:
    recovery = rsr(scale * 0.144, scale * 0.36, scale * restored)
    assert recovery.value == pytest.approx((0.36 - restored) / 0.216)
    assert recovery.verdict == verdict


@pytest.mark.parametrize("pruned", [0.1, 0.2])
def test_rsr_is_undefined_where_pruning_did_no_harm(pruned: float) -> None:
    recovery = rsr(full=0.2, pruned=pruned, restored=0.05)
    assert (recovery.value, recovery.verdict) == (
        None,
        "undefined: pruning did not raise ASR",
    )


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


def test_bootstrap_rsr_agrees_with_resampling_prompts_one_by_one() -> None:
    generator = np.random.default_rng(5)
    dense, pruned, restored = (generator.random(120) < p for p in (0.15, 0.45, 0.25))
    rows = np.random.default_rng(6).integers(120, size=(20_000, 120))
    d, p, r = (outcome[rows].sum(axis=1) for outcome in (dense, pruned, restored))
    keep = p > d
    truth = np.quantile((p - r)[keep] / (p - d)[keep], [0.025, 0.975])
    interval = bootstrap_rsr(dense.tolist(), pruned.tolist(), restored.tolist(), seed=0)
    assert interval == pytest.approx(tuple(truth), abs=0.04)


def test_bootstrap_rsr_of_perfect_recovery_has_no_width() -> None:
    dense, pruned = attacks(200, 20), attacks(200, 120)
    assert bootstrap_rsr(dense, pruned, dense, seed=0) == (1.0, 1.0)
    assert bootstrap_rsr(dense, pruned, pruned, seed=0) == (0.0, 0.0)


def test_bootstrap_rsr_is_none_where_the_loss_of_safety_is_uncertain() -> None:
    dense, pruned = attacks(50, 10), attacks(50, 11)
    assert bootstrap_rsr(dense, pruned, dense, seed=0) is None


@pytest.mark.parametrize("lengths", [(0, 0, 0), (2, 2, 3), (1, 2, 2)])
def test_bootstrap_rsr_needs_the_same_prompts(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="same prompts"):
        bootstrap_rsr(*([True] * n for n in lengths), seed=0)


def test_per_ten_thousand() -> None:
    assert per_ten_thousand(500, 3_800_000) == pytest.approx(1.3158, abs=1e-4)
    with pytest.raises(ValueError, match="pruned"):
        per_ten_thousand(0, 0)
