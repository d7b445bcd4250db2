"""A whole run in one YAML file: the settings of its stages, and which of them make which model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, cast

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

from regraft.data.sources import DataSource
from regraft.data.storage import is_on_hub
from regraft.errors import RegraftError
from regraft.files import digest
from regraft.pruning.base import PRUNERS, PruneSettings, all_settings, refuse_broken
from regraft.restoration.base import (
    DEFAULT,
    METHODS,
    MethodSettings,
    needs_of,
    own_settings,
)
from regraft.settings.base import Settings, by_method, checked_name, explain
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import DefenceSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.models import ModelSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import SearchSettings
from regraft.settings.validation import Choosing, validation_of, with_validation

_create_model: Any = create_model  # its types do not know bases of two kinds


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


@cache
def _named_settings(settings: type[PruneSettings]) -> type[PruningSettings]:
    """A pruner's settings with the name."""
    bases: Any = (settings, PruningSettings)
    named: Any = create_model(settings.__name__, __base__=bases)
    return cast("type[PruningSettings]", named)


def _any_pruner() -> Any:
    named = {name: _named_settings(one) for name, one in all_settings().items()}
    return by_method(named, default="wanda")


def pruning_settings(**given: Any) -> PruningSettings:
    """One pruned model of a run, by the pruner that `method` names."""
    found: PruningSettings = TypeAdapter(_any_pruner()).validate_python(given)
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
            if "budget" in type(self).model_fields and self.method != "fine-tune":
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
    bases: Any = (METHODS.get(method).Settings, VariantSettings)
    own: type[VariantSettings] = _create_model(f"variant-{method}", __base__=bases)
    return own


def _as_variant(given: Any, otherwise: ValidatorFunctionWrapHandler) -> VariantSettings:
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


def _one_or_more(value: Any) -> Any:
    if value is None:
        raise ValueError("nothing is given; leave the name out, or write [] for none")
    return value if isinstance(value, list | tuple) else [value]


class EvaluateSettings(EvalSettings):
    """What a run evaluates every model on: one suite, or a list of suites taken together."""

    suite: Annotated[tuple[DataSource, ...], BeforeValidator(_one_or_more)] = Field(
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


def _prunings(value: Any) -> Any:
    """One block of settings as a list of one, so that errors in it name its fields alone."""

    def given(one: Any) -> Any:
        refuse_broken(one)
        plain = isinstance(one, PruneSettings) and not isinstance(one, PruningSettings)
        return one.model_dump() if plain else one

    if isinstance(value, list | tuple):
        several: Any = GenericAlias(list, (_any_pruner(),))
        return TypeAdapter(several).validate_python([given(one) for one in value])
    return [TypeAdapter(_any_pruner()).validate_python(given(value))]


def _named(prunings: tuple[PruningSettings, ...]) -> tuple[PruningSettings, ...]:
    if not prunings:
        raise ValueError("the list is empty; give at least one pruning")
    names = [
        one.name or (one.derived_name() if len(prunings) > 1 else "pruned") for one in prunings
    ]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{names.count(twice[0])} prunings are called {twice[0]!r}; give each a `name` of its "
            "own"
        )
    return tuple(
        one.model_copy(update={"name": name}) for one, name in zip(prunings, names, strict=True)
    )


