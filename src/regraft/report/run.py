"""The input of a report: the models of a finished run, or evaluations, with their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.costs import CalibrationPass, Cost
from regraft.errors import RegraftError
from regraft.evaluation.pairing import on_the_same
from regraft.evaluation.results import Answer, EvalResult
from regraft.evaluation.tradeoff import Searched
from regraft.evaluation.verdicts import Agreement, Judged
from regraft.restoration.methods.gain.path import GainPath


@dataclass(frozen=True)
class Variant:
    """One evaluated model: dense, pruned, realigned or a control.

    Attributes:
        method: How it was made, such as "top 16 heads"; empty if its name says so.
        base: Name of the model that it was made from and is compared with: the dense model for a
            pruned one, the pruned model for a realigned one; None for the dense model.
        sparsity: Fraction of zeros among the prunable weights.
        restored: Number of restored weights, with trained values if `trained`; None if unknown, and
            for models and defences without a patch.
        pruned: Number of weights that pruning set to 0 or, if `changed`, that compression changed;
            0 also if unknown.
        restored_by_module: Kind of module, such as "self_attn.q_proj" -> restored weights by layer.
        heads: The (layer, head) pairs that could be restored.
        n_m: The N:M pattern of the pruning, such as "2:4"; `violated_groups` of its `groups` no
            longer have it.
        inference_time: Whether it is a defence that acts while the pruned model answers.
        curve: The search on validation prompts that chose `restored`.
        passes: Compute of choosing the weights, in passes over the calibration prompts; None if not
            measured.
        checkpoint: Path of a pruned model, and `patch` of a patch, relative to the run's folder.
    """

    name: str
    result: EvalResult
    method: str = ""
    base: str | None = None
    sparsity: float = 0.0
    restored: int | None = None
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
    def label(self) -> str:
        """The name with the method: "hsr (top 16 heads)"."""
        return labelled(self.name, self.method)

    @property
    def name_in_group(self) -> str:
        """The name without the pruning's, as in the recipe."""
        return self.name.removeprefix(f"{self.base}/")

    @property
    def per_ten_thousand(self) -> float | None:
        """Restored weights per 10,000 pruned or changed ones; None if either is unknown."""
        if self.restored is None or not self.pruned:
            return None
        return 10_000 * self.restored / self.pruned


def labelled(name: str, method: str) -> str:
    return f"{name} ({method})" if method else name


@dataclass(frozen=True)
class HeadMap:
    """Scores of attention heads, `values[layer][head]`; None is a head that was not scored."""

    name: str
    unit: str
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class DataAccount:
    """Rows of one source: how many were read, used, and skipped by reason."""

    role: str
    source: str
    read: int
    used: int
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedPath:
    """A path of gain and the methods of a pruning that restore its first weights.

    `allowed` maps methods that have a budget and no search to the number of weights it allows.
    """

    pruning: str
    methods: tuple[str, ...]
    path: GainPath
    allowed: Mapping[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The title of its panel and its table."""
        return f"{self.pruning}: {', '.join(self.methods)}"


@dataclass(frozen=True)
class Opinion:
    """Verdicts of another judge on a model's answers, and its agreement with the own judge."""

    name: str
    judged: Judged
    agreement: tuple[Agreement, ...]


@dataclass(frozen=True)
class Run:
    """A finished run, or evaluations of the same prompts by the same judge.

    Attributes:
        variants: The dense model, then each pruned one followed by those realigned from it.
        images: Reads the image file of each answer id, as it is now; may be incomplete.
        paths: The paths of methods by gain.
        one_pass: The unit of `Variant.passes`.
        unrelated: Whether only the answers of the models are known, so that all are compared with
            the first.
        caveat: A warning to show prominently.
        seed: The calibration seed; `name` is that of the model in a recipe of several.
    """

    title: str
    model: str
    variants: tuple[Variant, ...]
    head_maps: tuple[HeadMap, ...] = ()
    data: tuple[DataAccount, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    images: Callable[[], Mapping[str, Path]] = field(default=dict, compare=False)
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
        """The model that all others were made from or, if unrelated, are compared with."""
        return self.variants[0]

    @property
    def groups(self) -> tuple[tuple[Variant, ...], ...]:
        """Each pruned model followed by those realigned from it."""
        return tuple(
            (pruned, *(v for v in self.variants if v.base == pruned.name))
            for pruned in self.variants
            if pruned.base == self.dense.name and not self.unrelated
        )


def paired_answers(variants: tuple[Variant, ...]) -> tuple[tuple[Answer, ...], ...]:
    """Answers as one row per prompt and one column per variant, in the first variant's order.

    Raises:
        RegraftError: a variant has no answers, or see `on_the_same`.
    """
    if empty := [variant.name for variant in variants if not variant.result.answers]:
        raise RegraftError(f"{empty[0]} keeps no answers.")
    first, *others = variants
    same = [on_the_same(first.name, first.result, one.name, one.result) for one in others]
    by_id = [{answer.id: answer for answer in one.answers} for one in (first.result, *same)]
    return tuple(tuple(answers[key] for answers in by_id) for key in by_id[0])
