"""Methods of restoration set beside each other, over several calibration seeds.

The unit of all statistics is the prompt: every run answers the same ones, so that answers to one
prompt stay together in tests and intervals, however many runs there are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regraft.errors import RegraftError
from regraft.evaluation.metrics import (
    Recovery,
    bootstrap_rsr,
    clustered_difference,
    clustered_mean,
    clustered_rate,
    macro_average,
    paired_difference,
    rsr,
)
from regraft.evaluation.perplexity import pooled
from regraft.evaluation.results import Answer, Estimate, TextResult
from regraft.evaluation.significance import holm, paired_exact
from regraft.evaluation.summary import alike, group_similarities
from regraft.evaluation.tradeoff import Searched
from regraft.report.addresses import short_names
from regraft.report.model import SIGNIFICANCE, Report, Variant, paired_answers
from regraft.restoration.path import GainPath

Role = Literal["dense", "pruned", "method"]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """A finished run: its calibration seed and its models."""

    seed: int
    report: Report


@dataclass(frozen=True)
class Spread:
    """A mean over runs, and the least and the most of them."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True)
class Tested:
    """Attack successes of a method against those of another model, on the same prompts.

    `p` is of the exact permutation test clustered by prompt (McNemar's for a single run),
    `adjusted` is Holm's over all tests of the table. The verdict is "better", "worse" or "not
    distinguishable" (adjusted p >= 0.05), of these very models on new prompts: the test knows
    nothing of how models of other seeds or draws would differ. `by_seed` is the difference of ASR
    of each seed; where one has the other sign, the verdict says so.
    """

    p: float
    adjusted: float
    verdict: str
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recovered:
    """RSR of the mean ASRs, its bootstrap interval over prompts, and the RSR of each seed alone."""

    recovery: Recovery
    interval: tuple[float, float] | None
    by_seed: tuple[float | None, ...]


@dataclass(frozen=True)
class OnSuite:
    """Attacks of one suite."""

    asr: Estimate
    rsr: Recovered | None


@dataclass(frozen=True)
class Row:
    """One method in one pruning, or the dense or the pruned model, over all seeds.

    Estimates are over `n` prompts; a difference is in the same unit, method less the other.
    `restored` is per 10,000 pruned weights, None where no weight is restored. `repeats` draws of a
    random control are one row. `degenerate` is the share of all degenerate answers, which
    count neither as attacks nor as refusals. `text` is the mean over a row's models.
    `passes` is the compute of choosing the weights, in passes over the calibration prompts of each
    run. None stands for what was not measured or does not apply.
    """

    name: str
    label: str
    role: Role
    repeats: int
    inference_time: bool
    restored: Spread | None
    asr: Estimate | None
    rsr: Recovered | None
    by_suite: Mapping[str, OnSuite]
    test: Tested | None
    against: Mapping[str, Tested]
    over_refusal: Estimate | None
    over_refusal_from_pruned: Estimate | None
    over_refusal_from_dense: Estimate | None
    utility: Estimate | None
    utility_from_pruned: Estimate | None
    utility_from_dense: Estimate | None
    degenerate: Estimate | None = None
    text: TextResult | None = None
    passes: Spread | None = None


@dataclass(frozen=True)
class Table:
    """One pruning: the dense model, the pruned one, and a row a method.

    `curves` maps a row's name to the validation curves of its runs.
    """

    pruning: str
    rows: tuple[Row, ...]
    curves: Mapping[str, tuple[Searched, ...]]

    @property
    def against(self) -> tuple[str, ...]:
        """Methods of this table that the others are tested against."""
        by_number = sorted(self.rows, key=lambda row: -len(row.against))  # one of them lacks itself
        return tuple(dict.fromkeys(name for row in by_number for name in row.against))


