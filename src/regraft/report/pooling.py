"""From runs to a study: answers pooled by prompt, rates, tests and differences.

The unit of all statistics is the prompt. Every run answers the same prompts, and the answers to one
prompt form a cluster in tests and intervals, however many seeds and draws there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from regraft.errors import RegraftError
from regraft.evaluation.metrics import macro_average
from regraft.evaluation.pairing import holm, paired_exact
from regraft.evaluation.perplexity import pooled
from regraft.report.answers import Events, RowAnswers, read_answers, rows_of_methods
from regraft.report.formatting import short_names
from regraft.report.published import Published, beside
from regraft.report.run import Run
from regraft.report.study import (
    SIGNIFICANCE,
    Outcome,
    Row,
    RowModels,
    Spread,
    Study,
    Table,
    Tested,
)

Tests = Mapping[str, Mapping[str, Tested]]  # row -> base


def study_of(
    runs: Sequence[Run],
    against: Sequence[str] = (),
    *,
    title: str = "",
    published: Published | None = None,
) -> Study:
    """Pool the runs of each model, which differ only in their calibration seed.

    Args:
        runs: At least one; runs of the same `name` have the same variants, as those of one recipe.
        against: Methods that all others are tested against, besides the pruned model.
        title: Title of the page; that of the first run if not given.
        published: Published figures to show for comparison.

    Raises:
        RegraftError: runs differ in their prompts, two have the same seed, there are no answers, or
            a name in `against` is not a method.
    """
    if not runs:
        raise RegraftError("There is no run to compare. Name at least one folder of `regraft run`.")
    by_model: dict[str, list[Run]] = {run.name: [] for run in runs}
    for run in sorted(runs, key=lambda run: run.seed):
        by_model[run.name].append(run)
    for same in by_model.values():
        _check_seeds(same)
    layouts = [(same, models) for same in by_model.values() for models in _layouts(same)]
    against = _rows_of([models for _, models in layouts], against)
    tables = tuple(_table(same, models, against) for same, models in layouts)
    tables = tuple(_with_published(table, published) for table in tables) if published else tables
    shown = {row.published.row.key for table in tables for row in table.rows if row.published}
    every = tuple(run for same in by_model.values() for run in same)
    return Study(
        title=title or runs[0].title,
        runs=every,
        tables=tables,
        suites=short_names(
            dict.fromkeys(suite for run in every for suite in run.dense.result.suites)
        ),
        against=against,
        published=published,
        missing=tuple(one for one in published.rows if one.key not in shown) if published else (),
    )


def _with_published(table: Table, published: Published) -> Table:
    names = {"dense": ("", ""), "pruned": (table.pruning, "")}

    def found(row: Row) -> Row:
        pruning, method = names.get(row.role, (table.pruning, row.name))
        return replace(row, published=beside(published, table.model, pruning, method))

    return replace(table, rows=tuple(map(found, table.rows)))


def _check_seeds(runs: Sequence[Run]) -> None:
    for before, run in pairwise(runs):
        if run.seed == before.seed:
            raise RegraftError(
                f"Two of the runs have the calibration seed {run.seed}; expected runs that differ "
                "in it. Name each once."
            )


def _rows_of(layouts: Sequence[Sequence[RowModels]], against: Sequence[str]) -> tuple[str, ...]:
    """The rows of the methods `against`; a draw of a random control stands for its row.

    A method need not be in every table, since a pruning may have no realigned models.
    """
    row_of: dict[str, str] = {}
    for one in (one for models in layouts for one in models if one.role == "method"):
        row_of |= dict.fromkeys((*one.draws, one.name), one.name)
    if unknown := [name for name in against if name not in row_of]:
        known = ", ".join(dict.fromkeys(row_of.values()))
        raise RegraftError(
            f"against {unknown[0]}: there is no such method; expected one of {known}."
        )
    return tuple(dict.fromkeys(row_of[name] for name in against))


def _layouts(runs: Sequence[Run]) -> Iterator[list[RowModels]]:
    """The models of each table: one table per pruning, or one without a pruning."""
    first = runs[0]
    dense = RowModels("dense", first.dense.method, "dense", tuple((run.dense,) for run in runs))
    if first.unrelated:
        yield [RowModels(v.name, v.method, "other", ((v,),)) for v in first.variants]
    elif not first.groups:
        yield [dense]
    for groups in zip(*(run.groups for run in runs), strict=True):
        pruned = RowModels(
            groups[0][0].name, groups[0][0].method, "pruned", tuple((g[0],) for g in groups)
        )
        yield [dense, pruned, *rows_of_methods(groups, first.recipe)]


def _table(runs: Sequence[Run], models: Sequence[RowModels], against: Sequence[str]) -> Table:
    answers = read_answers(runs, models)
    tests = _table_tests(answers, against)
    return Table(
        model=runs[0].name,
        pruning=next((one.name for one in models if one.role == "pruned"), ""),
        rows=tuple(
            _row(one, *(of_event[model.name] for of_event in tests))
            for model, one in zip(models, answers, strict=True)
        ),
    )


def _table_tests(answers: Sequence[RowAnswers], against: Sequence[str]) -> list[Tests]:
    """Tests of attacks, of refusals and of degenerate answers, corrected separately.

    The test of pruned against dense is not corrected. A method is tested against the pruned model
    and, for attacks only, against the methods in `against`.
    """
    attacks = {one.models.name: one.attacks for one in answers}
    events = [
        attacks,
        {one.models.name: one.refusals for one in answers},
        {one.models.name: one.silent for one in answers},
    ]
    first, *others = attacks
    methods = [one.models.name for one in answers if one.models.role == "method"]
    against = [name for name in against if name in methods]
    if not any(one.models.role == "pruned" for one in answers):
        every = [(name, first) for name in others]
        return [_tests([every], one, {}) for one in events]
    pruning, titles = others[0], {first: "dense", others[0]: "pruned"}
    damage = [(pruning, first)]
    restored = [(name, pruning) for name in methods]
    named = [(name, base) for base in against for name in methods if name != base]
    families = [restored + named, restored, restored]
    return [_tests([damage, of], one, titles) for of, one in zip(families, events, strict=True)]


def _tests(
    families: Sequence[Sequence[tuple[str, str]]],
    events: Mapping[str, Events],
    titles: Mapping[str, str],
) -> Tests:
    """Test rows against their bases, with Holm's correction within each family.

    Two rows that are each other's base count as one test.
    """
    tests: dict[str, dict[str, Tested]] = {name: {} for name in events}
    for family in families:
        pairs = [pair for pair in family if events[pair[0]].size]
        # [seeds, draws, n] is summed over the seeds: a draw's answers to a prompt of all seeds form
        # one cluster, which is permuted as a whole.
        found = {
            (name, base): paired_exact(events[name].sum(axis=0), events[base].sum(axis=0))
            for name, base in pairs
        }
        p_of = {frozenset(pair): test.p for pair, test in found.items()}
        adjusted = dict(zip(p_of, holm(list(p_of.values())), strict=True))
        for (name, base), test in found.items():
            p = adjusted[frozenset((name, base))]
            by_seed = events[name].mean(axis=(1, 2)) - events[base].mean(axis=(1, 2))
            difference = float(by_seed.mean())  # of rates; the test's own is summed over the seeds
            tests[name][base] = Tested(
                against=titles.get(base, base),
                difference=difference,
                differing=test.differing,
                p=test.p,
                adjusted=p,
                outcome=_outcome(difference, p),
                by_seed=tuple(by_seed.tolist()),
            )
    return tests


def _outcome(difference: float, p: float) -> Outcome:
    """Classify a test; the tested events are bad ones, so fewer are better."""
    if p >= SIGNIFICANCE:
        return Outcome.SAME
    return Outcome.BETTER if difference < 0 else Outcome.WORSE


def _row(
    own: RowAnswers,
    attacks: Mapping[str, Tested],
    refusals: Mapping[str, Tested],
    silences: Mapping[str, Tested],
) -> Row:
    """The row of rates and tests; the first test is against the model it was made from."""
    models, prompts = own.models, own.prompts
    by_suite = {name: own.on(where, every=True) for name, where in prompts.suites.items()}
    attacked = [one.asr for one in by_suite.values() if one.asr is not None]
    rates = {name: own.asr(where) for name, where in prompts.categories.items()}
    return Row(
        **vars(models),
        sparsity=float(np.mean([variant.sparsity for variant in models.all])),
        weights=_spread([variant.restored for variant in models.all]),
        restored=_spread([variant.per_ten_thousand for variant in models.all]),
        violated=_spread([v.violated_groups for v in models.all if v.n_m]),
        passes=_spread([variant.passes for variant in models.all], none_is_zero=False),
        **vars(own.on(prompts.everywhere)),
        mean_asr=macro_average(attacked) if len(attacked) > 1 else None,
        mean_rsr=own.mean_recovered(),
        by_suite=by_suite,
        by_category={name: asr for name, asr in rates.items() if asr is not None},
        attacks=next(iter(attacks.values()), None),
        refusals=next(iter(refusals.values()), None),
        degeneration=next(iter(silences.values()), None),
        against=dict(list(attacks.items())[1:]),
        regained=own.refused_of(by_dense=True),
        added=own.refused_of(by_dense=False),
        over_refusal_from_pruned=own.refusals_less(own.pruned),
        over_refusal_from_dense=own.refusals_less(own.dense),
        utility_from_pruned=own.utility_less(own.pruned),
        utility_from_dense=own.utility_less(own.dense),
        text=pooled([one.result.text for one in models.all if one.result.text is not None]),
    )


def _spread(values: Sequence[float | None], *, none_is_zero: bool = True) -> Spread | None:
    """Mean and range; None if there is no value or, unless None stands for 0, if one is missing."""
    known = [one for one in values if one is not None]
    if not known or (len(known) < len(values) and not none_is_zero):
        return None
    every = [one or 0.0 for one in values]
    return Spread(sum(every) / len(every), min(every), max(every))
