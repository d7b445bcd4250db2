"""Check paths and names, and read text, with a clear error where that fails."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regraft.errors import RegraftError

SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_NAME = 255  # bytes of a file's name on nearly every file system


@contextmanager
def unreadable(path: Path, what: str = "") -> Iterator[None]:
    """Turn the operating system's errors about reading `path` into clear ones.

    `what` is a sentence for the message: what is needed.

    Raises:
        RegraftError: it is missing, a folder or not readable, or its name is invalid.
    """
    more = f" {what}" if what else ""
    try:
        yield
    except FileNotFoundError as error:
        raise RegraftError(f"{path} does not exist.{more}") from error
    except IsADirectoryError as error:
        raise RegraftError(f"{path} is a folder; a file is needed.{more}") from error
    except NotADirectoryError as error:
        file = next((above for above in path.parents if above.is_file()), path.parent)
        raise RegraftError(
            f"{path} does not exist: {file} is a file; a folder that holds "
            f"{path.relative_to(file)} is needed.{more}"
        ) from error
    except OSError as error:
        raise RegraftError(f"{path} cannot be read: {error.strerror or error}.{more}") from error
    except ValueError as error:  # a NUL
        raise RegraftError(f"{str(path)!r} cannot name a file: {error}.{more}") from error


def require_file(path: Path, what: str = "") -> int:
    """Raise unless `path` is a regular file; return its size in bytes.

    Raises:
        RegraftError: see `unreadable`; it is a device, a pipe or a socket, which may never end.
    """
    with unreadable(path, what):
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError
    if not stat.S_ISREG(about.st_mode):
        raise RegraftError(f"{path} is a device, a pipe or a socket; a file is needed. {what}")
    return about.st_size


def at_home(path: Path) -> Path:
    """Expand "~" in a path; leave it where there is no such user."""
    with suppress(RuntimeError):
        return path.expanduser()
    return path


def real(path: Path) -> Path:
    """The absolute path with links followed, as far as they lead; `Path.resolve` fails on loops."""
    return Path(os.path.realpath(path))


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False if no file can have such a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than 255 bytes; a NUL
        return False


def read_text(path: Path, what: str = "") -> str:
    """A file's text, UTF-8 with or without a byte order mark, line breaks as they are.

    Raises:
        RegraftError: see `require_file`; it is not UTF-8.
    """
    require_file(path, what)
    with unreadable(path, what):
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RegraftError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def is_text(value: str) -> bool:
    """Whether text is valid Unicode, without lone surrogates."""
    return not SURROGATE.search(value)


def is_name(name: str) -> bool:
    """Whether this can name a file in a folder: one part of a path, of at most 255 bytes."""
    return (
        name not in ("", ".", "..")
        and not re.search(r"[/\\\0\ud800-\udfff]", name)
        and len(os.fsencode(name)) <= _MOST_NAME
    )


def within(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder once all links are followed.

    Snapshots in the hub's cache link to the blobs beside them, which count as inside.
    """
    place, root = real(path), real(folder)
    if place.is_relative_to(root):
        return True
    parts = root.parts
    places = [i for i, part in enumerate(parts) if part == "snapshots" and i and parts[i + 1 :]]
    return any(place.is_relative_to(Path(*parts[:i], "blobs")) for i in places)
