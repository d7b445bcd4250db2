"""Find the prunable weights of a model in its checkpoint.

Names on disk usually differ between exports only in the prefix before "layers.", which is read from
the file itself. If a family's names differ in other ways, or experts are stored differently than in
memory, transformers' own conversion rules apply (`layout`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from regraft.errors import RegraftError
from regraft.models.architecture import decoder_layers
from regraft.models.checkpoint import Checkpoint
from regraft.models.layout import Layout, Piece, Tiling, narrow, squeeze_first, transpose
from regraft.models.places import Place, whole

Shape = tuple[int, str, tuple[int, int]]  # layer, name within it, [out, in]


class Part(NamedTuple):
    """Some rows of a matrix, from `first` on, and their tensor on disk.

    `place` is where in the tensor they are; None if they are the whole tensor.
    """

    first: int
    rows: int
    tensor: str
    place: Place | None


class NoPrefixError(RegraftError):
    """No prefix fits the names on disk, or several do."""


@dataclass(frozen=True)
class WeightFinder:
    """Finds weights of a model in its checkpoint.

    `prefix` comes before "layers.0..." on disk. It is None if names differ in other ways too, or if
    several prefixes fit; then weights are looked up in `layout()`, which always returns the same.
    """

    checkpoint: Checkpoint
    layout: Callable[[], Layout]
    prefix: str | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        checkpoint: Checkpoint,
        layout: Callable[[], Layout],
        shapes: Sequence[Shape],
    ) -> WeightFinder:
        """Find out how the decoder's linears, all listed in `shapes`, are named on disk."""
        try:
            return cls(checkpoint, layout, disk_prefix(checkpoint, shapes))
        except NoPrefixError as error:
            layers = decoder_layers(model)
            names = {id(module): name for name, module in model.named_modules()}
            if all(f"{names[id(layers[i])]}.{name}.weight" in layout() for i, name, _ in shapes):
                return cls(checkpoint, layout, None)
            raise RegraftError(str(error)) from None

    def linear(self, layer: int, name: str, module: str, shape: tuple[int, int]) -> list[Part]:
        """Find the weight of an `nn.Linear`, called `name` in its layer."""
        if self.prefix is not None:
            return [Part(0, shape[0], f"{self.prefix}layers.{layer}.{name}.weight", None)]
        return self._parts(f"{module}.weight", self._tiling(f"{module}.weight", shape))

    def expert(
        self, parameter: str, shape: tuple[int, ...], expert: int, transposed: bool
    ) -> list[Part]:
        """Find one expert's matrix in a parameter of all experts, of `shape` `[E, ., .]`."""
        own = squeeze_first(narrow(self._tiling(parameter, shape), 0, expert, 1))
        return self._parts(parameter, transpose(own) if transposed else own)

    def _tiling(self, parameter: str, shape: tuple[int, ...]) -> Tiling:
        tiling = self.layout().get(parameter)
        if tiling is None or isinstance(tiling, str):
            why = tiling or f"config.json describes a weight {parameter}, the file has none"
            raise RegraftError(f"{self.checkpoint.folder}: {parameter} cannot be found: {why}.")
        if tiling.shape != shape:
            raise RegraftError(
                f"{self.checkpoint.folder}: config.json describes {parameter} of shape "
                f"{list(shape)}, the file has {list(tiling.shape)}. Weights and config belong "
                "to different models."
            )
        return tiling

    def _parts(self, parameter: str, tiling: Tiling) -> list[Part]:
        """Convert the tiling of a matrix into parts, each a number of whole rows."""
        parts = [self._part(piece) for piece in sorted(tiling.pieces, key=lambda one: one.start)]
        if any(piece.shape[1] != tiling.shape[1] for piece in tiling.pieces):
            raise RegraftError(
                f"{self.checkpoint.folder}: {parameter} is stored as {len(parts)} tensors, side by "
                "side; this key layout is not supported."
            )
        return parts

    def _part(self, piece: Piece) -> Part:
        rows, columns = piece.shape
        place = Place(piece.first, *piece.strides)
        size = math.prod(self.checkpoint.tensors[piece.tensor].shape)
        is_whole = place == whole((rows, columns)) and size == rows * columns
        return Part(piece.start[0], rows, piece.tensor, None if is_whole else place)


def disk_prefix(checkpoint: Checkpoint, shapes: Sequence[Shape]) -> str:
    """Find what precedes "layers.0.self_attn.q_proj.weight" of the text decoder in the file.

    Key layouts differ between exports ("language_model.model.", "model.language_model.",
    "model."), and transformers renames them on load; what follows the prefix stays the same. It is
    the only prefix under which every linear is found with its shape.

    Raises:
        NoPrefixError: no prefix fits, or several do.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    pattern = re.compile(r"^(.*?)(layers\.\d+\..+)\.weight$")
    for name, record in checkpoint.tensors.items():
        if match := pattern.match(name):
            found[match[1]][match[2]] = record.shape
    wanted = {f"layers.{index}.{name}": shape for index, name, shape in shapes}
    fitting = [
        prefix
        for prefix, tensors in found.items()
        if all(tensors.get(name) == shape for name, shape in wanted.items())
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:  # as with an encoder and a decoder of the same sizes
        raise NoPrefixError(
            f"{checkpoint.folder}: the decoder's weights could be under any of {sorted(fitting)}."
        )
    closest = max(found, key=lambda p: len(found[p].keys() & wanted.keys()), default="")
    name = next(n for n, shape in wanted.items() if found[closest].get(n) != shape)
    stored = found[closest].get(name)
    raise NoPrefixError(
        f"{checkpoint.folder}: config.json describes a weight {closest}{name} of shape "
        f"{list(wanted[name])}, the file has {list(stored) if stored else 'none'}. "
        "Weights and config belong to different models, or the weights are quantised or fused."
    )
