"""Parse JSON and YAML that others wrote, into a checked value or a `RegraftError`.

Settings, artifacts and data go through here; tokenizer files and servers' replies are parsed where
they are read. A value has at most `MOST_DEPTH` levels, integers of 64 bits, finite numbers, valid
Unicode (no lone surrogates) and no name twice in one object, so it can always be written again.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from regraft.disk.paths import SURROGATE, read_text
from regraft.errors import RegraftError

MOST_DEPTH = 64
_MOST_YAML = 2**20  # characters; PyYAML reads about half a million a second
_MOST_NODES = 50_000  # of YAML, with aliases expanded
_MOST_DIGITS = 4000  # of an integer; Python's `int` reads 4300
_SHOWN = 60  # characters of a wrong value in a message
EXACT = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))  # for types of `from_json`
Read = TypeVar("Read")


class _RefusedError(ValueError):
    """A problem in a text; the caller adds the name of its file."""


def read_json(path: Path, what: str = "A JSON file is needed.", *, lenient: bool = False) -> Any:
    """Read JSON; see `json_value`. For `what` see `read_text`.

    Raises:
        RegraftError: see `read_text` and `json_value`.
    """
    return json_value(read_text(path, what), str(path), lenient=lenient)


def json_value(text: str | bytes, where: str, *, lenient: bool = False) -> Any:
    """Parse a JSON text.

    Args:
        where: Names the text in messages.
        lenient: Accept numbers of any size, and duplicate names (the last one counts), as other
            programs do in their settings.

    Raises:
        RegraftError: it is not valid JSON, or exceeds the bounds of this module.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=None if lenient else _object, parse_int=_integer)
        _check(found, strict=not lenient)
    except RecursionError as error:
        raise RegraftError(f"{where}: not valid JSON: it is nested too deeply.") from error
    except _RefusedError as error:
        raise RegraftError(f"{where}: {error}") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise RegraftError(f"{where}: not valid JSON: {error}") from error
    return found


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON text that must be an object; see `json_value`."""
    found = json_value(text, where)
    if not isinstance(found, dict):
        raise RegraftError(f"{where}: expected a JSON object, found {shown(found)}.")
    return found


class _LongInteger:
    """Stands for an integer too long for `int`, so that the error can name its field."""


def _integer(text: str) -> int | _LongInteger:
    return int(text) if len(text) <= _MOST_DIGITS else _LongInteger()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _RefusedError(f"the field {shown(name)} appears twice.")
        found[name] = value
    return found


def _check(value: Any, *, strict: bool = True) -> None:
    """Raise `_RefusedError` if a value of JSON or YAML breaks a promise of this module."""
    todo: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]  # each with its names, outermost first
    while todo:
        one, place = todo.pop()
        problem = _problem(one, strict)
        if len(place) > MOST_DEPTH:
            problem = f"is nested more than {MOST_DEPTH} levels deep"
        if problem:
            field = f"the field {shown('.'.join(map(str, place)))}" if place else "its value"
            raise _RefusedError(f"{field} {problem}.")
        if isinstance(one, dict):
            for name, inner in one.items():
                if isinstance(name, str) and ("\0" in name or SURROGATE.search(name)):
                    raise _RefusedError(
                        f"the field name {name!r} holds a NUL or half a character (a surrogate)."
                    )
                todo.append((inner, (*place, name)))
        elif isinstance(one, list):
            todo += [(inner, (*place, i)) for i, inner in enumerate(one)]


def _problem(value: Any, strict: bool) -> str:
    """What is wrong with one value; "" if nothing."""
    if isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
        return "holds half a character (a lone surrogate, such as \\ud83d): not valid Unicode"
    if isinstance(value, _LongInteger):
        return f"is an integer of more than {_MOST_DIGITS:,} digits"
    if strict and isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "is an integer of more than 64 bits"
    if strict and isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; a finite number is needed"
    return ""


def shown(value: object) -> str:
    """A value as JSON for a message, shortened to a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class _Loader(yaml.SafeLoader):
    """YAML without base-60 numbers, so that `n_m: 2:4` is text.

    A duplicate key is an error; PyYAML would take the last one.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # any kind: `!!bool x` a KeyError, a long integer a ValueError
            value = shown(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            raise yaml.constructor.ConstructorError(
                None, None, f"{value} cannot be read as {node.tag}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
        found = super().construct_mapping(node, deep)
        for key in found:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {key!r} is not text; put it in quotes", node.start_mark
                )
        return found


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"[-+]?(0|[1-9][0-9_]*)$") if tag.endswith(":int") else pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":timestamp", ":value"))  # dates stay text
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, what: str) -> Any:
    """Read YAML of plain values; None if it is all comments. For `what` see `read_text`.

    Raises:
        RegraftError: see `read_text`; it is not valid YAML, or exceeds this module's bounds.
    """
    text = read_text(path, what)
    if not text.strip():
        raise RegraftError(f"{path} is empty; expected settings, each a name and a value.")
    if len(text) > _MOST_YAML:
        raise RegraftError(
            f"{path} is too large: {len(text):,} characters; expected at most {_MOST_YAML:,}."
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, set())
        found = loader.construct_document(node)
        _check(found)
    except RecursionError as error:
        raise RegraftError(f"{path} is not valid YAML: it is nested too deeply.") from error
    except _RefusedError as error:
        raise RegraftError(f"{path}: {error}") from error
    except Exception as error:  # a YAMLError, or a ValueError for an invalid character
        reason = str(error) if isinstance(error, yaml.YAMLError) else repr(error)
        raise RegraftError(f"{path} is not valid YAML: {reason}") from error
    return found


def _count_nodes(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Count the nodes with every alias expanded."""
    if id(node) in above:
        raise _RefusedError("an alias (*name) refers to a value that contains it.")
    if id(node) in sizes:
        return sizes[id(node)]
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif isinstance(node, yaml.MappingNode):
        inside = [one for pair in node.value for one in pair]
    size = 1 + sum(_count_nodes(one, sizes, {*above, id(node)}) for one in inside)
    if size > _MOST_NODES:
        raise _RefusedError(f"it has more than {_MOST_NODES:,} values, aliases expanded.")
    sizes[id(node)] = size
    return size


def from_json(kind: type[Read], value: Any, where: str) -> Read:
    """Build a typed object from JSON values, each checked; `where` names it in messages.

    Raises:
        RegraftError: a field is missing, unknown or of the wrong type; the message names it.
    """
    try:
        found: Read = _adapter(cast(Any, kind)).validate_json(json.dumps(value), strict=True)
        return found
    except ValidationError as error:
        raise RegraftError(f"{where}: {_first_problem(error)}") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    *above, name = map(str, first["loc"]) if first["loc"] else [""]
    if first["type"] == "dataclass_type":
        found = f"expected a JSON object, found {type(first['input']).__name__}."
        return f"{name}: {found}" if name else found
    field = f"{'.'.join(above)}: field {name!r}" if above else f"field {name!r}"
    if first["type"] == "missing":
        return f"{field} is missing."
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown {field}."
    wrong = first["msg"].replace("Input should be", "expected")
    return f"{field} is {shown(first['input'])}; {wrong}."
