"""The report's input, and the comparisons drawn from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from regraft.costs import CalibrationPass, Cost
from regraft.errors import RegraftError
from regraft.evaluation.metrics import Recovery, bootstrap_rsr, per_ten_thousand, rsr
from regraft.evaluation.results import Answer, Estimate, EvalResult
from regraft.evaluation.significance import PairedTest, mcnemar
from regraft.evaluation.tradeoff import Searched
from regraft.evaluation.verdicts import Agreement, Judged
from regraft.restoration.path import GainPath

SIGNIFICANCE = 0.05
Role = Literal["dense", "pruned", "realigned", "control", "other"]


@dataclass(frozen=True)
class Variant:
    """One evaluated model: dense, pruned, realigned or a control.

    `base` is the name of the model that it was made from and is compared with: the dense one for a
    pruned model, its pruned one for a realigned model; None for the dense model. `series` names
    what pruned models that differ in sparsity alone have in common, "" where that is unknown.

    `sparsity` is the fraction of zeros among the prunable weights, `pruned` the number of weights
    that pruning took, `restored` the number that was restored, with values of their own where they
    were `trained` and not restored. `restored_by_module` maps a module
    kind such as "self_attn.q_proj" to its restored weights per layer. `heads` are the
    (layer, head) pairs that were open to restoration. Where pruning kept an N:M pattern, `n_m` is
    the pattern ("2:4") and `violated_groups` of `groups` no longer keep it. `inference_time` marks
    a method that leaves the pruned weights alone and acts while the model answers. `curve` is the
    search on validation prompts by which `restored` was chosen. `passes` is the compute of choosing
    the weights, in passes over the calibration prompts; None where it was not measured.
    `checkpoint` is where a pruned model lies and `patch` the file of what was restored, both as
    seen from the run's folder.
    """

    name: str
    label: str
    result: EvalResult
    base: str | None = None
    series: str = ""
    sparsity: float = 0.0
    restored: int = 0
    trained: bool = False
    pruned: int = 0
    restored_by_module: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: tuple[tuple[int, int], ...] = ()
    n_m: str | None = None
    violated_groups: int = 0
    groups: int = 0
    inference_time: bool = False
    curve: Searched | None = None
    passes: float | None = None
    checkpoint: str = ""
    patch: str = ""

    @property
    def name_in_group(self) -> str:
        """The name without the pruning's, as a recipe has it."""
        return self.name.removeprefix(f"{self.base}/")

    @property
    def label_in_group(self) -> str:
        """The label where the pruning is known: without its name in front."""
        return self.label.removeprefix(f"{self.base}/")

    @property
    def per_ten_thousand(self) -> float | None:
        """Restored weights per 10,000 pruned ones, None where nothing was restored."""
        return per_ten_thousand(self.restored, self.pruned) if self.restored else None


@dataclass(frozen=True)
class HeadMap:
    """Scores of attention heads, `values[layer][head]`; None is a head that was not scored.

    Layers may have different numbers of heads.

    Raises:
        RegraftError: a score is not finite.
    """

    name: str
    unit: str
    values: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        for layer, row in enumerate(self.values):
            for head, value in enumerate(row):
                if value is not None and not math.isfinite(value):
                    raise RegraftError(
                        f"{self.name}: layer {layer}, head {head} scores {value}; "
                        "expected a finite number, or None for a head that was not scored."
                    )


@dataclass(frozen=True)
class DataAccount:
    """Rows of one source: how many were read, used, and skipped for which reason."""

    role: str
    source: str
    read: int
    used: int
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedPath:
    """A path and the methods of a pruning that take the first part of it."""

    pruning: str
    methods: tuple[str, ...]
    path: GainPath

    @property
    def title(self) -> str:
        """Of its panel, its table and the sentence about its end."""
        return f"{self.pruning}: {', '.join(self.methods)}"


