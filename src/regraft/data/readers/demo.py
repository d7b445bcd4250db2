"""The demo data set: prompts drawn as images, for the bundled model."""

from __future__ import annotations

from dataclasses import replace

from regraft.data.demo import bundled
from regraft.data.example import Reading
from regraft.data.formats import read_jsonl
from regraft.data.readers import Dataset


def read_demo(split: str | None = None) -> Reading:
    """Read the bundled typographic images, all or one split."""
    reading = read_jsonl(bundled("typographic") / "examples.jsonl", split)
    return replace(reading, source="demo" if split is None else f"demo:{split}")


PLUGIN = Dataset(
    lambda _path, split: read_demo(split),
    splits=("calibration", "validation", "test", "borderline"),
    bundled=True,
)
