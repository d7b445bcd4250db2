"""The product: a safetensors file of dense values and where they go in a compressed checkpoint.

About 6 bytes a restored weight. Values are assigned, never added: applying twice is applying
once, and reverting is writing what was there: zeros, in a swap the kept weights that made room, and
after quantisation the values of few bits, 6 bytes more a weight.
For each tensor the file keeps a digest of the pruned tensor with the patched positions set to zero,
which is the same before and after applying, so a patch knows its base, patched or not, and refuses
any other.
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

FORMAT = "regraft-patch-1"
_KINDS = ("positions", "values", "minus", "removed", "removed_values")  # tensors of each patched
_NONE = torch.empty(0, dtype=torch.int64)
CHUNK = 2**20  # bytes handled at once: small enough for a processor's cache


@dataclass(frozen=True)
class TensorPatch:
    """New values for one tensor of shape `shape`.

    `positions` are flat, ascending, int64 `[k]`; `values` have the checkpoint's dtype `[k]` and are
    0 where a swap prunes a kept weight, and nowhere else; `base` is the digest of the compressed
    tensor (see `base_digest`). `before` is what that holds there, `[k]`: 0, -0.0 (a negative weight
    times a mask), or another value: of a swap's kept weight, or of one that compression changed.
    Reverting writes it, sign included.
    """

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    base: str
    before: Tensor

    @classmethod
    def of(cls, pruned: Tensor, positions: Tensor, values: Tensor) -> TensorPatch:
        """For the pruned tensor `[out, in]`, whose `positions` `[k]` are to hold `values` `[k]`."""
        before = pruned.reshape(-1)[positions]
        return cls(tuple(pruned.shape), positions, values, base_digest(pruned, positions), before)

    @property
    def restored(self) -> int:
        """Number of weights that are restored."""
        return int(self.values.count_nonzero())

    @property
    def marked(self) -> Tensor:
        """Positions at which the pruned tensor's bytes are not all 0, as its digest has them."""
        return self.positions[bits(self.before) != 0]


@dataclass(frozen=True)
class Patch:
    """Tensor name on disk -> its new values.

    `about` says how the patch was made; `name` is what messages call it, its file as a rule.
    """

    tensors: Mapping[str, TensorPatch]
    about: Mapping[str, Any]
    name: str = "a patch in memory"

    @property
    def restored(self) -> int:
        """Number of weights that are restored."""
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
    """What several patches together put on one tensor.

    `positions`, `values` and `before` are as in a `TensorPatch` and cover those of all `parts`,
    which are (name of the patch, its own values).
    """

    parts: tuple[tuple[str, TensorPatch], ...]
    positions: Tensor
    values: Tensor
    before: Tensor


def merge(patches: Sequence[Patch]) -> dict[str, Target]:
    """Tensor name -> what the patches put on it together, in whatever order they come.

    Raises:
        RegraftError: two patches disagree about a tensor or a weight.
    """
    names = dict.fromkeys(name for patch in patches for name in patch.tensors)
    return {name: _merge_tensor(name, [p for p in patches if name in p.tensors]) for name in names}


def _merge_tensor(name: str, patches: Sequence[Patch]) -> Target:
    named = tuple((patch.name, patch.tensors[name]) for patch in patches)
    parts = [part for _, part in named]
    if len(parts) == 1:
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
    which = f"{one.name} and {other.name} do not go together"
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


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that equal means equal to the bit, NaN and -0.0 too."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def save_patch(path: Path, patch: Patch) -> None:
    """Write a patch; the same patch gives the same bytes.

    Raises:
        RegraftError: the file exists already.
    """
    if path.exists():
        raise RegraftError(f"{path} exists already. Choose another name or remove it.")
    tensors = {}
    for name, tensor in patch.tensors.items():
        small = tensor.positions.numel() == 0 or int(tensor.positions[-1]) < 2**31
        tensors[f"{name}.positions"] = tensor.positions.to(torch.int32 if small else torch.int64)
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
    """Of one tensor in a patch's header."""

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
    return Patch(tensors, header["about"], str(path))


def _before(path: Path, name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """What the pruned tensor holds, from the few places where that is not plain 0. `[k]`"""
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
            f"{path}: the tensors {name}.minus, {name}.removed and {name}.removed_values do not go "
            f"with {name}.values; expected ascending places in it, and values of its dtype."
        )
    before[minus] = -0.0
    before[removed] = held
    return before


def _positions(path: Path, name: str, stored: Tensor) -> Tensor:
    """Positions `[k]` as int64."""
    if stored.dtype not in (torch.int32, torch.int64) or stored.ndim != 1:
        raise RegraftError(
            f"{path}: the tensor {name} is {stored.dtype} {list(stored.shape)}; expected a list of "
            "positions (int32 or int64)."
        )
    return stored.long()


def _ascending_below(size: int, positions: Tensor) -> bool:
    if positions.ndim != 1:
        return False
    ascending = bool((positions[1:] > positions[:-1]).all())
    return ascending and (
        not len(positions) or (int(positions[0]) >= 0 and int(positions[-1]) < size)
    )
