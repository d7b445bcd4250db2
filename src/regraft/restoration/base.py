"""What a restoration method is: its settings, what it needs, and how it ranks weights.

A method is one object. It ranks the weights that can be restored, best first: those that pruning
took, or all that compression changed (`regraft.patch.pair`). How many of the ranking are restored
is said by a budget, or the ranking ends by itself. All else (reading checkpoints, gathering what is
needed, patches, searches, reports) is the same for all methods and asks only what `Method` answers.
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
from regraft.pruning.base import PRUNERS
from regraft.pruning.statistics import SavedStatistics
from regraft.registry import Registry
from regraft.restoration.ranking import Ranking
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings

DEFAULT_BUDGET = 5.0  # per 10,000 pruned, or changed


class MethodSettings(Settings):
    """What all methods have: a name. A method's own class fixes it and adds fields."""

    method: str

    @property
    def drawn(self) -> bool:
        """Whether a seed decides what is restored, so that repeats differ."""
        return False

    @property
    def searchable(self) -> bool:
        """Whether any first part of the ranking may be restored, so that a search can choose."""
        return False

    @property
    def exchanges(self) -> bool:
        """Whether a kept weight is pruned for each that is restored."""
        return False

    @property
    def only_pruned(self) -> str | None:
        """Why a model of which every weight changed won't do, with the fix; None where it will."""
        return None

    def how_many(self, pruned: int) -> int | None:
        """How many of `pruned` weights are restored at most; None for the whole ranking."""
        return None

    def without_amount(self) -> Self:
        """What the ranking depends on; settings that share it are equal here."""
        return self

    def reseeded(self, by: int) -> Self:
        """With another draw of what a seed decides, `draw_seed`; itself where none does."""
        if not self.drawn:
            return self
        return self.model_copy(update={"draw_seed": getattr(self, "draw_seed") + by})  # noqa: B009


class Counted(MethodSettings):
    """How many weights are changed, as a share of those pruned or as a number."""

    budget: float | None = Field(
        None,
        gt=0,
        lt=10_000,
        description=f"Restored weights per 10,000 pruned ones; {DEFAULT_BUDGET:g} where neither "
        "this nor a count is given.",
    )
    count: int | None = Field(None, ge=1, description="At most so many restored weights.")

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if self.budget is not None and self.count is not None:
            raise ValueError("`budget` and `count` say the same thing; give one of them")
        return self

    def how_many(self, pruned: int) -> int | None:
        if self.count is not None:
            return min(self.count, pruned)
        return None if self.budget is None else int(self.budget * pruned / 10_000)


class Budgeted(Counted):
    """Weights that are restored one by one, so that a search may choose how many."""

    @property
    def searchable(self) -> bool:
        return self.budget is not None or self.count is not None


class AlwaysBudgeted(Budgeted):
    """A number of weights that is never left open; written out, so that artifacts tell it."""

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, given: Any) -> Any:
        return with_default_budget(given)


def with_default_budget(given: Any) -> Any:
    """The fields of settings, with the default budget where they have neither it nor a count."""
    if not isinstance(given, Mapping):
        return given
    if given.get("budget") is not None or given.get("count") is not None:
        return given
    return {**given, "budget": DEFAULT_BUDGET}


@dataclass(frozen=True)
class HeadChoice:
    """The `count` best heads by a criterion."""

    criterion: Criterion
    count: int


@dataclass(frozen=True)
class Needs:
    """What must be there before a method ranks.

    Attributes:
        heads: Scored heads, of which these are chosen.
        statistics: The kind of importance gathered on D^s and D^u.
        answers: The dense model's own answers to harmful and harmless prompts, which the method
            imitates by gradients.
        positions: Another ranking: a file, in a recipe also the name of a method before it.
        some_heads: How many heads the model must have.
        passes: What ranking takes, about, in forward passes over all calibration prompts; for
            estimates of time.
    """

    heads: HeadChoice | None = None
    statistics: str | None = None
    answers: bool = False
    positions: str | None = None
    some_heads: int = 0
    passes: float = 0

    @property
    def gradients(self) -> bool:
        """Whether gradients are taken, for the ranking or for its statistics."""
        return self.answers or (
            self.statistics is not None and PRUNERS.get(self.statistics).by_gradients
        )


@dataclass(frozen=True)
class Between:
    """A range that tuning draws from, both ends in it."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


Space = dict[str, Between | tuple[str, ...]]
"""Field of a method's settings -> what tuning may set it to."""


@dataclass(frozen=True)
class Matrix:
    """One prunable weight: the `index`-th of `Architecture.linears`.

    `weight` `[out, in]` is the dense model's; `free` `[out, in]` bool says where a value of it can
    be restored.
    """

    index: int
    linear: LinearArchitecture
    weight: Tensor
    free: Tensor


@dataclass(frozen=True)
class Context:
    """What a method ranks from.

    Attributes:
        dense: The dense checkpoint.
        pruned: The same network pruned or otherwise compressed, by whomever.
        survey: What that changed.
        count: How many weights to rank at most; None for all that the method takes.
        seed: The calibration seed, of whatever is drawn.
        compute: Device, dtype, batch size and placement.
        progress: Progress.
        work: A folder for unfinished work, which a resumed run finds again.
        heads: Scores, if needed.
        statistics: Of D^s and D^u, if needed.
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
        """Every prunable weight in the order of the network, one in memory at a time."""
        device, index = pick_device(self.compute.device), count()
        layers = self.dense.architecture.layers
        pruned = iter(self.pruned.architecture.linears)  # which have names of their own on disk
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
        name: What it is called on the command line and in recipes.
        settings_type: Its settings, with `method: Literal[name] = name`.
        algorithm: Raised whenever the same settings give another ranking than before.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[MethodSettings]]
    algorithm: ClassVar[int] = 1

    def needs(self, settings: S) -> Needs:
        """What must be there before `rank`; nothing by default.

        No settings may need more than the default ones, for which the command line has flags.
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
        """Find bad input before any long work.

        Args:
            settings: Of the method.
            dense: The dense checkpoint.
            seed: The calibration seed.
            compute: Batch size and number of processes decide how prompts are shared.
            prompts: If it needs answers, the prompts by "safety" and "utility", else empty.

        Raises:
            RegraftError: it cannot be ranked so.
        """

    @abstractmethod
    def rank(self, settings: S, context: Context) -> Ranking:
        """The weights that can be restored, in the order in which they are.

        Its `about` may say how it came about. Of that the patch takes over "heads", those restored
        in, "values" and "passes".
        """

    def label(self, settings: S) -> str:
        """What tables call it."""
        return self.name

    @property
    def tunes(self) -> bool:
        """Whether it has a `space` of its own."""
        return type(self).space is not Method.space

    def space(self, settings: S, dense: Source, kept: float) -> Space:
        """What tuning varies; nothing by default.

        Args:
            settings: As given.
            dense: Whose heads bound their number.
            kept: Share of weights that pruning kept.
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
    """The method that these are settings of."""
    return METHODS.get(settings.method)


def needs_of(settings: MethodSettings) -> Needs:
    """What the method needs with these settings."""
    return method_of(settings).needs(settings)


def own_settings(settings: MethodSettings) -> MethodSettings:
    """The method's settings alone, of settings that name and store a result too."""
    return settings.narrowed(method_of(settings).settings_type)


def settings_in(content: Mapping[str, Any]) -> MethodSettings:
    """The method's settings among those that a recipe writes of a variant."""
    own = METHODS.get(content.get("method", DEFAULT)).settings_type
    return own(**{name: content[name] for name in own.model_fields if name in content})
