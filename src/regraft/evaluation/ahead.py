"""Doing the next pieces of work in threads while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(
    make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2
) -> Iterator[tuple[Item, Made]]:
    """Each item with what `make` made of it, in order; up to `depth` items are made ahead.

    Raises:
        Exception: what `make` raises, when its item's turn comes.
    """
    left = iter(items)
    with ThreadPoolExecutor(depth) as pool:
        waiting: deque[tuple[Item, Future[Made]]] = deque()

        def start(count: int) -> None:
            waiting.extend((item, pool.submit(make, item)) for item in islice(left, count))

        try:
            start(depth)
            while waiting:
                item, future = waiting.popleft()
                made = future.result()
                start(1)
                yield item, made
        finally:
            for _, future in waiting:
                future.cancel()
