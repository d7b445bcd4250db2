"""What all settings have in common, and errors in them said in one line a field."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        return None

    def first_set(self, *names: str) -> str | None:
        """The first of these settings that is not as it is if not given."""
        fields = type(self).model_fields
        return next((one for one in names if getattr(self, one) != fields[one].default), None)


def _names_of(settings: type[BaseModel]) -> set[str]:
    """Of all settings that there are."""
    return set(settings.model_fields).union(*(_names_of(one) for one in settings.__subclasses__()))


def _is_percent(problem: Mapping[str, Any]) -> bool:
    """Whether a share of at most 1 was given in per cent."""
    given = problem["input"]
    return problem["ctx"]["lt"] == 1 and isinstance(given, int | float) and 1 < given < 100


def explain(error: ValidationError, *, flags: bool = False) -> str:
    """A pydantic error in one line a field, named as in a recipe or as a command line's flag."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if flags and where:
            where = f"--{where.replace('_', '-')}"
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})"
        if problem["type"] in ("missing", "value_error"):
            given = ""
        elif problem["type"] == "extra_forbidden":
            near = get_close_matches(str(problem["loc"][-1]), sorted(_names_of(Settings)), 1)
            message = "there is no such setting" + (f"; is it {near[0]}?" if near else "")
            given = ""
        elif problem["type"] == "tuple_type":
            message = "a list is needed, as in [0, 1]"
        elif problem["type"] in ("model_type", "dict_type"):
            message = "settings are needed, each a name and a value"
        elif problem["type"] == "less_than" and _is_percent(problem):
            message += f"; {problem['input']:g} % is {problem['input'] / 100:g}"
        lines.append(f"  {where}: {message}{given}" if where else f"  {message}{given}")
    return "\n".join(lines)
