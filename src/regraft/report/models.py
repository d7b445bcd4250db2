"""One table over the runs of several models, beside published figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from regraft.evaluation.metrics import Recovery, bootstrap_macro_rsr, macro_average, rsr
from regraft.evaluation.results import Answer, Estimate, EvalResult, Rates
from regraft.report.addresses import short_names, suites_of
from regraft.report.model import Report, comparisons, measured
from regraft.report.published import (
    Published,
    PublishedRow,
    attack_rates,
    mean_attack_rate,
    published_rsr_interval,
)


@dataclass(frozen=True)
class Measured:
    """What an evaluation measured, by data set and in the mean.

    `asr` is the mean over the data sets of attacks, each counting the same, as the HSR paper has
    it; `over_refusal` pools all prompts that test it, `utility` is as in `EvalResult`. `by_suite`
    has short names of suites.
    """

    asr: Estimate | None
    over_refusal: Estimate | None
    utility: Estimate | None
    by_suite: Mapping[str, Rates]


@dataclass(frozen=True)
class Beside:
    """A published row with what is computed here of it: intervals by its number of prompts."""

    row: PublishedRow
    asr: Estimate | None
    by_suite: Mapping[str, Estimate]
    rsr_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One evaluated model of one run.

    `pruning` is "" of the dense model, `method` "" of dense and pruned ones. `rsr` and its interval
    are of the mean over data sets; `p` is McNemar's against the pruned model (of a pruned one
    against the dense) over all harmful prompts. `per_ten_thousand` is None where nothing was
    restored.
    """

    model: str
    pruning: str
    method: str
    label: str
    measured: Measured
    rsr: Recovery | None = None
    rsr_interval: tuple[float, float] | None = None
    p: float | None = None
    restored: int = 0
    per_ten_thousand: float | None = None
    published: Beside | None = None

    @property
    def name(self) -> str:
        """ "wanda-50/hsr", "wanda-50" or "dense"."""
        return "/".join(filter(None, (self.pruning, self.method))) or "dense"


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of total Ships and the rise in ASR, one pruned model a run.

    `points` are (model, total Ships in radians, rise in ASR as a fraction); `rho` is None where all
    values of one are equal, `p` where points are not independent.
    """

    pruning: str
    points: tuple[tuple[str, float, float], ...]
    rho: float | None
    p: float | None
    note: str | None = None


@dataclass(frozen=True)
class ModelTable:
    """All rows of all models, in the order of the recipe.

    `missing` are published rows that no run is of.
    """

    title: str
    judge: str
    rows: tuple[Row, ...]
    versions: Mapping[str, Mapping[str, str]]
    published: Published | None = None
    missing: tuple[PublishedRow, ...] = ()
    correlation: Correlation | None = None

    @property
    def suites(self) -> tuple[str, ...]:
        """Short names of all data sets, in the order of the first run."""
        return tuple(dict.fromkeys(one for row in self.rows for one in row.measured.by_suite))

    @property
    def models(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    def of(self, model: str) -> tuple[Row, ...]:
        """The rows of one model."""
        return tuple(row for row in self.rows if row.model == model)


def measure(result: EvalResult) -> Measured:
    """The rates of one evaluation, its suites by short names."""
    names = short_names(suites_of(result))
    whole = Rates(result.asr, result.over_refusal, result.utility)
    by_suite = {names[one]: result.by_suite.get(one, whole) for one in names}
    attacked = [asr for rates in by_suite.values() if (asr := measured(rates.asr)) is not None]
    return Measured(
        macro_average(attacked) if attacked else None,
        result.over_refusal,
        result.utility,
        by_suite,
    )


def model_table(
    title: str, reports: Mapping[str, Report], published: Published | None = None
) -> ModelTable:
    """One table over the reports of several models.

    Args:
        title: Of the table.
        reports: Name of the model -> the report of its run.
        published: Figures to set beside.
    """
    rows = tuple(row for name, one in reports.items() for row in _rows(name, one, published))
    keys = {(row.model, row.pruning, row.method) for row in rows}
    left = () if published is None else tuple(r for r in published.rows if r.key not in keys)
    return ModelTable(
        title=title,
        judge=next(iter(reports.values())).dense.result.judge,
        rows=rows,
        versions={name: dict(one.versions) for name, one in reports.items()},
        published=published,
        missing=left,
    )


def macro_rsr(
    dense: Sequence[Answer], pruned: Sequence[Answer], restored: Sequence[Answer]
) -> tuple[Recovery | None, tuple[float, float] | None]:
    """RSR of the mean ASR over data sets, each counting the same, and its paired interval.

    None where there is no harmful prompt. The answers are to the same prompts, in any order.
    """
    by_suite: dict[str, list[tuple[bool, bool, bool]]] = {}
    others = [{one.id: one.complies for one in answers} for answers in (pruned, restored)]
    for one in dense:
        if one.harmful:
            outcome = (one.complies, others[0][one.id], others[1][one.id])
            by_suite.setdefault(one.suite, []).append(outcome)
    if not by_suite:
        return None, None
    rates = [
        sum(sum(row[which] for row in rows) / len(rows) for rows in by_suite.values())
        / len(by_suite)
        for which in range(3)
    ]
    return rsr(*rates), bootstrap_macro_rsr(list(by_suite.values()))


def _rows(model: str, report: Report, published: Published | None) -> Iterator[Row]:
    dense = report.dense
    compared = {one.name: one for one in comparisons(report)}
    yield Row(model, "", "", "dense", measure(dense.result), published=_beside(published, model))
    for pruned, *made in report.groups:
        for variant in (pruned, *made):
            method = "" if variant is pruned else variant.name_in_group
            attacks = compared[variant.name].attacks
            answers = [one.result.answers for one in (dense, pruned, variant)]
            recovery, interval = macro_rsr(*answers) if method else (None, None)
            yield Row(
                model=model,
                pruning=pruned.name,
                method=method,
                label=variant.label_in_group,
                measured=measure(variant.result),
                rsr=recovery,
                rsr_interval=interval,
                p=None if attacks is None else attacks.p,
                restored=variant.restored,
                per_ten_thousand=variant.per_ten_thousand,
                published=_beside(published, model, pruned.name, method),
            )


def _beside(
    published: Published | None, model: str, pruning: str = "", method: str = ""
) -> Beside | None:
    row = None if published is None else published.of(model, pruning, method)
    if published is None or row is None:
        return None
    return Beside(
        row,
        mean_attack_rate(row, published.prompts),
        attack_rates(row, published.prompts),
        published_rsr_interval(published, row),
    )
