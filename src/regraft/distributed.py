"""Several processes on one job: ranks, shares of the work, sums over processes, resumable work.

`torchrun` (or `accelerate launch`) starts the same command several times, on one machine or more;
each process takes its share of the batches and rank 0 writes. All processes must see the output
folder. Without a launcher there is one process, and these functions do nothing.
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

from regraft.disk.files import write_json
from regraft.disk.parsing import from_json, read_json
from regraft.errors import RegraftError
from regraft.launcher import local_rank, processes

K = TypeVar("K")
R = TypeVar("R")
T = TypeVar("T")
_TIMEOUT = timedelta(days=2)  # rank 0 may write or select for long while the others wait


def rank() -> int:
    """Index of this process, 0 to `world()` - 1. Rank 0 writes."""
    return dist.get_rank() if _initialised() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialised() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes if a launcher started this one as one of several.

    The process group is not destroyed after an error: the others may be waiting in a sum on their
    devices, and destroying it would wait for them. The caller prints the error and calls `leave`.
    """
    if processes() < 2:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_TIMEOUT)
    try:
        yield
    except SystemExit as end:  # successful commands end this way too
        if end.code:
            raise
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process; at once if it is one of several, so that the launcher ends the others."""
    if _initialised():
        os._exit(code)  # flushes nothing: the caller must have
    sys.exit(code)


def share(items: Sequence[T]) -> Sequence[T]:
    """Every `world()`-th item, from this process's index on."""
    return items[rank() :: world()]


def total(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place; all must call it, in the same order."""
    if _initialised():
        dist.all_reduce(tensor)
    return tensor


def gathered(value: T) -> list[T]:
    """The values that all processes pass, in the order of their ranks."""
    if not _initialised():
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def merged(own: Mapping[K, T]) -> dict[K, T]:
    """The entries that all processes pass, in the order of their ranks."""
    return {key: value for part in gathered(own) for key, value in part.items()}


def same(value: object) -> bool:
    """Whether all processes pass an equal value."""
    return all(other == value for other in gathered(value))


def decided(question: Callable[[], bool]) -> bool:
    """Rank 0's answer to a question about the disk, whose state may differ for the others."""
    if not _initialised():
        return question()
    answer = [question() if rank() == 0 else False]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def barrier() -> None:
    """Wait until all processes get here."""
    if _initialised():
        dist.barrier()


def resumable_map(
    pieces: Sequence[T],
    make: Callable[[Sequence[T]], Iterable[tuple[int, Any]]],
    scratch: Path | None,
    name: str,
    kind: type[R],
    kept: Callable[[T], None] = lambda _: None,
) -> list[R]:
    """Process pieces of work on all processes; return the results, in order, in every process.

    Args:
        pieces: The pieces, such as batches of prompts.
        make: Takes the pieces of this process that are not done; yields (index among them, result
            as JSON values) in any order. A result is written before the next is asked for.
        scratch: A folder for this work alone, seen by all processes; results found there are
            reused, whichever and however many processes made them, and made again if they are
            damaged. None keeps nothing.
        name: Prefix of the files in `scratch`.
        kind: The type of a result.
        kept: Called with every piece of this process whose result was found there.
    """
    own = share(range(len(pieces)))
    files = {i: scratch / f"{name}_{i:06d}.json" for i in own} if scratch else {}
    results: dict[int, R] = {}
    for i, file in files.items():
        try:
            results[i] = from_json(kind, read_json(file), str(file))
        except RegraftError:  # it does not exist, or is damaged
            continue
        kept(pieces[i])
    missing = [i for i in own if i not in results]
    for index, result in make([pieces[i] for i in missing]):
        i = missing[index]
        if i in files:
            write_json(files[i], result)
        results[i] = from_json(kind, result, name)
    everyones = merged(results)
    return [everyones[i] for i in range(len(pieces))]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
