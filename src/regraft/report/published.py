"""Published figures of other authors, and the intervals that their numbers of prompts imply.

Papers on pruned models give rates without n or intervals. If the number of prompts is known, both
can be computed; wherever they are shown, they are marked as computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from regraft.disk.parsing import read_yaml
from regraft.errors import RegraftError
from regraft.evaluation.metrics import macro_average, ratio_interval, wilson
from regraft.evaluation.results import Estimate
from regraft.settings.base import Settings, explain


def _fraction(percent: float) -> float:
    return percent / 100


Percent = Annotated[float, Field(ge=0, le=100), AfterValidator(_fraction)]


class PublishedRow(Settings):
    """One model of a publication; given in per cent, held as fractions.

    Figures are `checked` if they are consistent: rates of whole numbers of prompts, their mean and
    the RSR. Others are second-hand.
    """

    model: str = Field(min_length=1, description="Its name in the recipe.")
    pruning: str = Field("", description="The pruning's name; none for the dense model.")
    method: str = Field("", description="The name under realign; none for the pruned model.")
    asr: dict[str, Percent] = Field({}, description="ASR of each data set, per cent.")
    mean_asr: Percent | None = Field(None, description="Mean over the data sets, per cent.")
    rsr: Annotated[float, AfterValidator(_fraction)] | None = Field(None, description="Per cent.")
    per_ten_thousand: float | None = Field(None, ge=0, description="Restored per 10,000 pruned.")
    utility: dict[str, Percent] = Field({}, description="Score of each data set, per cent.")
    checked: bool = Field(False, description="Whether the figures are consistent.")

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.pruning, self.method


class Published(Settings):
    """All figures of a publication that are compared with a run's.

    `spearman` is the rank correlation of total Ships and lost safety.
    """

    source: str = Field(min_length=1, description="The publication, and where in it.")
    prompts: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="How many prompts each data set of attacks has."
    )
    rows: tuple[PublishedRow, ...] = Field(min_length=1, description="One per model.")
    spearman: float | None = Field(None, ge=-1, le=1, description="Total Ships, lost safety.")
    spearman_n: int | None = Field(None, ge=3, description="Over how many models.")

    @model_validator(mode="after")
    def _check(self) -> Published:
        keys = [one.key for one in self.rows]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"two rows are of {', '.join(filter(None, twice[0]))}")
        if (self.spearman is None) != (self.spearman_n is None):
            raise ValueError("give both of `spearman` and `spearman_n`, or none")
        return self

    def of(self, model: str, pruning: str, method: str) -> PublishedRow | None:
        return next((one for one in self.rows if one.key == (model, pruning, method)), None)


@dataclass(frozen=True)
class Beside:
    """A published row with the intervals computed here from its numbers of prompts."""

    row: PublishedRow
    asr: Estimate | None
    by_suite: Mapping[str, Estimate]
    rsr_interval: tuple[float, float] | None


def beside(published: Published, model: str, pruning: str, method: str) -> Beside | None:
    """The published figures of one model; None if there are none."""
    row = published.of(model, pruning, method)
    if row is None:
        return None
    return Beside(
        row,
        mean_attack_rate(row, published.prompts),
        attack_rates(row, published.prompts),
        unpaired_rsr_interval(published, row),
    )


def attack_rates(row: PublishedRow, prompts: Mapping[str, int]) -> dict[str, Estimate]:
    """Each published ASR with Wilson's interval for the data set's number of prompts.

    The count is the whole number of prompts nearest to the rate.
    """
    return {
        name: wilson(round(rate * prompts[name]), prompts[name])
        for name, rate in row.asr.items()
        if name in prompts
    }


def mean_attack_rate(row: PublishedRow, prompts: Mapping[str, int]) -> Estimate | None:
    """The published mean ASR with its 95 % interval; None if none is published.

    The interval is MOVER's if all rates are published. For the mean alone it is Wilson's for the
    number of all prompts: the variance of a mean of rates is largest if the rates are equal, so
    that it is not too narrow as long as the data sets have about the same size.
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


def unpaired_rsr_interval(published: Published, row: PublishedRow) -> tuple[float, float] | None:
    """A 95 % interval of a row's RSR; None unless the rates of all three models are published.

    Fieller's, with the mean and variance of every rate from the Beta distribution of Jeffreys'
    interval (Brown et al. 2001) of its count. The rates are taken as independent, since paired
    answers are not published; pairing would narrow the interval. None also if RSR may be unbounded
    (see `ratio_interval`).
    """
    dense = published.of(row.model, "", "")
    pruned = published.of(row.model, row.pruning, "")
    if row.rsr is None or dense is None or pruned is None:
        return None
    rates = [attack_rates(one, published.prompts) for one in (dense, pruned, row)]
    names = list(rates[0])
    if not names or any(list(one) != names for one in rates):
        return None
    (full, of_full), (cut, of_cut), (back, of_back) = map(_mean_and_variance, rates)
    covariance = np.array([[of_cut + of_back, of_cut], [of_cut, of_cut + of_full]])
    return ratio_interval(np.array([cut - back, cut - full]), covariance)


def _mean_and_variance(rates: Mapping[str, Estimate]) -> tuple[float, float]:
    """Mean and variance of the mean over data sets, by Jeffreys' distribution of each rate."""
    counts = np.array([[one.count or 0, one.n] for one in rates.values()], dtype=np.float64)
    n = counts[:, 1] + 1
    each = (counts[:, 0] + 0.5) / n
    return float(each.mean()), float((each * (1 - each) / (n + 1)).sum()) / len(each) ** 2


def read_published(path: Path) -> Published:
    """Read published figures.

    Raises:
        RegraftError: the file is missing, or a field is wrong; the message names each.
    """
    content = read_yaml(path, "Published figures are needed.")
    try:
        return Published.model_validate(content)
    except ValidationError as error:
        raise RegraftError(f"{path}:\n{explain(error)}") from error