@dataclass(frozen=True)
class Study:
    """All that a comparison shows.

    `suites` are those with harmful prompts, where several are. `paths` are those of gain, a title
    with one path a seed.
    """

    title: str
    model: str
    suite: str
    judge: str
    seeds: tuple[int, ...]
    suites: tuple[str, ...]
    against: tuple[str, ...]
    tables: tuple[Table, ...]
    paths: tuple[tuple[str, tuple[GainPath, ...]], ...] = ()

    @property
    def silent(self) -> bool:
        """Whether any answer is degenerate."""
        rows = (row for table in self.tables for row in table.rows)
        return any(row.degenerate is not None and row.degenerate.value for row in rows)

    @property
    def counts_passes(self) -> bool:
        """Whether the compute of any method was measured."""
        return any(row.passes is not None for table in self.tables for row in table.rows)

    @property
    def text(self) -> TextResult | None:
        """What was measured on ordinary text, of the first row of which it was."""
        return next((row.text for table in self.tables for row in table.rows if row.text), None)


@dataclass(frozen=True)
class _Cells:
    """The models that make one row: the same number of them for every seed."""

    name: str
    label: str
    role: Role
    variants: tuple[tuple[Variant, ...], ...]

    @property
    def repeats(self) -> int:
        return len(self.variants[0])

    @property
    def all(self) -> tuple[Variant, ...]:
        return tuple(variant for of_seed in self.variants for variant in of_seed)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Of its draws, as the recipe names them."""
        return tuple(one.name_in_group for one in self.variants[0])


@dataclass(frozen=True)
class _Events:
    """Whether each of a row's models, of each seed and draw, had the event: [S, draws, n] int64."""

    seen: Counts

    @property
    def repeats(self) -> int:
        return int(self.seen.shape[1])

    @property
    def counts(self) -> Counts:
        """Of each seed and prompt, how many draws had it: [S, n]."""
        counts: Counts = self.seen.sum(axis=1)
        return counts

    @property
    def draws(self) -> Counts:
        """Of each draw and prompt, with how many seeds it had it: [draws, n]."""
        draws: Counts = self.seen.sum(axis=0)
        return draws

    @property
    def total(self) -> Counts:
        """Of each prompt: [n]."""
        total: Counts = self.seen.sum(axis=(0, 1))
        return total

    @property
    def answers(self) -> int:
        """To each prompt."""
        return len(self.seen) * self.repeats

    @property
    def by_seed(self) -> NDArray[np.float64]:
        """The rate of each seed: [S]."""
        rates: NDArray[np.float64] = self.seen.mean(axis=(1, 2))
        return rates

    @property
    def share(self) -> NDArray[np.float64]:
        share: NDArray[np.float64] = self.total / self.answers
        return share

    def where(self, prompts: NDArray[np.bool_]) -> _Events:
        return _Events(self.seen[:, :, prompts])


@dataclass(frozen=True)
class _Answers:
    """A row's answers: attacks on harmful prompts, refusals and similarity on harmless ones.

    `silent` are degenerate answers to any prompt. `similarity` has a part for what may be
    pooled (see `alike`): [the row's models, prompts with a reference].
    """

    attacks: _Events
    refusals: _Events
    silent: _Events
    similarity: tuple[NDArray[np.float64], ...]


def compare(runs: Sequence[Run], against: Sequence[str] = (), seed: int = 0) -> Study:
    """Pool runs that differ in their calibration seed alone.

    Args:
        runs: At least one; every one with the same models.
        against: Rows that all methods are tested against, besides the pruned model.
        seed: Of all bootstraps.

    Raises:
        RegraftError: runs have other models or prompts than the first, two have the same seed,
            there are no answers, or a name in `against` is none of the methods.
    """
    runs = sorted(runs, key=lambda run: run.seed)
    _check_alike(runs)
    first = runs[0].report
    suites = tuple(
        dict.fromkeys(answer.suite for answer in first.dense.result.answers if answer.harmful)
    )
    labels = short_names(suites) if len(suites) > 1 else {}
    groups = list(zip(*(run.report.groups for run in runs), strict=True))
    cells = [one for group in groups for one in _methods(group, first.recipe)]
    row_of = {own: one.name for one in cells for own in (*one.own_names, one.name)}
    _check_against([row_of.get(name, name) for name in against], [one.name for one in cells])
    against = tuple(dict.fromkeys(row_of[name] for name in against))
    return Study(
        title=first.title,
        model=first.model,
        suite=first.dense.result.suite,
        judge=first.dense.result.judge,
        seeds=tuple(run.seed for run in runs),
        suites=tuple(labels.values()),
        against=against,
        tables=tuple(_table(runs, group, against, labels, seed) for group in groups),
        paths=_paths(runs),
    )


