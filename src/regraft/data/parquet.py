"""Tables in Parquet, as the hub keeps data sets: rows of Python values, images in cells as files.

An image is the struct of `bytes` and `path` that the `datasets` library writes, or plain bytes. It
is written to the cache under the digest of its bytes; the path in the cell is never written to.
A file named SPLIT-00000-of-00002.parquet stands for all files of its split.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.data.storage import cached_image
from regraft.errors import RegraftError

SUFFIX = ".parquet"
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")
_OTHERS = {".csv", ".tsv", ".json", ".jsonl", ".txt", ".zip"}  # a data set of another form
_NO_DATA = {"dataset_infos.json", "requirements.txt"}
_ROWS = 2**22  # most rows of a table: all of them are kept in memory
_CELL = 256 * 2**20  # most bytes in a cell
_AT_ONCE = 16  # rows decoded at a time
_IMAGE = {"bytes", "path"}
_SHOWN = 6


def is_parquet(path: Path) -> bool:
    """Whether a path names a table in Parquet."""
    return path.suffix.lower() == SUFFIX


def records(path: Path, what: str, *, as_text: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, all shards of it, read piece by piece.

    Args:
        path: The file, or any shard.
        what: What it should be, for the error where it is missing.
        as_text: Every value as text, as it would stand in a CSV: "" for null, JSON for lists and
            structs, base64 for bytes and images. Otherwise nulls are left out, and bytes and images
            are names of files in the cache, which `locate_images` finds.

    Yields:
        (where the row is, for messages; its values by column).

    Raises:
        RegraftError: a file or pyarrow is missing, it is no whole Parquet file, or too large.
    """
    count = 0
    for file in shards(path, what):
        for number, values in enumerate(_rows(file), start=1):
            count += 1
            if count > _ROWS:
                raise RegraftError(f"{path} has more than {_ROWS:,} rows. Split it.")
            where = f"{file}, row {number}"
            if as_text:
                yield where, {name: _text(where, name, one) for name, one in values.items()}
            else:
                plain = {name: _plain(where, name, one) for name, one in values.items()}
                yield where, {name: one for name, one in plain.items() if one is not None}


def shards(path: Path, what: str) -> list[Path]:
    """All files of the table that a file belongs to, in order.

    Raises:
        RegraftError: one is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        files = [path]
    else:
        count = int(match["count"])
        names = (f"{match['split']}-{i:05}-of-{count:05}{SUFFIX}" for i in range(count))
        files = [path.with_name(name) for name in names]
    if not path.is_file() or path not in files:
        raise RegraftError(f"{path} does not exist. {what}")
    if missing := [file for file in files if not file.is_file()]:
        raise RegraftError(
            f"{missing[0]} is missing, one of the {len(files)} files of a table "
            f"({len(missing)} missing). Put all of them into one folder."
        )
    return files


def table_in(folder: Path, split: str | None) -> Path | None:
    """Of a folder that holds tables and no other data: a file of its only table, or of the split.

    The split is what the name begins with, as in data/train-00000-of-00002.parquet.

    Returns:
        None where the folder holds something else.

    Raises:
        RegraftError: no table, or several, fit.
    """
    found = sorted(path.relative_to(folder) for path in folder.rglob(f"*{SUFFIX}"))
    if not found or any(
        path.suffix.lower() in _OTHERS and path.name not in _NO_DATA for path in folder.rglob("*")
    ):
        return None
    tables: dict[str, Path] = {}
    for path in found:
        match = _SHARD.fullmatch(path.name)
        name = match["split"] if match else path.stem
        tables.setdefault((path.parent / name).as_posix(), folder / path)
    fitting = [n for n in tables if split is None or n.rpartition("/")[2] == split]
    if len(fitting) == 1:
        return tables[fitting[0]]
    listed = ", ".join(list(tables)[:_SHOWN]) + (", ..." if len(tables) > _SHOWN else "")
    wanted = "one of them is needed" if split is None else f"split {split!r} fits {len(fitting)}"
    example = tables[(fitting or list(tables))[0]]
    raise RegraftError(
        f"{folder} holds the tables {listed}; {wanted}. Name a file, such as {example}, or where "
        "the data set has splits of its own a split, as in PATH#train."
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """A file's rows; whatever pyarrow makes of a damaged one becomes a `RegraftError`."""
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
            if table.metadata.num_rows > _ROWS:
                raise RegraftError(f"{file} has more than {_ROWS:,} rows. Split it.")
            if twice := [name for name, count in names.items() if count > 1]:
                raise RegraftError(f"{file} has two columns {twice[0]!r}.")
            for batch in table.iter_batches(batch_size=_AT_ONCE, use_threads=False):
                yield from batch.to_pylist()
    except damaged as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RegraftError(
            f"{file} is no whole Parquet file that can be read: {reason[:300]} Get it again."
        ) from error


def _plain(where: str, name: str, value: Any) -> Any:
    content = _content(where, name, value)
    if content is not None:
        return cached_image(content).name
    if isinstance(value, dict):
        if value.keys() == _IMAGE:  # an image beside the table, without its bytes
            return value["path"]
        return {key: _plain(where, name, one) for key, one in value.items()}
    return [_plain(where, name, one) for one in value] if isinstance(value, list) else value


def _text(where: str, name: str, value: Any) -> str:
    content = _content(where, name, value)
    if content is not None:
        return base64.b64encode(content).decode()
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _content(where: str, name: str, value: Any) -> bytes | None:
    """The bytes of an image, None of anything else."""
    if isinstance(value, Mapping) and value.keys() == _IMAGE:
        value = value["bytes"]
    if not isinstance(value, bytes):
        return None
    if len(value) > _CELL:
        raise RegraftError(
            f"{where}: the field {name!r} holds {len(value):,} bytes; at most {_CELL:,} are read."
        )
    return value
