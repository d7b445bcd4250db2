"""The patch file: dense values and their positions in a compressed checkpoint, as safetensors.

About 6 bytes per restored weight. Values are assigned, never added, so applying twice equals
applying once. Reverting writes the values from before: zeros, the kept weights that a swap removed,
or quantised values (6 bytes more per weight for the latter two).

For each tensor the file has a digest of the compressed tensor with the patched positions set to
zero. It is the same before and after applying, so that a patch recognises its base, patched or not,
and refuses any other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from regraft.disk.artifact import read_artifact, require_finite, write_artifact
from regraft.disk.parsing import EXACT, from_json
from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture
from regraft.models.checkpoint import bits

FORMAT = "regraft-patch-1"
_KINDS = ("positions", "values", "minus", "removed", "removed_values")  # tensors of each patched
_NONE = torch.empty(0, dtype=torch.int64)
CHUNK = 2**20  # bytes processed at once: small enough for a processor's cache


@dataclass(frozen=True)
class TensorPatch:
    """New values for one tensor.

    Attributes:
        shape: Shape of the tensor on disk.
        positions: Flat, ascending, `[k]` int64.
        values: New values in the checkpoint's dtype, `[k]`; 0 only where a swap prunes a weight.
        base: Digest of the compressed tensor; see `base_digest`.
        before: The compressed tensor's values there, `[k]`, which reverting writes: 0, -0.0 (a
            negative weight times a mask), a kept weight that a swap prunes, or a quantised value.
    """

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    base: str
    before: Tensor

    @classmethod
    def of(cls, pruned: Tensor, positions: Tensor, values: Tensor) -> TensorPatch:
        """Make the patch that writes `values` `[k]` to `positions` `[k]` of a pruned tensor."""
        before = pruned.reshape(-1)[positions]
        return cls(tuple(pruned.shape), positions, values, base_digest(pruned, positions), before)

    @property
    def restored(self) -> int:
        """Number of restored weights."""
        return int(self.values.count_nonzero())

    def within(self, linear: LinearArchitecture) -> tuple[Tensor, Tensor]:
        """Flat positions in a linear of this tensor and their new values, both `[k]`."""
        if linear.stored is None:  # the linear is the whole tensor
            return self.positions, self.values
        here, positions = linear.stored.inside(self.positions, linear.shape)
        return positions, self.values[here]

    @property
    def zeroed(self) -> Tensor:
        """Positions where the digest replaces other bytes of the compressed tensor by zeros."""
        return self.positions[bits(self.before) != 0]


@dataclass(frozen=True)
class Patch:
    """Tensor name on disk -> its new values.

    `about` records how the patch was made; `file` is where it was read from, if it was.
    """

    tensors: Mapping[str, TensorPatch]
    about: Mapping[str, Any]
    file: Path | None = None

    @property
    def name(self) -> str:
        """What identifies it in messages."""
        return "a patch in memory" if self.file is None else str(self.file)

    @property
    def restored(self) -> int:
        """Number of restored weights."""
        return sum(tensor.restored for tensor in self.tensors.values())

    @property
    def removed(self) -> int:
        """Number of kept weights that are pruned in exchange."""
        return sum(len(tensor.positions) for tensor in self.tensors.values()) - self.restored


def base_digest(tensor: Tensor, positions: Tensor) -> str:
    """SHA-256 of a tensor's bytes with `positions` (flat, ascending) set to zero, as hex."""
    flat = tensor.reshape(-1)
    hasher = hashlib.sha256()
    for start, stop, inside in chunks(len(flat), tensor.element_size(), positions):
        chunk = flat[start:stop].clone()
        chunk[positions[inside] - start] = 0
        hasher.update(chunk.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def chunks(size: int, item: int, positions: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Cut `size` elements of `item` bytes into chunks of `CHUNK` bytes.

    Yields:
        (first element, one past the last, which of the ascending int64 `positions` lie in it).
    """
    step = CHUNK // item
    bounds = torch.arange(0, size + step, step)
    inside = torch.searchsorted(positions, bounds).tolist()
    for i, start in enumerate(range(0, size, step)):
        yield start, min(start + step, size), slice(inside[i], inside[i + 1])


@dataclass(frozen=True)
class Target:
    """The combined changes of several patches to one tensor.

    `parts` are (name of a patch, its changes); `positions`, `values` and `before` are the union of
    theirs, as in a `TensorPatch`.
    """

    parts: tuple[tuple[str, TensorPatch], ...]
    positions: Tensor
    values: Tensor
    before: Tensor


def merge(patches: Sequence[Patch]) -> dict[str, Target]:
    """Tensor name -> the combined changes of the patches, whose order does not matter.

    Raises:
        RegraftError: two patches disagree about a tensor or a weight.
    """
    names = dict.fromkeys(name for patch in patches for name in patch.tensors)
    return {name: _merge_tensor(name, [p for p in patches if name in p.tensors]) for name in names}


def _merge_tensor(name: str, patches: Sequence[Patch]) -> Target:
    named = tuple((patch.name, patch.tensors[name]) for patch in patches)
    parts = [part for _, part in named]
    if len(parts) == 1:  # neither sorted nor copied: it may have hundreds of millions of weights
        return Target(named, parts[0].positions, parts[0].values, parts[0].before)
    for one, other in combinations(patches, 2):
        _check_agreement(name, one, other)
    positions, place = torch.cat([part.positions for part in parts]).unique(return_inverse=True)
    values = torch.empty(len(positions), dtype=parts[0].values.dtype)
    before = torch.empty_like(values)
    values[place] = torch.cat([part.values for part in parts])
    before[place] = torch.cat([part.before for part in parts])
    return Target(named, positions, values, before)


def _check_agreement(name: str, one: Patch, other: Patch) -> None:
    a, b = one.tensors[name], other.tensors[name]
    which = f"{one.name} and {other.name} are incompatible"
    if a.shape != b.shape or a.values.dtype != b.values.dtype:
        raise RegraftError(
            f"{which}: {name} is {list(a.shape)} {a.values.dtype} in the first and "
            f"{list(b.shape)} {b.values.dtype} in the second. Make both from one pruned checkpoint."
        )
    shared_a, shared_b = torch.isin(a.positions, b.positions), torch.isin(b.positions, a.positions)
    values = bits(a.values[shared_a]) != bits(b.values[shared_b])
    before = bits(a.before[shared_a]) != bits(b.before[shared_b])
    if conflicts := int((values | before).sum()):
        raise RegraftError(
            f"{which}: they hold different values for {conflicts:,} of the {len(values):,} "
            f"weights of {name} that both change. Leave one of them out, or make both from the "
            "same dense and pruned checkpoints."
        )


def stored_positions(positions: Tensor) -> Tensor:
    """Ascending positions in the dtype of files: int32 or, from 2^31 on, int64."""
    small = positions.numel() == 0 or int(positions[-1]) < 2**31
    return positions.to(torch.int32 if small else torch.int64)


def save_patch(path: Path, patch: Patch) -> None:
    """Write a patch; the same patch gives the same bytes.

    Raises:
        RegraftError: the file exists already.
    """
    if path.exists():
        raise RegraftError(f"{path} exists already. Choose another name or remove it.")
    tensors = {}
    for name, tensor in patch.tensors.items():
        tensors[f"{name}.positions"] = stored_positions(tensor.positions)
        tensors[f"{name}.values"] = tensor.values.contiguous()
        zero = tensor.before == 0
        for kind, indices in (
            ("minus", (tensor.before.signbit() & zero).nonzero()),
            ("removed", zero.logical_not().nonzero()),
        ):
            if len(indices):
                tensors[f"{name}.{kind}"] = indices.flatten().to(torch.int32)
        if not zero.all():
            tensors[f"{name}.removed_values"] = tensor.before[~zero]
    layout = {
        name: {"shape": list(tensor.shape), "base": tensor.base}
        for name, tensor in patch.tensors.items()
    }
    write_artifact(path, FORMAT, {"about": patch.about, "tensors": layout}, tensors)


@EXACT
@dataclass(frozen=True)
class _Layout:
    """Header entry of one tensor."""

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    base: str


def load_patch(path: Path) -> Patch:
    """Read and check a patch.

    Raises:
        RegraftError: the file is missing, truncated, not a patch, or inconsistent.
    """
    header, stored = read_artifact(path, FORMAT, "a patch")
    layouts = from_json(dict[str, _Layout], header["tensors"], f"{path}: tensors in its header")
    try:
        tensors = {
            name: TensorPatch(
                layout.shape,
                _positions(path, f"{name}.positions", stored[f"{name}.positions"]),
                stored[f"{name}.values"],
                layout.base,
                _before(path, name, stored),
            )
            for name, layout in layouts.items()
        }
    except KeyError as error:
        raise RegraftError(f"{path} is damaged: {error} is missing.") from error
    require_finite(path, stored)
    known = {f"{name}.{kind}" for name in layouts for kind in _KINDS}
    if unknown := sorted(stored.keys() - known):
        raise RegraftError(f"{path} is damaged: its header does not name the tensor {unknown[0]}.")
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape)
        valid = tensor.positions.shape == tensor.values.shape and _ascending_below(
            size, tensor.positions
        )
        if not valid:
            raise RegraftError(
                f"{path}: the tensors {name}.positions and {name}.values are not valid for its "
                f"shape; expected ascending positions below {size:,}, and a value for each."
            )
    return Patch(tensors, header["about"], path)


def _before(path: Path, name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """The compressed tensor's values, `[k]`; the file lists only those that are not +0."""
    values = stored[f"{name}.values"]
    if values.ndim != 1 or not values.is_floating_point():
        raise RegraftError(
            f"{path}: the tensor {name}.values is {values.dtype} {list(values.shape)}; expected a "
            "list of weights."
        )
    before = torch.zeros_like(values)
    minus, removed = (
        _positions(path, f"{name}.{kind}", stored.get(f"{name}.{kind}", _NONE))
        for kind in ("minus", "removed")
    )
    held = stored.get(f"{name}.removed_values", before[:0])
    if not (
        _ascending_below(len(before), minus)
        and _ascending_below(len(before), removed)
        and held.shape == removed.shape
        and held.dtype == before.dtype
    ):
        raise RegraftError(
            f"{path}: the tensors {name}.minus, {name}.removed and {name}.removed_values do not "
            f"match {name}.values; expected ascending indices into it, and values of its dtype."
        )
    before[minus] = -0.0
    before[removed] = held
    return before


def _positions(path: Path, name: str, stored: Tensor) -> Tensor:
    """Check positions `[k]` and convert them to int64."""
    if stored.dtype not in (torch.int32, torch.int64) or stored.ndim != 1:
        raise RegraftError(
            f"{path}: the tensor {name} is {stored.dtype} {list(stored.shape)}; expected a list of "
            "positions (int32 or int64)."
        )
    return stored.long()


def _ascending_below(size: int, positions: Tensor) -> bool:
    """Whether positions `[k]` are ascending numbers from 0 to `size` - 1, however large."""
    if not len(positions):
        return True
    inside = int(positions[0]) >= 0 and int(positions[-1]) < size
    return inside and bool((positions[1:] > positions[:-1]).all())