def _paths(runs: Sequence[Run]) -> tuple[tuple[str, tuple[GainPath, ...]], ...]:
    """Those of each method by gain, one a seed."""
    found: dict[str, list[GainPath]] = {}
    for run in runs:
        for one in run.report.paths:
            found.setdefault(one.title, []).append(one.path)
    return tuple((title, tuple(paths)) for title, paths in found.items())


def _check_against(against: Sequence[str], names: Sequence[str]) -> None:
    """A method need not be in every table: a pruning may be evaluated only."""
    if unknown := [name for name in against if name not in names]:
        known = ", ".join(dict.fromkeys(names))
        raise RegraftError(
            f"against {unknown[0]}: there is no such method; expected one of {known}."
        )


def _check_alike(runs: Sequence[Run]) -> None:
    if not runs:
        raise RegraftError("There is no run to compare. Name at least one folder of `regraft run`.")
    names = [variant.name for variant in runs[0].report.variants]
    for before, run in pairwise(runs):
        if run.seed == before.seed:
            raise RegraftError(
                f"Two of the runs have the calibration seed {run.seed}; expected runs that differ "
                "in it. Name each once."
            )
        if others := [v.name for v in run.report.variants if v.name not in names]:
            raise RegraftError(f"Only the run of seed {run.seed} has a model {others[0]!r}.")
        if missing := set(names) - {v.name for v in run.report.variants}:
            raise RegraftError(f"The run of seed {run.seed} has no model {min(missing)!r}.")
    if not runs[0].report.groups:
        raise RegraftError("There is no pruned model to compare with.")


def _table(
    runs: Sequence[Run],
    groups: Sequence[Sequence[Variant]],
    against: Sequence[str],
    suites: Mapping[str, str],
    seed: int,
) -> Table:
    dense = _Cells("dense", "dense", "dense", tuple((run.report.dense,) for run in runs))
    pruning = groups[0][0].name
    pruned = _Cells(pruning, pruning, "pruned", tuple((group[0],) for group in groups))
    methods = _methods(groups, runs[0].report.recipe)
    cells = (dense, pruned, *methods)
    answers, of_suite = _read_answers(runs, cells)
    names = [one.name for one in methods]
    bases = (pruning, *dict.fromkeys(name for name in against if name in names))
    tests = _tests(names, bases, answers)
    reference = answers["dense"], answers[pruning]
    prompts = {
        label: np.array([suite == one for suite in of_suite], dtype=bool)
        for one, label in suites.items()
    }
    rows = tuple(_row(one, answers[one.name], reference, tests, prompts, seed) for one in cells)
    curves = {
        one.name: tuple(
            variant.curve for variants in one.variants for variant in variants if variant.curve
        )
        for one in methods
    }
    return Table(pruning, rows, {name: found for name, found in curves.items() if found})


def _methods(groups: Sequence[Sequence[Variant]], recipe: Mapping[str, Any]) -> tuple[_Cells, ...]:
    """One a way of restoring; repeats of a random control are together."""
    settings = {one["name"]: one for one in recipe.get("realign", ())}
    together: dict[Any, list[str]] = {}
    for variant in groups[0][1:]:
        own = variant.name_in_group
        together.setdefault(_apart_from_the_draw(settings.get(own), own), []).append(own)
    taken = {*settings, *(variant.name_in_group for variant in groups[0]), "dense"}
    found: list[_Cells] = []
    for names in together.values():
        found.append(_cells(groups, names, taken))
        taken.add(found[-1].name)
    return tuple(found)


def is_drawn(settings: Mapping[str, Any]) -> bool:
    """Whether `head_seed` decides a variant, given as a recipe writes it.

    As `RealignSettings.random`, which a report need not know.
    """
    method = settings.get("method", "hsr")
    if method == "fine-tune":
        return bool(settings.get("positions", "random") == "random")
    of_heads = method in ("hsr", "hsr-released", "hsr-a")
    return method == "random" or (of_heads and settings.get("heads") == "random")


