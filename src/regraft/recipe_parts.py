"""What a recipe lists: prunings, ways of realigning, defences, and how all are evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    create_model,
    field_validator,
    model_validator,
)

from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.pruning.base import PRUNERS, PruneSettings, all_settings
from regraft.restoration.base import (
    DEFAULT,
    METHODS,
    Budgeted,
    MethodSettings,
)
from regraft.settings.base import Settings, by_method, checked_name
from regraft.settings.defending import DefenceSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings

Named = TypeVar("Named", bound=Settings)


def _named_by_method(given: Any) -> Any:
    """The settings as they are written, with the method's name where they have none."""
    if isinstance(given, Mapping) and isinstance(given.get("method"), str):
        return {"name": given["method"], **given}
    return given


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
        plain = PRUNERS.get(self.method).Settings
        return plain(**self.model_dump(include=set(plain.model_fields)))

    def derived_name(self) -> str:
        """The name among several prunings where none is given."""
        amount = self.n_m.replace(":", "-") if self.n_m else f"{round(100 * self.sparsity, 6):g}"
        return f"{self.method}-{amount}"


def _both(settings: type[Settings], named: type[Named]) -> type[Named]:
    """A class with the fields of a plug-in's settings, whose rules come first, and of `named`."""
    bases: Any = (settings, named)
    made: Any = create_model(settings.__name__, __base__=bases)
    return cast("type[Named]", made)


@cache
def named_settings(settings: type[PruneSettings]) -> type[PruningSettings]:
    """A pruner's settings with the name."""
    return _both(settings, PruningSettings)


def any_pruner() -> Any:
    named = {name: named_settings(one) for name, one in all_settings().items()}
    return by_method(named, default="wanda")


def pruning_settings(**given: Any) -> PruningSettings:
    """One pruned model of a run, by the pruner that `method` names."""
    found: PruningSettings = TypeAdapter(any_pruner()).validate_python(given)
    return found


class VariantSettings(MethodSettings):
    """One realigned model of a run: what to call and keep of it, beside the method's settings.

    Every method has a class of its own, with these fields and the method's; see `variant`.
    """

    name: str = Field(
        "",
        description="What to call it in tables and folders; if not given, as the method is called.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings that are realigned so; all if not given."
    )
    search: SearchSettings | None = Field(
        None, description="Choose how many weights are restored on validation prompts."
    )
    checkpoint: bool = Field(True, description="Write the checkpoint too, not only the patch.")
    repeats: int = Field(
        1,
        ge=1,
        description="Of a random control: R draws NAME-1 to NAME-R, with seeds that no two "
        "calibration seeds share.",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return checked_name(name, "dense", "pruned")

    @model_validator(mode="after")
    def _check_search(self) -> VariantSettings:
        if self.search is not None and not self.searchable:
            if issubclass(METHODS.get(self.method).Settings, Budgeted):
                raise ValueError(
                    f"{self.name!r} searches a number of weights: give it a `budget` too"
                )
            raise ValueError(
                f"{self.name!r} has no number of weights to search; leave `search` out"
            )
        return self

    @model_validator(mode="after")
    def _check_repeats(self) -> VariantSettings:
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


def variant(**given: Any) -> VariantSettings:
    """The settings of one realigned model, by whichever method they name.

    Raises:
        ValidationError: they are not this method's.
        ValueError: there is no such method.
    """
    method = given.get("method", DEFAULT)
    if not isinstance(method, str):
        raise ValueError(f"method must be a name, not {method!r}")
    try:
        own = variant_class(method)
    except RegraftError as error:
        raise ValueError(str(error)) from error
    if odd := [name for name in given if name not in own.model_fields]:
        near = get_close_matches(odd[0], own.model_fields, 1)
        raise ValueError(
            f"{method} has no setting {', '.join(map(repr, odd))}"
            + (f"; is it {near[0]}?" if near else "")
            + ("" if "method" in given else f" (no `method` is named, so it is {method})")
        )
    return own.model_validate({"name": method, **given})


@cache
def variant_class(method: str) -> type[VariantSettings]:
    """The fields of `VariantSettings` and those of a method.

    Raises:
        RegraftError: there is no such method.
    """
    return _both(METHODS.get(method).Settings, VariantSettings)


def as_variant(given: Any, otherwise: ValidatorFunctionWrapHandler) -> VariantSettings:
    if isinstance(given, VariantSettings):
        return given
    if isinstance(given, Mapping):
        return variant(**given)
    found: VariantSettings = otherwise(given)  # which says what is wrong with it
    return found


class NamedDefenceSettings(DefenceSettings):
    """One defended model of a run."""

    name: str = Field(
        "adashield",
        description="What to call it in tables and folders; if not given, as the method is called.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings that are defended so; all if not given."
    )

    @model_validator(mode="before")
    @classmethod
    def _derived_name(cls, given: Any) -> Any:
        return _named_by_method(given)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return checked_name(name, "dense", "pruned")

    def only(self) -> DefenceSettings:
        """These settings without the name."""
        return DefenceSettings(**self.model_dump(include=set(DefenceSettings.model_fields)))


Way = TypeVar("Way", VariantSettings, NamedDefenceSettings)


def one_or_more(value: Any) -> Any:
    if value is None:
        raise ValueError("nothing is given; leave the name out, or write [] for none")
    return value if isinstance(value, list | tuple) else [value]


class EvaluateSettings(EvalSettings):
    """What a run evaluates every model on: one suite, or a list of suites taken together."""

    suite: Annotated[tuple[DataSource, ...], BeforeValidator(one_or_more)] = Field(
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

    @model_validator(mode="after")
    def _check_text(self) -> EvaluateSettings:
        if self.text is not None and self.backend == "vllm":
            raise ValueError("text is measured by the transformers backend only")
        return self

    def only(self) -> EvalSettings:
        """These settings without the suites and the text."""
        return EvalSettings(**self.model_dump(include=set(EvalSettings.model_fields)))
