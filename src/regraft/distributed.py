"""Several processes at one job: who am I, what is my share, our sum, and work that resumes.

`torchrun` (or `accelerate launch`) starts the same command several times, on one machine or more;
each process takes its share of the batches and rank 0 writes. The output folder must be one that
all of them see. Outside of that there is one process and nothing to do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from regraft.disk.files import read_json, write_json
from regraft.launcher import local_rank, processes

K = TypeVar("K")
T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # rank 0 may write or select for long while the others wait


def rank() -> int:
    """Index of this process, 0 to `world()` - 1. Rank 0 writes."""
    return dist.get_rank() if _together() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _together() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes if a launcher started this one as one of several.

    They are not left after an error: the others may be waiting in a sum on their devices, and
    leaving would wait for them. What is to be said then should be, and `leave` called.
    """
    if processes() < 2:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
    try:
        yield
    except SystemExit as end:  # how commands end that went well
        if end.code:
            raise
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process; at once where it is one of several, so that their launcher ends them."""
    if _together():
        os._exit(code)  # what was printed must have been flushed
    sys.exit(code)


def share(items: Sequence[T]) -> Sequence[T]:
    """Every `world()`-th item, from this process's index on."""
    return items[rank() :: world()]


def total(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place; all must call it, in the same order."""
    if _together():
        dist.all_reduce(tensor)
    return tensor


def gathered(value: T) -> list[T]:
    """What every process passes, in the order of their indices."""
    if not _together():
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def merged(own: Mapping[K, T]) -> dict[K, T]:
    """The entries of all processes together, in the order of their indices."""
    return {key: value for part in gathered(own) for key, value in part.items()}


def same(value: object) -> bool:
    """Whether all processes pass an equal value."""
    return all(other == value for other in gathered(value))


def decided(question: Callable[[], bool]) -> bool:
    """Rank 0's answer to a question that the others must not put to the disk themselves."""
    if not _together():
        return question()
    answer = [question() if rank() == 0 else False]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def barrier() -> None:
    """Wait until all processes are here."""
    if _together():
        dist.barrier()


def resumable_map(
    pieces: Sequence[T],
    make: Callable[[Sequence[T]], Iterable[tuple[int, Any]]],
    scratch: Path | None,
    name: str,
    kept: Callable[[T], None] = lambda _: None,
) -> list[Any]:
    """The result of every piece of work, in order, the same in every process.

    Args:
        pieces: What is to be done, such as batches of prompts.
        make: From the pieces that this process is to do to (place among them, result as JSON
            values), in any order. Each is written before the next one is asked for.
        scratch: A folder of this very work, seen by all processes; results found there are kept,
            whichever and however many processes made them. None keeps nothing.
        name: Of the files in it.
        kept: Called with every piece of this process that was found there.
    """
    files = [scratch / f"{name}_{i:06d}.json" if scratch else None for i in range(len(pieces))]
    missing = []
    for i in share(range(len(pieces))):
        if (file := files[i]) is not None and file.exists():
            kept(pieces[i])
        else:
            missing.append(i)
    made: dict[int, Any] = {}
    for place, result in make([pieces[i] for i in missing]):
        i = missing[place]
        if (file := files[i]) is None:
            made[i] = result
        else:
            write_json(file, result)
    if scratch is None:
        made = merged(made)
        return [made[i] for i in range(len(pieces))]
    barrier()
    return [read_json(file) for file in files if file is not None]


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
