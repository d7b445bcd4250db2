"""Parquet tables, the hub's format of data sets: rows of Python values, images in cells as files.

An image is the struct of `bytes` and `path` that the `datasets` library writes, or plain bytes that
begin as images do. It is written to the cache under the digest of its bytes; the path in the cell
is never written to. Other plain bytes are text that older programs wrote without its type.
A file named SPLIT-00000-of-00002.parquet stands for all files of its split.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from regraft.data.storage import cached_image
from regraft.disk.paths import require_file
from regraft.errors import RegraftError

SUFFIX = ".parquet"
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.parquet")
_OTHER = {".csv", ".tsv", ".json", ".jsonl", ".txt", ".zip"}  # data in other formats
_NO_DATA = {"dataset_infos.json", "requirements.txt"}
_MOST_ROWS = 2**22  # of a table, whose rows are all kept in memory
_MOST_CELL = 256 * 2**20  # bytes
_MOST_COLUMN = 2**30  # bytes of a column in the rows that are decoded at a time
_MOST_TEXT = 2**25  # characters
# limits on the bytes of a table's values, which are all kept in memory: for the smallest files, per
# byte on disk, and for any
_SMALL, _RATIO, _LARGE = 2**26, 100, 2**32
_AT_ONCE = 16  # rows decoded at a time
_IMAGE = {"bytes", "path"}
_IMAGE_STARTS = re.compile(  # of PNG, JPEG, GIF, WebP, BMP, TIFF, JPEG 2000, AVIF and HEIF
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|\0{3}\x0cjP|\0{3}.ftyp",
    re.DOTALL,
)
_SHOWN = 6


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def records(path: Path, what: str, *, as_text: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a table, all its shards, a few at a time.

    Args:
        path: The file, or any shard.
        what: What it should be, for the error where it is missing.
        as_text: Convert every value to text as in a CSV: "" for null, JSON for lists and structs,
            base64 for images. Otherwise nulls are left out, and images become names of files in
            the cache, which `locate_images` finds. Bytes that are neither image nor text stay
            bytes, which `Row` refuses where they are read.

    Yields:
        (where the row is, for messages; its values by column).

    Raises:
        RegraftError: a file or pyarrow is missing, or a file is damaged, incomplete or too large.
    """
    rows = size = 0
    files = shards(path, what)
    most = min(_LARGE, max(_SMALL, _RATIO * sum(file.stat().st_size for file in files)))
    for file in files:
        for number, cells in enumerate(_rows(file), start=1):
            rows += 1
            if rows > _MOST_ROWS:
                raise RegraftError(f"{path} has more than {_MOST_ROWS:,} rows. Split it.")
            where = f"{file}, row {number}"
            convert = _text if as_text else _plain
            values = {name: convert(where, name, cell) for name, cell in cells.items()}
            size += _size(values)
            if size > most:
                raise RegraftError(
                    f"{where}: the values of the table exceed {most:,} bytes by this row, "
                    "more than any data set of this size on disk. Do not use it, or split it."
                )
            yield where, {name: value for name, value in values.items() if value is not None}


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return 8 * len(value) + sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8


def shards(path: Path, what: str) -> list[Path]:
    """All files of the table that a file belongs to, in order."""
    require_file(path, what)
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = (f"{match['split']}-{i:05}-of-{count:05}{SUFFIX}" for i in range(count))
    files = [path.with_name(name) for name in names]
    if path not in files:
        raise RegraftError(
            f"{path}: its number is beyond the {len(files)} files that its name counts. {what}"
        )
    if missing := [file for file in files if not file.is_file()]:
        raise RegraftError(
            f"{missing[0]} is missing, one of the {len(files)} files of its table "
            f"({len(missing)} missing). Put all of them into one folder."
        )
    return files


