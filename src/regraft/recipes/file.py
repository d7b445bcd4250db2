"""A recipe as a YAML file: read, with paths relative to it, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from regraft.data.sources import DataSource
from regraft.data.storage import is_on_hub
from regraft.disk.parsing import read_yaml
from regraft.disk.paths import at_home
from regraft.errors import RegraftError
from regraft.recipes.recipe import Recipe
from regraft.settings.base import Settings, explain


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; relative paths in it are relative to the file.

    Raises:
        RegraftError: the file is missing or a field is wrong; the message names each.
    """
    content = read_yaml(path, "A recipe is needed.")
    try:
        recipe = Recipe.model_validate({} if content is None else content)
    except ValidationError as error:
        raise RegraftError(f"{path}:\n{explain(error)}") from error
    anchored: Recipe = _anchored(recipe, path.absolute().parent)
    return anchored


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _anchored(value: Any, folder: Path, field: str = "") -> Any:
    """Settings with the paths in them, however deep, relative to a folder; fields by their type.

    Text is a path where it names a model, and only if it is not the id of one on the hub.
    """
    if isinstance(value, Settings):
        found = {name: _anchored(one, folder, name) for name, one in value}
        # what stays is not set, so that a sweep still knows what the recipe says
        return value.model_copy(update={k: v for k, v in found.items() if v != getattr(value, k)})
    if isinstance(value, tuple):
        return tuple(_anchored(one, folder, field) for one in value)
    if isinstance(value, DataSource):
        on_disk = value.path is not None and not is_on_hub(value.path)
        return value.model_copy(update={"path": _anchored(value.path, folder)} if on_disk else {})
    if isinstance(value, Path):
        return folder / at_home(value)
    return _model(value, folder) if value and field in ("model", "pruned") else value


def _model(name: str, folder: Path) -> str:
    """A model's folder beside the recipe, or a hub id as it is."""
    on_hub = name[0] not in "./~" and name.partition("@")[0].count("/") == 1
    beside = folder / at_home(Path(name))
    if name != "demo" and (not on_hub or beside.is_dir()):
        return str(beside)
    if on_hub and Path(name).is_dir() and Path(name).resolve() != beside.resolve():
        raise RegraftError(
            f"{name} is a folder of the current one, but paths of a recipe are relative to "
            f"its file: there is no {beside}. Write {Path(name).absolute()}."
        )
    return name
