"""What a recipe lists: models, prunings, ways of realigning, defences, what is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, Generic, TypeVar, cast

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from regraft.data.sources import DataSource
from regraft.pruning.base import PRUNERS, PruneSettings
from regraft.restoration.base import DEFAULT, METHODS, Budgeted, MethodSettings
from regraft.settings.base import Settings, by_method, checked_name
from regraft.settings.defending import AnyDefenceSettings, DefenceSettings, defence_type
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings

Named = TypeVar("Named", bound=Settings)


@cache
def _both(settings: type[Settings], named: type[Named]) -> type[Named]:
    bases: Any = (settings, named)
    made: Any = create_model(settings.__name__, __base__=bases)
    return cast("type[Named]", made)


@dataclass(frozen=True)
class Choice(Generic[Named]):
    """Blocks of a recipe with the settings of one of several methods, which `method` names.

    Args:
        find: The class of a method's settings. Raises RegraftError if there is no such method.
        named: The fields of a block beside the method's own.
        default: The method of a block that names none.
    """

    find: Callable[[str], type[Settings]]
    named: type[Named]
    default: str

    def block(self, method: str) -> type[Named]:
        """A class with the fields of a method's settings, whose rules come first, and of `named`.

        Raises:
            RegraftError: there is no such method.
        """
        return _both(self.find(method), self.named)

    def parse(self, given: Any) -> Named:
        """A block as it is written, or settings of a method.

        Raises:
            ValidationError: see `by_method`.
        """
        if isinstance(given, self.named):
            return given
        content = given.model_dump() if isinstance(given, Settings) else given
        return by_method(content, self.block, self.default)


def one_or_more(parse: Callable[[Any], Any] = lambda given: given) -> BeforeValidator:
    """One block, or a list of them; errors in the only one name its fields alone."""

    def listed(value: Any) -> Any:
        if value is None:
            raise ValueError("nothing is given; leave the name out, or write [] for none")
        return value if isinstance(value, list | tuple) else [parse(value)]

    return BeforeValidator(listed)


class ModelSettings(Settings):
    """One model of a run of several; its folder or hub id alone is enough."""

    model: str = Field(min_length=1, description="A folder, a hub id, or 'demo'.")
    name: str = Field(
        "",
        description="What to call it in tables and folders; if not given, the last part of its "
        "folder or hub id.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings that it is run with; all if not given."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_id(cls, given: Any) -> Any:
        given = {"model": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping) or given.get("name"):
            return given
        if not isinstance(model := given.get("model"), str):
            return given
        return {**given, "name": PurePath(model.partition("@")[0]).name}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return checked_name(name)


class PruningSettings(PruneSettings):
    """One pruned model of a run; `pruning_settings` makes those of a pruner."""

    name: str = Field(
        "",
        description="What to call it in tables and folders; if not given: pruned, or of several "
        "prunings method and sparsity, such as wanda-60 or wanda-2-4.",
    )
    realign: bool = Field(
        True, description="Realign and defend it too; if not, it is only evaluated."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return checked_name(name, "dense")

    def only(self) -> PruneSettings:
        """These settings without the name."""
        return self.narrowed(PRUNERS.get(self.method).settings_type)

    def derived_name(self) -> str:
        """The name among several prunings where none is given."""
        amount = self.n_m.replace(":", "-") if self.n_m else f"{round(100 * self.sparsity, 6):g}"
        return f"{self.method}-{amount}"


PRUNING = Choice(lambda name: PRUNERS.get(name).settings_type, PruningSettings, "wanda")


def pruning_settings(**given: Any) -> PruningSettings:
    """One pruned model of a run, by the pruner that `method` names."""
    return PRUNING.parse(given)


class Way(Settings):
    """What to call one of the ways of making pruned models safer, and which prunings it is for."""

    name: str = Field(
        "",
        description="What to call it in tables and folders; if not given, as the method is called.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings that it is done to; all if not given."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_by_method(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        method = given.get("method", cls.model_fields["method"].default)
        return {"name": method, **given} if isinstance(method, str) else given

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return checked_name(name, "dense", "pruned")


class VariantSettings(Way, MethodSettings):
    """One realigned model of a run: what to call and keep of it, beside the method's settings.

    Every method has a class of its own, with these fields and the method's; see `variant`.
    """

    search: SearchSettings | None = Field(
        None, description="Choose how many weights are restored on validation prompts."
    )
    checkpoint: bool = Field(True, description="Write the checkpoint too, not only the patch.")
    repeats: int = Field(
        1,
        ge=1,
        le=100,
        description="Of a random control: R draws NAME-1 to NAME-R, with seeds that no two "
        "calibration seeds share.",
    )

    @model_validator(mode="after")
    def _check_variant(self) -> VariantSettings:  # a method's own class may have a `_check`
        if self.search is not None and not self.searchable:
            if issubclass(METHODS.get(self.method).settings_type, Budgeted):
                raise ValueError(
                    f"{self.name!r} searches a number of weights: give it a `budget` too"
                )
            raise ValueError(
                f"{self.name!r} has no number of weights to search; leave `search` out"
            )
        if self.repeats > 1 and not self.drawn:
            raise ValueError(
                f"{self.name!r} has {self.repeats} repeats and nothing random in it, so that they "
                "would all be the same; only random controls can be repeated"
            )
        return self

    def draws(self, seed: int) -> tuple[VariantSettings, ...]:
        """The repeats as variants of their own, for runs calibrated by `seed`; one is itself."""
        if self.repeats == 1:
            return (self,)
        return tuple(
            self.reseeded(self.repeats * seed + i).model_copy(
                update={"name": f"{self.name}-{i + 1}", "repeats": 1}
            )
            for i in range(self.repeats)
        )


VARIANT = Choice(lambda name: METHODS.get(name).settings_type, VariantSettings, DEFAULT)


def variant(**given: Any) -> VariantSettings:
    """One realigned model of a run, by the method that it names."""
    return VARIANT.parse(given)


class NamedDefenceSettings(Way, DefenceSettings):
    """One defended model of a run; every method has a class of its own, see `DEFENCE`."""

    def only(self) -> AnyDefenceSettings:
        """These settings without the name."""
        return cast("AnyDefenceSettings", self.narrowed(defence_type(self.method)))


DEFENCE = Choice(defence_type, NamedDefenceSettings, "adashield")


class EvaluateSettings(EvalSettings):
    """What a run evaluates every model on: one suite, or a list of suites taken together."""

    suite: Annotated[tuple[DataSource, ...], one_or_more()] = Field(
        (DataSource(name="demo", split="test"),),
        min_length=1,
        description="What the models are asked: demo:test, a .jsonl file, or NAME:PATH as for "
        "`regraft eval`; one, or a list of them.",
    )

    text: Path | None = Field(
        None,
        description="A text file, documents with blank lines between them: measure perplexity on "
        "it, and KL to the dense model.",
    )

    def only(self) -> EvalSettings:
        """These settings without the suites and the text."""
        return self.narrowed(EvalSettings)
