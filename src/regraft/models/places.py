"""Where a weight matrix is inside a larger tensor, such as one expert's in that of all experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The place of a matrix `[out, in]` inside a contiguous tensor, in elements.

    Attributes:
        first: Offset of its element [0, 0].
        row: Stride from one row to the next; 1 if the tensor holds the transpose.
        column: Stride from one column to the next; otherwise 1.
    """

    first: int
    row: int
    column: int

    @classmethod
    def of(cls, view: Tensor) -> Place:
        """The place of a view in the tensor that begins its storage."""
        row, column = view.stride()
        return cls(int(view.storage_offset()), row, column)

    def view(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """The matrix, as a view of `tensor`."""
        return tensor.as_strided(
            shape, (self.row, self.column), tensor.storage_offset() + self.first
        )

    def stop(self, shape: tuple[int, int]) -> int:
        """One past its last element."""
        return self.first + (shape[0] - 1) * self.row + (shape[1] - 1) * self.column + 1

    def flat(self, positions: Tensor, shape: tuple[int, int]) -> Tensor:
        """Flat positions in the matrix `[k]` int64 -> flat positions in the tensor."""
        columns = shape[1]
        return self.first + positions // columns * self.row + positions % columns * self.column

    def inside(self, positions: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Which flat positions of the tensor are in it, `[n]` bool, and their own in it, `[k]`."""
        rest = positions - self.first
        far, near = max(self.row, self.column), min(self.row, self.column)
        major, minor = rest // far, rest % far // near
        by_row = self.row > self.column or (self.row == self.column and shape[1] == 1)
        row, column = (major, minor) if by_row else (minor, major)
        found = (rest >= 0) & (rest % far % near == 0) & (row < shape[0]) & (column < shape[1])
        return found, (row * shape[1] + column)[found]


def of_tensor(tensor: Tensor, place: Place | None, shape: tuple[int, int]) -> Tensor:
    """The matrix at a place of a tensor, as a view; the tensor itself if `place` is None."""
    return tensor if place is None else place.view(tensor, shape)


def at(positions: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Convert flat positions `[k]` int64 to (rows, columns) of a matrix, on its device."""
    positions = positions.to(matrix.device)
    return positions // matrix.shape[1], positions % matrix.shape[1]
