"""Where the files of a data set lie on this disk: downloaded, unpacked and cached, each once."""

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

from regraft.disk.files import (
    atomic_file,
    atomic_folder,
    digest,
    disk_errors,
    locked,
    require_space,
)
from regraft.disk.paths import at_home, require_file
from regraft.errors import PassingError, RegraftError

CACHE_VARIABLE = "REGRAFT_CACHE"
PREFIX = "hf:"
MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?")
"""ORG/NAME of a model, with or without @REVISION."""
_LARGE, _MOST_RATIO = 2**30, 100  # bytes unpacked, and times the size of the archive
_MOST_NESTED = 64  # folders
_ALONE = (".csv", ".tsv", ".txt", ".parquet")
_written: list[Path] = []  # into the cache, by this process
CACHED_IMAGE = re.compile(r"[0-9a-f]{32}\.(png|jpg)")
_SHARDS = re.compile(r"-\d{5}(-of-\d{5}\.parquet)$")  # all files of a table are one
_ADDRESS = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inner>.+))?")


def is_on_hub(path: Path) -> bool:
    return path.as_posix().startswith(PREFIX)


def located(path: Path) -> Path:
    """A path as it is, or for "hf:ORG/NAME[@REVISION][/PATH]" where the download lies.

    All of the data set is downloaded, since images lie beside files that name them; of a table or a
    list of prompts that file alone.

    Raises:
        RegraftError: the address is malformed, or the data set cannot be downloaded.
    """
    if not is_on_hub(path):
        return at_home(path)
    text = path.as_posix()
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise RegraftError(
            f"{text!r} names no data set on the hub; expected hf:ORG/NAME, with a revision "
            "(@REVISION) and a path in it where wanted."
        )
    inner = match["inner"] or ""
    wanted = [_SHARDS.sub(r"-*\1", inner)] if inner.lower().endswith(_ALONE) else None
    return from_hub(match["name"], match["revision"], wanted, repo_type="dataset") / inner


def from_hub(
    name: str,
    revision: str | None,
    wanted: list[str] | None,
    unwanted: list[str] | None = None,
    *,
    repo_type: Literal["model", "dataset"] = "model",
) -> Path:
    """The folder of the files that match `wanted`, of a repository ORG/NAME of the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(
            name,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except GatedRepoError as error:
        raise RegraftError(
            f"{name} is gated: accept its terms on its page, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise RegraftError(
            f"There is neither a folder nor a {repo_type} {name} on the hub, or it is private: "
            "`hf auth login`."
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:  # a missing local entry, too
        reason = str(error).splitlines()[0].removeprefix("Got: ")
        raise RegraftError(
            f"{name} is not a folder here and could not be downloaded from the hub: {reason} "
            "Without a network give the path of a copy on disk."
        ) from error
    return Path(folder)


def unpacked(archive: Path) -> Path:
    """The folder with what is in `archive`; it is unpacked the first time.

    Raises:
        RegraftError: it is no whole zip file, has a password, a link, or a path that leaves the
            folder, or the disk is too full.
    """
    require_file(archive)
    about = archive.stat()
    key = digest(str(archive.resolve()), str(about.st_size), str(about.st_mtime_ns))
    folder = cache_folder() / "unpacked" / f"{archive.stem}-{key[:16]}"
    if folder.is_dir():
        return folder
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                _check(archive, member)
            size = sum(member.file_size for member in members)
            if size > _LARGE and size > _MOST_RATIO * about.st_size:
                raise RegraftError(
                    f"{archive} has {about.st_size:,} bytes and would unpack to {size:,}: no data "
                    "set is packed so tightly. Nothing was unpacked; do not use this archive."
                )
            with one_writer(folder.parent):
                if folder.is_dir():  # by the process that this one waited for
                    return folder
                require_space(folder.parent, size)
                with atomic_folder(folder) as temporary:
                    for member in members:
                        _extract(content, member, temporary)
                _written.append(folder)
    except (RegraftError, OSError):
        raise
    except Exception as error:  # decoders of a broken archive raise all kinds
        raise RegraftError(
            f"{archive} is not a whole zip file ({error}). Download it again."
        ) from error
    return folder


def only_entry(folder: Path) -> Path:
    """The one file of an archive, or the folder in which all of it lies."""
    inside = [path for path in folder.iterdir() if path.name != "__MACOSX"]
    if len(inside) != 1:
        return folder
    return only_entry(inside[0]) if inside[0].is_dir() else inside[0]


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    try:
        content.extract(member, folder)
    except OSError as error:
        if error.errno is None:  # of the decoder of bzip2
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
            f"{archive}: the entry {member.filename[:60]!r} ... lies in {len(path.parts):,} "
            f"folders; expected {_MOST_NESTED} at most."
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise RegraftError(f"{archive}: the entry {member.filename!r} is a link; expected files.")
    if member.flag_bits & 1:
        raise RegraftError(f"{archive}: the entry {member.filename!r} needs a password.")


def cache_folder() -> Path:
    """REGRAFT_CACHE, else `regraft` in the place where this system keeps caches."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"


def cached_file(content: bytes, suffix: str) -> Path:
    """A file with this content, named after its digest; it is written once."""
    name = hashlib.sha256(content).hexdigest()[:32]
    path = image_cache() / f"{name}{suffix}"

    def whole() -> bool:
        return path.is_file() and path.stat().st_size == len(content)

    if not whole():
        with one_writer(path.parent):
            if not whole():
                with atomic_file(path) as temporary:
                    temporary.write_bytes(content)
                _written.append(path)
    return path


def cached_image(content: bytes) -> Path:
    """A file with the bytes of an image, see `cached_file`."""
    return cached_file(content, ".png" if content.startswith(b"\x89PNG") else ".jpg")


def image_cache() -> Path:
    """The folder in which images of cells lie, under names that `CACHED_IMAGE` matches."""
    return cache_folder() / "images"


@contextmanager
def kept_if_read() -> Iterator[None]:
    """Take out of the cache again what the block put there, if it ends with bad input."""
    before = len(_written)
    try:
        yield
    except PassingError:
        raise
    except RegraftError:
        for path in _written[before:]:
            if path.is_dir():  # at once for others, who take a folder that is there for whole
                gone = path.with_name(f".{path.name}-{os.getpid()}")
                path.replace(gone)
                shutil.rmtree(gone, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        del _written[before:]


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Write into a folder of the cache, which is made, while other processes wait."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / ".lock"
        lock.touch()
    with locked(lock, folder, wait=True):
        yield
