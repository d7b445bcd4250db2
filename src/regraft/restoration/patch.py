"""The product: a safetensors file of dense values and where they go in a pruned checkpoint.

About 6 bytes a restored weight. Values are assigned, never added: applying twice is applying
once, and reverting is writing zeros. For each tensor the file keeps a digest of the pruned tensor
with the patched positions set to zero, which is the same before and after applying, so a patch
knows its base, patched or not, and refuses any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.artifact import read_artifact, write_artifact
from regraft.errors import RegraftError

FORMAT = "regraft-patch-1"


@dataclass(frozen=True)
class TensorPatch:
    """New values for one tensor of shape `shape`.

    `positions` are flat, ascending, int64 `[k]`; `values` have the checkpoint's dtype `[k]`;
    `base` is the digest of the pruned tensor (see `base_digest`). `minus` are the indices, into
    `positions`, of pruned weights that are -0.0: a negative weight times a mask. Reverting gives
    their sign back.
    """

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    base: str
    minus: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def of(cls, pruned: Tensor, positions: Tensor, values: Tensor) -> TensorPatch:
        """For the pruned tensor `[out, in]`, whose `positions` `[k]` are to hold `values` `[k]`."""
        minus = pruned.reshape(-1)[positions].signbit().nonzero().flatten()
        base = base_digest(pruned, positions)
        return cls(tuple(pruned.shape), positions, values, base, minus)

    @property
    def zeros(self) -> Tensor:
        """What the pruned tensor holds at `positions`, sign included. `[k]`"""
        zeros = torch.zeros_like(self.values)
        zeros[self.minus] = -0.0
        return zeros


@dataclass(frozen=True)
class Patch:
    """Tensor name on disk -> its new values. `about` says how the patch was made."""

    tensors: Mapping[str, TensorPatch]
    about: Mapping[str, Any]

    @property
    def restored(self) -> int:
        """Number of weights that come back."""
        return sum(len(tensor.positions) for tensor in self.tensors.values())


def base_digest(tensor: Tensor, positions: Tensor) -> str:
    """SHA-256 of a tensor's bytes with `positions` set to zero, as hex."""
    masked = tensor.reshape(-1).clone()
    masked[positions] = 0
    return hashlib.sha256(masked.view(torch.uint8).numpy().data).hexdigest()


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
        if len(tensor.minus):
            tensors[f"{name}.minus"] = tensor.minus.to(torch.int32)
    layout = {
        name: {"shape": list(tensor.shape), "base": tensor.base}
        for name, tensor in patch.tensors.items()
    }
    write_artifact(path, FORMAT, {"about": patch.about, "tensors": layout}, tensors)


def load_patch(path: Path) -> Patch:
    """Read and check a patch.

    Raises:
        RegraftError: the file is missing, truncated, not a patch, or inconsistent.
    """
    header, stored = read_artifact(path, FORMAT, "a patch")
    try:
        tensors = {
            name: TensorPatch(
                tuple(layout["shape"]),
                stored[f"{name}.positions"].long(),
                stored[f"{name}.values"],
                layout["base"],
                stored.get(f"{name}.minus", torch.empty(0)).long(),
            )
            for name, layout in header["tensors"].items()
        }
        about = header["about"]
    except KeyError as error:
        raise RegraftError(f"{path} is damaged: {error} is missing.") from error
    for name, tensor in tensors.items():
        size = torch.Size(tensor.shape).numel()
        valid = (
            tensor.positions.shape == tensor.values.shape
            and _ascending_below(size, tensor.positions)
            and _ascending_below(len(tensor.positions), tensor.minus)
        )
        if not valid:
            raise RegraftError(f"{path}: the positions of {name} are not valid for its shape.")
    return Patch(tensors, about)


def _ascending_below(size: int, positions: Tensor) -> bool:
    if positions.ndim != 1:
        return False
    ascending = bool((positions[1:] > positions[:-1]).all())
    return ascending and (
        not len(positions) or (int(positions[0]) >= 0 and int(positions[-1]) < size)
    )
