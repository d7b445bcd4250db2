"""A map over long pieces of work: shared out over processes, and resumable after every piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from regraft import distributed
from regraft.disk.files import read_json, write_json

Piece = TypeVar("Piece")


def resumable_map(
    pieces: Sequence[Piece],
    make: Callable[[Sequence[Piece]], Iterable[tuple[int, Any]]],
    scratch: Path | None,
    name: str,
    kept: Callable[[Piece], None] = lambda _: None,
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
    for i in distributed.share(range(len(pieces))):
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
        made = distributed.merged(made)
        return [made[i] for i in range(len(pieces))]
    distributed.barrier()
    return [read_json(file) for file in files if file is not None]
