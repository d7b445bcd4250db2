"""Base classes of pruners, their settings, and the registry of pruners.

A pruner is one object in one file: the statistic that it accumulates over the calibration data, the
score computed from a weight and that statistic, its update of the kept weights (if any), and its
settings. `regraft.pruning.prune` runs it layer by layer; `regraft.pruning.statistics` saves its
statistics, from which restoration computes the same scores.

To add one, put `PLUGIN = MyPruner()` into a file of `regraft/pruning/pruners`, or name the object
in the entry-point group `regraft.pruners` of another package; docs/extending.md has a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from regraft.data.collate import Batch, response_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.models.architecture import HEAD_ROLES, LinearArchitecture
from regraft.pruning.inputs import Sums
from regraft.pruning.masks import Pattern, Patterns, Scope, assign_patterns
from regraft.pruning.results import PrunedWeight
from regraft.registry import Registry
from regraft.settings.base import Settings

Encode = Callable[[Any, Sequence[Example]], Batch]
"""(processor, examples) -> a batch."""
Note = Callable[[str], None]


class PruneSettings(Settings):
    """How much is pruned, and where: the settings that all pruners share."""

    method: str
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of prunable weights set to 0.")
    n_m: str | None = Field(
        None, description="N:M pattern such as 2:4: N of each M inputs are kept; replaces sparsity."
    )
    scope: Scope = Field("row", description="Weights compete within their row or the matrix.")
    ignore: tuple[str, ...] = Field(
        (),
        description="Globs of weights left dense, such as `*.down_proj`: a list, on the command "
        "line one per flag.",
    )

    @model_validator(mode="after")
    def _check(self) -> PruneSettings:
        try:
            self.pattern()
        except RegraftError as error:
            raise ValueError(str(error)) from error
        if self.n_m is not None and self.first_set("sparsity"):
            raise ValueError(
                f"`n_m` {self.n_m} takes the place of `sparsity` "
                f"{self.sparsity:g}; leave one of them out"
            )
        if self.n_m is not None and self.first_set("scope"):
            raise ValueError(f"`scope` has no effect when `n_m` is {self.n_m}: groups are in rows")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of calibration prompts that are read: "utility" (D^u), "safety" (D^s), or none."""
        return ()

    @property
    def sequential(self) -> bool:
        """Whether a layer is calibrated on the outputs of the pruned layers before it."""
        return False

    def pattern(self) -> Pattern:
        """The pattern of each weight matrix."""
        if self.n_m is not None:
            return Pattern.parse_n_m(self.n_m)
        return Pattern(self.sparsity, self.scope)

    def patterns(self, linears: Iterable[LinearArchitecture]) -> Patterns:
        """The pattern of each weight matrix that is to be pruned, without ignored ones."""
        return assign_patterns(linears, self.pattern(), self.ignore)


