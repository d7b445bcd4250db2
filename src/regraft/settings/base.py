"""Base class of all settings, and validation errors explained in one line per field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from regraft.errors import RegraftError

EXPERT = Parameter(group=Group("Expert settings", sort_key=9))  # the last heading of a help
NAMED = Parameter(show_choices=False)  # the description names every choice

S = TypeVar("S", bound="Settings")
_LONGEST_NAME = 100  # file names add suffixes to it, and have at most 255 bytes
_OURS = "regraft"  # type of our own errors, whose messages need nothing added
_NO_BLOCK = "expected settings, each a name and a value"


class Settings(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, given: Any, info: ValidationInfo) -> Any:
        """Refuse booleans where a number is expected; pydantic would take True as 1."""
        kinds = set(_types_in(cls.model_fields[info.field_name or ""].annotation))
        items = given if isinstance(given, list | tuple) else [given]
        if kinds & {int, float} and bool not in kinds and any(isinstance(x, bool) for x in items):
            raise ValueError(f"expected a number (got {given!r})")
        return given

    @field_validator("*")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        """Refuse larger integers, which could not be read back from an artifact."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"expected an integer of at most 64 bits (got {value})")
        return value

    def first_set(self, *names: str) -> str | None:
        """The first of these settings that differs from its default, or None."""
        fields = type(self).model_fields
        return next((one for one in names if getattr(self, one) != fields[one].default), None)

    def narrowed(self, block: type[S]) -> S:
        """These settings as a `block`, without the fields that it does not have."""
        return block(**self.model_dump(include=set(block.model_fields)))


def _types_in(annotation: Any) -> Iterator[Any]:
    """All types in an annotation, nested ones too, such as int in `tuple[int, ...] | None`."""
    yield annotation
    for inner in get_args(annotation):
        yield from _types_in(inner)


def by_method(given: Any, find: Callable[[str], type[S]], default: str) -> S:
    """Validate settings of the method that they name, or of the default one.

    Methods are only looked up here, since installed packages may add their own.

    `find` returns a method's settings class, or raises RegraftError if there is no such method.

    Raises:
        ValidationError: there is no such method, it has no such setting, or a value is wrong.
    """
    if not isinstance(given, Mapping):
        raise _error(_NO_BLOCK, given)
    method = given.get("method", default)
    try:
        block = find(method if isinstance(method, str) else repr(method))
    except RegraftError as error:
        raise _error(str(error), method, "method") from error
    whose = f" of method {method}" + ("" if "method" in given else " (no `method` is named)")
    for name, value in given.items():
        if name not in block.model_fields:
            raise _error(_unknown(name, block.model_fields, whose), value, name)
    return block.model_validate({**given, "method": method})


def _error(message: str, given: Any, *where: str) -> ValidationError:
    """A validation error with our own message."""
    # passed as context, since braces in a template are placeholders
    kind = PydanticCustomError(_OURS, "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "settings", [InitErrorDetails(type=kind, loc=where, input=given)]
    )


def _unknown(name: str, known: Iterable[str], of: str = "") -> str:
    near = get_close_matches(name, [one for one in known if one != name], 1)
    return f"unknown setting{of}" + (f"; did you mean {near[0]}?" if near else "")


def checked_name(name: str, *taken: str) -> str:
    """Return the name if it can be used in paths and tables.

    Raises:
        ValueError: it has characters other than letters, digits, '.', '_' and '-', starts with one
            of the last three, is longer than 100 characters, or is taken.
    """
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{name[:20]!r}... must have at most {_LONGEST_NAME} characters")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in taken:
        reserved = f", and not be {' or '.join(map(repr, taken))}" if taken else ""
        raise ValueError(
            f"{name!r} must consist of letters, digits, '.', '_' and '-' and start with a letter "
            f"or digit{reserved}"
        )
    return name


def _all_settings(of: type[BaseModel] = Settings) -> set[type[BaseModel]]:
    return {of}.union(*(_all_settings(one) for one in of.__subclasses__()))


def _names_in(block: str, *, nested: bool) -> list[str]:
    """Setting names of the class named `block`, or of all settings classes if `nested`."""
    blocks = [one for one in _all_settings() if nested or one.__name__ == block]
    return sorted({name for one in blocks for name in one.model_fields})


def _is_percent(problem: Mapping[str, Any]) -> bool:
    """Whether a share of at most 1 looks as if it was given in per cent."""
    given = problem["input"]
    most = problem["ctx"].get("lt", problem["ctx"].get("le"))
    return most == 1 and isinstance(given, int | float) and 1 < given <= 100


def explain(error: ValidationError, *, flags: bool = False) -> str:
    """A pydantic error in one line per field, named as in a recipe, or as a flag if `flags`."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(one) or "''" for one in problem["loc"])
        if flags and where:
            where = f"--{where.replace('_', '-')}"
        message = problem["msg"].removeprefix("Value error, ")
        if flags:
            message = re.sub(r"`\w+`", lambda name: name[0].replace("_", "-"), message)
        kind, given = problem["type"], f" (got {problem['input']!r})"
        if kind in ("missing", "value_error", _OURS):
            given = ""
        elif kind == "extra_forbidden":
            names = _names_in(error.title, nested=len(problem["loc"]) > 1)
            message, given = _unknown(str(problem["loc"][-1]), names), ""
        elif kind == "tuple_type":
            message, given = f"expected a list, such as [{problem['input']!r}]", ""
        elif kind in ("model_type", "dict_type"):
            message = _NO_BLOCK
        elif kind in ("less_than", "less_than_equal") and _is_percent(problem):
            message += f"; {problem['input']:g} % is {problem['input'] / 100:g}"
        lines.append(f"  {where}: {message}{given}" if where else f"  {message}{given}")
    return "\n".join(lines)
