"""A recipe: all settings of a run, and the checks across its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from regraft.disk.files import digest
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.recipes.parts import (
    EvaluateSettings,
    ModelSettings,
    NamedDefenceSettings,
    PruningSettings,
    VariantSettings,
    Way,
    one_or_more,
    parse_defence,
    parse_pruning,
    parse_variant,
)
from regraft.restoration.base import needs_of, own_settings
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.searching import Choosing, validation_of, with_validation

AnyWay = TypeVar("AnyWay", bound=Way)


def _name_prunings(prunings: tuple[PruningSettings, ...]) -> tuple[PruningSettings, ...]:
    if not prunings:
        raise ValueError("the list is empty; give at least one pruning")
    names = [
        one.name or (one.derived_name() if len(prunings) > 1 else "pruned") for one in prunings
    ]
    if twice := _duplicate(names):
        raise ValueError(
            f"{names.count(twice)} prunings are called {twice!r}; give each a `name` of its own"
        )
    return tuple(
        one.model_copy(update={"name": name}) for one, name in zip(prunings, names, strict=True)
    )


def _duplicate(names: Iterable[str]) -> str | None:
    """A name that occurs more than once, if any."""
    return next((name for name, uses in Counter(names).items() if uses > 1), None)


class Recipe(Settings):
    """A whole run: prune, score heads, realign, evaluate, report."""

    title: str = Field("regraft", description="Title of the report.")
    model: str = Field(
        "demo", min_length=1, description="A folder, a hub id, or 'demo' for the bundled model."
    )
    models: tuple[ModelSettings, ...] = Field(
        (),
        description="Several models, in place of `model`: one run each, in folders model-NAME, and "
        "one table over all.",
    )
    published: Path | None = Field(
        None,
        description="With models: a YAML file of published figures to show in the table.",
    )
    pruned: str | None = Field(
        None,
        min_length=1,
        description="An existing pruned checkpoint, folder or hub id; `prune` is then not used.",
    )
    calibration: CalibrationSettings = CalibrationSettings()
    seeds: tuple[int, ...] = Field(
        (),
        description="Calibration seeds, in place of calibration.seed: one run each, in folders "
        "seed-N, and a comparison over all.",
    )
    against: Annotated[tuple[str, ...], one_or_more()] = Field(
        (),
        description="With seeds: names from `realign` or `defend` that the comparison tests every "
        "method against, besides the pruned model.",
    )
    prune: Annotated[
        tuple[Annotated[SerializeAsAny[PruningSettings], BeforeValidator(parse_pruning)], ...],
        one_or_more(parse_pruning),
        AfterValidator(_name_prunings),
    ] = Field(
        default_factory=lambda: (parse_pruning({"name": "pruned"}),),
        description="One pruning, or a list of them, each evaluated and realigned.",
    )
    heads: HeadSettings = HeadSettings()
    realign: Annotated[
        tuple[Annotated[SerializeAsAny[VariantSettings], BeforeValidator(parse_variant)], ...],
        one_or_more(parse_variant),
    ] = Field(
        (parse_variant({}),),
        description="One way of realigning, or a list of them; gain if no `method` is named.",
    )
    defend: Annotated[
        tuple[Annotated[SerializeAsAny[NamedDefenceSettings], BeforeValidator(parse_defence)], ...],
        one_or_more(parse_defence),
    ] = Field((), description="Defences at inference, evaluated on the pruned models.")
    evaluate: EvaluateSettings = EvaluateSettings()
    compute: ComputeSettings = ComputeSettings()

    @field_validator("realign")
    @classmethod
    def _expand(
        cls, realign: tuple[VariantSettings, ...], info: ValidationInfo
    ) -> tuple[VariantSettings, ...]:
        """Expand repeats into variants, and give searches their validation prompts."""
        if "calibration" in info.data and not info.data.get("seeds"):  # else for each seed's run
            seed = info.data["calibration"].seed
            realign = tuple(draw for one in realign for draw in one.draws(seed))
        return tuple(
            one
            if one.search is None
            else one.model_copy(update={"search": _choosing(one.search, one.name, info)})
            for one in realign
        )

    @field_validator("defend")
    @classmethod
    def _add_validation(
        cls, defend: tuple[NamedDefenceSettings, ...], info: ValidationInfo
    ) -> tuple[NamedDefenceSettings, ...]:
        return tuple(
            _choosing(cast("Any", one), one.name, info) if one.searches else one for one in defend
        )

    @model_validator(mode="after")
    def _check_runs(self) -> Recipe:
        """Check `pruned`, `seeds`, `against`, `models` and `published` against each other."""
        if self.pruned is not None and len(self.prune) > 1:
            raise ValueError(
                f"`pruned` names an existing checkpoint and `prune` has {len(self.prune)} "
                "prunings; leave one of them out"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ, not {list(self.seeds)}")
        if self.seeds and self.calibration.seed:
            raise ValueError("`seeds` take the place of `calibration.seed`; leave one of them out")
        if self.against and not self.seeds:
            raise ValueError("`against` is for the comparison over `seeds`; add some, or drop it")
        if self.published is not None and not self.models:
            raise ValueError("`published` is for the table over `models`; add some, or drop it")
        if not self.models:
            return self
        if other := [one for one in ("pruned", "seeds") if getattr(self, one)]:
            raise ValueError(f"`models` and `{other[0]}` cannot be combined; leave one of them out")
        if self.first_set("model"):
            raise ValueError("`models` take the place of `model`; leave one of them out")
        if twice := _duplicate(one.name for one in self.models):
            raise ValueError(f"two of `models` are called {twice!r}; give each its own `name`")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        """Check that names are unique, and that all names referred to exist."""
        ways: list[Way] = [*self.realign, *self.defend]
        names = [one.name for one in ways]
        both = "`realign` and `defend`" if self.defend else "`realign`"
        if odd := [name for name in self.against if name not in names]:
            raise ValueError(f"`against` names {odd[0]!r}; expected some of {', '.join(names)}")
        if _duplicate(names):
            raise ValueError(f"the names of {both} must differ, not {names}")
        if clash := [one.name for one in self.prune if one.name in names]:
            raise ValueError(f"`prune` and one of {both} are both called {clash[0]!r}")
        known = sorted(one.name for one in self.prune)
        referring: list[ModelSettings | Way] = [*self.models, *ways]
        for one in referring:
            if odd := sorted({*one.prunings}.difference(known)):
                raise ValueError(
                    f"{one.name!r} is for the pruning {odd[0]!r}, but the prunings are "
                    f"{', '.join(known)}"
                )
        left = {one.name for one in self.prune if not one.realign}
        for way in ways:
            if way.prunings and left.issuperset(way.prunings):
                raise ValueError(
                    f"{way.name!r} is for {way.prunings[0]!r} alone, which is only evaluated; "
                    "leave out its `realign: false`, or give other `prunings`"
                )
        return self

    @model_validator(mode="after")
    def _check_positions(self) -> Recipe:
        """Check that positions by name are those of an earlier ranking without swaps."""
        before: list[str] = []
        for one in self.realign:
            source = self.source_of_positions(one)
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
        return self

    def for_model(self, model: ModelSettings) -> Recipe:
        """The recipe of one model's run, with only its prunings and what applies to them."""
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
        """The recipe of one seed's run.

        Random controls draw anew in every run: repeated ones as `draws` says, others by their
        `draw_seed` + `seed`.
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
        return tuple(one for one in self.realign if _is_for(pruning, one.prunings))

    def defences_of(self, pruning: PruningSettings) -> tuple[NamedDefenceSettings, ...]:
        return tuple(one for one in self.defend if _is_for(pruning, one.prunings))

    def ranking_name(self, variant: VariantSettings) -> str:
        """Name of a variant's ranking, shared by those that only take different amounts of it."""
        settings = own_settings(variant).without_amount()
        return f"{variant.method}-{digest(settings.model_dump_json())[:8]}"

    def source_of_positions(self, variant: VariantSettings) -> VariantSettings | None:
        """The earlier variant, if any, from whose ranking `variant` takes its positions."""
        name = needs_of(variant).positions
        return next((one for one in self.realign if one.name == name), None)

    def on_disk(self, variant: VariantSettings) -> bool:
        """Whether the variant's checkpoint is written: if wanted, and always of streamed models.

        Weights of these that are offloaded to disk cannot be patched in memory.
        """
        return variant.checkpoint or self.compute.placement == "streamed"


def _choosing(settings: Choosing, name: str, info: ValidationInfo) -> Choosing:
    """Fill in bundled validation prompts, and raise where there are none at all."""
    if not {"model", "models", "calibration"} <= info.data.keys():
        return settings  # fields that are missing here have errors of their own
    models, calibration = info.data["models"], info.data["calibration"]
    model = models[0].model if models else info.data["model"]
    found = with_validation(settings, model, calibration)
    try:
        validation_of(found)
    except RegraftError as error:
        raise ValueError(f"{name!r}: {error}") from error
    return found


def _for_prunings(ways: Sequence[AnyWay], known: Sequence[str]) -> list[AnyWay]:
    """The ways that apply to any of the prunings `known`, with only these as their prunings."""
    kept = [(one, tuple(name for name in one.prunings if name in known)) for one in ways]
    return [
        one.model_copy(update={"prunings": prunings})
        for one, prunings in kept
        if prunings or not one.prunings
    ]


def _is_for(pruning: PruningSettings, names: tuple[str, ...]) -> bool:
    return pruning.realign and (not names or pruning.name in names)
