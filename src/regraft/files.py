"""Writing to disk so that nothing is ever half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.errors import RegraftError


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.regraft-tmp")


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" and "not allowed" into a clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RegraftError(
                f"The disk is full: could not write {target}. Nothing was kept of it. "
                "Free some space or choose another output folder."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RegraftError(
                f"No permission to write {target}. Choose another output folder."
            ) from error
        raise


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        with disk_errors(target):
            yield temporary
            _sync(temporary)
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `target`; rename it to `target` if the block succeeds.

    Raises:
        RegraftError: `target` exists and is not an empty folder.
    """
    require_empty(target)
    temporary = _temporary(target)
    if temporary.exists():  # left by a killed run
        shutil.rmtree(temporary)
    try:
        with disk_errors(target):
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    _sync(path)
            if target.exists():
                target.rmdir()
            temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_empty(folder: Path) -> None:
    """Raise unless `folder` is absent or empty, so that no output overwrites anything."""
    if folder.is_file():
        raise RegraftError(f"{folder} is a file; the output must be a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise RegraftError(
            f"The output folder {folder} is not empty. Choose a new folder or empty this one."
        )


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise if the disk that will hold `folder` has fewer than `needed_bytes` free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise RegraftError(
            f"The disk is too full: {folder} needs {needed_bytes / 2**30:.2f} GiB and "
            f"{free / 2**30:.2f} GiB are free. Free some space or choose another folder."
        )


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` in one step (UTF-8)."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step; keys keep their order."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RegraftError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RegraftError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RegraftError(f"{path} is not valid JSON: {error}") from error


def digest(*parts: bytes | str) -> str:
    """SHA-256 over length-prefixed parts, as hex."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