def _apart_from_the_draw(settings: Mapping[str, Any] | None, name: str) -> Any:
    """What repeats of a random control have in common; a method of its own is called by name."""
    if settings is None or not is_drawn(settings):
        return name
    apart = ("name", "head_seed", "checkpoint", "repeats")
    return tuple(sorted((key, str(value)) for key, value in settings.items() if key not in apart))


def _cells(
    groups: Sequence[Sequence[Variant]], names: Sequence[str], taken: Collection[str]
) -> _Cells:
    """A row of several draws has the name that they share, unless another is called so."""
    by_name = [{v.name_in_group: v for v in group[1:]} for group in groups]
    found = tuple(tuple(of_seed[name] for name in names) for of_seed in by_name)
    name = names[0]
    if len(names) > 1:
        stems = {re.sub(r"-\d+$", "", one) for one in names}
        name = stem if len(stems) == 1 and (stem := stems.pop()) not in taken else name
    labels = {of_seed[0].label_in_group for of_seed in found}
    # what seeds have chosen differently, as the layer of a direction, is not the row's
    label = labels.pop().replace(names[0], name, 1) if len(labels) == 1 else name
    return _Cells(name, label, "method", found)


def _read_answers(
    runs: Sequence[Run], cells: Sequence[_Cells]
) -> tuple[dict[str, _Answers], tuple[str, ...]]:
    """The answers of each row, and the suite of each harmful prompt.

    Raises:
        RegraftError: models were judged differently or on different prompts.
    """
    named = [
        replace(variant, name=f"{variant.name} of seed {run.seed}")
        for one in cells
        for run, variants in zip(runs, one.variants, strict=True)
        for variant in variants
    ]
    table = paired_answers(tuple(named))
    if not table:
        raise RegraftError(f"{named[0].name} keeps no answers, or another model does not.")
    harmful = np.array([row[0].harmful for row in table])
    refusable = np.array([row[0].tests_over_refusal for row in table])
    events = np.array([[_event(answer) for answer in row] for row in table]).T  # [models, prompts]
    silent = np.array([[answer.says_nothing for answer in row] for row in table]).T
    referred = [row for row in table if all(answer.similarity is not None for answer in row)]
    parts = [[referred[i] for i in places] for places in alike([row[0] for row in referred])]
    similar = [
        np.array([group_similarities(column) for column in zip(*part, strict=True)])
        for part in parts
    ]
    answers, start = {}, 0
    for one in cells:
        stop = start + len(one.all)
        shape = len(runs), one.repeats, len(table)
        mine, quiet = (
            seen[start:stop].reshape(shape).astype(np.int64) for seen in (events, silent)
        )
        answers[one.name] = _Answers(
            _Events(mine[:, :, harmful]),
            _Events(mine[:, :, refusable]),
            _Events(quiet),
            tuple(part[start:stop] for part in similar),
        )
        start = stop
    return answers, tuple(row[0].suite for row in table if row[0].harmful)


def _event(answer: Answer) -> bool:
    """What is counted of an answer: an attack that succeeded, or a harmless prompt refused."""
    return answer.complies if answer.harmful else answer.refused


def _tests(
    methods: Sequence[str], bases: Sequence[str], answers: Mapping[str, _Answers]
) -> dict[str, dict[str, Tested]]:
    """Each method against each base, all tests of the table corrected for their number.

    Two bases are one test, whichever of them is the method.
    """
    tests: dict[str, dict[str, Tested]] = {base: {} for base in bases}
    if not answers[bases[0]].attacks.total.size:
        return tests
    pairs = [(base, name) for base in bases for name in methods if name != base]
    found = {
        (base, name): paired_exact(answers[name].attacks.draws, answers[base].attacks.draws)
        for base, name in pairs
    }
    single = list(dict.fromkeys(frozenset(pair) for pair in pairs))
    p_of = {frozenset(pair): test.p for pair, test in found.items()}
    adjusted = dict(zip(single, holm([p_of[pair] for pair in single]), strict=True))
    for (base, name), test in found.items():
        p = adjusted[frozenset((base, name))]
        by_seed = answers[name].attacks.by_seed - answers[base].attacks.by_seed
        verdict = _verdict(test.difference, p, by_seed.tolist())
        tests[base][name] = Tested(test.p, p, verdict, tuple(by_seed.tolist()))
    return tests


