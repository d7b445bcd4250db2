"""Copy a checkpoint with some tensors changed.

Shards are copied and the bytes of single tensors overwritten, so that everything else (other
tensors, their order, dtypes, shard sizes, metadata) stays the same to the byte. Weights are checked
while they are copied, so they are read only once.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from regraft.disk.artifact import require_finite
from regraft.disk.files import (
    atomic_folder,
    in_threads,
    leftover_bytes,
    read_at,
    require_new,
    require_space,
    write_all,
)
from regraft.disk.parsing import read_json
from regraft.disk.paths import real
from regraft.errors import PassingError, RegraftError
from regraft.models.checkpoint import (
    FLOATS,
    OTHER_WEIGHTS,
    Checkpoint,
    open_checkpoint,
    read_tensor,
)
from regraft.progress import Advance, thread_safe

Edit = Callable[[Tensor], Tensor]
EditShard = Callable[[Path], None]
Unbounded = Callable[[str], bool]
"""Whether the tensor of this name may hold infinity."""
_CHUNK = 2**20  # bytes read at a time; they fit in a core's own cache


def write_edited(
    source: Checkpoint,
    target: Path,
    edits: Mapping[str, Edit],
    *,
    files: Mapping[str, str] | None = None,
    advance: Advance = lambda _: None,
    unbounded: Unbounded = lambda _: False,
) -> Checkpoint:
    """Copy a checkpoint folder to `target` atomically, replacing single tensors.

    Config, processor, tokenizer and chat template files are copied unchanged, except that a
    `sparsity_config` in config.json is dropped (zeros are saved densely and serving engines
    reject it); weights in other formats are left out.

    Args:
        target: The new folder; must be absent or empty.
        edits: Tensor name on disk -> function from the tensor (its own dtype, CPU) to its
            replacement, of the same shape and dtype. One tensor is in memory at a time.
        files: Extra text files to write into the folder, name -> content.
        advance: Called with the number of bytes just copied.
        unbounded: Which tensors may hold infinity.

    Raises:
        RegraftError: `target` is not empty, the disk is full, an edit names a tensor that does not
            exist, or a tensor of `source` holds NaN or infinity.
    """
    for name in edits:
        source.record(name)

    def edit(path: Path) -> None:
        touched = [source.tensors[n] for n in edits if source.tensors[n].shard == path.name]
        with path.open("r+b") as handle:
            for record in sorted(touched, key=lambda r: r.start):
                handle.seek(record.start)
                before = read_tensor(handle, record)
                after = edits[record.name](before)
                if after.shape != before.shape or after.dtype != before.dtype:
                    raise ValueError(f"{record.name}: an edit changed shape or dtype")
                handle.seek(record.start)
                handle.write(after.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write_copy(
        source, target, edit, files=files, advance=advance, unbounded=unbounded, one_by_one=True
    )


def write_copy(
    source: Checkpoint,
    target: Path,
    edit_shard: EditShard,
    *,
    files: Mapping[str, str] | None = None,
    advance: Advance = lambda _: None,
    unbounded: Unbounded = lambda _: False,
    one_by_one: bool = False,
) -> Checkpoint:
    """Copy a checkpoint folder as `write_edited` does, editing whole shards.

    `edit_shard` is called with the path of each shard's copy, in several threads unless shards are
    copied `one_by_one`.

    Raises:
        RegraftError: `target` is not empty, the disk is full, a tensor of `source` holds NaN or
            infinity, or `source` changed during the copy.
    """
    check_target(source, target)
    stamps = source.stamps()
    with atomic_folder(target) as temporary:
        _copy_side_files(source, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        stop = Event()
        advance = thread_safe(advance, stop)

        def copy(shard: str) -> None:
            with (temporary / shard).open("wb", buffering=0) as writer:
                for piece in _read_checked(source, shard, unbounded):
                    write_all(writer, piece)
                    advance(len(piece))
            edit_shard(temporary / shard)

        if one_by_one:
            for shard in source.shards:
                copy(shard)
        else:
            in_threads(copy, source.shards, stop)
        if source.stamps() != stamps:
            raise PassingError(
                f"{source.folder} changed while it was copied. Run the same command again when "
                "nothing else writes there."
            )
    return open_checkpoint(target)


def check_target(source: Checkpoint, target: Path) -> None:
    """Check that a copy of `source` can be written to `target`; writes and removes nothing.

    Raises:
        RegraftError: `target` is not a new folder or is inside `source`, or the disk is too full.
    """
    require_new(target)
    if real(target).is_relative_to(real(source.folder)):
        raise RegraftError(
            f"The output folder {target} is inside the checkpoint {source.folder}. "
            "Choose a folder outside it."
        )
    needed = source.bytes + sum(path.stat().st_size for path in _side_files(source))
    require_space(target, needed - leftover_bytes(target))


def _read_checked(source: Checkpoint, shard: str, unbounded: Unbounded) -> Iterator[memoryview]:
    """Yield all bytes of a shard in order, through one buffer, after checking them.

    Raises:
        RegraftError: a float tensor holds NaN, or infinity without being `unbounded`.
    """
    path = source.folder / shard
    records = [one for one in source.tensors.values() if one.shard == shard]
    header = min((one.start for one in records), default=path.stat().st_size)
    buffer = torch.empty(_CHUNK, dtype=torch.uint8)
    with path.open("rb", buffering=0) as handle:
        for piece in _cut(0, header):
            yield _fill(buffer, handle, piece)
        for record in sorted(records, key=lambda one: one.start):
            for piece in _cut(record.start, record.stop):
                content = _fill(buffer, handle, piece)
                if record.dtype in FLOATS:
                    part = buffer[: len(piece)].view(record.torch_dtype)
                    require_finite(source.folder, {record.name: part}, unbounded=unbounded)
                yield content


def check_all_weights(source: Checkpoint, unbounded: Unbounded, advance: Advance) -> None:
    """Read a checkpoint and check its weights for NaN and infinity, as a copy does.

    `advance` is called with the number of bytes just read.

    Raises:
        RegraftError: a float tensor holds NaN, or infinity without being `unbounded`.
    """
    stop = Event()
    advance = thread_safe(advance, stop)

    def check(shard: str) -> None:
        for piece in _read_checked(source, shard, unbounded):
            advance(len(piece))

    in_threads(check, source.shards, stop)


def _cut(start: int, stop: int) -> Iterator[range]:
    return (range(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK))


def _fill(buffer: Tensor, handle: io.FileIO, piece: range) -> memoryview:
    """Read a range of bytes of a file into the buffer."""
    content = buffer[: len(piece)].numpy().data
    read_at(handle, piece.start, content)
    return content


def _copy_side_files(source: Checkpoint, target: Path) -> None:
    for path in _side_files(source):
        relative = path.relative_to(source.folder)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        if str(relative) == "config.json":
            _copy_config(path, target / relative)
        else:
            shutil.copyfile(path, target / relative)


def _side_files(source: Checkpoint) -> Iterator[Path]:
    """Files of a model's folder to copy besides its weights."""
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        weight_name = Path(path.name.removesuffix(".index.json"))
        in_other_format = relative.parts[0] == "original" or weight_name.suffix in OTHER_WEIGHTS
        is_weight = path.suffix == ".safetensors" or relative.name in source.shards
        if path.is_file() and not (hidden or in_other_format or is_weight):
            yield path


def _copy_config(source: Path, target: Path) -> None:
    config = read_json(source, lenient=True)
    if not isinstance(config, dict):
        raise RegraftError(f"{source}: expected a JSON object with settings.")
    dense = {key: value for key, value in config.items() if key != "sparsity_config"}
    quantization = dense.get("quantization_config")
    if isinstance(quantization, dict) and "sparsity_config" in quantization:
        rest = {k: v for k, v in quantization.items() if k != "sparsity_config"}
        if rest.get("config_groups"):
            dense["quantization_config"] = rest
        else:
            del dense["quantization_config"]
    if dense == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(dense, indent=2) + "\n", encoding="utf-8")
