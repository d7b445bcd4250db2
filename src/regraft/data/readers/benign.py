"""A file of harmless prompts, in the same formats as `prompts`."""

from __future__ import annotations

from regraft.data.formats import read_prompts
from regraft.data.readers import Dataset

PLUGIN = Dataset(lambda path, _split: read_prompts(path, harmful=False), only="harmless")
