"""The paper's analyses: sweeps, total Ships against lost safety, and what two tasks share.

Each is a module: what is computed, its figure, and a function that writes both into a folder, JSON
and an SVG file that can be put on any page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.disk.files import atomic_folder, write_json, write_text
from regraft.report.drawing import standalone


def write_analysis(folder: Path, name: str, content: Any, figure: str) -> None:
    """Write NAME.json and NAME.svg into a folder that is there."""
    if distributed.first():
        write_json(folder / f"{name}.json", content)
        write_text(folder / f"{name}.svg", standalone(figure))


def write_new(out: Path, name: str, content: Any, figure: str) -> None:
    """`write_analysis`, and the folder is made for it."""
    if distributed.first():
        with atomic_folder(out) as folder:
            write_analysis(folder, name, content, figure)
