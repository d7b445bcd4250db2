"""Commands of methods that have settings of their own: a command for each, with its flags alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import create_model

from regraft.cli.options import Flat
from regraft.settings.base import Settings

_create_model: Any = create_model


def as_command(
    run: Callable[..., None],
    name: str,
    kind: type[Settings],
    text: str,
    without: Collection[str] = (),
    changed: Mapping[str, Mapping[str, Any]] = {},
) -> Callable[..., None]:
    """`run` as the command of one method: with its settings, and no flag that it does not read.

    Args:
        run: Its first argument is the method's name, and `settings` are those of any method.
        name: The method.
        kind: The class of its settings.
        text: The help.
        without: Other parameters of `run` that mean nothing here.
        changed: What a parameter has here instead, its annotation or default, by its name.
    """
    hidden = Annotated[Literal[name], Parameter(show=False, parse=False)]  # type: ignore[valid-type]
    own = _create_model(kind.__name__, __base__=kind, method=(hidden, name))
    changed = {"settings": {"annotation": Annotated[own, Flat], "default": None}, **changed}
    parameters = [
        one.replace(**changed.get(one.name, {}))
        for one in inspect.signature(run, eval_str=True).parameters.values()
        if one.name not in {"name", *without}
    ]

    def command(*args: Any, **flags: Any) -> None:
        # Of the method's own class again, which worker processes can import.
        block = flags.get("settings")
        chosen = {} if block is None else block.model_dump(exclude_unset=True)
        run(name, *args, **{**flags, "settings": kind(**{**chosen, "method": name})})

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__doc__, command.__name__ = text, name
    return command
