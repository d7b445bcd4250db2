"""Where the prunable weights of a model are in its checkpoint.

Names on disk differ between exports by what comes before "layers.", as a rule, and that is read off
the file itself. Where a family's names differ in other ways, or experts are stored otherwise than
they are in memory, the rules are transformers' own (`layout`).
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
from regraft.models.layout import Laid, Layout, Piece, cut, flat_first, swapped
from regraft.models.places import Place, whole

Shape = tuple[int, str, tuple[int, int]]  # layer, name in it, [out, in]


class Part(NamedTuple):
    """Some rows of a matrix: the first, how many, the tensor on disk and where in it they are.

    No place means that the tensor is these rows.
    """

    first: int
    rows: int
    tensor: str
    place: Place | None


class NoPrefixError(RegraftError):
    """No prefix fits the names on disk, or several do."""


@dataclass(frozen=True)
class OnDisk:
    """Finds weights of a model in its checkpoint.

    `prefix` comes before "layers.0..." on disk; None where names differ in other ways, too, and
    where it alone does not tell the decoder's weights from others'. Then they are found in
    `layout`, which gives the same every time.
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
    ) -> OnDisk:
        """Find out how the decoder's linears are named; `shapes` are of them all."""
        try:
            return cls(checkpoint, layout, disk_prefix(checkpoint, shapes))
        except NoPrefixError as error:
            layers = decoder_layers(model)
            names = {id(module): name for name, module in model.named_modules()}
            if all(f"{names[id(layers[i])]}.{name}.weight" in layout() for i, name, _ in shapes):
                return cls(checkpoint, layout, None)
            raise RegraftError(str(error)) from None

    def linear(self, layer: int, name: str, module: str, shape: tuple[int, int]) -> list[Part]:
        """Where the weight of an `nn.Linear` is; `name` is its place in the layer."""
        if self.prefix is not None:
            return [Part(0, shape[0], f"{self.prefix}layers.{layer}.{name}.weight", None)]
        return self._parts(f"{module}.weight", self._laid(f"{module}.weight", shape))

    def expert(
        self, parameter: str, shape: tuple[int, ...], expert: int, transposed: bool
    ) -> list[Part]:
        """Where one expert's matrix is, of a parameter `shape` `[E, ., .]` of all experts."""
        own = flat_first(cut(self._laid(parameter, shape), 0, expert, 1))
        return self._parts(parameter, swapped(own) if transposed else own)

    def _laid(self, parameter: str, shape: tuple[int, ...]) -> Laid:
        laid = self.layout().get(parameter)
        if laid is None or isinstance(laid, str):
            why = laid or f"config.json describes a weight {parameter}, the file has none"
            raise RegraftError(f"{self.checkpoint.folder}: {parameter} cannot be found: {why}.")
        if laid.shape != shape:
            raise RegraftError(
                f"{self.checkpoint.folder}: config.json describes {parameter} of shape "
                f"{list(shape)}, the file has {list(laid.shape)}. Weights and config belong "
                "to different models."
            )
        return laid

    def _parts(self, parameter: str, laid: Laid) -> list[Part]:
        """A matrix as rows of tensors on disk."""
        parts = [self._part(piece) for piece in sorted(laid.pieces, key=lambda one: one.start)]
        if any(piece.shape[1] != laid.shape[1] for piece in laid.pieces):
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
    """What the file puts before "layers.0.self_attn.q_proj.weight" of the text decoder.

    Key layouts differ between exports ("language_model.model.", "model.language_model.",
    "model."), and transformers renames them on load; what follows the prefix never changes. The
    prefix is the only one under which every linear lies with its shape.
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
    if fitting:  # such as those of an encoder and a decoder of the same sizes
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
