"""What commands share: the types of their flags, opening a model, and the console they write to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
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
_FOLDER = Parameter(name=["--out", "-o"], help="New folder to write.")
_FILE = Parameter(name=["--out", "-o"], help="New file to write.")
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