def table_in(folder: Path, split: str | None) -> Path | None:
    """Find a file of a folder's only table, or of the table of `split`.

    The split is the beginning of the file's name, as in data/train-00000-of-00002.parquet.

    Returns:
        None where the folder holds no table, or other data too.

    Raises:
        RegraftError: no table, or several, fit.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob(f"*{SUFFIX}"))
    if not files or any(
        path.suffix.lower() in _OTHER and path.name not in _NO_DATA for path in folder.rglob("*")
    ):
        return None
    tables: dict[str, Path] = {}
    for path in files:
        match = _SHARD.fullmatch(path.name)
        name = match["split"] if match else path.stem
        tables.setdefault((path.parent / name).as_posix(), folder / path)
    fitting = [n for n in tables if split is None or n.rpartition("/")[2] == split]
    if len(fitting) == 1:
        return tables[fitting[0]]
    listed = ", ".join(list(tables)[:_SHOWN]) + (", ..." if len(tables) > _SHOWN else "")
    wanted = "choose one" if split is None else f"split {split!r} fits {len(fitting)} of them"
    example = tables[(fitting or list(tables))[0]]
    raise RegraftError(
        f"{folder} holds the tables {listed}; {wanted}. Name a file, such as {example}, or, if "
        "the data set has splits, a split, as in PATH#train."
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read a file's rows; any error of pyarrow's for a damaged file becomes a `RegraftError`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RegraftError(
            f"{file} is a Parquet file, which needs pyarrow: pip install 'regraft[parquet]'."
        ) from error
    damaged = (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError, MemoryError)
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            names = Counter(table.schema_arrow.names)
            if table.metadata.num_rows > _MOST_ROWS:
                raise RegraftError(f"{file} has more than {_MOST_ROWS:,} rows. Split it.")
            if twice := [name for name, count in names.items() if count > 1]:
                raise RegraftError(f"{file} has two columns {twice[0]!r}.")
            for batch in table.iter_batches(batch_size=_AT_ONCE, use_threads=False):
                columns = {name: _values(file, name, batch.column(name)) for name in names}
                for row in range(batch.num_rows):
                    yield {name: values[row] for name, values in columns.items()}
    except damaged as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RegraftError(
            f"{file} is not a complete, readable Parquet file: {reason[:300]} Get it again."
        ) from error


def _values(file: Path, name: str, column: Any) -> list[Any]:
    """The values of a column; as text where Python has no such type (nanoseconds, lost zones)."""
    import pyarrow as pa

    _require_small(file, name, column)
    wrong = (pa.ArrowException, ValueError, OverflowError, LookupError)
    try:
        return list(column.to_pylist())
    except wrong as error:
        reason = " ".join(str(error).split())[:200]
    try:
        if pa.types.is_timestamp(column.type):  # in UTC, since the zone may be unknown
            column = column.cast(pa.timestamp(column.type.unit))
        return list(column.cast(pa.string()).to_pylist())
    except wrong as error:
        raise RegraftError(
            f"{file}: the column {name!r} ({column.type}) cannot be read: {reason}. Leave it out "
            "of the table, or write it as text."
        ) from error


def _require_small(file: Path, name: str, column: Any) -> None:
    """Raise where a few rows of a column would fill the memory as Python objects."""
    import pyarrow as pa

    size, most, unit = column.nbytes, _MOST_COLUMN, "bytes"
    while size <= most and (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        column = column.flatten()
        size, most, unit = len(column), _MOST_ROWS, "elements of lists"
    if size > most:
        raise RegraftError(
            f"{file}: the column {name!r} holds {size:,} {unit} in {_AT_ONCE} rows; at most "
            f"{most:,} are read."
        )


def _plain(where: str, name: str, value: Any) -> Any:
    image = _image(where, name, value)
    if image is not None:
        return cached_image(image).name
    if isinstance(value, dict):
        if value.keys() == _IMAGE:  # an image beside the table, without its bytes
            return value["path"]
        return {key: _plain(where, name, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(where, name, one) for one in value]
    return _decoded(where, name, value)


def _text(where: str, name: str, value: Any) -> str | bytes:
    image = _image(where, name, value)
    if image is not None:
        return base64.b64encode(image).decode()
    value = _decoded(where, name, value)
    if value is None or isinstance(value, str | bytes):
        return value or ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=_shown)
    return str(value)


def _shown(value: object) -> str:
    """Text for a value inside a list that JSON has no type for."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _image(where: str, name: str, value: Any) -> bytes | None:
    """The bytes of an image; None for anything else."""
    if isinstance(value, Mapping) and value.keys() == _IMAGE:
        value = value["bytes"]
    elif not (isinstance(value, bytes) and _IMAGE_STARTS.match(value)):
        return None
    if not isinstance(value, bytes):
        return None
    if len(value) > _MOST_CELL:
        raise _too_long(where, name, f"{len(value):,} bytes; at most {_MOST_CELL:,}")
    return value


def _decoded(where: str, name: str, value: Any) -> Any:
    """Decode bytes that are valid text; return everything else as it is."""
    if isinstance(value, str | bytes) and len(value) > _MOST_TEXT:
        raise _too_long(where, name, f"a text of {len(value):,} characters; at most {_MOST_TEXT:,}")
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _too_long(where: str, name: str, found: str) -> RegraftError:
    return RegraftError(f"{where}: the field {name!r} holds {found} are read.")
