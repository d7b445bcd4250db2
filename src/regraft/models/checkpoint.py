"""A checkpoint on disk: names, shards and bytes. Knows safetensors but not models.

Headers are parsed here because `safetensors.safe_open` does not give the byte range of a tensor,
which is needed to overwrite it in place.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from io import BufferedRandom, BufferedReader
from pathlib import Path
from threading import Event

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from regraft.disk.files import digest, file_digest, in_threads
from regraft.disk.parsing import from_json, json_object, read_json, shown
from regraft.disk.paths import is_name, require_file, within
from regraft.errors import RegraftError
from regraft.models.places import Place
from regraft.progress import Advance, Progress, thread_safe

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")  # dtypes of weights that are not quantised
_OUTLINE_BYTES = 4096  # of each tensor in `Checkpoint.outline`
_LARGE = 2**30  # bytes; less is read in about a second
_SAMPLE = 1024  # elements in `Checkpoint.sample`
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite"}
SETTINGS_FILES = (".json", ".jinja", ".txt", ".model", ".py")
_MOST_SETTINGS = 2**30  # bytes
_MOST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
_AGAIN = "Download or export the file again."
_LFS_POINTER = b"version https://git-lfs"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def bits(tensor: Tensor) -> Tensor:
    """View floats as integers, for bitwise comparison including NaN and -0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor is: `shard` file name, byte range [start, stop) in it, dtype, shape."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in _DTYPES:
            raise RegraftError(
                f"{self.shard}: the tensor {self.name} is stored as {self.dtype}, which is not "
                f"supported; expected one of {', '.join(_DTYPES)}."
            )
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards whose headers have been read and checked."""

    folder: Path
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorRecord]

    def read(self, name: str) -> Tensor:
        """Read one tensor in its own dtype, on CPU."""
        record = self.record(name)
        return self._elements(record, 0, math.prod(record.shape)).view(record.shape)

    def matrix(self, name: str, place: Place | None, shape: tuple[int, int]) -> Tensor:
        """Read the matrix at `place` in one tensor (None: all of it), contiguous, in its dtype."""
        if place is None:
            return self.read(name)
        part = self._elements(self.record(name), place.first, place.stop(shape) - place.first)
        return replace(place, first=0).view(part, shape).contiguous()

    def sample(self, name: str) -> Tensor:
        """Read at most 1024 elements from the middle of one tensor, flat, in its own dtype."""
        record = self.record(name)
        elements = record.bytes // record.torch_dtype.itemsize
        count = min(elements, _SAMPLE)
        return self._elements(record, (elements - count) // 2, count)

    def _elements(self, record: TensorRecord, first: int, count: int) -> Tensor:
        """Read `count` elements of a tensor from element `first` on, flat."""
        size = record.torch_dtype.itemsize
        with (self.folder / record.shard).open("rb") as handle:
            handle.seek(record.start + first * size)
            return read_tensor(handle, replace(record, shape=(count,)))

    def record(self, name: str) -> TensorRecord:
        """Look up a tensor by its name on disk."""
        try:
            return self.tensors[name]
        except KeyError:
            raise RegraftError(f"{self.folder}: there is no tensor {name}.") from None

    def stamps(self) -> list[tuple[int, int]]:
        """Time of the last change (ns) and size of every shard."""
        stats = [(self.folder / shard).stat() for shard in self.shards]
        return [(stat.st_mtime_ns, stat.st_size) for stat in stats]

    @property
    def bytes(self) -> int:
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes of all shards and settings files, 64 hex digits."""
        return self._digest(lambda _: None)

    def fingerprint_shown(self, progress: Progress) -> str:
        """`fingerprint`, with progress if it is not known yet and the checkpoint is large."""
        known = vars(self)
        if "fingerprint" not in known and self.bytes >= _LARGE:
            with progress.task(f"Reading {self.folder}", self.bytes, "bytes") as done:
                known["fingerprint"] = self._digest(done)
        return self.fingerprint

    def _digest(self, advance: Advance) -> str:
        settings = {path.name: file_digest(path) for path in self._settings()}
        stop = Event()
        advance = thread_safe(advance, stop)
        shards = in_threads(lambda one: file_digest(self.folder / one, advance), self.shards, stop)
        return digest(*self.shards, *settings, *shards, *settings.values())

    def outline(self, without: Container[str] = ()) -> str:
        """A cheap fingerprint that does not read all weights: SHA-256, 64 hex digits.

        It covers each tensor's record and first 4 KiB, and the settings files. Checkpoints of one
        layout that differ only further inside their tensors have the same outline. `without` names
        tensors and files whose content is ignored.
        """
        parts: list[bytes | str | memoryview] = []
        for shard in self.shards:
            with (self.folder / shard).open("rb") as handle:
                for name, record in sorted(self.tensors.items()):
                    if record.shard == shard:
                        parts.append(repr(record))
                        handle.seek(record.start)
                        size = 0 if name in without else record.bytes
                        parts.append(handle.read(min(size, _OUTLINE_BYTES)))
        for path in self._settings():
            if path.name not in without:
                parts += [path.name, file_digest(path)]
        return digest(*parts)

    def _settings(self) -> list[Path]:
        """Config, tokenizer, processor and template files."""
        files = sorted(self.folder.iterdir())
        found = [path for path in files if path.suffix in SETTINGS_FILES and path.is_file()]
        for path in found:
            if (size := path.stat().st_size) > _MOST_SETTINGS:
                raise RegraftError(
                    f"{path} has {size:,} bytes; expected at most {_MOST_SETTINGS:,} for such a "
                    "file of a model."
                )
        return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of safetensors and check it without reading tensors.

    Raises:
        RegraftError: the folder, a shard or the index is missing, a shard is truncated or not
            safetensors, a tensor's byte range does not fit its shape and dtype, index and shards
            disagree, or the folder holds pickled weights only.
    """
    if folder.is_file():
        raise RegraftError(
            f"{folder} is a file, and a model is a folder with config.json and safetensors. "
            "Models come first on the command line, patches and statistics after them."
        )
    if not folder.is_dir():
        raise RegraftError(
            f"The model folder {folder} does not exist. A folder on disk is needed here, with "
            "config.json and safetensors, not a hub id or the word demo. `hf download ID` prints "
            "the folder of a model from the hub."
        )
    _require_within(folder)
    index = folder / INDEX_FILE
    listed = _read_index(folder)
    shards = tuple(sorted(set(listed.values()))) or (SINGLE_FILE,)
    tensors: dict[str, TensorRecord] = {}
    for shard in shards:
        for record in _read_header(folder / shard):
            if record.name in tensors:
                raise RegraftError(f"{folder}: tensor {record.name} is in two shards.")
            tensors[record.name] = record
    for name, shard in listed.items():
        if name not in tensors or tensors[name].shard != shard:
            raise RegraftError(
                f"{index} lists tensor {name!r} in {shard}, but it is not in that file. "
                "Download or export the checkpoint again."
            )
    return Checkpoint(folder, shards, tensors)


def _require_within(folder: Path) -> None:
    """Raise if a file is a link out of the model's folder: a copy would include its target.

    The hub's own links, from a snapshot to the blobs beside it, are allowed.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not within(path, folder):
            raise RegraftError(
                f"{path} is a link out of the model folder, to {path.readlink()}, and such links "
                "are not followed. Put the file itself there."
            )


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> shard as the index has it, all shards existing; empty for a single weights file."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() or single.is_symlink():  # not a regular file: an error when it is read
        return {}
    if not (index.exists() or index.is_symlink()):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_WEIGHTS)
        if others:
            raise RegraftError(
                f"{folder} holds weights only as {others[0]}. regraft reads safetensors and never "
                "unpickles: load the model once with transformers and save_pretrained() it."
            )
        raise RegraftError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: it is not a model folder."
        )
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RegraftError(f"{index}: field weight_map is missing or empty.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_name(shard):
            raise RegraftError(
                f"{index}: the shard of {name!r} in weight_map is {shown(shard)}; expected the "
                "name of a file in the folder."
            )
    first = {shard: name for name, shard in reversed(weight_map.items())}
    for shard, name in first.items():
        if not (folder / shard).is_file():
            raise RegraftError(
                f"{folder}: shard {shard}, listed in {INDEX_FILE} for {name!r}, is missing."
            )
    if not isinstance(content.get("metadata"), dict):  # transformers requires it
        raise RegraftError(f"{index}: field metadata is missing or not a JSON object.")
    return weight_map


@dataclass(frozen=True)
class _Entry:
    """A tensor in a header; `data_offsets` are its first byte and one past its last."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


def _read_header(path: Path) -> Iterator[TensorRecord]:
    size = require_file(path)
    with path.open("rb") as handle:
        first = handle.read(8)
        if first == _LFS_POINTER[:8] and first + handle.read(15) == _LFS_POINTER:
            raise RegraftError(f"{path} is only a Git LFS pointer. Run `git lfs pull` there.")
        handle.seek(8)
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise RegraftError(f"{path} is truncated or not safetensors ({size} bytes). {_AGAIN}")
        where = f"{path} is damaged, download or export it again: its safetensors header"
        header = json_object(handle.read(length), where)
    header.pop("__metadata__", None)
    entries = from_json(dict[str, _Entry], header, where)
    base = 8 + length
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end:
            raise RegraftError(
                f"{path} is damaged: tensor {name} begins at byte {start} of the data, the one "
                f"before it ends at {end}. {_AGAIN}"
            )
        end = stop
        if base + stop > size:
            raise RegraftError(
                f"{path} is truncated: tensor {name} ends at byte {base + stop}, "
                f"the file at {size}. {_AGAIN}"
            )
        record = TensorRecord(name, path.name, entry.dtype, entry.shape, base + start, base + stop)
        _require_size(path, record)
        yield record
    if rest := size - base - end:
        raise RegraftError(f"{path}: {rest} bytes follow the last tensor. {_AGAIN}")


def _require_size(path: Path, record: TensorRecord) -> None:
    if record.dtype not in _DTYPES:
        return
    needed = math.prod(record.shape) * record.torch_dtype.itemsize
    if record.bytes != needed:
        raise RegraftError(
            f"{path} is damaged: tensor {record.name} of shape {list(record.shape)} and dtype "
            f"{record.dtype} takes {needed} bytes, the header says {record.bytes}. {_AGAIN}"
        )


def read_tensor(handle: BufferedReader | BufferedRandom, record: TensorRecord) -> Tensor:
    """Read the tensor that `record` describes from the file's current position."""
    tensor = torch.empty(record.shape, dtype=record.torch_dtype)
    memory = tensor.reshape(-1).view(torch.uint8).numpy().data
    if handle.readinto(memory) != memory.nbytes:
        raise RegraftError(f"{handle.name} became shorter while it was read. {_AGAIN}")
    return tensor
