"""Base classes of restoration methods: settings, requirements, and the ranking of weights.

A method is one object. It ranks the restorable weights, best first: those that pruning set to zero,
or all that compression changed (`regraft.patch.pair`). A budget decides how many of the ranking are
restored, unless the method stops by itself. Everything else (reading checkpoints, gathering inputs,
patches, searches, reports) is shared by all methods and uses only the interface of `Method`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from regraft.data.example import Reading
from regraft.heads.score import Criterion, HeadScores
from regraft.models.architecture import LinearArchitecture
from regraft.models.load import Source, pick_device
from regraft.patch.pair import Survey, restorable
from regraft.progress import Progress
from regraft.pruning.masks import count_of
from regraft.pruning.statistics import SavedStatistics
from regraft.registry import Registry
from regraft.restoration.ranking import Ranking
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings

DEFAULT_BUDGET = 5.0  # per 10,000 pruned or changed weights


class MethodSettings(Settings):
    """Base class of every method's settings: its name. Subclasses fix the name and add fields."""

    method: str

    @property
    def drawn(self) -> bool:
        """Whether the result depends on a random seed, so repeated runs differ."""
        return False

    @property
    def searchable(self) -> bool:
        """Whether any prefix of the ranking can be restored, so a search can choose its length."""
        return False

    @property
    def exchanges(self) -> bool:
        """Whether a kept weight is pruned for each restored one."""
        return False

    @property
    def only_pruned(self) -> str | None:
        """Why the method needs a pruned model, with the fix; None if a changed one will do too."""
        return None

    def how_many(self, pruned: int) -> int | None:
        """Maximum number of restored weights, given `pruned` ones; None for the whole ranking."""
        return None

    def without_amount(self) -> Self:
        """The settings that the ranking depends on, to tell whether two settings share one."""
        return self

    def reseeded(self, by: int) -> Self:
        """The settings with `draw_seed` increased by `by`; unchanged if nothing is random."""
        if not self.drawn:
            return self
        return self.model_copy(update={"draw_seed": getattr(self, "draw_seed") + by})  # noqa: B009


