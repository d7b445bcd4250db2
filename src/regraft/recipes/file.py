"""Read recipes from YAML, write them, and write the commented template of all settings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from cyclopts import Parameter
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from regraft.data.sources import DataSource
from regraft.data.storage import is_on_hub
from regraft.disk.parsing import read_yaml
from regraft.disk.paths import at_home, real
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import NOTE, Point, Tried, Tuned
from regraft.pruning.base import PruneSettings, all_settings, help_text
from regraft.recipes.parts import ModelSettings, parse_variant
from regraft.recipes.recipe import Recipe
from regraft.report.formatting import rate
from regraft.restoration.base import METHODS, MethodSettings
from regraft.restoration.methods.fine_tune import RANDOM
from regraft.settings.base import Settings, explain
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import DEFENCES, DefenceSettings, defence_type
from regraft.settings.searching import SearchSettings

_WIDTH = 100


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; relative paths in it are relative to the file.

    Raises:
        RegraftError: the file is missing or fields are wrong; the message names each.
    """
    content = read_yaml(path, "A recipe is needed.")
    try:
        recipe = Recipe.model_validate({} if content is None else content)
    except ValidationError as error:
        raise RegraftError(f"{path}:\n{explain(error)}") from error
    names = {RANDOM, *(one.name for one in recipe.realign)}
    anchored: Recipe = _anchored(recipe, path.absolute().parent, names)
    return anchored


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _anchored(value: Any, folder: Path, names: Set[str], field: str = "") -> Any:
    """Resolve all paths in settings, nested ones too, against a folder.

    Paths are recognised by their type; text is one where it names a model that is not on the hub,
    or positions that are none of these `names`.
    """
    if isinstance(value, Settings):
        found = {name: _anchored(one, folder, names, name) for name, one in value}
        # unchanged fields stay unset, so that a sweep still knows which ones the recipe sets
        return value.model_copy(update={k: v for k, v in found.items() if v != getattr(value, k)})
    if isinstance(value, tuple):
        return tuple(_anchored(one, folder, names, field) for one in value)
    if isinstance(value, DataSource):
        on_disk = value.path is not None and not is_on_hub(value.path)
        return value.model_copy(
            update={"path": _anchored(value.path, folder, names)} if on_disk else {}
        )
    if isinstance(value, Path):
        return folder / at_home(value)
    if field == "positions":
        return value if value in names else str(folder / at_home(Path(value)))
    return _model(value, folder) if value and field in ("model", "pruned") else value


def _model(name: str, folder: Path) -> str:
    """Resolve a model's folder against the recipe's; a hub id is returned as it is."""
    on_hub = name[0] not in "./~" and name.partition("@")[0].count("/") == 1
    local = folder / at_home(Path(name))
    if name != "demo" and (not on_hub or local.is_dir()):
        return str(local)
    if on_hub and Path(name).is_dir() and real(Path(name)) != real(local):
        raise RegraftError(
            f"{name} is a folder in the current directory, but paths in a recipe are relative to "
            f"the recipe's file, and there is no {local}. Write {Path(name).absolute()}."
        )
    return name


def explained_recipe() -> str:
    """The default recipe as YAML, with every setting explained and unused blocks as comments."""
    return "\n".join(_block(Recipe(), "")) + "\n"


def _block(settings: Settings, pad: str) -> Iterator[str]:
    content = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        value, written = getattr(settings, name), content[name]
        meaning = _meaning(field, value)
        if name == "method" and isinstance(settings, PruneSettings):
            meaning = help_text()
        elif name == "method" and isinstance(settings, MethodSettings):
            meaning = _first_line(METHODS.get(value).settings_type)
        elif name == "method" and isinstance(settings, DefenceSettings):
            meaning = _first_line(defence_type(value))
        yield from _comment(meaning, pad)
        if isinstance(value, Settings):
            yield f"{pad}{name}:"
            yield from _block(value, f"{pad}  ")
        elif written and isinstance(written, list) and isinstance(value[0], Settings):
            yield f"{pad}{name}:"
            yield from _items(value, pad)
            if isinstance(value[-1], PruneSettings):
                yield from _other_pruners(value[-1], f"{pad}    ")
        else:
            yield from _entry(name, written, pad)
        if name == "search" and value is None:
            yield from _example(["search:", *_block(SearchSettings(), "  ")], pad)
        if name == "realign" and isinstance(settings, Recipe):
            yield from _example(["realign:", *_items(_other_methods(value), "")], pad)
        if name == "models" and not value:
            yield from _example(["models:", *_items([ModelSettings(model="ORG/NAME")], "")], pad)
        if name == "defend" and not value:
            ways = [one(method=method) for method, one in DEFENCES.items()]
            yield from _example(["defend:", *_items(ways, "")], pad)


