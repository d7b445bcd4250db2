"""What all settings have in common, and errors in them said in one line a field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import reduce
from operator import or_
from typing import Annotated, Any

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError

EXPERT = Parameter(group=Group("Expert settings", sort_key=9))  # the last heading of a help
NAMED = Parameter(show_choices=False)  # the description names every choice
_BY_METHOD = "method "  # how the location of an error in a union of settings names the method


class Settings(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        return None

    def first_set(self, *names: str) -> str | None:
        """The first of these settings that is not as it is if not given."""
        fields = type(self).model_fields
        return next((one for one in names if getattr(self, one) != fields[one].default), None)


def by_method(choices: Mapping[str, type[Settings]], default: str) -> Any:
    """The type of settings of one of several methods; those of the default need not name it."""

    def tag(given: Any) -> str | None:
        if isinstance(given, Settings):
            return f"{_BY_METHOD}{getattr(given, 'method', None)}"
        return f"{_BY_METHOD}{given.get('method', default)}" if isinstance(given, Mapping) else None

    tagged = (Annotated[one, Tag(f"{_BY_METHOD}{name}")] for name, one in choices.items())
    decides = Discriminator(
        tag,
        custom_error_type="no_such_method",
        custom_error_message=f"there is no such method; expected {', '.join(choices)}",
    )
    union: Any = reduce(or_, tagged)
    return Annotated[union, decides]


def checked_name(name: str, *taken: str) -> str:
    """The name, which stands in paths and tables.

    Raises:
        ValueError: it has other characters than letters, digits, '.', '_' and '-', or is taken.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in taken:
        but = f", and neither {' nor '.join(map(repr, taken))}" if len(taken) > 1 else ""
        but = but or (f", and not {taken[0]!r}" if taken else "")
        raise ValueError(f"{name!r} must be letters, digits, '.', '_' and '-'{but}")
    return name


def _all_settings(of: type[BaseModel] = Settings) -> set[type[BaseModel]]:
    return {of}.union(*(_all_settings(one) for one in of.__subclasses__()))


def _names_in(block: str, *, nested: bool) -> list[str]:
    """Of the settings in a block, by the name of its class; of all that there are if `nested`."""
    blocks = [one for one in _all_settings() if nested or one.__name__ == block]
    return sorted({name for one in blocks for name in one.model_fields})


def _is_percent(problem: Mapping[str, Any]) -> bool:
    """Whether a share of at most 1 was given in per cent."""
    given = problem["input"]
    most = problem["ctx"].get("lt", problem["ctx"].get("le"))
    return most == 1 and isinstance(given, int | float) and 1 < given <= 100


def explain(error: ValidationError, *, flags: bool = False) -> str:
    """A pydantic error in one line a field, named as in a recipe or as a command line's flag."""
    lines = []
    for problem in error.errors():
        loc = [str(part) for part in problem["loc"]]
        method = next((part for part in loc if part.startswith(_BY_METHOD)), None)
        where = ".".join(part for part in loc if part != method)
        if problem["type"] == "no_such_method" and isinstance(problem["input"], Mapping):
            where = f"{where}.method" if where else "method"
        if flags and where:
            where = f"--{where.replace('_', '-')}"
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})"
        if problem["type"] in ("missing", "value_error"):
            given = ""
        elif problem["type"] == "extra_forbidden":
            names = _names_in(error.title, nested=len(problem["loc"]) > 1)
            given_name = str(problem["loc"][-1])  # which may be a setting of another block
            near = get_close_matches(given_name, [one for one in names if one != given_name], 1)
            message = "there is no such setting" + (f" of {method}" if method else "")
            message += f"; is it {near[0]}?" if near else ""
            given = ""
        elif problem["type"] == "tuple_type":
            message = "a list is needed, as in [0, 1]"
        elif problem["type"] == "no_such_method" and isinstance(problem["input"], Mapping):
            given = f" (got {problem['input'].get('method')!r})"
        elif problem["type"] in ("model_type", "dict_type", "no_such_method"):
            message = "settings are needed, each a name and a value"
        elif problem["type"] in ("less_than", "less_than_equal") and _is_percent(problem):
            message += f"; {problem['input']:g} % is {problem['input'] / 100:g}"
        lines.append(f"  {where}: {message}{given}" if where else f"  {message}{given}")
    return "\n".join(lines)