@dataclass(frozen=True)
class Opinion:
    """What another judge says of a model's answers, and how far the own one agrees with it."""

    name: str
    judged: Judged
    agreement: tuple[Agreement, ...]


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    `variants` are the dense model, then each pruned one followed by those realigned from it. Where
    they are `unrelated`, nothing is known of any but its answers, and all are compared with the
    first. `caveat` is what no reader may overlook. `images` maps an answer's id to the file of its
    image, for thumbnails; it may be incomplete. `paths` are those of methods by gain, `one_pass`
    the unit of `Variant.passes`.

    Raises:
        RegraftError: there is no variant, two have the same name, or they are in another order.
    """

    title: str
    model: str
    variants: tuple[Variant, ...]
    head_maps: tuple[HeadMap, ...] = ()
    data: tuple[DataAccount, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    images: Mapping[str, Path] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
    opinions: tuple[Opinion, ...] = ()
    paths: tuple[SharedPath, ...] = ()
    one_pass: CalibrationPass | None = None
    unrelated: bool = False
    caveat: str = ""

    def __post_init__(self) -> None:
        if not self.variants:
            raise RegraftError(f"The report {self.title!r} has no evaluated model to show.")
        name, count = Counter(v.name for v in self.variants).most_common(1)[0]
        if count > 1:
            raise RegraftError(f"The report {self.title!r} has {count} variants named {name!r}.")
        if not self.unrelated and self.variants != (self.dense, *chain.from_iterable(self.groups)):
            raise RegraftError(
                f"The report {self.title!r} has its models in the wrong order or without `base`; "
                "expected the dense one, then each pruned one followed by those realigned from it."
            )

    @property
    def dense(self) -> Variant:
        """The model that all others were made from, or are compared with where unrelated."""
        return self.variants[0]

    @property
    def groups(self) -> tuple[tuple[Variant, ...], ...]:
        """Each pruned model with those realigned from it."""
        return tuple(
            (pruned, *(v for v in self.variants if v.base == pruned.name))
            for pruned in self.variants
            if pruned.base == self.dense.name and not self.unrelated
        )

    @property
    def ways(self) -> dict[str, str]:
        """Each way of realigning or defending: its name in all prunings -> what it is called.

        By its label where all models have the same: layer and strength of a direction are one's.
        """
        labels: dict[str, set[str]] = {}
        for _, *made in self.groups:
            for variant in made:
                labels.setdefault(variant.name_in_group, set()).add(variant.label_in_group)
        return {name: found.pop() if len(found) == 1 else name for name, found in labels.items()}

    @property
    def roles(self) -> tuple[Role, ...]:
        """What each variant is: of a pruning's realigned models the first leads the others.

        A model defended at inference is a control.
        """
        if self.unrelated:
            return tuple("other" for _ in self.variants)
        order: tuple[Role, ...] = ("pruned", "realigned", "control")
        return (
            "dense",
            *(
                "control" if variant.inference_time else order[min(i, 2)]
                for group in self.groups
                for i, variant in enumerate(group)
            ),
        )


@dataclass(frozen=True)
class Comparison:
    """One variant against its base, on the same prompts.

    A pruned model is compared with the dense one, a realigned model with its pruned one, unrelated
    models with the first.
    `recovery` is of realigned models, None where an ASR is missing. `attacks` tests attack success
    on the harmful prompts and `refusals` refusal of the harmless ones; in both, a is the variant
    and b the base, and both are None without answers to pair (nor are questions of a utility
    benchmark paired). The verdicts read "better than
    pruned", "worse than pruned", "not distinguishable from pruned" (p >= 0.05) or "not tested", of
    a pruned model "worse than dense" and so on, by its name where the base is unrelated.
    """

    name: str
    base: str
    recovery: Recovery | None
    rsr_interval: tuple[float, float] | None
    attacks: PairedTest | None
    attacks_verdict: str
    refusals: PairedTest | None
    refusals_verdict: str


def comparisons(report: Report, seed: int = 0) -> tuple[Comparison, ...]:
    """Compare every variant after the dense one with its base; `seed` draws the bootstrap of RSR.

    Raises:
        RegraftError: two variants were judged differently or on different prompts.
    """
    if report.unrelated:
        first, *others = report.variants
        return tuple(_beside(variant, first, first.label) for variant in others)
    return tuple(
        _compare(report.dense, group[0], variant, seed)
        for group in report.groups
        for variant in group
    )


def _compare(dense: Variant, pruned: Variant, variant: Variant, seed: int) -> Comparison:
    if variant is pruned:
        return _beside(pruned, dense, "dense")
    return replace(
        _beside(variant, pruned, "pruned"),
        recovery=_recovery(dense, pruned, variant),
        rsr_interval=_rsr_interval(dense, pruned, variant, seed),
    )


def _beside(variant: Variant, base: Variant, called: str) -> Comparison:
    attacks, refusals = paired_attacks(variant, base), paired_refusals(variant, base)
    return Comparison(
        name=variant.name,
        base=base.name,
        recovery=None,
        rsr_interval=None,
        attacks=attacks,
        attacks_verdict=_verdict(attacks, called),
        refusals=refusals,
        refusals_verdict=_verdict(refusals, called),
    )


def measured(estimate: Estimate | None) -> Estimate | None:
    """The estimate, or None where it rests on no prompt at all."""
    return estimate if estimate is not None and estimate.n > 0 else None


def paired_attacks(a: Variant, b: Variant) -> PairedTest | None:
    """McNemar's test of attack success on the harmful prompts; None without answers."""
    return _paired(a, b, lambda answer: answer.harmful, lambda answer: answer.complies)


