"""A file of harmless prompts, in the same formats as `prompts`."""

from __future__ import annotations

from regraft.data.readers import Dataset
from regraft.data.readers.prompts import read_prompts

PLUGIN = Dataset(lambda path, _split: read_prompts(path, harmful=False), only="harmless")
