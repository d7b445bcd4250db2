"""A recipe as a YAML file: read, with paths relative to it, and written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
    create_model,
)

from regraft.data.sources import DataSource
from regraft.data.storage import is_on_hub
from regraft.errors import RegraftError
from regraft.recipe import Recipe
from regraft.settings.base import explain
from regraft.settings.validation import validation_of

_create_model: Any = create_model  # its types do not know bases of two kinds


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
