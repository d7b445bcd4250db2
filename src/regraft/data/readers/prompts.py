"""A file of harmful prompts: AdvBench, HarmBench, JailbreakBench, StrongREJECT or your own."""

from __future__ import annotations

from regraft.data.formats import read_prompts
from regraft.data.readers import Dataset

PLUGIN = Dataset(lambda path, _split: read_prompts(path), only="harmful")
