"""Put a patch on a checkpoint or take it off, shard by shard, into a new folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.models.anatomy import Anatomy
from regraft.models.checkpoint import Checkpoint, Edit, Progress, write_edited
from regraft.restoration.patch import Patch, base_digest


def apply_patch(
    checkpoint: Checkpoint,
    patch: Patch,
    target: Path,
    *,
    files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write `checkpoint` with the patch's values to `target`.

    Raises:
        RegraftError: the patch belongs to another base, or `target` is not empty.
    """
    check_base(checkpoint, patch)
    edits = {name: _assign(t.positions, t.values) for name, t in patch.tensors.items()}
    return write_edited(checkpoint, target, edits, files=files, progress=progress)


def revert_patch(
    checkpoint: Checkpoint,
    patch: Patch,
    target: Path,
    *,
    files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write `checkpoint` with the patch's positions zero again to `target`, to the byte.

    Raises:
        RegraftError: the patch belongs to another base, or `target` is not empty.
    """
    check_base(checkpoint, patch)
    edits = {name: _assign(t.positions, t.zeros) for name, t in patch.tensors.items()}
    return write_edited(checkpoint, target, edits, files=files, progress=progress)


@contextmanager
def patched(model: nn.Module, anatomy: Anatomy, patch: Patch) -> Iterator[None]:
    """Put a patch on a pruned model in memory for the length of the block.

    Raises:
        RegraftError: the patch names a tensor that is no prunable weight of this model.
    """
    modules = dict(model.named_modules())
    weights = {linear.tensor: modules[linear.module].weight for linear in anatomy.linears}
    for name in patch.tensors:
        if name not in weights:
            raise RegraftError(f"The patch is for another model: it has no weight {name}.")
        if tuple(weights[name].shape) != patch.tensors[name].shape:
            raise RegraftError(
                f"The patch is for another model: {name} is {list(weights[name].shape)}, the "
                f"patch is for {list(patch.tensors[name].shape)}."
            )
    targets = [(weights[name], tensor) for name, tensor in patch.tensors.items()]
    before = [_get(weight, tensor.positions) for weight, tensor in targets]
    try:
        for weight, tensor in targets:
            _put(weight, tensor.positions, tensor.values)
        yield
    finally:
        for (weight, tensor), values in zip(targets, before, strict=True):
            _put(weight, tensor.positions, values)


def _get(weight: Any, positions: Tensor) -> Tensor:
    values: Tensor = weight.data.view(-1)[positions.to(weight.device)]
    return values


def _put(weight: Any, positions: Tensor, values: Tensor) -> None:
    weight.data.view(-1)[positions.to(weight.device)] = values.to(weight.device, weight.dtype)


def check_base(checkpoint: Checkpoint, patch: Patch) -> None:
    """Check that a checkpoint is the patch's base, with or without the patch; writes nothing.

    Raises:
        RegraftError: a tensor is missing, has another shape, dtype or content, or a target holds
            something else than zero or the patch's own value.
    """
    fix = "Apply the patch to the pruned checkpoint that it was made for."
    for name, tensor in patch.tensors.items():
        where = f"{checkpoint.folder} is not the base of this patch"
        if name not in checkpoint.tensors:
            raise RegraftError(f"{where}: it has no tensor {name}. {fix}")
        current = checkpoint.read(name)
        if tuple(current.shape) != tensor.shape or current.dtype != tensor.values.dtype:
            raise RegraftError(
                f"{where}: {name} is {list(current.shape)} {current.dtype}, the patch is for "
                f"{list(tensor.shape)} {tensor.values.dtype}. {fix}"
            )
        held = current.reshape(-1)[tensor.positions]
        if not ((held == 0) | (held == tensor.values)).all():
            raise RegraftError(
                f"{where}: {name} holds other values where the patch restores pruned ones. {fix}"
            )
        if base_digest(current, tensor.positions) != tensor.base:
            raise RegraftError(f"{where}: the weights of {name} differ. {fix}")


def zeros_filled(checkpoint: Checkpoint, patch: Patch) -> int:
    """How many zeros of `checkpoint` the patch fills; none where it is on already."""
    return sum(
        int((checkpoint.read(name).reshape(-1)[tensor.positions] == 0).sum())
        for name, tensor in patch.tensors.items()
    )


def _assign(positions: Tensor, values: Tensor) -> Edit:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[positions] = values
        return tensor

    return edit
