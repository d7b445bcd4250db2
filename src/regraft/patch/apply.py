"""Apply patches to a checkpoint or revert them, shard by shard.

First the affected tensors are read once, in small chunks, to check them and to list the changes in
a `Plan`; then the plan is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from regraft.disk.files import in_threads, read_at, write_at
from regraft.errors import RegraftError
from regraft.models.architecture import Architecture, LinearArchitecture
from regraft.models.checkpoint import Checkpoint, TensorRecord, bits
from regraft.models.checkpoint_copy import Unbounded, write_copy
from regraft.models.placement import weight_in_memory
from regraft.models.places import at, of_tensor
from regraft.patch.format import CHUNK, Patch, Target, TensorPatch, chunks, merge
from regraft.progress import Advance

Operation = Literal["apply", "revert"]
_GAP = 64 * 2**10  # bytes; smaller gaps between changes are rewritten instead of skipped
_FIX = "Apply the patch to the pruned checkpoint that it was made for."
_OTHERS = "If other patches are applied to it, name them too."
_FIX_OF_REVERT = (
    "If other patches are applied to it, name them too, so that all are reverted; then apply again "
    "those that should stay."
)


@dataclass(frozen=True)
class Change:
    """New values for one tensor: flat, ascending, int64 `positions` `[k]` and `values` `[k]`."""

    record: TensorRecord
    positions: Tensor
    values: Tensor

    def spans(self) -> list[slice]:
        """Slices of positions that lie close enough together to be written at once."""
        if not len(self.positions):
            return []
        item = self.values.element_size()
        splits = self.positions.diff() * item > _GAP
        splits |= (self.positions // (CHUNK // item)).diff() > 0
        edges = [0, *(splits.nonzero().flatten() + 1).tolist(), len(self.positions)]
        return [slice(*edge) for edge in pairwise(edges)]


@dataclass(frozen=True)
class Plan:
    """The changes that apply or revert patches, without weights that have the wanted value already.

    `applied` is the number of weights of each patch that are applied before.
    """

    checkpoint: Checkpoint
    patches: tuple[Patch, ...]
    applied: tuple[int, ...]
    changes: tuple[Change, ...]

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({change.record.shard for change in self.changes}))

    @property
    def weights(self) -> int:
        return sum(len(change.positions) for change in self.changes)


def make_plan(
    checkpoint: Checkpoint,
    patches: Patch | Sequence[Patch],
    operation: Operation,
    *,
    advance: Advance = lambda _: None,
) -> Plan:
    """Check that a checkpoint is the base of patches and list the changes; nothing is written.

    Any of `patches`, in any order, may be applied to the checkpoint, wholly or in part, but no
    others. `advance` is called with 1 after each tensor.

    Raises:
        RegraftError: two patches disagree; a tensor is missing, has another shape, dtype or
            content, or a target holds neither what pruning left there nor the patch's own value.
    """
    patches = [patches] if isinstance(patches, Patch) else patches
    targets = merge(patches)
    for name, target in targets.items():
        _check_layout(checkpoint, name, target)

    def inspect(name: str) -> tuple[Change, Tensor]:
        result = _inspect(checkpoint, checkpoint.tensors[name], targets[name], operation)
        advance(1)
        return result

    order = sorted(targets, key=lambda name: (checkpoint.tensors[name].shard, name))
    inspected = dict(zip(order, in_threads(inspect, order), strict=True))
    on = {name: is_on for name, (_, is_on) in inspected.items()}
    applied = [
        sum(_applied(targets[name], tensor, on[name]) for name, tensor in patch.tensors.items())
        for patch in patches
    ]
    changes = [change for change, _ in inspected.values() if len(change.positions)]
    return Plan(checkpoint, tuple(patches), tuple(applied), tuple(changes))


def write_plan(
    plan: Plan,
    target: Path,
    *,
    files: Mapping[str, str] | None = None,
    advance: Advance = lambda _: None,
    unbounded: Unbounded = lambda _: False,
) -> Checkpoint:
    """Write a copy of the plan's checkpoint with its changes to `target`; see `write_copy`."""

    def edit_shard(path: Path) -> None:
        _write_changes(path, [one for one in plan.changes if one.record.shard == path.name])

    return write_copy(
        plan.checkpoint, target, edit_shard, files=files, advance=advance, unbounded=unbounded
    )


