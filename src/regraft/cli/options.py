"""What commands share: the types of their flags, opening a model, and the console they write to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from regraft import distributed
from regraft.console import ConsoleWatch
from regraft.data.demo import demo_model
from regraft.models.load import Source, open_answering, open_source
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


def open_model(model: str, trust_remote_code: bool, *, answers_only: bool = False) -> Source:
    """What lies in the folder, behind the hub id or in the bundled model; loads no weights.

    With `answers_only` of any type that transformers loads, otherwise of one that can be pruned.
    """
    opened = open_answering if answers_only else open_source
    return opened(demo_model() if model == "demo" else model, trust_remote_code=trust_remote_code)


@contextmanager
def watching() -> Iterator[ConsoleWatch]:
    """Progress and notes on standard output, from one process of several."""
    width = None if sys.stdout.isatty() else 120
    yield ConsoleWatch(Console(width=width, quiet=not distributed.first(), emoji=False))