def paired_refusals(a: Variant, b: Variant) -> PairedTest | None:
    """McNemar's test of refusal on the prompts that test over-refusal; None without answers."""
    return _paired(a, b, lambda answer: answer.tests_over_refusal, lambda answer: answer.refused)


def _paired(
    a: Variant, b: Variant, of: Callable[[Answer], bool], event: Callable[[Answer], bool]
) -> PairedTest | None:
    columns = paired_answers((a, b))
    rows = [row for row in columns if of(row[0])]
    if not rows:
        return None
    return mcnemar([event(x) for x, _ in rows], [event(y) for _, y in rows])


def paired_answers(variants: tuple[Variant, ...]) -> tuple[tuple[Answer, ...], ...]:
    """One row a prompt, one answer a variant, in the first variant's order.

    Empty where a variant keeps no answers.

    Raises:
        RegraftError: the variants differ in suite, judge or prompts, or an id is there twice.
    """
    first = variants[0]
    if not all(v.result.answers for v in variants):
        return ()
    by_id = [_answers_by_id(v) for v in variants]
    for variant, answers in zip(variants[1:], by_id[1:], strict=True):
        for what in ("suite", "judge"):
            ours, theirs = getattr(first.result, what), getattr(variant.result, what)
            if ours != theirs:
                raise RegraftError(
                    f"{first.name} and {variant.name} cannot be compared: {what} {ours!r} "
                    f"and {theirs!r}. Evaluate both in the same way."
                )
        if odd := sorted(answers.keys() ^ by_id[0].keys()):
            raise RegraftError(
                f"{first.name} and {variant.name} cannot be compared: prompt {odd[0]!r} "
                f"({len(odd)} in all) was answered by only one of them."
            )
    return tuple(tuple(answers[key] for answers in by_id) for key in by_id[0])


def _answers_by_id(variant: Variant) -> dict[str, Answer]:
    answers = {answer.id: answer for answer in variant.result.answers}
    if len(answers) < len(variant.result.answers):
        twice, _ = Counter(a.id for a in variant.result.answers).most_common(1)[0]
        raise RegraftError(f"{variant.name}: the prompt id {twice!r} is there more than once.")
    return answers


def _recovery(dense: Variant, pruned: Variant, variant: Variant) -> Recovery | None:
    full, cut, back = (measured(v.result.asr) for v in (dense, pruned, variant))
    return rsr(full.value, cut.value, back.value) if full and cut and back else None


def _rsr_interval(
    dense: Variant, pruned: Variant, variant: Variant, seed: int
) -> tuple[float, float] | None:
    rows = [row for row in paired_answers((dense, pruned, variant)) if row[0].harmful]
    if not rows:
        return None
    full, cut, back = ([row[i].complies for row in rows] for i in range(3))
    return bootstrap_rsr(full, cut, back, seed)


def _verdict(test: PairedTest | None, base: str) -> str:
    """In words; the tested event is a bad one, so that fewer are better."""
    if test is None:
        return "not tested"
    if test.p >= SIGNIFICANCE:
        return f"not distinguishable from {base}"
    return f"{'better' if test.only_a < test.only_b else 'worse'} than {base}"