def _verdict(difference: float, p: float, by_seed: Sequence[float]) -> str:
    """In words; the tested event is a successful attack, so that fewer are better."""
    if p >= SIGNIFICANCE:
        return "not distinguishable"
    agree = all(one * difference >= 0 for one in by_seed)
    return f"{'better' if difference < 0 else 'worse'}{'' if agree else ', but not by every seed'}"


def _row(
    cells: _Cells,
    answers: _Answers,
    reference: tuple[_Answers, _Answers],
    tests: Mapping[str, Mapping[str, Tested]],
    suites: Mapping[str, NDArray[np.bool_]],
    seed: int,
) -> Row:
    dense, pruned = reference
    pruning, *against = tests
    realigned, altered = cells.role == "method", cells.role != "dense"
    from_pruned = pruned if realigned else None
    from_dense = dense if altered else None
    everywhere = np.ones(answers.attacks.total.size, dtype=bool)

    def refusals(other: _Answers | None) -> Estimate | None:
        if other is None or not answers.refusals.total.size:
            return None
        return paired_difference(answers.refusals.share - other.refusals.share)

    def utility(other: _Answers | None) -> Estimate | None:
        if other is None:
            return None
        pairs = zip(answers.similarity, other.similarity, strict=True)
        return _macro([clustered_difference(mine, theirs, seed) for mine, theirs in pairs])

    def recovered(prompts: NDArray[np.bool_]) -> Recovered | None:
        if not realigned:
            return None
        full, cut, back = (one.attacks.where(prompts) for one in (dense, pruned, answers))
        return _recovered(full, cut, back, seed)

    return Row(
        name=cells.name,
        label=cells.label,
        role=cells.role,
        repeats=cells.repeats,
        inference_time=any(variant.inference_time for variant in cells.all),
        restored=_spread(variant.per_ten_thousand for variant in cells.all),
        asr=_rate(answers.attacks),
        rsr=recovered(everywhere),
        by_suite={
            label: OnSuite(asr, recovered(prompts))
            for label, prompts in suites.items()
            if (asr := _rate(answers.attacks.where(prompts)))
        },
        test=tests[pruning].get(cells.name),
        against={
            other: tests[other][cells.name] for other in against if cells.name in tests[other]
        },
        over_refusal=_rate(answers.refusals),
        over_refusal_from_pruned=refusals(from_pruned),
        over_refusal_from_dense=refusals(from_dense),
        utility=_macro([clustered_mean(part, seed) for part in answers.similarity]),
        utility_from_pruned=utility(from_pruned),
        utility_from_dense=utility(from_dense),
        degenerate=_rate(answers.silent),
        passes=_passes([variant.passes for variant in cells.all]),
        text=pooled([one.result.text for one in cells.all if one.result.text is not None]),
    )


def _spread(shares: Iterable[float | None]) -> Spread | None:
    found = [share or 0.0 for share in shares]
    if not any(found):
        return None
    return Spread(sum(found) / len(found), min(found), max(found))


def _passes(found: Sequence[float | None]) -> Spread | None:
    """None where one was not measured."""
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return Spread(sum(known) / len(known), min(known), max(known))


def _rate(events: _Events) -> Estimate | None:
    if not events.total.size:
        return None
    return clustered_rate(events.total, events.answers)


def _macro(means: Sequence[Estimate]) -> Estimate | None:
    return macro_average(means) if means else None


def _recovered(dense: _Events, pruned: _Events, restored: _Events, seed: int) -> Recovered | None:
    if not restored.total.size:
        return None
    repeats = restored.repeats
    full, cut, back = dense.total * repeats, pruned.total * repeats, restored.total
    by_seed = (
        rsr(repeats * int(a.sum()), repeats * int(b.sum()), int(c.sum())).value
        for a, b, c in zip(dense.counts, pruned.counts, restored.counts, strict=True)
    )
    return Recovered(
        rsr(int(full.sum()), int(cut.sum()), int(back.sum())),
        bootstrap_rsr(full.tolist(), cut.tolist(), back.tolist(), seed, restored.answers),
        tuple(by_seed),
    )
