"""Shared by the commands: types of flags, and one command per method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import create_model

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
Trust = Annotated[bool, Parameter(help="Run the checkpoint's own Python code.")]
DryRun = Annotated[bool, Parameter(help="Show the steps and an estimate; write nothing.")]
Calibration = Annotated[CalibrationSettings, Flat]
Compute = Annotated[ComputeSettings, Flat]


_create_model: Any = create_model


def as_command(
    run: Callable[..., None],
    name: str,
    kind: type[Settings],
    text: str,
    without: Collection[str] = (),
    changed: Mapping[str, Mapping[str, Any]] = {},
) -> Callable[..., None]:
    """Turn `run` into the command of one method, with the method's settings as flags.

    Args:
        run: Takes the name of a method, then among others `settings` of any method.
        name: The method.
        kind: The class of its settings.
        text: The help.
        without: Parameters of `run` that this method does not use, which get no flags.
        changed: Parameter -> its annotation or default for this method.
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
        # Back to the method's own class, with the method among the fields that are set.
        block = flags.get("settings")
        chosen = {} if block is None else block.model_dump(exclude_unset=True)
        run(name, *args, **{**flags, "settings": kind(**{**chosen, "method": name})})

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__doc__, command.__name__ = text, name
    return command
