"""What several stages share: loading, batching, the name of the description file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from regraft.data.collate import Batch, batches
from regraft.data.example import Example
from regraft.models.load import Source, has_processor, load_model, load_processor
from regraft.recipe import (
    ComputeSettings,
)
from regraft.watch import Watch

ABOUT_FILE = "regraft.json"


def load(
    source: Source, compute: ComputeSettings, watch: Watch, processor_from: Source | None = None
) -> tuple[nn.Module, Any]:
    """The model and its processor."""
    own = processor_from is None or has_processor(source)
    with watch.task(f"Loading {source.folder}", 1) as done:
        processor = load_processor(source if own else processor_from or source)
        model = load_model(source, dtype=compute.dtype, device=compute.device)
        done(1)
    return model, processor


def collate(
    processor: Any,
    encode: Callable[[Any, Sequence[Example]], Batch],
    examples: Sequence[Example],
    compute: ComputeSettings,
) -> list[Batch]:
    """Examples as batches in host memory."""
    return [encode(processor, chunk) for chunk in batches(examples, compute.batch_size)]
