"""The demo data set: prompts drawn as images, for the bundled model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from regraft.data.demo import bundled
from regraft.data.example import Reading
from regraft.data.readers import Dataset
from regraft.data.readers.jsonl import read_jsonl

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
