"""Write to disk so that nothing is ever half-written; threads and digests of files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from safetensors import SafetensorError

from regraft.disk.paths import real
from regraft.errors import PassingError, RegraftError

_CHUNK = 2**20  # bytes
_MOST_SLUG = 60  # characters without the digest; names have at most 255 bytes
WORKERS = min(4, os.cpu_count() or 1)
Item = TypeVar("Item")
Result = TypeVar("Result")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.regraft-tmp")


def lock_of(file: Path) -> Path:
    """The lock for writing `file`, beside it."""
    return file.with_name(f".{file.name}.regraft-lock")


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing `target` into clear ones.

    Raises:
        PassingError: the disk is full, permission is missing, or the path cannot be written.
    """
    messages = {
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): f"The disk is full: could not write {target}. "
        "Nothing of it was kept. Free some space and run the same command again, which continues "
        "from what was finished before, or choose another output folder.",
        (errno.EACCES, errno.EPERM, errno.EROFS): f"No permission to write {target}. Choose "
        "another output folder.",
        (errno.ENAMETOOLONG,): f"The name of {target} is too long for this file system. Choose a "
        "shorter one.",
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR): f"{target} cannot be written: there is a file "
        "where a folder is needed, or a folder where a file is needed. Choose another output.",
    }
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        for numbers, message in messages.items():
            if number in numbers:
                raise PassingError(message) from error
        raise


def _error_number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


@contextmanager
def new_folders(target: Path) -> Iterator[None]:
    """Create the folders above `target`; if the block fails, remove the new ones if empty."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not empty: something else was written there
                folder.rmdir()
        raise


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` if the block succeeds.

    Raises:
        PassingError: another process removed the temporary file, or see `disk_errors`.
    """
    with new_folders(target):
        temporary = discard_leftover(target)
        try:
            with disk_errors(target):
                if target.is_dir():  # found now, before other files are put into place
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
                yield temporary
                sync(temporary)
                temporary.replace(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError) and error.filename == str(temporary):
                raise PassingError(
                    f"{target} was not written: its temporary file was removed, perhaps by another "
                    "regraft process that writes it too. Run the same command again."
                ) from error
            raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `target`; rename it to `target` if the block succeeds.

    Raises:
        PassingError: see `require_new`.
    """
    require_new(target)
    with new_folders(target):
        temporary = discard_leftover(target)
        try:
            with disk_errors(target):
                temporary.mkdir()
                yield temporary
                in_threads(sync, [*temporary.rglob("*"), temporary])
                if target.exists():
                    target.rmdir()
                temporary.replace(target)
                sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def discard_leftover(target: Path) -> Path:
    """Remove the temporary path that a killed run left beside `target`; return that path."""
    temporary = _temporary(target)
    with disk_errors(target):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    return temporary


def require_empty(folder: Path, file: Path | None = None) -> None:
    """Raise unless `folder` is absent or empty, so that no output overwrites anything.

    With `file` it may also hold that file, with whatever belongs to it, or the beginnings of it:
    what a killed run left, or what another process is writing.
    """
    if folder.is_file():
        raise PassingError(f"{folder} is a file; the output must be a new folder.")
    inside = set(folder.iterdir()) if folder.is_dir() else set()
    if file is not None and file not in inside:
        inside -= {_temporary(file), lock_of(file)}
    if inside and file not in inside:
        raise PassingError(
            f"The output folder {folder} is not empty. Choose a new folder or empty this one."
        )


def require_new(folder: Path) -> None:
    """Raise unless `folder` is absent or empty and can be put in place by one rename.

    Raises:
        PassingError: it is not empty, or is a link, a mount point or the current folder.
    """
    require_empty(folder)
    for what, applies in {
        "a link": folder.is_symlink(),
        "a mount point": folder.exists() and os.path.ismount(folder),
        "the current folder": folder.exists() and Path.cwd() == real(folder),
    }.items():
        if applies:
            raise PassingError(
                f"The output folder {folder} is {what}, which a finished folder cannot replace in "
                f"one step. Choose a new one, such as {folder / 'out'}."
            )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if the path does not exist.

    So do files that another process removes meanwhile.
    """
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(map(_file_size, (path, *inside)))


def _file_size(path: Path) -> int:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def leftover_bytes(target: Path) -> int:
    """Bytes that a killed run left beside `target`; freed before it is written again."""
    return size_of(_temporary(target))


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise a `PassingError` if the disk that will hold `folder` has less than `needed_bytes`."""
    above = (folder.absolute(), *folder.absolute().parents)
    free = shutil.disk_usage(next(path for path in above if path.exists())).free
    if free < needed_bytes:
        raise PassingError(
            f"The disk is too full: {folder} needs {readable_size(needed_bytes)} and "
            f"{readable_size(free)} are free. Free some space or choose another folder."
        )


def readable_size(count: int) -> str:
    """A number of bytes in GiB, or in MiB if it is less than one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    if not path.is_dir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    elif os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        with suppress(OSError):  # not every file system supports it
            os.fsync(folder)
        os.close(folder)


def read_at(handle: io.FileIO, offset: int, data: memoryview) -> None:
    """Fill `data` with the bytes of an unbuffered file from `offset` on.

    Raises:
        RegraftError: the file ends before `data` is full.
    """
    handle.seek(offset)
    while data:
        count = handle.readinto(data)
        if not count:
            raise RegraftError(f"{handle.name} became shorter while it was read.")
        data = data[count:]


def write_at(handle: io.FileIO, offset: int, data: memoryview) -> None:
    """Overwrite an unbuffered file from byte `offset` on."""
    handle.seek(offset)
    write_all(handle, data)


def write_all(handle: io.FileIO, data: memoryview) -> None:
    """Write all of `data`; a single `write` to an unbuffered file may write less."""
    while data:
        data = data[handle.write(data) :]


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], stop: Event | None = None
) -> list[Result]:
    """Run `work` on every item in threads, in any order; return the results in order.

    The first error cancels calls that have not begun and sets `stop`, which running ones can check.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # before `stop` frees a thread
            if stop is not None:
                stop.set()
            raise
        return [future.result() for future in futures]


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` atomically, in UTF-8, with ? in place of lone surrogates."""
    write_texts({target: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """As `write_text` for several files: all are written before the first is put into place."""
    with ExitStack() as stack:
        for target, text in reversed([*texts.items()]):  # the stack ends with the first
            temporary = stack.enter_context(atomic_file(target))
            temporary.write_text(text, encoding="utf-8", errors="replace")
            sync(temporary)


def to_json(value: Any) -> str:
    """Indented JSON with a final line break; keys keep their order."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    """Write `value` as JSON atomically."""
    write_text(target, to_json(value))


def slug(text: str) -> str:
    """`text` as a file name of at most 69 word characters, dots and dashes.

    Of other texts 60 characters are kept, with "-" for what a name cannot have and a digest.
    """
    plain = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    fits = plain == text and len(text) <= _MOST_SLUG
    return text if fits else f"{plain[-_MOST_SLUG:]}-{digest(text)[:8]}"


def digest(*parts: bytes | str | memoryview) -> str:
    """SHA-256 over length-prefixed parts, as hex."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def file_digest(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's bytes, as hex; `advance` is called with the number of bytes just read."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK):
            hasher.update(chunk)
            advance(len(chunk))
    return hasher.hexdigest()
