"""Loading of models and batching of prompts, shared by the stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from regraft import distributed
from regraft.data.collate import batches
from regraft.data.example import Example
from regraft.data.images import length_class
from regraft.errors import RegraftError
from regraft.models.chat_template import tells_the_date
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import (
    Source,
    has_processor,
    load_model,
    load_placed,
    load_processor,
)
from regraft.models.placement import PlacedModel
from regraft.progress import Progress
from regraft.settings.compute import ComputeSettings


def load(
    source: Source,
    compute: ComputeSettings,
    progress: Progress,
    processor_from: Source | None = None,
) -> tuple[nn.Module, Any]:
    """Load a whole model, on one device or split over several, and its processor."""
    split = compute.placement != "resident"
    with progress.task(f"Loading {source.folder}", 1) as done:
        processor = _processor(with_processor(source, processor_from), progress)
        model = load_model(
            source, dtype=compute.dtype, device=compute.device, split=split, note=progress.note
        )
        done(1)
    progress.loaded(model)
    return model, processor


def with_processor(source: Source, other: Source | None) -> Source:
    """Which of two checkpoints gives the processor: `source`, unless it has none."""
    return source if other is None or has_processor(source) else other


def load_layerwise(
    source: Source,
    compute: ComputeSettings,
    progress: Progress,
    processor_of: Source | None = None,
) -> tuple[PlacedModel, Any]:
    """Load a model that is run layer by layer, and its processor or that of another model."""
    with progress.task(f"Loading {source.folder}", 1) as done:
        processor = _processor(processor_of or source, progress)
        model = load_placed(
            source, dtype=compute.dtype, device=compute.device, placement=compute.placement
        )
        done(1)
    progress.loaded(model.network)
    return model, processor


def _processor(source: Source, progress: Progress) -> Any:
    processor = load_processor(source)
    if tells_the_date(processor):
        progress.note(
            f"The chat template of {source.folder} prints today's date, so that answers may differ "
            "from day to day. To repeat them exactly, write a fixed date in place of strftime_now."
        )
    return processor


def hidden_state_bytes(source: Source, layerwise: LayerwisePass) -> int:
    """Bytes on disk for the inputs of all layers, which backward passes save there.

    Of the batches of all processes, which write to one disk and must all call this.
    """
    architecture = source.architecture
    size = len(architecture.layers) * architecture.hidden_size * layerwise.model.dtype.itemsize
    return int(distributed.total(torch.tensor(layerwise.tokens))) * size


def cut(examples: Sequence[Example], compute: ComputeSettings) -> list[tuple[Example, ...]]:
    """Split examples into batches, with examples of similar length together."""
    return list(batches(sorted(examples, key=length_class), compute.batch_size))


def check_shares(examples: Sequence[Example], compute: ComputeSettings) -> None:
    """Raise unless there is a batch for each of the processes."""
    count = -(-len(examples) // compute.batch_size)
    if count < distributed.world():
        raise RegraftError(
            f"{len(examples)} examples make {count} batches of {compute.batch_size}, too few for "
            f"{distributed.world()} processes. Lower --batch-size or start fewer processes."
        )
