"""Pruning results of each layer, saved on disk so that a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from regraft import distributed
from regraft.disk.artifact import load_unfinished, save_unfinished
from regraft.models.architecture import Architecture, LayerArchitecture, LinearArchitecture
from regraft.models.checkpoint_copy import Edit
from regraft.models.places import of_tensor


@dataclass(frozen=True)
class PrunedWeight:
    """Result for one linear: a mask `[out, in]` bool, True where pruned, or new weights."""

    mask: Tensor | None = None
    weight: Tensor | None = None

    def put(self, weight: Tensor) -> Tensor:
        """Apply the result to the dense weight `[out, in]`, in place."""
        if self.mask is not None:
            return weight.masked_fill_(self.mask.to(weight.device), 0)
        assert self.weight is not None
        return weight.copy_(self.weight)

    def rounded(self, dtype: torch.dtype) -> PrunedWeight:
        """The result with new weights in `dtype`; masks are unchanged."""
        if self.weight is None:
            return self
        return PrunedWeight(weight=self.weight.to(dtype))


class LayerResults:
    """One file per layer: 1 bit per weight for masks, whole weights where pruning updates them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, layer: LayerArchitecture, results: Mapping[str, PrunedWeight]) -> None:
        save_unfinished(
            self._path(layer), {key: _packed(result) for key, result in results.items()}
        )

    def has(self, layer: LayerArchitecture) -> bool:
        """Whether a layer's results are saved; all processes must ask.

        One answers for all: they might see a new file at different times, and part ways.
        """
        return distributed.decided(self._path(layer).exists)

    def load(self, layer: LayerArchitecture) -> dict[str, PrunedWeight] | None:
        """Read a layer's results; None if they are not saved yet. All processes must ask."""
        if not self.has(layer):
            return None
        stored = load_unfinished(self._path(layer))
        linears = {linear.key: linear for linear in layer.linears}
        return {key: _unpacked(value, linears[key]) for key, value in stored.items()}

    def edits(self, architecture: Architecture) -> dict[str, Edit]:
        """Edits for `write_edited` that apply all results; files are read one at a time."""

        def put(layer: LayerArchitecture, linear: LinearArchitecture, weight: Tensor) -> Tensor:
            with safe_open(self._path(layer), "pt") as stored:
                if linear.key not in stored.keys():  # noqa: SIM118 - not a mapping
                    return weight
                return _unpacked(stored.get_tensor(linear.key), linear).put(weight)

        return edits_by_tensor(
            (li, partial(put, layer, li)) for layer in architecture.layers for li in layer.linears
        )

    def _path(self, layer: LayerArchitecture) -> Path:
        return self.folder / f"layer_{layer.index:03d}.safetensors"


def edits_by_tensor(edits: Iterable[tuple[LinearArchitecture, Edit]]) -> dict[str, Edit]:
    """Group edits of matrices, in place, into edits of the tensors on disk that hold them."""
    by_tensor: dict[str, list[tuple[LinearArchitecture, Edit]]] = {}
    for linear, edit in edits:
        by_tensor.setdefault(linear.tensor, []).append((linear, edit))

    def edit_all(parts: Sequence[tuple[LinearArchitecture, Edit]], tensor: Tensor) -> Tensor:
        for linear, edit in parts:
            edit(of_tensor(tensor, linear.stored, linear.shape))
        return tensor

    return {name: partial(edit_all, parts) for name, parts in by_tensor.items()}


def _packed(result: PrunedWeight) -> Tensor:
    if result.mask is not None:
        return torch.from_numpy(np.packbits(result.mask.cpu().numpy()))
    assert result.weight is not None
    return result.weight.cpu().contiguous()


def _unpacked(stored: Tensor, linear: LinearArchitecture) -> PrunedWeight:
    if stored.dtype != torch.uint8:
        return PrunedWeight(weight=stored)
    rows, columns = linear.shape
    bits = np.unpackbits(stored.numpy(), count=rows * columns)
    return PrunedWeight(mask=torch.from_numpy(bits.astype(bool)).view(rows, columns))