class CalibratedSettings(PruneSettings):
    """Settings of a pruner that is calibrated on prompts with responses."""

    calibrate_on: Literal["harmless", "both"] = Field(
        "harmless",
        description="Harmless prompts and answers (D^u, as in HSR's paper), or harmful prompts and "
        "refusals (D^s) as well.",
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("utility", "safety") if self.calibrate_on == "both" else ("utility",)


class LayerwiseSettings(PruneSettings):
    """Settings of a pruner that processes layers from first to last."""

    order: Literal["sequential", "one-shot"] = Field(
        "sequential",
        description="sequential: each layer is calibrated on the outputs of the pruned layers "
        "before it (the procedure of Wanda and SparseGPT). one-shot: all on the dense model.",
    )

    @property
    def sequential(self) -> bool:
        return self.order == "sequential"


class Pruner(ABC):
    """A pruning method. A direct subclass reads no data: its statistics are empty tensors.

    Attributes:
        name: Name in settings, as in `--method wanda`.
        label: Name in tables.
        settings_type: Its settings, with `method: Literal[name]` and only fields that it reads.
        restores: Whether restoration may rank weights by its score.
        every_linear: Whether a statistics file keeps all linears. Otherwise it keeps those of
            attention, which is all that restoration in heads needs: a statistic may be as large as
            the weights (SNIP) or take a factorisation of the MLP's width (SparseGPT).
        updates: Whether kept weights change, so that whole weights are stored instead of masks.
        reads_data: Whether it has statistics.
        by_gradients: Whether its statistics are of gradients and take a backward pass.
        reads_responses: Whether its calibration prompts need responses.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    settings_type: ClassVar[type[PruneSettings]]
    restores: ClassVar[bool] = True
    every_linear: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    reads_data: ClassVar[bool] = False
    by_gradients: ClassVar[bool] = False
    reads_responses: ClassVar[bool] = True

    @abstractmethod
    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """Importance of every weight; pruning removes the lowest.

        Args:
            weight: `[out, in]`, any float dtype, or some of its rows; not modified.
            statistic: The weight's statistic (`[in]`, or `[out, in]` with the same rows), float32,
                on the weight's device.

        Returns:
            `[out, in]` float32, finite and not negative.
        """

    def checked_score(
        self, linear: LinearArchitecture, weight: Tensor, statistic: Tensor
    ) -> Tensor:
        """The `score` of a linear's weight, or of some of its rows.

        Raises:
            RegraftError: a score is negative or NaN, for which masks and ranks are not exact.
        """
        score = self.score(weight, statistic)
        if not (score >= 0).all():
            raise RegraftError(
                f"{linear.key}: a score of {self.name} is negative or NaN; expected 0 or more. "
                "Correct the pruner, or the weight or statistic that has values out of range."
            )
        return score

    def statistics(
        self, linears: Iterable[LinearArchitecture], found: Sums, note: Note = lambda _: None
    ) -> Iterator[tuple[LinearArchitecture, Tensor]]:
        """The statistic that `score` takes, for each of some linears that ran.

        `found` has their sums, which may be consumed; `note` is called with messages for the user.

        Raises:
            RegraftError: a linear never ran, or its inputs overflow.
        """
        for linear in linears:
            yield linear, found.of(linear)

    def prune(
        self,
        weights: Mapping[LinearArchitecture, Tensor],
        found: Sums,
        patterns: Patterns,
        settings: Any,
        note: Note = lambda _: None,
    ) -> Iterator[tuple[LinearArchitecture, PrunedWeight]]:
        """Prune the linears of one layer: by default, mask the lowest scores.

        `weights` `[out, in]` are not modified; `found` and `note` are as for `statistics`.

        Raises:
            RegraftError: see `checked_score` and `statistics`.
        """
        for linear, statistic in self.statistics(weights, found, note):
            score = self.checked_score(linear, weights[linear], statistic)
            yield linear, PrunedWeight(mask=patterns[linear].mask(score))

    def encoders(self, settings: Any) -> tuple[Encode, ...]:
        """Functions that encode the calibration examples; each encodes all of them once."""
        return (response_batch,)

    def keeps(self, linear: LinearArchitecture) -> bool:
        """Whether a statistics file holds this linear."""
        return self.every_linear or linear.role in HEAD_ROLES


class InputPruner(Pruner):
    """A pruner whose statistic is a sum over each linear's inputs at response tokens."""

    reads_data = True

    @abstractmethod
    def accumulate(self, inputs: Tensor) -> Tensor:
        """Sum over tokens of a function of inputs `[tokens, in]`; batches are added up."""

    def add(self, inputs: Tensor, batch: Batch) -> Tensor:
        """What a batch adds to the sum; override it if that depends on more than the inputs."""
        return self.accumulate(inputs)


class GradientPruner(Pruner):
    """A pruner whose statistic is a mean over gradients of each response's mean cross-entropy.

    It needs a whole backward pass before it prunes anything, so it is always one-shot.
    """

    reads_data = by_gradients = True

    @abstractmethod
    def accumulate(self, dy: Tensor, x: Tensor) -> Tensor:
        """Sum over samples, from a linear's dL/dY `[B, T, out]` and inputs `[B, T, in]`.

        `[out, in]` float32; its mean over all samples is the statistic.
        """


PRUNERS: Registry[Pruner] = Registry(
    "pruner",
    "regraft.pruning.pruners",
    "regraft.pruners",
    Pruner,  # type: ignore[type-abstract]
)


def prune_settings(method: str = "wanda", **fields: Any) -> PruneSettings:
    """Make the settings of the pruner called `method`.

    Raises:
        RegraftError: no pruner has that name, or it cannot be imported.
        pydantic.ValidationError: it has no such setting, or a value is wrong.
    """
    return PRUNERS.get(method).settings_type(**fields)


def all_settings() -> dict[str, type[PruneSettings]]:
    """Name -> settings of every pruner, without plug-ins that cannot be imported."""
    return {name: PRUNERS.get(name).settings_type for name in PRUNERS.working()}


def help_text() -> str:
    """Every pruner's name with the first line of its class docstring, for `--help`."""
    docs = ((name, type(PRUNERS.get(name)).__doc__ or "") for name in all_settings())
    return " ".join(f"{name}: {text.partition(chr(10))[0]}" for name, text in docs)


def _check_score(name: str) -> str:
    known = [one for one in all_settings() if PRUNERS.get(one).restores]
    if name not in known:
        raise ValueError(f"there is no score {name!r}; expected {', '.join(known)}")
    return name


ScoreName = Annotated[str, AfterValidator(_check_score)]
"""Name of a pruner whose score of the dense weights restoration may rank by."""
NO_STATISTIC = torch.empty(0)  # statistic of a pruner that reads no data
