"""Published figures: what li-2025.yaml holds, and the intervals computed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import RegraftError
from regraft.evaluation.metrics import macro_average, rsr, rsr_interval, wilson
from regraft.report.published import (
    Published,
    PublishedRow,
    attack_rates,
    mean_attack_rate,
    read_published,
    unpaired_rsr_interval,
)

LI = Path(__file__).parents[1] / "recipes" / "published" / "li-2025.yaml"


# RSR of means over data sets


def test_data_sets_count_the_same_whatever_their_size() -> None:
    """Against resampling prompts one by one, each data set by itself."""
    generator = np.random.default_rng(0)
    strata = [
        [(bool(a < 0.1), bool(a < 0.7), bool(b < 0.5)) for a, b in generator.random((n, 2))]
        for n in (200, 40)
    ]
    values = []
    for _ in range(3000):
        means = np.zeros(3)
        for rows in strata:
            drawn = np.array(rows)[generator.integers(len(rows), size=len(rows))]
            means += drawn.mean(axis=0) / 2
        values.append((means[1] - means[2]) / (means[1] - means[0]))
    found = rsr_interval(strata)
    assert found == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.03)
    pooled = rsr_interval([[row for rows in strata for row in rows]])
    assert pooled is not None
    assert found is not None
    assert found[1] - found[0] > pooled[1] - pooled[0], "the small data set weighs more"


def test_no_data_set_has_no_rsr() -> None:
    for strata in ([], [[]]):
        with pytest.raises(ValueError, match="at least one prompt"):
            rsr_interval(strata)
    assert rsr_interval([[(True, False, False)] * 20]) is None, "pruning raised nothing"


# Published figures


def test_checked_figures_follow_from_whole_numbers_of_prompts() -> None:
    published = read_published(LI)
    assert published.prompts == {"safebench": 500, "ch3ef": 468}
    checked = [row for row in published.rows if row.checked]
    assert len(checked) == 7
    for row in checked:
        for name, rate in row.asr.items():
            n = published.prompts[name]
            assert round(100 * round(rate * n) / n, 2) == pytest.approx(100 * rate), row.key
        assert row.mean_asr == pytest.approx(sum(row.asr.values()) / 2, abs=6e-5), row.key
        dense = published.of(row.model, "", "")
        pruned = published.of(row.model, row.pruning, "")
        if row.rsr is not None and row.mean_asr is not None:
            assert dense is not None
            assert dense.mean_asr is not None
            assert pruned is not None
            assert pruned.mean_asr is not None
            recovered = rsr(dense.mean_asr, pruned.mean_asr, row.mean_asr)
            assert recovered == pytest.approx(row.rsr, abs=5e-5)
    found = {row.key[1:]: row.rsr for row in checked if row.rsr}
    assert found == pytest.approx(
        {
            ("wanda-50", "hsr"): 0.2740,
            ("snip-50", "hsr-snip"): 0.4888,
            ("sparsegpt-50", "hsr-sparsegpt"): 0.3443,
        }
    )


def test_second_hand_figures_imply_the_losses_that_the_paper_names() -> None:
    """Pruned less restored ASR by RSR is what pruning cost: 2.8 to 15.4 points, it says."""
    published = read_published(LI)
    lost = []
    for row in published.rows:
        pruned = published.of(row.model, row.pruning, "")
        if row.rsr is not None and row.mean_asr is not None and row.method == "hsr":
            assert pruned is not None
            assert pruned.mean_asr is not None
            lost.append(100 * (pruned.mean_asr - row.mean_asr) / row.rsr)
    assert len(lost) == 6
    assert min(lost) == pytest.approx(2.8, abs=0.05)
    assert max(lost) == pytest.approx(15.4, abs=0.1)


def test_published_rates_have_the_intervals_of_their_counts() -> None:
    row = PublishedRow(model="m", asr={"a": 11.2, "b": 17.74}, mean_asr=14.47)
    prompts = {"a": 500, "b": 468}
    rates = attack_rates(row, prompts)
    assert rates == {"a": wilson(56, 500), "b": wilson(83, 468)}
    mean, wanted = mean_attack_rate(row, prompts), macro_average([*rates.values()])
    assert mean is not None
    assert (mean.value, mean.low, mean.high, mean.n) == (0.1447, wanted.low, wanted.high, 968)
    assert mean_attack_rate(PublishedRow(model="m"), prompts) is None


@given(st.integers(0, 500), st.integers(0, 500))
def test_a_mean_alone_has_no_narrower_interval_than_its_parts(a: int, b: int) -> None:
    prompts = {"a": 500, "b": 500}
    mean = (a + b) / 1000
    parts = mean_attack_rate(
        PublishedRow(model="m", asr={"a": a / 5, "b": b / 5}, mean_asr=100 * mean), prompts
    )
    alone = mean_attack_rate(PublishedRow(model="m", mean_asr=100 * mean), prompts)
    assert parts is not None
    assert alone is not None
    # MOVER's ends differ from Wilson's of the whole where rates are near 0 or 1: by its centre
    assert alone.high - alone.low >= (parts.high - parts.low) - 2 / 1000


def test_an_rsr_without_answers_has_the_interval_of_independent_rates() -> None:
    """Against binomial draws around the rates: a parametric bootstrap."""
    generator = np.random.default_rng(1)
    counts = {"dense": (7, 11), "pruned": (56, 83), "restored": (45, 61)}
    n = np.array([[500], [468]])
    full, cut, back = (
        (generator.binomial(n, np.array([[c[0]], [c[1]]]) / n, (2, 20_000)) / n).mean(axis=0)
        for c in counts.values()
    )
    wanted = np.quantile((cut - back) / (cut - full), [0.025, 0.975])
    published = read_published(LI)
    names = {"dense": ("", ""), "pruned": ("wanda-50", ""), "restored": ("wanda-50", "hsr")}
    for name, (pruning, method) in names.items():
        row = published.of("qwen2.5-vl", pruning, method)
        assert row is not None
        rates = attack_rates(row, published.prompts).values()
        assert tuple((one.count, one.n) for one in rates) == tuple(
            zip(counts[name], (500, 468), strict=True)
        )
    assert unpaired_rsr_interval(published, row) == pytest.approx(wanted, abs=0.03)


def test_an_rsr_of_no_loss_or_of_means_alone_has_no_interval() -> None:

    def found(dense: Any, pruned: Any, restored: Any) -> tuple[float, float] | None:
        rows = (
            PublishedRow(model="m", **dense),
            PublishedRow(model="m", pruning="p", **pruned),
            PublishedRow(model="m", pruning="p", method="hsr", rsr=50, **restored),
        )
        return unpaired_rsr_interval(Published(source="x", prompts={"a": 100}, rows=rows), rows[2])

    rates = [{"asr": {"a": percent}} for percent in (10, 60, 30)]
    assert found(*rates) is not None
    assert found(*rates[:1] * 3) is None
    small = [{"asr": {"a": percent}} for percent in (10, 19, 12)]
    assert found(*small) is None, "the rise is not significant: one end is unbounded"
    assert found({"mean_asr": 10}, {"mean_asr": 60}, {"mean_asr": 30}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("a: [", "not valid YAML"),
        ("source: x\nrows: []", "rows"),
        ("source: x\nrows: [{model: a, asrs: {}}]", "rows.0.asrs: unknown setting"),
        ("source: x\nrows: [{model: a}, {model: a}]", "two rows are of a"),
        ("source: x\nspearman: 1\nrows: [{model: a}]", "give both of `spearman`"),
    ],
)
def test_bad_files_of_published_figures(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RegraftError, match=message):
        read_published(tmp_path / "x.yaml")
