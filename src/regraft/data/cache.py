"""Images that a data set keeps inside a table, as files in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regraft.files import atomic_file, disk_errors, locked

CACHE_VARIABLE = "REGRAFT_CACHE"


def cache_folder() -> Path:
    """REGRAFT_CACHE, else `regraft` in the place where this system keeps caches."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"


def cached_file(content: bytes, suffix: str) -> Path:
    """A file with this content, named after its digest; it is written once."""
    name = hashlib.sha256(content).hexdigest()[:32]
    path = cache_folder() / "images" / f"{name}{suffix}"

    def whole() -> bool:
        return path.is_file() and path.stat().st_size == len(content)

    if not whole():
        with one_writer(path.parent):
            if not whole():
                with atomic_file(path) as temporary:
                    temporary.write_bytes(content)
    return path


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Write into a folder of the cache, which is made, while other processes wait.

    Raises:
        RegraftError: it cannot be written to.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / ".lock"
        lock.touch()
    with locked(lock, folder, wait=True):
        yield
