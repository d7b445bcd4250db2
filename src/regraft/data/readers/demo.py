"""What is bundled with regraft: a small model, and a data set of prompts drawn as images."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from regraft.data.example import Reading
from regraft.data.formats import read_jsonl
from regraft.data.readers import Dataset
from regraft.disk.paths import at_home, real
from regraft.errors import RegraftError

CAVEAT = (
    "A toy: the bundled model has 12 million parameters and refuses by the wording and the length "
    "of a title, not by its meaning. Its over-refusal on demo:borderline, harmless titles worded "
    "like harmful ones, shows how far a method restores refusing as such. This run shows a refusal "
    "behaviour lost and restored. It cannot show that safety is restored, nor what any method does "
    "to a real model."
)


def demo_model() -> Path:
    """Folder of the bundled checkpoint, reader-llava-12m."""
    return bundled("reader-llava-12m")


def is_demo(model: str | Path) -> bool:
    """Whether a model is the bundled one, named "demo" or by its folder."""
    return str(model) == "demo" or real(at_home(Path(model))) == real(demo_model())


def bundled(name: str) -> Path:
    """Folder bundled with regraft under this name."""
    path = Path(str(files("regraft"))) / "demo" / name
    if not path.is_dir():
        raise RegraftError(f"{path} is missing from this installation. Install regraft again.")
    return path


_read_once = cache(read_jsonl)  # a run asks for them many times, and bundled files do not change


def read_demo(split: str | None = None) -> Reading:
    """Read the bundled typographic images, all or one split."""
    reading = _read_once(bundled("typographic") / "examples.jsonl", split)
    return replace(reading, source="demo" if split is None else f"demo:{split}")


PLUGIN = Dataset(
    lambda _path, split: read_demo(split),
    splits=("calibration", "validation", "test", "borderline"),
    bundled=True,
)
