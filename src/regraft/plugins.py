"""Registries: what is built in by name, and what installed packages add by entry point.

A package adds one in its pyproject.toml, with the group that the registry names:

    [project.entry-points."regraft.methods"]
    my-method = "my_package.my_module:MY_METHOD"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from regraft.errors import RegraftError


@dataclass(frozen=True)
class Registry:
    """Objects by name, each imported when it is asked for and not before.

    Attributes:
        what: What the objects are, for messages.
        group: The entry-point group that adds to it.
        built_in: Name -> "module:object" of this package.
    """

    what: str
    group: str
    built_in: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """All that there are, those of other packages last."""
        return tuple(dict.fromkeys([*self.built_in, *sorted(_installed(self.group))]))

    def load(self, name: str) -> Any:
        """The object of this name.

        Raises:
            RegraftError: there is none, or it cannot be imported.
        """
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(import_module(module), attribute)
        point = _installed(self.group).get(name)
        if point is None:
            near = get_close_matches(name, self.names(), 1)
            raise RegraftError(
                f"There is no {self.what} {name!r}"
                + (f"; is it {near[0]}?" if near else ".")
                + f" There are {', '.join(self.names())}."
            )
        try:
            return point.load()
        except Exception as error:
            raise RegraftError(
                f"The {self.what} {name!r} ({point.value}, of another package) cannot be "
                f"imported: {error}"
            ) from error


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
