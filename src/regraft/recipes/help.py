"""Every setting of a recipe with its default and what it does: YAML that is a recipe itself."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from cyclopts import Parameter
from pydantic.fields import FieldInfo

from regraft.pruning.base import PruneSettings, all_settings, described
from regraft.recipes.parts import ModelSettings
from regraft.recipes.recipe import Recipe
from regraft.restoration.base import METHODS, MethodSettings
from regraft.settings.base import Settings
from regraft.settings.defending import DEFENCES, DefenceSettings, defence_type
from regraft.settings.searching import SearchSettings

_WIDTH = 100


def explained_recipe() -> str:
    """The default recipe; blocks that it does not have are there as comments."""
    return "\n".join(_block(Recipe(), "")) + "\n"


def _block(settings: Settings, pad: str) -> Iterator[str]:
    content = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        if name not in content:  # of a backend that is not the default
            continue
        value, written = getattr(settings, name), content[name]
        meaning = _meaning(field, value)
        if name == "method" and isinstance(settings, PruneSettings):
            meaning = described()
        elif name == "method" and isinstance(settings, MethodSettings):
            meaning = _first_line(METHODS.get(value).settings_type)
        elif name == "method" and isinstance(settings, DefenceSettings):
            meaning = _first_line(defence_type(value))
        yield from _comment(meaning, pad)
        if isinstance(value, Settings):
            yield f"{pad}{name}:"
            yield from _block(value, f"{pad}  ")
        elif isinstance(written, dict):  # a list of one that is written without a list
            yield f"{pad}{name}:"
            yield from _block(value[0], f"{pad}  ")
            if isinstance(value[0], PruneSettings):
                yield from _of_other_pruners(value[0], f"{pad}  ")
        elif written and isinstance(written, list) and isinstance(value[0], Settings):
            yield f"{pad}{name}:"
            yield from _items(value, pad)
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


def _of_other_pruners(settings: PruneSettings, pad: str) -> Iterator[str]:
    """Settings of pruners other than that of `settings`, as comments."""
    for method, other in all_settings().items():
        for name, field in other.model_fields.items():
            if name not in type(settings).model_fields:
                yield from _comment(f"Of {method}: {_meaning(field, None)}", pad)
                yield from (f"{pad}# {line}" for line in _entry(name, field.default, ""))


def _other_methods(ways: Sequence[MethodSettings]) -> list[MethodSettings]:
    """The settings of all methods that a recipe does not have, without names."""
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
    """What takes the place of the line before, as a comment."""
    yield f"{pad}# such as:"
    yield from (f"{pad}# {line}" for line in lines)


def _comment(text: str, pad: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(pad) - 2, break_on_hyphens=False):
        yield f"{pad}# {line}"


def _meaning(field: FieldInfo, value: Any) -> str:
    """A setting's description, or a block's, with the choices that it does not name."""
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
    """Of a literal, or of one that may be left out."""
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    return next((found for one in get_args(annotation) if (found := _choices(one))), [])
