"""Zip archives of data sets, unpacked once into the user's cache folder, and never beyond it."""

from __future__ import annotations

import errno
import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from regraft.data.cache import cache_folder, one_writer
from regraft.errors import RegraftError
from regraft.files import atomic_folder, digest, require_space


def unpacked(archive: Path) -> Path:
    """The folder with what is in `archive`; it is unpacked the first time.

    Raises:
        RegraftError: it is no whole zip file, has a password, a link, or a path that leaves the
            folder, or the disk is too full.
    """
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
            with one_writer(folder.parent):
                if folder.is_dir():  # by the process that this one waited for
                    return folder
                require_space(folder.parent, sum(member.file_size for member in members))
                with atomic_folder(folder) as temporary:
                    for member in members:
                        _extract(content, member, temporary)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
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
    if stat.S_ISLNK(member.external_attr >> 16):
        raise RegraftError(f"{archive}: the entry {member.filename!r} is a link; expected files.")
    if member.flag_bits & 1:
        raise RegraftError(f"{archive}: the entry {member.filename!r} needs a password.")