def _other_pruners(settings: PruneSettings, pad: str) -> Iterator[str]:
    """The settings that only other pruners have, as comments."""
    for method, other in all_settings().items():
        for name, field in other.model_fields.items():
            if name not in type(settings).model_fields:
                yield from _comment(f"For {method}: {_meaning(field, None)}", pad)
                yield from (f"{pad}# {line}" for line in _entry(name, field.default, ""))


def _other_methods(ways: Sequence[MethodSettings]) -> list[MethodSettings]:
    """Default settings, without names, of all methods that a recipe does not use."""
    shown = {one.method for one in ways}
    names = [name for name in METHODS.working() if name not in shown]
    return [METHODS.get(name).settings_type(method=name) for name in names]


def _items(settings: Any, pad: str) -> Iterator[str]:
    for one in settings:
        yield f"{pad}  -"
        yield from _block(one, f"{pad}    ")


def _entry(name: str, written: Any, pad: str) -> Iterator[str]:
    text = yaml.safe_dump({name: written}, sort_keys=False, allow_unicode=True, width=_WIDTH)
    yield from (f"{pad}{line}" for line in text.splitlines())


def _example(lines: list[str], pad: str) -> Iterator[str]:
    """An alternative to the line before, as a comment."""
    yield f"{pad}# for example:"
    yield from (f"{pad}# {line}" for line in lines)


def _comment(text: str, pad: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(pad) - 2, break_on_hyphens=False):
        yield f"{pad}# {line}"


def _meaning(field: FieldInfo, value: Any) -> str:
    """Description of a setting or a block, with the choices if it does not name them all."""
    helps = [one.help for one in field.metadata if isinstance(one, Parameter) and one.help]
    text = field.description or " ".join(helps)
    if not text and isinstance(value, Settings):
        text = _first_line(type(value))
    choices = _choices(field.annotation)
    if choices and not all(choice in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    return text


def _first_line(settings: type[Settings]) -> str:
    return (settings.__doc__ or "").strip().partition("\n")[0]


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal type, optional or not; none of other types."""
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    return next((found for one in get_args(annotation) if (found := _choices(one))), [])


def recipe_item(
    tuned: Tuned,
    best: Tried,
    method: MethodSettings,
    calibration: CalibrationSettings,
    max_new_tokens: int,
) -> str:
    """The best trial as YAML, an item of a recipe's `realign`.

    If it restores only a prefix of its ranking, `count` gives the number of weights.
    """
    content: dict[str, Any] = {"name": f"{method.method}-tuned", "method": method.method}
    content |= method.model_dump(mode="json", exclude_defaults=True) | dict(best.settings)
    content.pop("r_max", None)  # a recipe sets it once, in `heads`
    whole = method.how_many(tuned.pruned)
    if whole is not None and best.point.restored < whole:
        content |= {"budget": None, "count": best.point.restored}
    content = {name: value for name, value in content.items() if value is not None}
    parse_variant(content)  # raises if the item is not valid
    r_max = best.settings.get("r_max")
    lines = [
        f"Trial {best.number}, the best of {len(tuned.trials)}: an item of a recipe's `realign`.",
        f"On validation prompts: {_rates(best.point)}.",
        f"It was found with evaluate.max_new_tokens {max_new_tokens}, "
        f"calibration.samples {calibration.samples}, calibration.seed {calibration.seed}"
        + ("." if r_max is None else f", heads.r_max {r_max}."),
        NOTE,
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump([content], sort_keys=False)


def _rates(point: Point) -> str:
    rates = {"ASR": point.asr, "over-refusal": point.over_refusal, "utility": point.utility}
    return ", ".join(
        f"{name} {rate(one)} (n {one.n})" for name, one in rates.items() if one is not None
    )