class Recipe(Settings):
    """A whole run: prune, score heads, realign, evaluate, report."""

    title: str = Field("regraft", description="Of the report.")
    model: str = Field(
        "demo", min_length=1, description="A folder, a hub id, or 'demo' for the bundled model."
    )
    models: tuple[ModelSettings, ...] = Field(
        (),
        description="Several models, in place of `model`: one run each, in the folders model-NAME, "
        "and one table over them.",
    )
    published: Path | None = Field(
        None,
        description="With models: a YAML file of published figures that the table sets beside its "
        "own.",
    )
    pruned: str | None = Field(
        None,
        min_length=1,
        description="An existing pruned checkpoint, folder or hub id; `prune` is then not used.",
    )
    calibration: CalibrationSettings = CalibrationSettings()
    seeds: tuple[int, ...] = Field(
        (),
        description="Calibration seeds, in place of calibration.seed: one run each, in the folders "
        "seed-N, and a comparison over them.",
    )
    against: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        (),
        description="With seeds: names of `realign` or `defend` that the comparison tests every "
        "method against, besides the pruned model.",
    )
    prune: Annotated[
        tuple[PruningSettings, ...], BeforeValidator(_prunings), AfterValidator(_named)
    ] = Field(
        default_factory=lambda: (pruning_settings(name="pruned"),),
        description="One pruning, or a list of them, each evaluated and realigned.",
    )
    heads: HeadSettings = HeadSettings()
    realign: Annotated[
        tuple[Annotated[SerializeAsAny[VariantSettings], WrapValidator(_as_variant)], ...],
        BeforeValidator(_one_or_more),
    ] = Field(
        (variant(),),
        description="One way of realigning, or a list of them; gain if no `method` is named.",
    )
    defend: Annotated[tuple[NamedDefenceSettings, ...], BeforeValidator(_one_or_more)] = Field(
        (), description="Defences at inference, evaluated on the pruned models."
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    compute: ComputeSettings = ComputeSettings()

    @field_validator("realign")
    @classmethod
    def _draw(
        cls, realign: tuple[VariantSettings, ...], info: ValidationInfo
    ) -> tuple[VariantSettings, ...]:
        """Repeats as variants of their own; where there are several runs, each draws its own."""
        if info.data.get("seeds") or "calibration" not in info.data:
            return realign
        seed = info.data["calibration"].seed
        return tuple(draw for one in realign for draw in one.draws(seed))

    @field_validator("realign")
    @classmethod
    def _search_on(
        cls, realign: tuple[VariantSettings, ...], info: ValidationInfo
    ) -> tuple[VariantSettings, ...]:
        """Searches with the prompts that they choose on."""
        return tuple(
            one
            if one.search is None
            else one.model_copy(update={"search": _choosing(one.search, one.name, info)})
            for one in realign
        )

    @field_validator("defend")
    @classmethod
    def _choose_on(
        cls, defend: tuple[NamedDefenceSettings, ...], info: ValidationInfo
    ) -> tuple[NamedDefenceSettings, ...]:
        """Defences with the prompts that they choose on."""
        return tuple(_choosing(one, one.name, info, needed=one.searches) for one in defend)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self._check_models()
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ, not {list(self.seeds)}")
        if self.seeds and self.calibration.seed:
            raise ValueError("`seeds` take the place of `calibration.seed`; leave one of them out")
        names = [one.name for one in self.realign] + [one.name for one in self.defend]
        both = "`realign` and `defend`" if self.defend else "`realign`"
        if self.against and not self.seeds:
            raise ValueError("`against` is for the comparison over `seeds`; give some, or leave it")
        if odd := [name for name in self.against if name not in names]:
            raise ValueError(f"`against` names {odd[0]!r}; expected some of {', '.join(names)}")
        if len(set(names)) < len(names):
            raise ValueError(f"the names of {both} must differ, not {names}")
        if clash := [one.name for one in self.prune if one.name in names]:
            raise ValueError(f"`prune` and one of {both} are both called {clash[0]!r}")
        self._check_positions()
        heads = [found for one in self.realign if (found := needs_of(one).heads)]
        most = max((one.count for one in heads), default=0)
        known = {one.name for one in self.prune}
        prunings_of = {one.name: one.prunings for one in self.realign}
        prunings_of |= {one.name: one.prunings for one in self.defend}
        left = {one.name for one in self.prune if not one.realign}
        for name, prunings in prunings_of.items():
            if prunings and left.issuperset(prunings):
                raise ValueError(
                    f"{name!r} is for {prunings[0]!r} alone, which is only evaluated; leave out "
                    "its `realign: false`, or give other `prunings`"
                )
            if odd := sorted({*prunings} - known):
                raise ValueError(
                    f"{name!r} is for the pruning {odd[0]!r}, but the prunings are "
                    f"{', '.join(sorted(known))}"
                )
        if self.heads.mode == "screened" and most > self.heads.candidates:
            raise ValueError(
                f"`heads.candidates` is {self.heads.candidates}, but `realign` takes {most} heads, "
                "some of which would only have estimated scores; raise the candidates"
            )
        directions = [one.name for one in self.defend if one.method == "refusal-direction"]
        if self.evaluate.backend == "vllm" and directions:
            raise ValueError(
                f"the refusal direction of {directions[0]!r} acts inside the model, which vLLM "
                "does not let it: set `evaluate.backend` to transformers or leave it out"
            )
        if self.pruned is not None and len(self.prune) > 1:
            raise ValueError(
                f"`pruned` names an existing checkpoint and `prune` has {len(self.prune)} "
                "prunings; leave one of them out"
            )
        return self

    def _check_positions(self) -> None:
        """Raise unless positions by name are those of a ranking made before, without swaps."""
        before: list[str] = []
        for one in self.realign:
            source = self.positions_of(one)
            if source is not None:
                if source.name not in before or not source.searchable or source.exchanges:
                    raise ValueError(
                        f"{one.name!r} takes the positions of {source.name!r}, which must come "
                        "before it in `realign`, have a budget or a count, and no swaps"
                    )
                if source.prunings and source.prunings != one.prunings:
                    raise ValueError(
                        f"{one.name!r} takes the positions of {source.name!r}; give it the "
                        f"same `prunings`, {', '.join(source.prunings)}"
                    )
            before.append(one.name)

    def _check_models(self) -> None:
        if self.published is not None and not self.models:
            raise ValueError("`published` is for the table over `models`; give some, or leave it")
        if not self.models:
            return
        if other := [one for one in ("pruned", "seeds") if getattr(self, one)]:
            raise ValueError(f"`models` and `{other[0]}` cannot be combined; leave one of them out")
        if self.model != type(self).model_fields["model"].default:
            raise ValueError("`models` take the place of `model`; leave one of them out")
        names = [one.name for one in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two of `models` are called {twice[0]!r}; give each its own `name`")
        known = [one.name for one in self.prune]
        for one in self.models:
            if odd := [name for name in one.prunings if name not in known]:
                raise ValueError(
                    f"{one.name!r} is pruned by {odd[0]!r}, but the prunings are {', '.join(known)}"
                )

    def for_model(self, model: ModelSettings) -> Recipe:
        """The recipe of one of the runs that `models` asks for.

        With the model's own prunings, and the ways of realigning and defending that these have.
        """
        prune = [one for one in self.prune if not model.prunings or one.name in model.prunings]
        realigned = [one.name for one in prune if one.realign]
        content = dict(self) | {
            "title": f"{self.title}: {model.name}",
            "model": model.model,
            "models": (),
            "published": None,
            "prune": prune,
            "realign": _for_prunings(self.realign, realigned),
            "defend": _for_prunings(self.defend, realigned),
        }
        return Recipe.model_validate(content)

    def for_seed(self, seed: int) -> Recipe:
        """The recipe of one of the runs that `seeds` asks for.

        Random controls draw other heads in every run: of R repeats as their `repeats` says, of one
        by its `head_seed` + `seed`.
        """
        realign = [
            one.reseeded(seed) if one.drawn and one.repeats == 1 else one for one in self.realign
        ]
        content = dict(self) | {
            "seeds": (),
            "against": (),
            "calibration": self.calibration.model_copy(update={"seed": seed}),
            "realign": realign,
        }
        return Recipe.model_validate(content)

    def variants_of(self, pruning: PruningSettings) -> tuple[VariantSettings, ...]:
        """How a pruning is realigned."""
        return tuple(one for one in self.realign if _is_for(pruning, one.prunings))

    def defences_of(self, pruning: PruningSettings) -> tuple[NamedDefenceSettings, ...]:
        """How a pruning is defended at inference."""
        return tuple(one for one in self.defend if _is_for(pruning, one.prunings))

    def ranking_name(self, variant: VariantSettings) -> str:
        """Variants that differ in what they take of a ranking share it."""
        settings = own_settings(variant).ranking()
        return f"{variant.method}-{digest(settings.model_dump_json())[:8]}"

    def positions_of(self, variant: VariantSettings) -> VariantSettings | None:
        """The method before it whose ranking `variant` needs, if it names one."""
        name = needs_of(variant).positions
        return next((one for one in self.realign if one.name == name), None)

    def on_disk(self, variant: VariantSettings) -> bool:
        """Whether its checkpoint is written, wanted or not.

        vLLM takes no patch in memory, nor do weights of streamed models that wait on disk.
        """
        in_memory = self.compute.placement != "streamed" and self.evaluate.backend != "vllm"
        return variant.checkpoint or not in_memory

    @field_serializer("prune")
    def _one_or_many(self, prune: tuple[PruningSettings, ...]) -> Any:
        written = [one.model_dump(mode="json") for one in prune]
        return written if len(written) > 1 else written[0]


def _choosing(
    settings: Choosing, name: str, info: ValidationInfo, *, needed: bool = True
) -> Choosing:
    if not {"model", "models", "calibration"} <= info.data.keys():
        return settings  # they have errors of their own
    models, calibration = info.data["models"], info.data["calibration"]
    model = models[0].model if models else info.data["model"]
    found = with_validation(settings, model, calibration, needed=needed)
    try:
        validation_of(found)
    except RegraftError as error:
        raise ValueError(f"{name!r}: {error}") from error
    return found


def _for_prunings(ways: Sequence[Way], known: Sequence[str]) -> list[Way]:
    """The ways of realigning or defending that are for some of the prunings, and these alone."""
    kept = [(one, tuple(name for name in one.prunings if name in known)) for one in ways]
    return [
        one.model_copy(update={"prunings": prunings})
        for one, prunings in kept
        if prunings or not one.prunings
    ]


def _is_for(pruning: PruningSettings, names: tuple[str, ...]) -> bool:
    return pruning.realign and (not names or pruning.name in names)


class _Loader(yaml.SafeLoader):
    """YAML without base-60 numbers, so that `n_m: 2:4` is the text that it looks like.

    A key that is there twice is an error; YAML takes the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"[-+]?(0|[1-9][0-9_]*)$") if tag.endswith(":int") else pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; relative paths in it are relative to the file.

    Raises:
        RegraftError: the file is missing or a field is wrong; the message names each.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)
    except FileNotFoundError as error:
        raise RegraftError(f"The recipe {path} does not exist.") from error
    except OSError as error:
        raise RegraftError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegraftError(f"{path} is not valid YAML: {error}") from error
    if not text.strip():
        raise RegraftError(f"{path} is empty; expected settings, each a name and a value.")
    try:
        recipe = Recipe.model_validate({} if content is None else content)
    except ValidationError as error:
        raise RegraftError(f"{path}:\n{explain(error)}") from error
    return _anchored(recipe, path.absolute().parent)


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    def path(value: Path) -> Path:
        return folder / value.expanduser()

    def source(value: DataSource) -> DataSource:
        if value.path is None or is_on_hub(value.path):
            return value
        return value.model_copy(update={"path": path(value.path)})

    calibration = recipe.calibration.model_copy(update={"data": source(recipe.calibration.data)})
    suites = tuple(source(one) for one in recipe.evaluate.suite)
    text = recipe.evaluate.text and path(recipe.evaluate.text)
    evaluate = recipe.evaluate.model_copy(update={"suite": suites, "text": text})
    defend = tuple(
        one.model_copy(update={"validation": source(validation_of(one))}) for one in recipe.defend
    )
    realign = tuple(
        one
        if one.search is None
        else one.model_copy(
            update={
                "search": one.search.model_copy(
                    update={"validation": source(validation_of(one.search))}
                )
            }
        )
        for one in recipe.realign
    )

    def model(name: str) -> str:
        on_hub = name[0] not in "./~" and name.partition("@")[0].count("/") == 1
        beside = path(Path(name))
        if name == "demo" or (on_hub and not beside.is_dir()):
            if on_hub and Path(name).is_dir() and Path(name).resolve() != beside.resolve():
                raise RegraftError(
                    f"{name} is a folder of the current one, but paths of a recipe are relative to "
                    f"its file: there is no {beside}. Write {Path(name).absolute()}."
                )
            return name
        return str(beside)

    return recipe.model_copy(
        update={
            "calibration": calibration,
            "defend": defend,
            "evaluate": evaluate,
            "model": model(recipe.model),
            "models": tuple(
                one.model_copy(update={"model": model(one.model)}) for one in recipe.models
            ),
            "published": None if recipe.published is None else path(recipe.published),
            "pruned": None if recipe.pruned is None else model(recipe.pruned),
            "realign": realign,
        }
    )
