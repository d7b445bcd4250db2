"""The paper's analyses: total Ships against lost safety, weights that two tasks share.

Each module has the computation, its figure, and a function that writes both to a folder, as JSON
and as a standalone SVG. Sweeps, which run a recipe, are in `regraft.runs.sweep`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.disk.files import atomic_folder, to_json, write_texts
from regraft.report.drawing import standalone


def write_analysis(folder: Path, name: str, content: Any, figure: str) -> None:
    """Write NAME.json and NAME.svg to an existing folder."""
    if distributed.first():
        files = {".json": to_json(content), ".svg": standalone(figure)}
        write_texts({folder / f"{name}{suffix}": text for suffix, text in files.items()})


def write_new(out: Path, name: str, content: Any, figure: str) -> None:
    """Write NAME.json and NAME.svg to the new folder `out`."""
    if distributed.first():
        with atomic_folder(out) as folder:
            write_analysis(folder, name, content, figure)