class Counted(MethodSettings):
    """Settings with a number of weights to change: a share of the pruned ones, or a count.

    By default the number is `DEFAULT_BUDGET`, which is filled in, so that artifacts record it.
    """

    budget: float | None = Field(
        None,
        gt=0,
        lt=10_000,
        description=f"Restored weights per 10,000 pruned ones; {DEFAULT_BUDGET:g} if neither "
        "this nor a count is given.",
    )
    count: int | None = Field(None, ge=1, description="Maximum number of restored weights.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not cls.has_default(given):
            return given
        if given.get("budget") is not None or given.get("count") is not None:
            return given
        return {**given, "budget": DEFAULT_BUDGET}

    @classmethod
    def has_default(cls, given: Mapping[str, Any]) -> bool:
        """Whether the default budget is filled into the given fields if they have no number."""
        return True

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if self.budget is not None and self.count is not None:
            raise ValueError("`budget` and `count` exclude each other; give one of them")
        return self

    def how_many(self, pruned: int) -> int | None:
        if self.count is not None:
            return min(self.count, pruned)
        return None if self.budget is None else count_of(self.budget / 10_000, pruned)


class Budgeted(Counted):
    """Settings of a method whose ranking can be cut anywhere, so a search may choose how many."""

    @property
    def searchable(self) -> bool:
        return self.budget is not None or self.count is not None


@dataclass(frozen=True)
class HeadChoice:
    """The `count` heads with the highest scores by a criterion."""

    criterion: Criterion
    count: int


@dataclass(frozen=True)
class Needs:
    """Inputs that a method requires before it can rank.

    Attributes:
        heads: Head scores, and which heads are chosen by them.
        statistics: Name of the importance whose statistics are gathered on D^s and D^u.
        answers: The dense model's own answers to harmful and harmless prompts, which the method
            imitates by gradients.
        positions: Another ranking: a file, or in a recipe the name of an earlier method.
        some_heads: Minimum number of heads in the model.
        passes: Approximate cost of ranking, in forward passes over all calibration prompts; for
            time estimates.
    """

    heads: HeadChoice | None = None
    statistics: str | None = None
    answers: bool = False
    positions: str | None = None
    some_heads: int = 0
    passes: float = 0


@dataclass(frozen=True)
class Between:
    """An inclusive range that tuning samples from."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


Space = dict[str, Between | tuple[str, ...]]
"""Field of a method's settings -> the values that tuning may give it."""


@dataclass(frozen=True)
class Matrix:
    """One prunable weight matrix: the `index`-th of `Architecture.linears`.

    `weight` `[out, in]` is the dense model's; `free` `[out, in]` bool marks the restorable weights.
    """

    index: int
    linear: LinearArchitecture
    weight: Tensor
    free: Tensor


@dataclass(frozen=True)
class Context:
    """Everything that a method may use to rank weights.

    Attributes:
        dense: The dense checkpoint.
        pruned: The same network, pruned or otherwise compressed by any tool.
        survey: What compression changed.
        count: Maximum number of weights to rank; None for as many as the method takes.
        seed: The calibration seed, for all random draws.
        compute: Device, dtype, batch size and placement.
        progress: Where progress is reported.
        work: Work folder for unfinished results, kept for a resumed run.
        heads: Head scores, if needed.
        statistics: Statistics of D^s and D^u, if needed: of every linear, or of attention only
            where the pruner's `every_linear` is False.
        answered: "safety" (harmful prompts) and "utility" (harmless ones) -> examples with the
            dense model's answers, if needed.
        positions: Another ranking, if needed.
    """

    dense: Source
    pruned: Source
    survey: Survey
    count: int | None
    seed: int
    compute: ComputeSettings
    progress: Progress
    work: Path
    heads: HeadScores | None = None
    statistics: SavedStatistics | None = None
    answered: Mapping[str, Reading] | None = None
    positions: Ranking | None = None

    def matrices(self) -> Iterator[Matrix]:
        """Every prunable matrix in network order, one in memory at a time."""
        device, index = pick_device(self.compute.device), count()
        layers = self.dense.architecture.layers
        pruned = iter(self.pruned.architecture.linears)  # names on disk may differ from the dense
        with self.progress.task("Ranking weights", len(layers), "layers") as done:
            for layer in layers:
                for linear in layer.linears:
                    weight = self.dense.weight(linear).to(device)
                    after = self.pruned.weight(next(pruned)).to(device)
                    free = restorable(weight, after, self.survey.kind)
                    yield Matrix(next(index), linear, weight, free)
                done(1)


S = TypeVar("S", bound=MethodSettings)


class Method(ABC, Generic[S]):
    """A restoration method. Subclass, make one object, and register it.

    Attributes:
        name: Its name on the command line and in recipes.
        settings_type: Its settings, with `method: Literal[name] = name`.
        algorithm: Version; increased whenever the same settings give a different ranking.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[MethodSettings]]
    algorithm: ClassVar[int] = 1

    def needs(self, settings: S) -> Needs:
        """Inputs that `rank` requires; none by default.

        The default settings must need the most: the command line has flags for their needs only.
        """
        return Needs()

    def check(
        self,
        settings: S,
        dense: Source,
        seed: int,
        compute: ComputeSettings,
        prompts: Mapping[str, Reading],
    ) -> None:
        """Reject bad input before any long work starts.

        `seed` is the calibration seed; the batch size of `compute` and the number of processes
        decide how prompts are split; `prompts` are those of "safety" and of "utility" if the method
        needs answers, else empty.

        Raises:
            RegraftError: the method cannot rank with this input.
        """

    @abstractmethod
    def rank(self, settings: S, context: Context) -> Ranking:
        """Rank the restorable weights, best first.

        The ranking's `about` may record how it was made. The patch repeats "heads" (where weights
        are restored), "values" and "passes".
        """

    def label(self, settings: S) -> str:
        """Name in tables."""
        return self.name

    @property
    def tunes(self) -> bool:
        """Whether the method defines a search `space` for tuning."""
        return type(self).space is not Method.space

    def space(self, settings: S, dense: Source, kept: float) -> Space:
        """Search space of tuning from these settings on; empty by default.

        The number of heads of `dense` bounds `top_heads`; `kept` is the share that pruning kept.
        All trials share their inputs, so no setting may be varied that decides the `statistics`.
        """
        return {}


METHODS: Registry[Method[Any]] = Registry(
    "restoration method",
    "regraft.restoration.methods",
    "regraft.methods",
    Method,  # type: ignore[type-abstract]
)
DEFAULT = "gain"


def method_of(settings: MethodSettings) -> Method[Any]:
    """The method that these settings belong to."""
    return METHODS.get(settings.method)


def needs_of(settings: MethodSettings) -> Needs:
    """The inputs that the method requires with these settings."""
    return method_of(settings).needs(settings)


def own_settings(settings: MethodSettings) -> MethodSettings:
    """The method's settings alone, without a recipe's fields that name and store its result."""
    return settings.narrowed(method_of(settings).settings_type)


def settings_in(content: Mapping[str, Any]) -> MethodSettings:
    """The method's settings among all fields of a recipe's variant."""
    own = METHODS.get(content.get("method", DEFAULT)).settings_type
    return own(**{name: content[name] for name in own.model_fields if name in content})
