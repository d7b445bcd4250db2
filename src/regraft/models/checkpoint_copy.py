"""A copy of a checkpoint in which some tensors differ.

Shards are copied and the bytes of single tensors overwritten, so that everything else (other
tensors, their order, dtypes, shard sizes, metadata) is kept to the byte. What is copied is checked
on the way, so that it is read once.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event, Lock

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
from regraft.errors import PassingError, RegraftError
from regraft.models.checkpoint import (
    FLOATS,
    OTHER_WEIGHTS,
    Checkpoint,
    open_checkpoint,
    read_tensor,
)
from regraft.progress import Advance

Edit = Callable[[Tensor], Tensor]
EditShard = Callable[[Path], None]
Unbounded = Callable[[str], bool]
"""Whether a tensor, by its name, may hold infinity."""
_CHUNK = 2**20  # bytes read at a time, which a core's own cache holds


def write_edited(
    source: Checkpoint,
    target: Path,
    edits: Mapping[str, Edit],
    *,
    files: Mapping[str, str] | None = None,
    advance: Advance = lambda _: None,
    unbounded: Unbounded = lambda _: False,
) -> Checkpoint:
    """Copy a checkpoint folder to `target`, replacing single tensors, in one atomic step.

    Config, processor, tokenizer and chat template files are copied as they are; a
    `sparsity_config` in config.json is dropped (zeros are saved densely and serving engines
    reject it); weights in other formats are left out.

    Args:
        source: The checkpoint to copy.
        target: The new folder; must be absent or empty.
        edits: Tensor name on disk -> function from the tensor (its own dtype, CPU) to its
            replacement, of the same shape and dtype. One tensor is in memory at a time.
        files: Extra text files to write into the folder, name -> content.
        advance: Called with the number of bytes just copied.
        unbounded: Of which tensors infinity is copied.

    Raises:
        RegraftError: `target` is not empty, the disk is full, an edit names no tensor, or a tensor
            of `source` holds NaN or infinity.
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
    """Copy a checkpoint folder as `write_edited` does, with any edit of its shards.

    `edit_shard` is called with the path of each shard's copy, in several threads unless shards are
    copied `one_by_one`.

    Raises:
        RegraftError: `target` is not empty, the disk is full, a tensor of `source` holds NaN or
            infinity, or the source changed meanwhile.
    """
    check_target(source, target)
    stamps = source.stamps()
    with atomic_folder(target) as temporary:
        _copy_side_files(source, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        stop = Event()
        advance = _one_at_a_time(advance, stop)

        def copy(shard: str) -> None:
            with (temporary / shard).open("wb", buffering=0) as writer:
                for piece in checked(source, shard, unbounded):
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
                f"{source.folder} was changed while it was copied. Run the same command again when "
                "nothing else writes there."
            )
    return open_checkpoint(target)


def check_target(source: Checkpoint, target: Path) -> None:
    """Check that a copy of `source` can be written to `target`; writes and removes nothing.

    Raises:
        RegraftError: `target` is no new folder, lies inside `source`, or the disk is too full.
    """
    require_new(target)
    if target.resolve().is_relative_to(source.folder.resolve()):
        raise RegraftError(
            f"The output folder {target} is inside the checkpoint {source.folder}. "
            "Choose a folder outside it."
        )
    needed = source.bytes + sum(path.stat().st_size for path in _side_files(source))
    require_space(target, needed - leftover_bytes(target))


def checked(
    source: Checkpoint, shard: str, unbounded: Unbounded = lambda _: False
) -> Iterator[memoryview]:
    """Read all bytes of a shard in order, through one buffer, and check them on the way.

    Raises:
        RegraftError: a tensor of floats holds NaN, or infinity and is not `unbounded`.
    """
    path = source.folder / shard
    records = [one for one in source.tensors.values() if one.shard == shard]
    header = min((one.start for one in records), default=path.stat().st_size)
    buffer = torch.empty(_CHUNK, dtype=torch.uint8)
    with path.open("rb", buffering=0) as handle:
        for piece in _cut(0, header):
            yield _filled(buffer, handle, piece)
        for record in sorted(records, key=lambda one: one.start):
            for piece in _cut(record.start, record.stop):
                content = _filled(buffer, handle, piece)
                if record.dtype in FLOATS:
                    part = buffer[: len(piece)].view(record.torch_dtype)
                    require_finite(source.folder, {record.name: part}, unbounded=unbounded)
                yield content


def check_all_weights(source: Checkpoint, unbounded: Unbounded, advance: Advance) -> None:
    """Read all weights of a checkpoint as `checked` does; `advance` is told the bytes."""
    stop = Event()
    advance = _one_at_a_time(advance, stop)

    def check(shard: str) -> None:
        for piece in checked(source, shard, unbounded):
            advance(len(piece))

    in_threads(check, source.shards, stop)


def _cut(start: int, stop: int) -> Iterator[range]:
    return (range(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK))


def _filled(buffer: Tensor, handle: io.FileIO, piece: range) -> memoryview:
    """A piece of a file, in the buffer."""
    content = buffer[: len(piece)].numpy().data
    read_at(handle, piece.start, content)
    return content


def _one_at_a_time(advance: Advance, stop: Event) -> Advance:
    """`advance` for several threads, one of them at a time; an error once `stop` is set."""
    lock = Lock()

    def locked(count: int) -> None:
        with lock:
            if stop.is_set():
                raise InterruptedError
            advance(count)

    return locked


def _copy_side_files(source: Checkpoint, target: Path) -> None:
    for path in _side_files(source):
        relative = path.relative_to(source.folder)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        if str(relative) == "config.json":
            _copy_config(path, target / relative)
        else:
            shutil.copyfile(path, target / relative)


def _side_files(source: Checkpoint) -> Iterator[Path]:
    """What is copied of a model's folder besides its weights."""
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
        left = {k: v for k, v in quantization.items() if k != "sparsity_config"}
        if left.get("config_groups"):
            dense["quantization_config"] = left
        else:
            del dense["quantization_config"]
    if dense == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(dense, indent=2) + "\n", encoding="utf-8")
