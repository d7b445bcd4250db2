"""Where a model's weights are while it runs: all on the device, or one decoder layer at a time.

A streamed model stays in host memory, where weights in the checkpoint's own dtype are pages of the
safetensors files, and what is about to run is copied to the device and dropped again.
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

    A `streamed` model must run inside `frame` or `layer`, which leave it as it was, whatever was
    written into the weights meanwhile.
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
        """Hold everything but the decoder layers: vision tower, embeddings, norm and head."""
        layers = {
            id(tensor) for layer in decoder_layers(self.network) for tensor in tensors_of(layer)
        }
        outside = [tensor for tensor in tensors_of(self.network) if id(tensor) not in layers]
        with self._held(outside):
            yield

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Hold one decoder layer and what the decoder runs around it (norm, rotary embedding)."""
        decoder = text_decoder(self.network)
        layers = layer_list(decoder)
        embedding = self.network.get_input_embeddings()  # type: ignore[operator]
        if embeds_for_each_layer(decoder):
            embedding = None  # held as well: it runs around each layer
        around = (
            child for child in decoder.children() if child is not layers and child is not embedding
        )
        modules = (layers[index], *around)
        with self._held(chain.from_iterable(map(tensors_of, modules))):
            yield

    @contextmanager
    def _held(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        if not self.streamed:
            yield
            return
        # `.data` is exchanged, not the parameter, whose object tied modules share
        homes = [(tensor, tensor.data) for tensor in tensors]
        try:
            for tensor, home in homes:
                tensor.data = home.to(self.device, copy=True, non_blocking=True)
            yield
        finally:
            for tensor, home in homes:
                tensor.data = home


def weight_in_memory(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A module's weight where it is, on a device or in host memory; None where it waits on disk.

    Accelerate keeps the weights of layers for which the devices have no room in host memory or on
    disk; the parameter is on the meta device until its AlignDevicesHook loads it to run the layer.
    """
    weight = getattr(module, name)
    assert isinstance(weight, Tensor)
    if not weight.is_meta:
        return weight.data
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        waiting = getattr(one, "weights_map", None)
        if waiting is not None:
            first, again = waiting[name], waiting[name]
            if first.data_ptr() == again.data_ptr():  # otherwise read from disk each time
                held: Tensor = first
                return held
    return None


def free_bytes(device: torch.device) -> int:
    """What an accelerator has left, freed memory that PyTorch keeps for later included."""
    left, _ = torch.cuda.mem_get_info(device)
    return left + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors in nested tuples, lists and dicts, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value


def tensors_within(value: Any) -> Iterator[Tensor]:
    """A tensor, or the tensors in nested tuples, lists and dicts, of any class of these."""
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
