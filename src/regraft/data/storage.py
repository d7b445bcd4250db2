"""Get the files of data sets onto this disk: downloaded, unpacked and cached, each once."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

from regraft.disk.files import atomic_file, atomic_folder, digest, disk_errors, require_space
from regraft.disk.locks import locked
from regraft.disk.paths import at_home, real, require_file
from regraft.errors import PassingError, RegraftError

CACHE_VARIABLE = "REGRAFT_CACHE"
MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?")
"""ORG/NAME of a model, with or without @REVISION."""
_LARGE, _MOST_RATIO = 2**30, 100  # bytes unpacked; bytes unpacked per byte of the archive
_MOST_NESTED = 64  # folders
_SELF_CONTAINED = (".csv", ".tsv", ".txt", ".parquet")  # name no other files
_blocks: list[list[Path]] = []  # paths that each open block of `kept_if_read` wrote to the cache
CACHED_IMAGE = re.compile(r"[0-9a-f]{32}\.(png|jpg)")
_SHARDS = re.compile(r"-\d{5}(-of-\d{5}\.parquet)$")
_ADDRESS = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inner>.+))?")


def is_on_hub(path: Path) -> bool:
    return path.as_posix().startswith("hf:")


def located(path: Path) -> Path:
    """Return a local path as it is; download "hf:ORG/NAME[@REVISION][/PATH]" and return its path.

    The whole data set is downloaded, since a file may name images beside it, unless PATH is a table
    (all its shards) or a list of prompts.

    Raises:
        RegraftError: the address is malformed, or the data set cannot be downloaded.
    """
    if not is_on_hub(path):
        return at_home(path)
    text = path.as_posix()
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise RegraftError(
            f"{text!r} names no data set on the hub; expected hf:ORG/NAME[@REVISION][/PATH]."
        )
    inner = match["inner"] or ""
    wanted = [_SHARDS.sub(r"-*\1", inner)] if inner.lower().endswith(_SELF_CONTAINED) else None
    return from_hub(match["name"], match["revision"], wanted, repo_type="dataset") / inner


def from_hub(
    name: str,
    revision: str | None,
    wanted: list[str] | None,
    unwanted: list[str] | None = None,
    *,
    repo_type: Literal["model", "dataset"] = "model",
) -> Path:
    """Download the files of a hub repository ORG/NAME that match `wanted`; return their folder.

    Raises:
        RegraftError: the repository is gated, missing or private, or the download fails.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except errors.GatedRepoError as error:
        raise RegraftError(
            f"{name} is gated: accept its terms on its page, then `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RegraftError(
            f"There is neither a folder nor a {repo_type} {name} on the hub, or it is private: "
            "`hf auth login`."
        ) from error
    except Exception as error:  # may be of the hub's HTTP library, which differs by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason.removeprefix("Got: ").rstrip(".")
        raise RegraftError(
            f"{name} is not a folder here and could not be downloaded from the hub: {reason}. "
            "Without a network give the path of a copy on disk."
        ) from error
    return Path(folder)


def unpacked(archive: Path) -> Path:
    """Unpack `archive` into the cache, the first time; return the folder.

    Raises:
        RegraftError: it is not a whole zip file, has a password, a link, or a path that leaves the
            folder, or the disk is too full.
    """
    require_file(archive)
    status = archive.stat()
    key = digest(str(real(archive)), str(status.st_size), str(status.st_mtime_ns))
    folder = cache_folder() / "unpacked" / f"{archive.stem}-{key[:16]}"
    if folder.is_dir():
        return folder
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                _check(archive, member)
            size = sum(member.file_size for member in members)
            if size > _LARGE and size > _MOST_RATIO * status.st_size:
                raise RegraftError(
                    f"{archive} has {status.st_size:,} bytes and would unpack to {size:,}: no data "
                    "set compresses that well. Nothing was unpacked; do not use this archive."
                )
            with one_writer(folder.parent):
                if folder.is_dir():  # another process unpacked it while this one waited
                    return folder
                require_space(folder.parent, size)
                with atomic_folder(folder) as temporary:
                    for member in members:
                        _extract(content, member, temporary)
                _wrote(folder)
    except (RegraftError, OSError):
        raise
    except Exception as error:  # decoders of a broken archive raise all kinds
        raise RegraftError(
            f"{archive} is not a whole zip file ({error}). Download it again."
        ) from error
    return folder


def only_entry(folder: Path) -> Path:
    """The only file in a folder, or else the innermost folder that holds everything."""
    inside = [path for path in folder.iterdir() if path.name != "__MACOSX"]
    if len(inside) != 1:
        return folder
    return only_entry(inside[0]) if inside[0].is_dir() else inside[0]


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    try:
        content.extract(member, folder)
    except OSError as error:
        if error.errno is None:  # bzip2's decoder raises it for damaged data
            raise zipfile.BadZipFile(str(error)) from error
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EINVAL):
            raise RegraftError(
                f"{content.filename}: the entry {member.filename!r} cannot be unpacked: "
                f"{error.strerror}."
            ) from error
        raise


def _check(archive: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    drive = ":" in path.parts[0] if path.parts else False
    if path.is_absolute() or drive or ".." in path.parts:
        raise RegraftError(
            f"{archive}: the entry {member.filename!r} leaves the folder it is unpacked into. "
            "Nothing was unpacked; do not use this archive."
        )
    if len(path.parts) > _MOST_NESTED:
        raise RegraftError(
            f"{archive}: the entry {member.filename[:60]!r} ... is {len(path.parts):,} folders "
            f"deep; expected {_MOST_NESTED} at most."
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise RegraftError(f"{archive}: the entry {member.filename!r} is a link; expected files.")
    if member.flag_bits & 1:
        raise RegraftError(f"{archive}: the entry {member.filename!r} needs a password.")


def cache_folder() -> Path:
    """REGRAFT_CACHE, or else `regraft` in the user's cache folder."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"


def cached_image(content: bytes) -> Path:
    """Write the bytes of an image into the cache, named by their digest, unless it is there."""
    suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
    path = image_cache() / f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"

    def whole() -> bool:
        return path.is_file() and path.stat().st_size == len(content)

    if not whole():
        with one_writer(path.parent):
            if not whole():
                with atomic_file(path) as temporary:
                    temporary.write_bytes(content)
                _wrote(path)
    return path


def image_cache() -> Path:
    """The folder of images out of tables, whose names match `CACHED_IMAGE`."""
    return cache_folder() / "images"


@contextmanager
def kept_if_read() -> Iterator[None]:
    """Delete what the block wrote into the cache if its input turns out to be bad.

    Blocks may be nested: an outer one also deletes what finished inner ones wrote.
    """
    written: list[Path] = []
    _blocks.append(written)
    try:
        yield
    except PassingError:
        raise
    except RegraftError:
        for path in written:
            if path.is_dir():  # rename first: other processes take an existing folder as complete
                doomed = path.with_name(f".{path.name}-{os.getpid()}")
                path.replace(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        _blocks.pop()


def _wrote(path: Path) -> None:
    for written in _blocks:
        written.append(path)


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Make a cache folder if needed, and lock it: other processes wait until the block ends."""
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder / ".lock"
            lock.touch()
        with locked(lock, folder, wait=True):
            yield
    except PassingError as error:
        raise PassingError(
            f"{error} It is in the cache: the variable {CACHE_VARIABLE} names another folder."
        ) from error
