"""Wanda, layer by layer: calibrate a layer, prune it, pass the pruned layer's outputs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.files import atomic_file
from regraft.importance.statistics import gather, observe
from regraft.importance.wanda import wanda_score
from regraft.models.anatomy import Anatomy, LayerAnatomy, LinearAnatomy
from regraft.models.checkpoint import Checkpoint, Edit
from regraft.models.load import placed
from regraft.models.replay import TextInputs, replay, text_inputs
from regraft.pruning.masks import Pattern

Order = Literal["sequential", "one-shot"]


class LayerMasks:
    """Masks on disk, one file a layer, 1 bit a weight; what is there survives a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, layer: LayerAnatomy, masks: Mapping[str, Tensor]) -> None:
        """Write a layer's masks (`LinearAnatomy.key` -> `[out, in]` bool)."""
        packed = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
            for name, mask in masks.items()
        }
        with atomic_file(self._path(layer)) as temporary:
            save_file(packed, temporary)

    def load(self, layer: LayerAnatomy) -> dict[str, Tensor] | None:
        """Read a layer's masks, None where they were not written yet."""
        if not self._path(layer).exists():
            return None
        packed = load_file(self._path(layer))
        return {linear.key: _unpack(packed[linear.key], linear) for linear in layer.linears}

    def edits(self, anatomy: Anatomy) -> dict[str, Edit]:
        """For `write_edited`: zero the masked weights of every linear, layer files read late."""

        def zero(layer: LayerAnatomy, linear: LinearAnatomy) -> Edit:
            def edit(weight: Tensor) -> Tensor:
                masks = self.load(layer)
                assert masks is not None
                return weight.masked_fill_(masks[linear.key], 0)

            return edit

        return {li.tensor: zero(layer, li) for layer in anatomy.layers for li in layer.linears}

    def _path(self, layer: LayerAnatomy) -> Path:
        return self.folder / f"layer_{layer.index:03d}.safetensors"


def prune_wanda(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    pattern: Pattern,
    masks: LayerMasks,
    *,
    order: Order = "sequential",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Prune every linear of the text decoder: write its masks, layer by layer.

    Layers whose masks are already written are not calibrated again, so a killed run goes on.

    Args:
        model: The dense model; "sequential" zeroes its prunable weights in place.
        anatomy: Its anatomy.
        batches: Calibration data with labels, D^u of the paper.
        pattern: Sparsity or N:M, and where scores compete.
        masks: Where the masks go.
        order: "sequential" calibrates each layer on the outputs of the pruned layers before it
            (Wanda's own procedure), "one-shot" calibrates all on the dense model.
        progress: Called with the number of samples each time a layer has seen a batch.

    Raises:
        RegraftError: N:M does not divide a row, inputs overflow, or a layer sees no data.
    """
    for linear in anatomy.linears:
        pattern.fits(linear.shape, linear.key)
    modules = dict(model.named_modules())
    linears = {
        layer.index: {linear: modules[linear.module] for linear in layer.linears}
        for layer in anatomy.layers
    }
    if order == "one-shot":
        if any(masks.load(layer) is None for layer in anatomy.layers):
            squares = gather(model, anatomy, batches, progress).squares
            for layer in anatomy.layers:
                masks.save(layer, _layer_masks(linears[layer.index], squares, pattern))
        return
    texts = [text_inputs(model, placed(batch, model).inputs) for batch in batches]
    states: list[Tensor | None] = [None] * len(batches)  # inputs of the layer, each [B, S, d]
    for layer in anatomy.layers:
        layer_masks = masks.load(layer)
        if layer_masks is None:
            seen: dict[str, Tensor] = {}
            for batch, text, state in zip(batches, texts, states, strict=True):
                with observe(linears[layer.index], placed(batch, model), seen):
                    _run_layer(model, anatomy, layer, text, state)
            layer_masks = _layer_masks(linears[layer.index], seen, pattern)
            masks.save(layer, layer_masks)
        for linear, module in linears[layer.index].items():
            weight = _weight(module)
            weight.masked_fill_(layer_masks[linear.key].to(weight.device), 0)
        for i, batch in enumerate(batches):
            states[i] = _run_layer(model, anatomy, layer, texts[i], states[i])
            if progress is not None:
                progress(len(batch.ids))


def _run_layer(
    model: nn.Module, anatomy: Anatomy, layer: LayerAnatomy, text: TextInputs, state: Tensor | None
) -> Tensor:
    stop = layer.index + 1 if layer.index + 1 < len(anatomy.layers) else None
    return replay(model, text, start=layer.index, hidden=state, stop=stop)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def zeros(checkpoint: Checkpoint, anatomy: Anatomy) -> int:
    """Number of prunable weights that are zero on disk; one tensor in memory at a time."""
    weights = (checkpoint.read(linear.tensor) for linear in anatomy.linears)
    return sum(int((weight == 0).count_nonzero()) for weight in weights)


def _layer_masks(
    linears: Mapping[LinearAnatomy, nn.Module], squares: Mapping[str, Tensor], pattern: Pattern
) -> dict[str, Tensor]:
    masks = {}
    for linear, module in linears.items():
        if linear.key not in squares:
            raise RegraftError(
                f"{linear.key} was never used by the calibration data (text-only prompts skip "
                "cross-attention); calibrate on examples with images."
            )
        if not torch.isfinite(squares[linear.key]).all():
            raise RegraftError(
                f"The inputs of {linear.key} overflow in this dtype. "
                "Use --dtype bfloat16 or float32."
            )
        weight = _weight(module)
        score = wanda_score(weight, squares[linear.key].to(weight.device))
        masks[linear.key] = pattern.mask(score)
    return masks


def _unpack(packed: Tensor, linear: LinearAnatomy) -> Tensor:
    rows, columns = linear.shape
    bits = np.unpackbits(packed.numpy(), count=rows * columns)
    return torch.from_numpy(bits.astype(bool)).view(rows, columns)
