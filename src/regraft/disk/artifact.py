"""Artifacts: tensors and a JSON header in one safetensors file; same content, same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from regraft.disk.descriptions import Fields, described
from regraft.disk.files import atomic_file, digest
from regraft.disk.parsing import json_value, read_json, shown
from regraft.disk.paths import require_file
from regraft.errors import RegraftError

ABOUT_FILE = "regraft.json"  # in a checkpoint that regraft wrote: how it was made
_KEY = "regraft"  # a single key: safetensors does not keep the order of several


def about_in(folder: Path) -> Fields | None:
    """The description of a checkpoint that regraft wrote; None of any other."""
    path = folder / ABOUT_FILE
    return described(read_json(path), str(path)) if path.exists() else None


def write_artifact(
    path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write `tensors` and `header` atomically; `kind` is stored as the file's format."""
    marks = {"format": kind, "digest": _digest(tensors)}
    content = json.dumps({**marks, **header}, sort_keys=True)
    with atomic_file(path) as temporary:
        save_tensors(temporary, tensors, {_KEY: content})


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with default permissions, which `save_file` would restrict."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata or {}))
    path.chmod(mode)


def read_artifact(path: Path, kind: str, what: str) -> tuple[Fields, dict[str, Tensor]]:
    """Read (header, tensors) of a file that `write_artifact` wrote.

    Args:
        kind: The expected format.
        what: What such a file holds ("head scores"), for messages.

    Raises:
        RegraftError: the file is missing, damaged, or of another format.
    """
    require_file(path, f"It should hold {what}.")
    try:
        with safe_open(path, "pt") as handle:
            header = _header(handle.metadata() or {}, kind, what, path)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RegraftError(f"{path} is damaged and cannot be read ({what}): {error}") from error
    if header.pop("digest", None) != _digest(tensors):
        raise RegraftError(
            f"{path} is damaged: its tensors ({', '.join(sorted(tensors)[:3])} ...) do not match "
            "the digest in its header."
        )
    fields = Fields(header, f"{path}: its header")
    if "about" in fields:
        fields["about"] = described(header["about"], f"{path}: about")
    return fields, tensors


def _header(metadata: Mapping[str, str], kind: str, what: str, path: Path) -> dict[str, Any]:
    """The header in the metadata of an artifact; the arguments are those of `read_artifact`."""
    header = json_value(metadata.get(_KEY, "{}"), f"{path} is damaged: its header")
    found = header.pop("format", None) if isinstance(header, dict) else None
    if found != kind:
        stated = "missing" if found is None else shown(found)
        raise RegraftError(
            f"{path} does not hold {what} of regraft: the format in its header is {stated}; "
            f"expected {kind}."
        )
    return cast(dict[str, Any], header)


def save_unfinished(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of a stage's unfinished work, for a resumed run."""
    with atomic_file(path) as temporary:
        save_file(dict(tensors), temporary)


def load_unfinished(path: Path) -> dict[str, Tensor]:
    """Read tensors of a stage's unfinished work.

    Raises:
        RegraftError: the file is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RegraftError(
            f"{path}, unfinished work, is damaged: {error}. Remove it and run the same command "
            "again."
        ) from error


def require_finite(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    nan: bool = False,
    unbounded: Callable[[str], bool] = lambda _: False,
) -> None:
    """Raise if a tensor holds NaN (unless `nan`) or infinity; the message names it and `path`.

    Tensors whose name is `unbounded` may hold infinity. Tensors on the meta device and quantised
    ones (8-bit floats, or a package's own class, as in torchao) are not checked.
    """
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, Parameter) and tensor.is_floating_point()
        if tensor.is_meta or not (plain and tensor.element_size() > 1 and tensor.numel()):
            continue
        values = tensor.nan_to_num(0.0, torch.inf, -torch.inf) if nan else tensor
        extremes = torch.stack(values.aminmax())  # NaN if any value is NaN
        if extremes.isfinite().all():
            continue
        if extremes.isnan().any() or not unbounded(name):
            raise RegraftError(
                f"{path}: the tensor {name} holds numbers that are "
                f"{'infinite' if nan else 'NaN or infinite'}. Create or download it again."
            )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    parts: list[bytes | str | memoryview] = []
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        parts += [name, f"{tensor.dtype} {list(tensor.shape)}"]
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest(*parts)
