"""Several processes at one job: who am I, what is my share, and our sum.

Outside of `torchrun` there is one process and nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Index of this process, 0 to `world()` - 1. Rank 0 writes."""
    return dist.get_rank() if _together() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _together() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """Every `world()`-th item, from this process's index on."""
    return items[rank() :: world()]


def total(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place; all must call it, in the same order."""
    if _together():
        dist.all_reduce(tensor)
    return tensor


def same(value: object) -> bool:
    """Whether all processes pass an equal value."""
    if not _together():
        return True
    values: list[object] = [None] * world()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def barrier() -> None:
    """Wait until all processes are here."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