def _write_changes(shard: Path, changes: Sequence[Change]) -> None:
    """Overwrite single weights of a shard; all changes are for tensors in it."""
    buffer = memoryview(bytearray(CHUNK))
    with shard.open("r+b", buffering=0) as handle:
        for change in sorted(changes, key=lambda one: one.record.start):
            item = change.values.element_size()
            for span in change.spans():
                positions = change.positions[span]
                first = int(positions[0])
                data = buffer[: (int(positions[-1]) + 1 - first) * item]
                place = change.record.start + first * item
                read_at(handle, place, data)
                torch.frombuffer(data, dtype=change.values.dtype)[positions - first] = (
                    change.values[span]
                )
                write_at(handle, place, data)


@contextmanager
def patched(model: nn.Module, architecture: Architecture, patch: Patch) -> Iterator[None]:
    """Context in which a patch is applied to a pruned model in memory.

    Raises:
        RegraftError: the patch names a tensor that is no prunable weight of this model, or one
            that is offloaded to disk.
    """
    linears: dict[str, list[LinearArchitecture]] = {}
    for linear in architecture.linears:
        linears.setdefault(linear.tensor, []).append(linear)
    edits = [
        (_weight(model, linear), positions, values)
        for name, tensor in patch.tensors.items()
        for linear, positions, values in _by_linear(name, tensor, linears.get(name, []))
    ]
    before = [weight[at(positions, weight)] for weight, positions, _ in edits]
    try:
        for weight, positions, values in edits:
            _put(weight, positions, values)
        yield
    finally:
        for (weight, positions, _), values in zip(edits, before, strict=True):
            _put(weight, positions, values)


def _by_linear(
    name: str, tensor: TensorPatch, linears: Sequence[LinearArchitecture]
) -> list[tuple[LinearArchitecture, Tensor, Tensor]]:
    """Split a patch of one tensor by its linears: (linear, flat positions in it, values), `[k]`."""
    another, parts = "The patch is for another model:", []
    if not linears:
        raise RegraftError(f"{another} this one has no weight {name}.")
    if linears[0].stored is None and (shape := linears[0].shape) != tensor.shape:
        raise RegraftError(
            f"{another} {name} is {list(shape)}, the patch is for {list(tensor.shape)}."
        )
    for linear in linears:
        positions, values = tensor.within(linear)
        if len(positions):
            parts.append((linear, positions, values))
    if sum(len(positions) for _, positions, _ in parts) != len(tensor.positions):
        raise RegraftError(f"{another} it changes parts of {name} that are not prunable here.")
    return parts


def _weight(model: nn.Module, linear: LinearArchitecture) -> Tensor:
    """A view of a linear's weight in memory, `[out, in]`."""
    weight = weight_in_memory(model.get_submodule(linear.module), linear.parameter)
    if weight is None:
        raise RegraftError(
            f"{linear.tensor} is offloaded to disk, where it cannot be patched. Write the "
            "checkpoint with `regraft apply` and evaluate that."
        )
    return of_tensor(weight, linear.held, linear.shape)


def _put(weight: Tensor, positions: Tensor, values: Tensor) -> None:
    weight[at(positions, weight)] = values.to(weight.device, weight.dtype)


def zeros_filled(checkpoint: Checkpoint, patch: Patch) -> int:
    """How many fewer zeros `checkpoint` has with the patch; 0 if it is already applied.

    A swap makes a zero for each that it fills.
    """
    return sum(
        int((checkpoint.read(name).reshape(-1)[tensor.positions] == 0).sum())
        - int((tensor.values == 0).sum())
        for name, tensor in patch.tensors.items()
    )


