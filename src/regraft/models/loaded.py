"""Whether what transformers loaded is the checkpoint, and what it raises where it cannot load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.disk.artifact import require_finite
from regraft.errors import RegraftError, is_host_memory
from regraft.models.architecture import Architecture, LinearArchitecture
from regraft.models.checkpoint import FLOATS, Checkpoint
from regraft.models.layout import Laid, Layout


def check_loading(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raise where transformers would go on with random values in place of those of the file."""
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise RegraftError(
            f"{folder}: {name} is {list(stored)} in the file, config.json describes "
            f"{list(wanted)}"
            + (f" ({len(mismatched) - 1} more differ)" if mismatched[1:] else "")
            + ". Weights and config belong to different models: export the whole model again."
        )
    if missing := sorted(loading["missing_keys"]):
        raise RegraftError(
            f"{folder} holds no weights for {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ", which config.json asks for. Export the whole model again."
        )


def check_headers(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> None:
    """`check_loading` by shapes alone, and that floats are stored as floats; reads no weights.

    Args:
        model: On the meta device, of weights that are not quantised.
        checkpoint: Its files. What few weights they lack is seen when it is loaded.
        layout: Where its parameters are in them.
    """
    wanted = model.state_dict()
    mismatched = []
    for name, laid in layout.items():
        if name not in wanted or isinstance(laid, str):
            continue
        records = [checkpoint.tensors[piece.tensor] for piece in laid.pieces]
        for record in records if wanted[name].is_floating_point() else ():
            require_float(checkpoint, record.name)
        if [one.shape for one in records] == [laid.shape] != [tuple(wanted[name].shape)]:
            mismatched.append((records[0].name, laid.shape, wanted[name].shape))
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in wanted if name not in layout and name not in tied]
    stored = sum(math.prod(one.shape) for one in checkpoint.tensors.values())
    most = sum(wanted[name].numel() for name in missing) > stored
    check_loading(
        checkpoint.folder,
        {"mismatched_keys": mismatched, "missing_keys": missing if most else ()},
    )


def of_parameters(model: nn.Module, layout: Layout) -> frozenset[str]:
    """The names on disk of what a model's parameters are made of."""
    named = model.named_parameters(remove_duplicate=False)
    found = (layout.get(name, "") for name, _ in named)
    return frozenset(
        piece.tensor for laid in found if isinstance(laid, Laid) for piece in laid.pieces
    )


def check_finite(folder: Path, model: nn.Module) -> None:
    """Raise where a parameter is NaN or infinite, or where a buffer read from disk is NaN."""
    buffers, kept = dict(model.named_buffers()), model.state_dict().keys()
    stored = {name: one for name, one in buffers.items() if name in kept}
    tensors = {**dict(model.named_parameters()), **stored}
    require_finite(folder, tensors, unbounded=buffers.__contains__)


def check_besides(checkpoint: Checkpoint, unbounded: Callable[[str], bool]) -> None:
    """Look for NaN in what no parameter is made of (`Source.unbounded`), which loading may not see.

    Raises:
        RegraftError: there is some, by the tensor's name.
    """
    for name, record in checkpoint.tensors.items():
        if unbounded(name) and record.dtype in FLOATS:
            require_finite(checkpoint.folder, {name: checkpoint.read(name)}, unbounded=unbounded)


def require_float(checkpoint: Checkpoint, tensor: str) -> None:
    dtype = checkpoint.record(tensor).dtype
    if dtype not in FLOATS:
        raise RegraftError(
            f"{checkpoint.folder}: {tensor} is stored as {dtype}: it is quantised, and config.json "
            f"does not say how. Give a checkpoint whose weights are {', '.join(FLOATS)}."
        )


def describe_unused(folder: Path, loading: Mapping[str, Any]) -> str | None:
    """What to say of weights on disk that the model has no place for, if there are any."""
    unused = sorted(loading["unexpected_keys"])
    if not unused:
        return None
    return (
        f"Warning: {folder} holds {len(unused)} tensors that the model of its config.json has no "
        f"place for, {unused[0]} the first: they are left out. If they belong to it, weights and "
        "config are of different models, and what is measured is neither."
    )


def check_weights(model: nn.Module, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise unless one prunable weight of each kind in memory is that on disk."""
    modules = dict(model.named_modules())
    for linear in _one_of_each(architecture):
        if getattr(modules[linear.module], linear.parameter).is_meta:
            continue  # a split model's layer that waits on disk
        weight = linear.weight(modules[linear.module])
        stored = checkpoint.matrix(linear.tensor, linear.stored, linear.shape)
        require_finite(checkpoint.folder, {linear.tensor: stored})  # NaN equals nothing
        if not torch.equal(stored.to(weight.dtype), weight.cpu()):
            raise RegraftError(
                f"{checkpoint.folder}: tensor {linear.tensor} on disk is not {linear.parameter} "
                f"of {linear.module} in memory; this key layout is not supported."
            )


def _one_of_each(architecture: Architecture) -> list[LinearArchitecture]:
    """The first linear, and of those that lie in larger tensors the last of each kind."""
    inside = [li for li in architecture.linears if li.held is not None or li.stored is not None]
    return [next(architecture.linears), *{linear.role: linear for linear in inside}.values()]


@contextmanager
def enough_memory(folder: Path) -> Iterator[None]:
    """Say what to lower where host memory does not suffice for a model.

    An accelerator's is said at the end of the program.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_host_memory(error):
            raise
        raise RegraftError(
            f"{folder}: there is not enough memory for its weights. Load them in fewer bytes with "
            "--dtype bfloat16 (in a recipe compute.dtype), and lower --batch-size "
            "(compute.batch_size), which takes memory too."
        ) from error
