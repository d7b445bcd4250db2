"""What all settings have in common, and errors in them said in one line a field."""

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
_LONGEST_NAME = 100  # of 255 bytes that files' names have, which add to it
_OURS = "regraft"  # the type of an error whose message is a whole one
_NO_BLOCK = "settings are needed, each a name and a value"


class Settings(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_a_number(cls, given: Any, info: ValidationInfo) -> Any:
        """True is no 1, as which pydantic takes it."""
        kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
        items = given if isinstance(given, list | tuple) else [given]
        if kinds & {int, float} and bool not in kinds and any(isinstance(x, bool) for x in items):
            raise ValueError(f"a number is needed (got {given!r})")
        return given

    @field_validator("*")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        """As all numbers in artifacts, which are not read otherwise."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"a number of 64 bits is needed (got {value})")
        return value

    def first_set(self, *names: str) -> str | None:
        """The first of these settings that is not as it is if not given."""
        fields = type(self).model_fields
        return next((one for one in names if getattr(self, one) != fields[one].default), None)

    def narrowed(self, block: type[S]) -> S:
        """These settings without those that another block does not have."""
        return block(**self.model_dump(include=set(block.model_fields)))


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types in an annotation: of `tuple[int, ...] | None` int is one."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def by_method(given: Any, find: Callable[[str], type[S]], default: str) -> S:
    """The settings of one of several methods: of the one that they name, else of the default.

    Which methods there are is only known when one is asked for: packages may bring their own.

    Args:
        given: Settings by name.
        find: The class of a method's settings. Raises RegraftError if there is no such method.
        default: The method of settings that name none.

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
    """An error in settings with a message of our own."""
    # braces in a message would be taken for fields of its context
    said = PydanticCustomError(_OURS, "{said}", {"said": message})
    return ValidationError.from_exception_data(
        "settings", [InitErrorDetails(type=said, loc=where, input=given)]
    )


def _unknown(name: str, known: Iterable[str], of: str = "") -> str:
    near = get_close_matches(name, [one for one in known if one != name], 1)
    return f"there is no such setting{of}" + (f"; is it {near[0]}?" if near else "")


def checked_name(name: str, *taken: str) -> str:
    """The name, which stands in paths and tables.

    Raises:
        ValueError: it has other characters than letters, digits, '.', '_' and '-', or more than a
            hundred, or is taken.
    """
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{name[:20]!r}... must have at most {_LONGEST_NAME} characters")
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
            message = "a list is needed, as in [0, 1]"
        elif kind in ("model_type", "dict_type"):
            message = _NO_BLOCK
        elif kind in ("less_than", "less_than_equal") and _is_percent(problem):
            message += f"; {problem['input']:g} % is {problem['input'] / 100:g}"
        lines.append(f"  {where}: {message}{given}" if where else f"  {message}{given}")
    return "\n".join(lines)