def _check_layout(checkpoint: Checkpoint, name: str, target: Target) -> None:
    where = _not_the_base(checkpoint, *(patch for patch, _ in target.parts))
    if name not in checkpoint.tensors:
        raise RegraftError(f"{where}: it has no tensor {name}. {_FIX}")
    record, (_, part) = checkpoint.tensors[name], target.parts[0]
    if record.shape != part.shape or record.torch_dtype != part.values.dtype:
        raise RegraftError(
            f"{where}: {name} is {list(record.shape)} {record.torch_dtype}, the patch is for "
            f"{list(part.shape)} {part.values.dtype}. {_FIX}"
        )


def _not_the_base(checkpoint: Checkpoint, *names: str) -> str:
    return f"{checkpoint.folder} is not the base of this patch ({' and '.join(names)})"


def _inspect(
    checkpoint: Checkpoint, record: TensorRecord, target: Target, operation: Operation
) -> tuple[Change, Tensor]:
    """The changes to one tensor, and which of the target's values it already has (bool `[k]`).

    To check digests, each chunk is reverted to the compressed tensor, and then the positions that a
    patch's own digest sets to zero (`TensorPatch.zeroed`) are set to zero.
    """
    before, positions = target.before, target.positions
    wanted = target.values if operation == "apply" else before
    on = torch.empty(len(positions), dtype=torch.bool)
    changing = torch.empty_like(on)
    zeroed = [part.zeroed for _, part in target.parts]
    hashers = {_key(one): (one, hashlib.sha256()) for one in zeroed}  # equal ones share a hasher
    for start, chunk, inside in _read_chunks(checkpoint.folder, record, positions):
        local = positions[inside] - start
        current = chunk[local]
        on[inside] = bits(current) == bits(target.values[inside])
        if not (on[inside] | (current == before[inside])).all():
            raise RegraftError(
                f"{_not_the_base(checkpoint, *(name for name, _ in target.parts))}: {record.name} "
                f"holds other values where the patch restores weights. {_FIX}"
            )
        changing[inside] = bits(current) != bits(wanted[inside])
        chunk[local] = before[inside]
        for own, hasher in hashers.values():
            here = _between(own, start, start + len(chunk)) - start
            saved = chunk[here]
            chunk[here] = 0.0
            hasher.update(chunk.view(torch.uint8).numpy().data)
            chunk[here] = saved
    for (name, part), own in zip(target.parts, zeroed, strict=True):
        if hashers[_key(own)][1].hexdigest() != part.base:
            raise RegraftError(
                f"{_not_the_base(checkpoint, name)}: the weights of {record.name} differ. "
                + (_FIX_OF_REVERT if operation == "revert" else f"{_FIX} {_OTHERS}")
            )
    if changing.all():  # as when a patch is applied for the first time; a copy would be as large
        return Change(record, positions, wanted), on
    return Change(record, positions[changing], wanted[changing]), on


def _applied(target: Target, tensor: TensorPatch, on: Tensor) -> int:
    """How many weights of one patch of a target are applied; `on` is of all the target's."""
    if len(target.parts) > 1:
        on = on[torch.searchsorted(target.positions, tensor.positions)]
    return int(on.sum())


def _read_chunks(
    folder: Path, record: TensorRecord, positions: Tensor
) -> Iterator[tuple[int, Tensor, slice]]:
    """Read a tensor in chunks into one buffer.

    Yields:
        (index of the first element, the elements, which of the ascending positions are in them).
    """
    dtype = record.torch_dtype
    buffer = memoryview(bytearray(CHUNK))
    with (folder / record.shard).open("rb", buffering=0) as handle:
        size = (record.stop - record.start) // dtype.itemsize
        for start, stop, inside in chunks(size, dtype.itemsize, positions):
            data = buffer[: (stop - start) * dtype.itemsize]
            read_at(handle, record.start + start * dtype.itemsize, data)
            yield start, torch.frombuffer(data, dtype=dtype), inside


def _between(positions: Tensor, start: int, stop: int) -> Tensor:
    first, last = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
    return positions[first:last]


def _key(positions: Tensor) -> bytes:
    return hashlib.sha256(positions.numpy().data).digest()
