"""JSON lines: a data set of your own."""

from __future__ import annotations

from regraft.data.formats import read_jsonl
from regraft.data.readers import Dataset

PLUGIN = Dataset(read_jsonl, splits=None)
