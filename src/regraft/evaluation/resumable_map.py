"""A map over long pieces of work: shared out over processes, and resumable after every piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.files import read_json, write_json
from regraft.progress import Advance


def resumable_map(
    count: int,
    make: Callable[[Sequence[int]], Iterator[tuple[int, Any]]],
    scratch: Path | None,
    name: str,
    kept: Advance = lambda _: None,
) -> list[Any]:
    """The results of `count` pieces of work, in order, the same in every process.

    Args:
        count: How many pieces.
        make: Given the pieces that this process is to do, yields each with its result, a JSON
            value. It is written before the next one is asked for.
        scratch: A folder of this very work, seen by all processes; those found there are kept,
            whichever and however many processes made them. None keeps nothing.
        name: Of the files in it.
        kept: Called with every piece of this process that was found there.
    """
    own = distributed.share(range(count))
    if scratch is None:
        found = distributed.merged(dict(make(own)))
        return [found[i] for i in range(count)]
    files = [scratch / f"{name}_{i:06d}.json" for i in range(count)]
    done = [i for i in own if files[i].exists()]
    for i in done:
        kept(i)
    for i, result in make([i for i in own if i not in set(done)]):
        write_json(files[i], result)
    distributed.barrier()
    return [read_json(path) for path in files]
