"""What a report is made from: the models of a finished run, or evaluations, with their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.costs import CalibrationPass, Cost
from regraft.errors import RegraftError
from regraft.evaluation.metrics import per_ten_thousand
from regraft.evaluation.results import Answer, EvalResult
from regraft.evaluation.tradeoff import Searched
from regraft.evaluation.verdicts import Agreement, Judged
from regraft.restoration.methods.gain.path import GainPath


@dataclass(frozen=True)
class Variant:
    """One evaluated model: dense, pruned, realigned or a control.

    `base` is the name of the model that it was made from and is compared with: the dense one for a
    pruned model, its pruned one for a realigned model; None for the dense model.

    `sparsity` is the fraction of zeros among the prunable weights, `pruned` the number of weights
    that pruning took, or that compression changed where these are `changed`, `restored` the number
    that was restored, with values of their own where they were `trained` and not restored; 0 also
    where it is not known.
    `restored_by_module` maps a module kind such as "self_attn.q_proj" to its restored weights per
    layer. `heads` are the (layer, head) pairs that were open to restoration. Where pruning kept an
    N:M pattern, `n_m` is the pattern ("2:4") and `violated_groups` of `groups` no longer keep it.
    `inference_time` marks a method that leaves the pruned weights alone and acts while the model
    answers. `curve` is the search on validation prompts by which `restored` was chosen. `passes` is
    the compute of choosing the weights, in passes over the calibration prompts; None where it was
    not measured.
    `checkpoint` is where a pruned model lies and `patch` the file of what was restored, both as
    seen from the run's folder.
    """

    name: str
    label: str
    result: EvalResult
    base: str | None = None
    sparsity: float = 0.0
    restored: int = 0
    trained: bool = False
    pruned: int = 0
    changed: bool = False
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
        """Restored weights per 10,000 pruned or changed ones; None where either is not known."""
        known = self.restored and self.pruned
        return per_ten_thousand(self.restored, self.pruned) if known else None


@dataclass(frozen=True)
class HeadMap:
    """Scores of attention heads, `values[layer][head]`; None is a head that was not scored.

    Layers may have different numbers of heads.
    """

    name: str
    unit: str
    values: tuple[tuple[float | None, ...], ...]


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
    """A path and the methods of a pruning that take the first part of it.

    `allowed` is how many weights the budget of each method allows, by its name; none of one that
    has no budget or searched for a number.
    """

    pruning: str
    methods: tuple[str, ...]
    path: GainPath
    allowed: Mapping[str, int] = field(default_factory=dict)

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
class Run:
    """A finished run, or evaluations of the same prompts by the same judge.

    `variants` are the dense model, then each pruned one followed by those realigned from it. Where
    they are `unrelated`, nothing is known of any but its answers, and all are compared with the
    first. `caveat` is what no reader may overlook. `images` maps an answer's id to the file of its
    image, for thumbnails; it may be incomplete. `paths` are those of methods by gain, `one_pass`
    the unit of `Variant.passes`. `seed` is that of the calibration, `name` tells models of a run of
    several apart.
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
    seed: int = 0
    name: str = ""

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


def paired_answers(variants: tuple[Variant, ...]) -> tuple[tuple[Answer, ...], ...]:
    """One row a prompt, one answer a variant, in the first variant's order.

    Raises:
        RegraftError: a variant keeps no answers, or they differ in judge or prompts.
    """
    first = variants[0]
    if bare := [variant.name for variant in variants if not variant.result.answers]:
        raise RegraftError(f"{bare[0]} keeps no answers.")
    by_id = [{answer.id: answer for answer in v.result.answers} for v in variants]
    for variant, answers in zip(variants[1:], by_id[1:], strict=True):
        ours, theirs = first.result.judge, variant.result.judge
        if ours != theirs:  # of one name: another version of an installed package's
            raise RegraftError(
                f"{first.name} and {variant.name} cannot be compared: one was judged by {ours}, "
                f"the other by {theirs}. Evaluate both with the same judge."
            )
        if odd := sorted(answers.keys() ^ by_id[0].keys()):
            raise RegraftError(
                f"{first.name} and {variant.name} cannot be compared: prompt {odd[0]!r} "
                f"({len(odd)} in all) was answered by only one of them."
            )
    return tuple(tuple(answers[key] for answers in by_id) for key in by_id[0])
