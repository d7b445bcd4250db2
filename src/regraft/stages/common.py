"""What several stages share: loading, batching, the name of the description file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regraft import ranks
from regraft.data.collate import Batch, batches
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.files import file_digest
from regraft.models.load import (
    Source,
    has_processor,
    load_model,
    load_placed,
    load_processor,
)
from regraft.models.placement import PlacedModel
from regraft.restoration.apply import check_base
from regraft.restoration.patch import Patch, load_patch
from regraft.settings import ComputeSettings
from regraft.watch import Watch

ABOUT_FILE = "regraft.json"


def load(
    source: Source, compute: ComputeSettings, watch: Watch, processor_from: Source | None = None
) -> tuple[nn.Module, Any]:
    """The whole model, on one device or split over several, and its processor."""
    own = processor_from is None or has_processor(source)
    split = compute.placement != "resident"
    with watch.task(f"Loading {source.folder}", 1) as done:
        processor = load_processor(source if own else processor_from or source)
        model = load_model(source, dtype=compute.dtype, device=compute.device, split=split)
        done(1)
    watch.loaded(model)
    return model, processor


def load_for_walk(
    source: Source, compute: ComputeSettings, watch: Watch, processor_from: Source | None = None
) -> tuple[PlacedModel, Any]:
    """The model, to be run layer by layer, and its processor."""
    with watch.task(f"Loading {source.folder}", 1) as done:
        processor = load_processor(processor_from or source)
        model = load_placed(
            source, dtype=compute.dtype, device=compute.device, placement=compute.placement
        )
        done(1)
    watch.loaded(model.network)
    return model, processor


def patch_in_memory(
    model: Source, patch_file: Path | None, compute: ComputeSettings
) -> tuple[Patch | None, dict[str, str]]:
    """A patch that is to be put on the model in memory, and the digests of both.

    Raises:
        RegraftError: it is for another base, or the model is not resident.
    """
    inputs = {"model": model.checkpoint.fingerprint}
    if patch_file is None:
        return None, inputs
    patch = load_patch(patch_file)
    if compute.placement == "streamed":
        raise RegraftError(
            "A patch can be put on in memory only where the whole model is resident. Write the "
            "checkpoint with `regraft apply` and evaluate that, or use --placement resident."
        )
    check_base(model.checkpoint, patch)
    return patch, inputs | {"patch": file_digest(patch_file)}


def hidden_state_bytes(source: Source, model: PlacedModel, batches: Sequence[Batch]) -> int:
    """What the inputs of all layers take on disk, of this process's batches: SNIP keeps them."""
    tokens = sum(batch.inputs["input_ids"].numel() for batch in batches)
    anatomy = source.anatomy
    return tokens * len(anatomy.layers) * anatomy.hidden_size * model.dtype.itemsize


def collate(
    processor: Any,
    encode: Callable[[Any, Sequence[Example]], Batch],
    examples: Sequence[Example],
    compute: ComputeSettings,
) -> list[Batch]:
    """Examples as batches in host memory."""
    return [encode(processor, chunk) for chunk in batches(examples, compute.batch_size)]


def collate_share(
    processor: Any,
    encode: Callable[[Any, Sequence[Example]], Batch],
    examples: Sequence[Example],
    compute: ComputeSettings,
) -> list[Batch]:
    """This process's share of the batches (see `check_shares`)."""
    chunks = list(batches(examples, compute.batch_size))
    return [encode(processor, chunk) for chunk in ranks.share(chunks)]
