"""What a pruner is, its settings, and where pruners are found.

A pruner is one object in one file: what it accumulates over the calibration data, the score that it
makes of a weight and of that statistic, its update of the weights that stay (if any), and its
settings. `regraft.pruning.prune` runs it layer by layer; `regraft.pruning.statistics` stores its
statistics for restoration, whose scores are those of the same object.

To add one, put `PLUGIN = MyPruner()` into a file of `regraft/pruning/pruners`, or name the object
in the entry-point group `regraft.pruners` of another package. A pruner that reads no data:

    class RandomSettings(PruneSettings):
        method: Literal["random"] = "random"

    class Random(Pruner):
        name, label, settings_type = "random", "random weights", RandomSettings

        def score(self, weight, statistic):
            return torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
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
"""(processor, examples) -> a batch of them."""
Note = Callable[[str], None]


class PruneSettings(Settings):
    """How much is pruned, and where. The settings of every pruner begin with these."""

    method: str
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of prunable weights set to 0.")
    n_m: str | None = Field(
        None, description="N:M pattern such as 2:4, kept of each M inputs; instead of sparsity."
    )
    scope: Scope = Field("row", description="Weights compete within their row or the matrix.")
    ignore: tuple[str, ...] = Field(
        (),
        description="Weights left dense, as a pattern: `layers.0.*`, `*.down_proj`; repeat the "
        "flag for more.",
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
            raise ValueError(
                f"`scope` changes nothing where `n_m` is {self.n_m}: groups are in rows"
            )
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The calibration prompts that are read: "utility" (D^u), "safety" (D^s), or none."""
        return ()

    @property
    def sequential(self) -> bool:
        """Whether a layer is calibrated on the outputs of the pruned layers before it."""
        return False

    def pattern(self) -> Pattern:
        """The pattern that these settings ask for."""
        if self.n_m is not None:
            return Pattern.parse_n_m(self.n_m)
        return Pattern(self.sparsity, self.scope)

    def patterns(self, linears: Iterable[LinearArchitecture]) -> Patterns:
        """The pattern of each weight that is to be pruned."""
        return assign_patterns(linears, self.pattern(), self.ignore)


class CalibratedSettings(PruneSettings):
    """Settings of a pruner that is calibrated on prompts with responses."""

    calibrate_on: Literal["harmless", "both"] = Field(
        "harmless",
        description="Harmless prompts and answers (D^u, the paper's), or harmful prompts and "
        "refusals (D^s) as well.",
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("utility", "safety") if self.calibrate_on == "both" else ("utility",)


class LayerwiseSettings(PruneSettings):
    """Settings of a pruner that goes forward from layer to layer."""

    order: Literal["sequential", "one-shot"] = Field(
        "sequential",
        description="sequential: each layer is calibrated on the outputs of the pruned layers "
        "before it (the procedure of Wanda and SparseGPT). one-shot: all on the dense model.",
    )

    @property
    def sequential(self) -> bool:
        return self.order == "sequential"


class Pruner(ABC):
    """A way of pruning. A direct subclass reads no data: its statistics are empty tensors.

    Attributes:
        name: In settings, as in `--method wanda`.
        label: In tables.
        settings_type: Its settings; their `method` is `Literal[name]`, and fields that it does not
            read are not there.
        restores: Whether its score may rank weights for restoration.
        every_linear: Whether a statistics file keeps all linears. The other files keep those of
            attention heads, as restoration in heads needs: a statistic may be as large as the
            weights (SNIP) or take a factorisation of the MLP's width (SparseGPT).
        updates: Whether weights that stay change, so that whole weights are stored, not masks.
        reads_data: Whether it has statistics.
        by_gradients: Whether these are of gradients, for which it takes a backward pass.
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
        """Importance of every weight, of which pruning takes the least.

        Args:
            weight: `[out, in]`, any float dtype, or some rows of it; left as it is.
            statistic: Of this weight (`[in]`, or `[out, in]` with the same rows), float32, on the
                weight's device.

        Returns:
            `[out, in]` float32, finite and not negative.
        """

    def statistics(
        self, linears: Iterable[LinearArchitecture], found: Sums, note: Note = lambda _: None
    ) -> Iterator[tuple[LinearArchitecture, Tensor]]:
        """What `score` takes of each linear, from what was accumulated.

        Args:
            linears: Any that ran.
            found: Accumulated for them; may be used up.
            note: Called with what a user should know.

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
        """Prune the linears of one layer: by default, mask the smallest scores.

        Args:
            weights: Dense, `[out, in]` each; left as they are.
            found: What was accumulated for them; may be used up.
            patterns: How much of each goes.
            settings: Of `settings_type`.
            note: Called with what a user should know.
        """
        for linear, statistic in self.statistics(weights, found, note):
            score = self.score(weights[linear], statistic)
            yield linear, PrunedWeight(mask=patterns[linear].mask(score))

    def encoders(self, settings: Any) -> tuple[Encode, ...]:
        """Each encodes all calibration examples once; `settings` are of `settings_type`."""
        return (response_batch,)

    def keeps(self, linear: LinearArchitecture) -> bool:
        """Whether a statistics file holds this linear."""
        return self.every_linear or linear.role in HEAD_ROLES


class InputPruner(Pruner):
    """A pruner that adds something up over what each linear is fed at response tokens."""

    reads_data = True

    @abstractmethod
    def accumulate(self, inputs: Tensor) -> Tensor:
        """A sum over tokens of inputs `[tokens, in]`, which is added up over batches."""

    def add(self, inputs: Tensor, batch: Batch) -> Tensor:
        """What the inputs of a batch add: `accumulate` of them, whatever the batch."""
        return self.accumulate(inputs)


class GradientPruner(Pruner):
    """A pruner that adds something up over gradients of each response's mean cross-entropy.

    It needs a whole backward pass before it prunes anything, so that it is one-shot always.
    """

    reads_data = by_gradients = True

    @abstractmethod
    def accumulate(self, dy: Tensor, x: Tensor) -> Tensor:
        """A sum over samples from a linear's dL/dY `[B, T, out]` and inputs `[B, T, in]`.

        `[out, in]` float32; its mean over all samples is the statistic.
        """


PRUNERS: Registry[Pruner] = Registry(
    "pruner",
    "regraft.pruning.pruners",
    "regraft.pruners",
    Pruner,  # type: ignore[type-abstract]
)


def prune_settings(method: str = "wanda", **fields: Any) -> PruneSettings:
    """Settings of a pruner by its name.

    Raises:
        RegraftError: there is none of that name, or it cannot be imported.
        pydantic.ValidationError: it has no such setting, or a value is wrong.
    """
    return PRUNERS.get(method).settings_type(**fields)


def all_settings() -> dict[str, type[PruneSettings]]:
    """The settings of every pruner, by name; without those of packages that are broken."""
    return {name: PRUNERS.get(name).settings_type for name in PRUNERS.working()}


def described() -> str:
    """Every pruner by its name, with what its class says of it."""
    docs = ((name, type(PRUNERS.get(name)).__doc__ or "") for name in all_settings())
    return " ".join(f"{name}: {text.partition(chr(10))[0]}" for name, text in docs)


def _check_score(name: str) -> str:
    known = [one for one in all_settings() if PRUNERS.get(one).restores]
    if name not in known:
        raise ValueError(f"there is no score {name!r}; expected {', '.join(known)}")
    return name


ScoreName = Annotated[str, AfterValidator(_check_score)]
"""A pruner by whose score of the dense weights restoration may rank."""
NO_STATISTIC = torch.empty(0)  # of a pruner that reads no data
