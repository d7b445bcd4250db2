"""Plug-ins by name: built-in ones, one file each, and those of installed packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar, cast

from regraft.errors import RegraftError

Plugin = TypeVar("Plugin")


@dataclass(frozen=True)
class Registry(Generic[Plugin]):
    """The plug-ins of one kind, each imported only when it is used.

    A built-in plug-in is the variable PLUGIN of a module of `package`, and is named after the file
    ("mm_safetybench.py" is "mm-safetybench"). Other packages register theirs as entry points of
    `group`, and cannot override a built-in one. All are objects of the class `kind`; `what` is its
    name in messages, such as "data set".
    """

    what: str
    package: str
    group: str
    kind: type[Plugin]

    def names(self) -> tuple[str, ...]:
        """All names: the built-in ones, then those of other packages, both sorted."""
        own = self.built_in()
        return (*own, *sorted(entry_points(group=self.group).names.difference(own)))

    def built_in(self) -> tuple[str, ...]:
        """The names of the built-in plug-ins, sorted."""
        return tuple(_built_in(self.package))

    def __contains__(self, name: object) -> bool:
        # Scanning the installed packages is slow, and most names are built in.
        return name in _built_in(self.package) or name in entry_points(group=self.group).names

    def get(self, name: str) -> Plugin:
        """The plug-in of that name.

        Raises:
            RegraftError: the name is unknown (the message lists the known ones), or the plug-in of
                an installed package cannot be imported, is of the wrong class or has another name.
        """
        if not isinstance(name, str):
            raise RegraftError(f"A {self.what} is a name, not {name!r}; {self.expected()}.")
        if module := _built_in(self.package).get(name):
            return cast(Plugin, import_module(module).PLUGIN)
        entry = next(iter(entry_points(group=self.group, name=name)), None)
        if entry is None:
            raise RegraftError(f"There is no {self.what} {name!r}; {self.expected()}.")
        named = f"The {self.what} {name!r} ({entry.value})"
        correct = f"Correct the package that registers it under {self.group}"
        try:
            found = entry.load()
        except Exception as error:  # another package's module may raise anything
            raise RegraftError(
                f"{named} cannot be imported: {type(error).__name__}: {error}. Repair or remove "
                "the package that registers it."
            ) from error
        if not isinstance(found, self.kind):
            raise RegraftError(
                f"{named} is {type(found).__name__!r}; expected an object of "
                f"{self.kind.__module__}.{self.kind.__name__}. {correct}."
            )
        if missing := [one for one in _promised(type(found)) if not hasattr(found, one)]:
            raise RegraftError(
                f"{named} has no {missing[0]!r}, which every {self.what} has. {correct}."
            )
        if (own := getattr(found, "name", name)) != name:
            raise RegraftError(
                f"{named} has another name of its own, {own!r}. {correct}: both must be the same."
            )
        return found

    def working(self) -> tuple[str, ...]:
        """The names of all plug-ins that `get` returns without an error."""
        found = []
        for name in self.names():
            with suppress(RegraftError):
                self.get(name)
                found.append(name)
        return tuple(found)

    def expected(self) -> str:
        """The part of an error message that lists the names."""
        return f"expected {', '.join(self.names())}"


def _promised(kind: type) -> Iterator[str]:
    """The attributes that our own base classes of a plug-in's class declare."""
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] == __name__.partition(".")[0]:
            yield from getattr(one, "__annotations__", {})


@cache
def _built_in(package: str) -> dict[str, str]:
    """Name -> module."""
    found = sorted(one.name for one in iter_modules(import_module(package).__path__))
    return {name.replace("_", "-"): f"{package}.{name}" for name in found}
