"""The content of a page: tables of models with rates, intervals and tests.

A single run is a study of one seed, a report on evaluations is a study without methods, and a run
of several models is one study with the tables of all models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from regraft.evaluation.results import Estimate, TextResult
from regraft.evaluation.tradeoff import Searched
from regraft.report.published import Beside, Published, PublishedRow
from regraft.report.run import Run, SharedPath, Variant, labelled
from regraft.restoration.methods.gain.path import path_to_json

SIGNIFICANCE = 0.05
Role = Literal["dense", "pruned", "method", "other"]
_LEFT_OUT = ("answers", "images")  # of the JSON; they are in the folder of the evaluation


class Outcome(StrEnum):
    """The outcome of a test of two models; fewer attacks and fewer refusals are better."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "not distinguishable"


@dataclass(frozen=True)
class Tested:
    """A test of the rate of an event in one model against that in another, on the same prompts.

    Attributes:
        against: The other model: "dense", "pruned" or its name.
        difference: Difference of the rates.
        differing: Number of prompts on which the two differ.
        p: p of the exact permutation test clustered by prompt; McNemar's for one model against one.
        adjusted: p with Holm's correction over all tests of the event in a table against the pruned
            model and the named methods.
        outcome: The outcome at adjusted p < 0.05. It is about these very models on new prompts, not
            about models of other seeds or draws.
        by_seed: The difference of each seed.
    """

    against: str
    difference: float
    differing: int
    p: float
    adjusted: float
    outcome: Outcome
    by_seed: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """ "better than pruned", "not distinguishable from dense"."""
        if self.outcome is Outcome.SAME:
            return f"{self.outcome} from {self.against}"
        opposed = any(one * self.difference < 0 for one in self.by_seed)
        but = ", but not by every seed" if opposed else ""
        return f"{self.outcome} than {self.against}{but}"


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum over runs and draws."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True)
class Recovered:
    """RSR of the mean ASRs, its interval over prompts, and the RSR of each seed alone.

    The RSR is None if pruning did not raise ASR, the interval if it is not certain that it did.
    """

    value: float | None
    interval: tuple[float, float] | None
    by_seed: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates over some prompts; None if there are no such prompts.

    `degenerate` is the share of answers that are degenerate and not refusals: they count neither as
    attacks nor as refusals. Only methods have an RSR.
    """

    asr: Estimate | None
    rsr: Recovered | None
    over_refusal: Estimate | None
    utility: Estimate | None
    degenerate: Estimate | None


@dataclass(frozen=True)
class RowModels:
    """One model of a table, or one method with the models of all seeds and draws.

    `members` are the models, by seed and draw; `drawn` marks a random control.
    """

    name: str
    method: str
    role: Role
    members: tuple[tuple[Variant, ...], ...]
    drawn: bool = False

    @property
    def label(self) -> str:
        """The name with the method, as of a `Variant`."""
        return labelled(self.name, self.method)

    @property
    def first(self) -> Variant:
        """The model of the first seed and draw."""
        return self.members[0][0]

    @property
    def all(self) -> tuple[Variant, ...]:
        return tuple(variant for of_seed in self.members for variant in of_seed)

    @property
    def curves(self) -> tuple[Searched, ...]:
        """The searches on validation prompts that chose the numbers of restored weights."""
        return tuple(one.curve for one in self.all if one.curve)

    @property
    def draws(self) -> tuple[str, ...]:
        """The names of the draws of a random control, as in the recipe."""
        return tuple(one.name_in_group for one in self.members[0])


@dataclass(frozen=True, kw_only=True)
class Row(RowModels, Measured):
    """Models with their rates and tests.

    Estimates are over `n` prompts, however many answers each has. None stands for what was not
    measured or does not apply.

    Attributes:
        weights: Number of restored weights; `restored` is the number per 10,000 pruned ones.
        passes: Compute of choosing the weights, in passes over the calibration prompts.
        mean_asr: Mean over several attack suites with equal weights, as in the HSR paper; the RSR
            of these means is `mean_rsr`.
        attacks: Test against the base: a pruned model against the dense one, a method against the
            pruned model, unrelated models against the first; `refusals` and `degeneration` (of
            degenerate answers) alike.
        regained: Share of the lost refusals that a method makes again: of the harmful prompts that
            the dense model refuses and the pruned one does not. `added` is its share of refusals of
            those that neither refuses.
        over_refusal_from_pruned: This model's rate minus the pruned model's; others ("from") alike.
    """

    sparsity: float = 0.0
    weights: Spread | None = None
    restored: Spread | None = None
    violated: Spread | None = None
    passes: Spread | None = None
    mean_asr: Estimate | None = None
    mean_rsr: Recovered | None = None
    by_suite: Mapping[str, Measured] = field(default_factory=dict)
    by_category: Mapping[str, Estimate] = field(default_factory=dict)
    attacks: Tested | None = None
    refusals: Tested | None = None
    degeneration: Tested | None = None
    against: Mapping[str, Tested] = field(default_factory=dict)
    regained: Estimate | None = None
    added: Estimate | None = None
    over_refusal_from_pruned: Estimate | None = None
    over_refusal_from_dense: Estimate | None = None
    utility_from_pruned: Estimate | None = None
    utility_from_dense: Estimate | None = None
    text: TextResult | None = None
    published: Beside | None = None


@dataclass(frozen=True)
class Table:
    """One pruning of a model: the dense model, the pruned one, and one row per method.

    Without a pruning it holds only the dense model, or unrelated models.
    """

    model: str
    pruning: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """ "wanda-50", or "qwen2-vl: wanda-50" if there are several models."""
        return ": ".join(filter(None, (self.model, self.pruning)))

    @property
    def methods(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.role == "method")


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of total Ships and the rise in ASR over pruned models.

    `points` are (model, total Ships in radians, rise in ASR as a fraction). `rho` is None if all
    values of one variable are equal, `p` if the points are not independent.
    """

    pruning: str
    points: tuple[tuple[str, float, float], ...]
    rho: float | None
    p: float | None
    note: str | None = None


