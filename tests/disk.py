"""Helpers of tests with files: trees to compare, data sets on disk, edited checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
from regraft.data.example import Example
from regraft.data.formats import jsonl_line
from regraft.disk.files import file_digest
from regraft.models.checkpoint import Checkpoint


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder`, hidden ones too: relative name -> digest, "" for a folder."""
    return {
        str(path.relative_to(folder)): file_digest(path) if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """Every file of more than `size` bytes is one too many for the disk."""
    resource = pytest.importorskip("resource", reason="limits the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def shards(folder: Path) -> dict[str, str]:
    """Digest of every safetensors file in a checkpoint folder."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}


def write_jsonl(path: Path, examples: Iterable[Example]) -> Path:
    """Write examples as a JSONL data set; images must be beside or below the file."""
    lines = (
        jsonl_line(one, one.image and one.image.relative_to(path.parent).as_posix())
        for one in examples
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_data(folder: Path, n: int, *, images: bool = True) -> Path:
    """A data set of `n` harmful and `n` harmless examples; returns its JSONL file."""
    examples = [
        example
        for harmful in (True, False)
        for example in pico.write_examples(folder / "images", n, harmful, images)
    ]
    return write_jsonl(folder / "data.jsonl", examples)


def rewrite(folder: Path, name: str, change: dict[str, torch.Tensor]) -> None:
    """Replace tensors of one shard, adding new ones."""
    tensors = load_file(folder / name) | change
    save_file(tensors, folder / name, metadata={"format": "pt"})


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits: -0.0 is not 0.0."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def differing(a: Checkpoint, b: Checkpoint) -> set[str]:
    """Names of the tensors that are not equal to the byte, or in one checkpoint only."""
    both = a.tensors.keys() & b.tensors.keys()
    changed = {name for name in both if not equal_bytes(a.read(name), b.read(name))}
    return changed | (a.tensors.keys() ^ b.tensors.keys())
