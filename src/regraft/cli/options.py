"""What commands share: the types of their flags, a command for each method, and the console."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import create_model
from rich.console import Console

from regraft import distributed
from regraft.console import ConsoleWatch
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings

Flat = Parameter(name="*")
Model = Annotated[str, Parameter(help="Checkpoint folder or hub id; 'demo' is the bundled model.")]
Answering = Annotated[
    str,
    Parameter(
        help="Checkpoint folder or hub id; 'demo' is the bundled model; or endpoint:URL#MODEL, a "
        "model behind an OpenAI-compatible server, whose key is in OPENAI_API_KEY."
    ),
]


def _require_name(_: Any, out: Path | None) -> None:
    if out is not None and not out.name:
        raise ValueError(f"{str(out)!r} is no name of a file")


_FOLDER = Parameter(name=["--out", "-o"], help="New folder to write.")
_FILE = Parameter(name=["--out", "-o"], help="New file to write.", validator=_require_name)
OutFolder = Annotated[Path, _FOLDER]
OutFile = Annotated[Path, _FILE]
MaybeOutFolder = Annotated[Path | None, _FOLDER]
MaybeOutFile = Annotated[Path | None, _FILE]
Trust = Annotated[bool, Parameter(help="Run Python code that comes with the checkpoint.")]
Calibration = Annotated[CalibrationSettings, Flat]
Compute = Annotated[ComputeSettings, Flat]


def given(*blocks: Settings) -> dict[str, Any]:
    """What was set in these blocks, by name, as the functions of `regraft.api` take it."""
    return {name: getattr(one, name) for one in blocks for name in one.model_fields_set}


@contextmanager
def watching() -> Iterator[ConsoleWatch]:
    """Progress and notes on standard output, from one process of several."""
    width = None if sys.stdout.isatty() else 120
    yield ConsoleWatch(Console(width=width, quiet=not distributed.first(), emoji=False))


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
