"""The paper's analyses: sweeps, total Ships against lost safety, weights that two tasks share.

Each module has the computation, its figure, and a function that writes both to a folder, as JSON
and as a standalone SVG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.disk.files import atomic_folder, write_json, write_text
from regraft.report.drawing import standalone


def write_analysis(folder: Path, name: str, content: Any, figure: str) -> None:
    """Write NAME.json and NAME.svg to an existing folder."""
    if distributed.first():
        write_json(folder / f"{name}.json", content)
        write_text(folder / f"{name}.svg", standalone(figure))


def write_new(out: Path, name: str, content: Any, figure: str) -> None:
    """Write NAME.json and NAME.svg to the new folder `out`."""
    if distributed.first():
        with atomic_folder(out) as folder:
            write_analysis(folder, name, content, figure)
