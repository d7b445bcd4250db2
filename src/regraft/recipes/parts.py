"""Blocks of a recipe: models, prunings, ways to realign and defend them, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from regraft.data.sources import DataSource
from regraft.pruning.base import PRUNERS, PruneSettings
from regraft.restoration.base import DEFAULT, METHODS, Budgeted, MethodSettings
from regraft.settings.base import Settings, by_method, checked_name
from regraft.settings.defending import AnyDefenceSettings, DefenceSettings, defence_type
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings

Item = TypeVar("Item", bound=Settings)


@cache
def _combined(settings: type[Settings], item: type[Item]) -> type[Item]:
    bases: Any = (settings, item)
    made: Any = create_model(settings.__name__, __base__=bases)
    return cast("type[Item]", made)


def _parsed(
    given: Any, item: type[Item], find: Callable[[str], type[Settings]], default: str
) -> Item:
    """Validate an item of a recipe, or convert the settings of a method to one.

    Its class combines the settings of the method that it names, whose validators run first, with
    the fields that such items have for any method.

    Args:
        given: An item, settings of a method, or values by name.
        item: Class with the fields that do not depend on the method.
        find, default: As for `by_method`.
    """
    if isinstance(given, item):
        return given
    content = given.model_dump() if isinstance(given, Settings) else given
    parsed: Item = by_method(content, lambda method: _combined(find(method), item), default)
    return parsed


def _name(*taken: str) -> AfterValidator:
    """Validator of a name that is part of paths, other than the names `taken`."""
    return AfterValidator(lambda name: checked_name(name, *taken))


def one_or_more(parse: Callable[[Any], Any] = lambda given: given) -> BeforeValidator:
    """Validator that also takes one block for a list; its errors then name no list index."""

    def listed(value: Any) -> Any:
        if value is None:
            raise ValueError("no value is given; leave the setting out, or write [] for none")
        return value if isinstance(value, list | tuple) else [parse(value)]

    return BeforeValidator(listed)


class ModelSettings(Settings):
    """One of several models of a run; its folder or hub id alone is enough."""

    model: str = Field(min_length=1, description="A folder, a hub id, or 'demo'.")
    name: Annotated[str, _name()] = Field(
        "",
        description="Name in tables and folders; by default the last part of `model`.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings to run it with; by default all."
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


class PruningSettings(PruneSettings):
    """One pruned model of a run; made by `parse_pruning`, with the fields of its pruner."""

    name: Annotated[str, _name("dense")] = Field(
        "",
        description="Name in tables and folders; by default `pruned`, or with several prunings "
        "method and sparsity, such as wanda-60 or wanda-2-4.",
    )
    realign: bool = Field(
        True, description="Realign and defend it too; if not, it is only evaluated."
    )

    def only(self) -> PruneSettings:
        """These settings without the name."""
        return self.narrowed(PRUNERS.get(self.method).settings_type)

    def derived_name(self) -> str:
        """The default name where there are several prunings."""
        amount = self.n_m.replace(":", "-") if self.n_m else f"{round(100 * self.sparsity, 6):g}"
        return f"{self.method}-{amount}"


def parse_pruning(given: Any) -> PruningSettings:
    """One pruned model of a run, by the pruner that `method` names."""
    return _parsed(given, PruningSettings, lambda name: PRUNERS.get(name).settings_type, "wanda")


class Way(Settings):
    """A way to make pruned models safer: base class of the items of `realign` and `defend`."""

    name: Annotated[str, _name("dense", "pruned")] = Field(
        "",
        description="Name in tables and folders; by default the method's.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings to apply it to; by default all."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_by_method(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        method = given.get("method", cls.model_fields["method"].default)
        return {"name": method, **given} if isinstance(method, str) else given


class VariantSettings(Way, MethodSettings):
    """One realigned model of a run.

    Every method has its own subclass, with these fields and the method's; see `parse_variant`.
    """

    search: SearchSettings | None = Field(
        None, description="Choose how many weights are restored on validation prompts."
    )
    checkpoint: bool = Field(True, description="Write the checkpoint too, not only the patch.")
    repeats: int = Field(
        1,
        ge=1,
        le=100,
        description="For random controls: number R of draws, NAME-1 to NAME-R; every calibration "
        "seed has its own.",
    )

    @model_validator(mode="after")
    def _check_variant(self) -> VariantSettings:  # a method's own class may define `_check`
        if self.search is not None and not self.searchable:
            if issubclass(METHODS.get(self.method).settings_type, Budgeted):
                raise ValueError(
                    f"{self.name!r} searches for a number of weights: give it a `budget` too"
                )
            raise ValueError(
                f"{self.name!r} has no number of weights to search for; leave `search` out"
            )
        if self.repeats > 1 and not self.drawn:
            raise ValueError(
                f"{self.name!r} has {self.repeats} repeats but nothing random, so all would be the "
                "same; only random controls can be repeated"
            )
        return self

    def draws(self, seed: int) -> tuple[VariantSettings, ...]:
        """One variant per repeat, with random seeds that depend on the calibration `seed`."""
        if self.repeats == 1:
            return (self,)
        return tuple(
            self.reseeded(self.repeats * seed + i).model_copy(
                update={"name": f"{self.name}-{i + 1}", "repeats": 1}
            )
            for i in range(self.repeats)
        )


def parse_variant(given: Any) -> VariantSettings:
    """One realigned model of a run, by the method that it names."""
    return _parsed(given, VariantSettings, lambda name: METHODS.get(name).settings_type, DEFAULT)


class NamedDefenceSettings(Way, DefenceSettings):
    """One defended model of a run; every method has its own subclass, see `parse_defence`."""

    def only(self) -> AnyDefenceSettings:
        """These settings without the name."""
        return cast("AnyDefenceSettings", self.narrowed(defence_type(self.method)))


def parse_defence(given: Any) -> NamedDefenceSettings:
    """One defended model of a run, by the method that it names."""
    return _parsed(given, NamedDefenceSettings, defence_type, "adashield")


class EvaluateSettings(EvalSettings):
    """What every model of a run is evaluated on: one suite, or several taken together."""

    suite: Annotated[tuple[DataSource, ...], one_or_more()] = Field(
        (DataSource(name="demo", split="test"),),
        min_length=1,
        description="Test prompts: demo:test, a .jsonl file, or NAME:PATH as for `regraft eval`; "
        "one suite, or a list of them.",
    )

    text: Path | None = Field(
        None,
        description="A text file with blank lines between documents: measure perplexity on it, and "
        "KL to the dense model.",
    )

    def only(self) -> EvalSettings:
        """These settings without the suites and the text."""
        return self.narrowed(EvalSettings)
