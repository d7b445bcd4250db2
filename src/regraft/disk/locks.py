"""Locks, so that two processes do not write the same output."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from regraft.disk.paths import require_file
from regraft.errors import RegraftError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # Lustre or NFS mounted without locks


@contextmanager
def locked(path: Path, what: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock on the file `path`, created if missing, while the block runs.

    `what` is the output that it protects, for messages. With `wait`, wait while another process
    holds the lock.

    Raises:
        RegraftError: another process holds it and `wait` is off, or held it until now and finished
            the output; or the file system has no locks.
    """
    with _opened(path) as handle:
        _lock(handle, path, what, wait)
        if not _is_at(handle, path):
            raise RegraftError(
                f"Another regraft process has just written {what}. Run the same command again; "
                "it continues from there."
            )
        yield


@contextmanager
def in_turn(path: Path, what: Path) -> Iterator[None]:
    """As `locked` with `wait`, and leave no lock file: whoever has finished removes it.

    Raises:
        RegraftError: the file system has no locks.
    """
    while True:
        with _opened(path) as handle:
            _lock(handle, path, what, wait=True)
            if _is_at(handle, path):  # else its last holder removed it: lock the new one
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows removes no open file
                        path.unlink()
                return


def _opened(path: Path) -> IO[bytes]:
    if path.exists():
        require_file(path)  # opening a pipe would wait for its reader
    return path.open("ab")


def _lock(handle: IO[bytes], path: Path, what: Path, wait: bool) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise RegraftError(
                f"Another regraft process is writing {what} at this moment. Wait for it, or "
                "choose another output."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise RegraftError(
                f"{path.parent} is on a file system without file locks (such as Lustre mounted "
                "without flock, or NFS without a lock daemon), where another process could "
                f"write {what} too. Mount it with locks, or choose an output elsewhere."
            ) from error


def _is_at(handle: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at `path`; its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
