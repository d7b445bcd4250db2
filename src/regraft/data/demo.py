"""The data set and the model that come with regraft."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from regraft.data.example import Reading
from regraft.data.jsonl import read_jsonl
from regraft.errors import RegraftError

CAVEAT = (
    "A toy: the bundled model has 12 million parameters and refuses by the wording and the length "
    "of a title, not by its meaning. How much of what a method restores is only refusing shows in "
    "its over-refusal on demo:borderline, harmless titles that are worded like harmful ones. This "
    "run shows a refusal behaviour lost and restored. It cannot show that safety is restored, nor "
    "what any method does to a real model."
)


def read_demo(split: str | None = None) -> Reading:
    """Read the bundled typographic images: all, or one split of them.

    Raises:
        RegraftError: there is no such split (the message lists them), or the files are missing.
    """
    reading = read_jsonl(_bundled("typographic") / "examples.jsonl", split)
    return replace(reading, source="demo" if split is None else f"demo:{split}")


def demo_model() -> Path:
    """Folder of the bundled checkpoint, reader-llava-12m.

    Raises:
        RegraftError: it is missing.
    """
    return _bundled("reader-llava-12m")


def is_demo(model: str | Path) -> bool:
    """Whether a model is the bundled one, by the word "demo" or by its folder."""
    return str(model) == "demo" or Path(model).expanduser().resolve() == demo_model().resolve()


def _bundled(name: str) -> Path:
    path = Path(str(files("regraft"))) / "demo" / name
    if not path.is_dir():
        raise RegraftError(f"{path} is missing from this installation. Install regraft again.")
    return path
