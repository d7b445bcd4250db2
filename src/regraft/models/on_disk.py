"""Find the prunable weights of a model in its checkpoint, by the layout of its files."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import RegraftError
from regraft.models.checkpoint import Checkpoint
from regraft.models.layout import (
    Layout,
    Piece,
    Tiling,
    as_stored,
    narrow,
    squeeze_first,
    transpose,
)
from regraft.models.places import Place


@dataclass(frozen=True)
class WeightFinder:
    """Finds weights of a model in its checkpoint.

    A matrix is found as pieces, each a number of its whole rows, from the first row on.
    """

    checkpoint: Checkpoint
    layout: Layout

    def linear(self, parameter: str, shape: tuple[int, ...]) -> list[Piece]:
        """Find the weight of an `nn.Linear`."""
        return self._by_rows(parameter, self._tiling(parameter, shape))

    def expert(
        self, parameter: str, shape: tuple[int, ...], expert: int, transposed: bool
    ) -> list[Piece]:
        """Find one expert's matrix in a parameter of all experts, of `shape` `[E, ., .]`."""
        own = squeeze_first(narrow(self._tiling(parameter, shape), 0, expert, 1))
        return self._by_rows(parameter, transpose(own) if transposed else own)

    def place(self, piece: Piece) -> Place | None:
        """Where in its tensor a piece of a matrix is; None if it is the whole tensor."""
        (whole,) = as_stored(self.checkpoint, piece.tensor).pieces
        if (piece.shape, piece.strides) == (whole.shape, whole.strides):
            return None
        return Place(piece.first, *piece.strides)

    def _tiling(self, parameter: str, shape: tuple[int, ...]) -> Tiling:
        tiling = self.layout.get(parameter)
        if isinstance(tiling, str):
            raise RegraftError(f"{self.checkpoint.folder}: {parameter} cannot be found: {tiling}.")
        if tiling is None or tiling.shape != shape:
            stored = list(tiling.shape) if tiling else "none"
            raise RegraftError(
                f"{self.checkpoint.folder}: config.json describes a weight {parameter} of shape "
                f"{list(shape)}, the file has {stored}. Weights and config belong to different "
                "models, or the weights are quantised or fused."
            )
        return tiling

    def _by_rows(self, parameter: str, tiling: Tiling) -> list[Piece]:
        if any(piece.shape[1] != tiling.shape[1] for piece in tiling.pieces):
            raise RegraftError(
                f"{self.checkpoint.folder}: {parameter} is stored as {len(tiling.pieces)} tensors, "
                "side by side; this key layout is not supported."
            )
        return sorted(tiling.pieces, key=lambda one: one.start)
