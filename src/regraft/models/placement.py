"""Place a model's weights while it runs: all on the device, or one decoder layer at a time.

A streamed model stays in host memory (memory-mapped if it has the checkpoint's own dtype); each
part is copied to the device to run and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from regraft.data.collate import Batch
from regraft.models.architecture import (
    decoder_layers,
    embeds_for_each_layer,
    layer_list,
    text_decoder,
)


@dataclass(frozen=True)
class PlacedModel:
    """A model, and the device and dtype in which it computes.

    A `streamed` model must run inside `frame` or `layer`, which leave it unchanged: what the block
    writes into weights is lost.
    """

    network: nn.Module
    device: torch.device
    dtype: torch.dtype
    streamed: bool = False

    def place(self, batch: Batch) -> Batch:
        """The batch on the device, pixels in the model's dtype."""
        return batch.to(self.device, self.dtype)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Put all but the decoder layers on the device: vision tower, embeddings, norm and head."""
        layers = {
            id(tensor) for layer in decoder_layers(self.network) for tensor in tensors_of(layer)
        }
        outside = [tensor for tensor in tensors_of(self.network) if id(tensor) not in layers]
        with self._on_device(outside):
            yield

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Put one decoder layer on the device, and what runs around it (norm, rotary embedding)."""
        decoder = text_decoder(self.network)
        layers = layer_list(decoder)
        embedding = self.network.get_input_embeddings()  # type: ignore[operator]
        if embeds_for_each_layer(decoder):
            embedding = None  # not left out below, because it runs around each layer
        around = (
            child for child in decoder.children() if child is not layers and child is not embedding
        )
        modules = (layers[index], *around)
        with self._on_device(chain.from_iterable(map(tensors_of, modules))):
            yield

    @contextmanager
    def _on_device(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        if not self.streamed:
            yield
            return
        # `.data` is replaced, not the parameter, because tied modules share the object
        homes = [(tensor, tensor.data) for tensor in tensors]
        try:
            for tensor, home in homes:
                tensor.data = home.to(self.device, copy=True, non_blocking=True)
            yield
        finally:
            for tensor, home in homes:
                tensor.data = home


def weight_in_memory(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A module's weight, on a device or in host memory; None if it is offloaded to disk.

    Accelerate offloads layers that do not fit on the devices to host memory or disk; the parameter
    is on the meta device until its AlignDevicesHook loads it to run the layer.
    """
    weight = getattr(module, name)
    assert isinstance(weight, Tensor)
    if not weight.is_meta:
        return weight.data
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        offloaded = getattr(one, "weights_map", None)
        if offloaded is not None:
            first, again = offloaded[name], offloaded[name]
            if first.data_ptr() == again.data_ptr():  # otherwise read from disk each time
                in_memory: Tensor = first
                return in_memory
    return None


def free_bytes(device: torch.device) -> int:
    """Free memory of an accelerator, including what PyTorch's allocator holds in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def moved(value: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors in nested tuples, lists and dicts, to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value


def tensors_within(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, or the tensor itself."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_within(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_within(item)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    return chain(module.parameters(), module.buffers())
