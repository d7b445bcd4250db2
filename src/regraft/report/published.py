"""Figures that others published, and the intervals that their numbers of prompts imply.

Papers on pruned models give rates without n or intervals. Where the number of prompts is known,
both follow, and are marked as computed here wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from regraft.evaluation.metrics import RESAMPLES, macro_average, wilson
from regraft.evaluation.results import Estimate


@dataclass(frozen=True)
class PublishedRow:
    """One model of a publication.

    Attributes:
        model: As a recipe with `models` names it.
        pruning: The recipe's name of the pruning; "" for the dense model.
        method: The recipe's name of the way of realigning; "" for the pruned model itself.
        asr: Data set -> attack success rate, in [0, 1].
        mean_asr: Mean over the data sets, in [0, 1]; None where nothing is published.
        rsr: Restored safety rate as a fraction.
        per_ten_thousand: Restored weights per 10,000 pruned ones.
        utility: Data set -> score, in [0, 1].
        checked: Whether the figures follow from each other: rates of whole numbers of prompts,
            their mean and the RSR. Others are second-hand.
    """

    model: str
    pruning: str = ""
    method: str = ""
    asr: Mapping[str, float] = field(default_factory=dict)
    mean_asr: float | None = None
    rsr: float | None = None
    per_ten_thousand: float | None = None
    utility: Mapping[str, float] = field(default_factory=dict)
    checked: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is of."""
        return self.model, self.pruning, self.method


@dataclass(frozen=True)
class Published:
    """All figures of a publication that are set beside a run's own.

    `prompts` is how many prompts each data set of attacks has, `spearman` the rank correlation of
    total Ships and lost safety over `spearman_n` models, None where none is published.
    """

    source: str
    prompts: Mapping[str, int]
    rows: tuple[PublishedRow, ...]
    spearman: float | None = None
    spearman_n: int | None = None

    def of(self, model: str, pruning: str, method: str) -> PublishedRow | None:
        """The row of one model, if there is one."""
        return next((one for one in self.rows if one.key == (model, pruning, method)), None)


def attack_rates(row: PublishedRow, prompts: Mapping[str, int]) -> dict[str, Estimate]:
    """Each published ASR with Wilson's interval at the data set's number of prompts.

    The count is the whole number of prompts that is nearest to the rate.
    """
    return {
        name: wilson(round(rate * prompts[name]), prompts[name])
        for name, rate in row.asr.items()
        if name in prompts
    }


def mean_attack_rate(row: PublishedRow, prompts: Mapping[str, int]) -> Estimate | None:
    """The published mean ASR with its 95 % interval; None where there is none.

    By MOVER of the rates where each is published. Of the mean alone, Wilson's at the number of all
    prompts: the variance of a mean of rates is largest where they are equal, so that this is not
    narrower as long as the data sets are of about one size.
    """
    if row.mean_asr is None:
        return None
    rates = attack_rates(row, prompts)
    if rates and rates.keys() == row.asr.keys():
        return replace(macro_average(list(rates.values())), value=row.mean_asr, count=None)
    n = sum(prompts.values())
    if not n:
        return None
    return replace(wilson(round(row.mean_asr * n), n), value=row.mean_asr, count=None)


def rsr_interval(
    dense: Sequence[Estimate],
    pruned: Sequence[Estimate],
    restored: Sequence[Estimate],
    seed: int = 0,
) -> tuple[float, float] | None:
    """A 95 % interval of the RSR of mean rates that were published without their answers.

    Each rate is drawn 10,000 times from the Beta distribution of Jeffreys' interval (Brown et al.
    2001) of its count, independently: which prompts the models share is not published, and pairing
    would narrow the interval. Draws in which pruning did not raise the mean have no RSR; None where
    they are more than 5 %.

    Args:
        dense: Rates with counts, one a data set, in one order for all three.
        pruned: See `dense`.
        restored: See `dense`.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)

    def drawn(rates: Sequence[Estimate]) -> NDArray[np.float64]:
        counts = np.array([[rate.count or 0, rate.n] for rate in rates], dtype=np.float64)
        successes, n = counts[:, :1] + 0.5, counts[:, 1:] + 1
        found = generator.beta(successes, n - successes, (len(rates), RESAMPLES))
        return np.asarray(found.mean(axis=0), dtype=np.float64)

    full, cut, back = drawn(dense), drawn(pruned), drawn(restored)
    lost = cut - full
    if (lost > 0).mean() < 0.95:
        return None
    low, high = np.quantile((cut - back)[lost > 0] / lost[lost > 0], (0.025, 0.975))
    return float(low), float(high)


def published_rsr_interval(published: Published, row: PublishedRow) -> tuple[float, float] | None:
    """Of a row with an RSR, where all three models' rates are published by data set; else None."""
    dense = published.of(row.model, "", "")
    pruned = published.of(row.model, row.pruning, "")
    if row.rsr is None or dense is None or pruned is None:
        return None
    rates = [attack_rates(one, published.prompts) for one in (dense, pruned, row)]
    names = list(rates[0])
    if not names or any(list(one) != names for one in rates):
        return None
    full, cut, back = ([one[name] for name in names] for one in rates)
    return rsr_interval(full, cut, back)