@dataclass(frozen=True)
class Study:
    """Everything that a page shows.

    `suites` maps suites to short names. `missing` are published rows without a run.
    """

    title: str
    runs: tuple[Run, ...]
    tables: tuple[Table, ...]
    suites: Mapping[str, str]
    against: tuple[str, ...] = ()
    published: Published | None = None
    missing: tuple[PublishedRow, ...] = ()
    correlation: Correlation | None = None

    @property
    def run(self) -> Run | None:
        """The run, if there is only one."""
        return self.runs[0] if len(self.runs) == 1 else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The distinct calibration seeds."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @property
    def judge(self) -> str:
        return self.runs[0].dense.result.judge

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for table in self.tables for row in table.rows)

    @property
    def paths(self) -> dict[str, list[SharedPath]]:
        """The paths of methods by gain: title -> one path per seed."""
        found: dict[str, list[SharedPath]] = {}
        for run in self.runs:
            for one in run.paths:
                title = f"{run.name}: {one.title}" if run.name else one.title
                found.setdefault(title, []).append(one)
        return found


def plain(value: Any) -> Any:
    """Convert a value for JSON or YAML: dataclasses to dicts, sequences to lists, paths to text."""
    if isinstance(value, Row):
        members = [[variant.name for variant in of_seed] for of_seed in value.members]
        return {**_fields(value, (*_LEFT_OUT, "members")), "members": members}
    if isinstance(value, Variant):
        return {**_fields(value, _LEFT_OUT), "per_ten_thousand": value.per_ten_thousand}
    if isinstance(value, SharedPath):
        return {**_fields(value, ("path",)), **path_to_json(value.path)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _fields(value, _LEFT_OUT)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _fields(item: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    return {f.name: plain(getattr(item, f.name)) for f in fields(item) if f.name not in left_out}
