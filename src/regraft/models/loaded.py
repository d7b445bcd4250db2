"""Check that the model that transformers loaded is the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.disk.artifact import require_finite
from regraft.errors import RegraftError, is_host_memory
from regraft.models.architecture import Architecture
from regraft.models.checkpoint import FLOATS, Checkpoint
from regraft.models.layout import Layout


def check_loading(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raise where transformers would continue with random values in place of weights on disk."""
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
    """`check_loading` from headers alone, and check that float weights are stored as floats.

    Missing weights are reported here only if they are more than all that is stored. The model is on
    the meta device and not quantised.
    """
    wanted = model.state_dict()
    mismatched = []
    for name, tiling in layout.items():
        if name not in wanted or isinstance(tiling, str):
            continue
        records = [checkpoint.tensors[piece.tensor] for piece in tiling.pieces]
        for record in records if wanted[name].is_floating_point() else ():
            if record.dtype not in FLOATS:
                raise RegraftError(
                    f"{checkpoint.folder}: {record.name} is stored as {record.dtype}: it is "
                    "quantised, and config.json does not say how. Give a checkpoint whose weights "
                    f"are {', '.join(FLOATS)}."
                )
        if [one.shape for one in records] == [tiling.shape] != [tuple(wanted[name].shape)]:
            mismatched.append((records[0].name, tiling.shape, wanted[name].shape))
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in wanted if name not in layout and name not in tied]
    stored = sum(math.prod(one.shape) for one in checkpoint.tensors.values())
    too_many = sum(wanted[name].numel() for name in missing) > stored
    check_loading(
        checkpoint.folder,
        {"mismatched_keys": mismatched, "missing_keys": missing if too_many else ()},
    )


def check_finite(folder: Path, model: nn.Module) -> None:
    """Raise if a parameter holds NaN or infinity, or a buffer read from disk holds NaN."""
    buffers, kept = dict(model.named_buffers()), model.state_dict().keys()
    stored = {name: one for name, one in buffers.items() if name in kept}
    tensors = {**dict(model.named_parameters()), **stored}
    require_finite(folder, tensors, unbounded=buffers.__contains__)


def check_unloaded(checkpoint: Checkpoint, unbounded: Callable[[str], bool]) -> None:
    """Raise where a tensor holds NaN that loading may skip: `Source.unbounded`, no parameter's."""
    for name, record in checkpoint.tensors.items():
        if unbounded(name) and record.dtype in FLOATS:
            require_finite(checkpoint.folder, {name: checkpoint.read(name)}, unbounded=unbounded)


def describe_unused(folder: Path, loading: Mapping[str, Any]) -> str | None:
    """A warning about weights on disk that the model does not use; None if there are none."""
    unused = sorted(loading["unexpected_keys"])
    if not unused:
        return None
    return (
        f"Warning: {folder} holds {len(unused)} tensors that the model of its config.json does not "
        f"use, such as {unused[0]}. They are ignored. If they belong to it, weights and config are "
        "of different models, and results hold for neither."
    )


def check_weights(model: nn.Module, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise unless one prunable weight of each kind is equal in memory and on disk."""
    inside = [li for li in architecture.linears if li.held is not None or li.stored is not None]
    # of linears inside larger tensors the last of each role
    for linear in (next(architecture.linears), *{li.role: li for li in inside}.values()):
        module = model.get_submodule(linear.module)
        if getattr(module, linear.parameter).is_meta:
            continue  # an offloaded layer of a split model
        weight = linear.weight(module)
        stored = checkpoint.matrix(linear.tensor, linear.stored, linear.shape)
        require_finite(checkpoint.folder, {linear.tensor: stored})  # NaN equals nothing
        if not torch.equal(stored.to(weight.dtype), weight.cpu()):
            raise RegraftError(
                f"{checkpoint.folder}: tensor {linear.tensor} on disk is not equal to "
                f"{linear.parameter} of {linear.module} in memory; this key layout is not "
                "supported."
            )


def refuse_tokens_without_embedding(model: nn.Module, folder: Path) -> None:
    """Make a model raise `RegraftError` at such a token: on a GPU it would end the process.

    Only what reaches the embeddings is checked: tokens of images, which need none, do not.
    """
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # of classes whose embeddings transformers does not know
        return
    if not isinstance(embeddings, nn.Embedding):
        return
    tables = (one for one in embeddings.modules() if isinstance(one, nn.Embedding))
    rows = sum(one.num_embeddings for one in tables)  # Idefics has two tables

    def check(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for ids in inputs:
            if (ids >= rows).any():
                raise RegraftError(
                    f"The tokenizer gives a prompt the token {int(ids.max()):,}, but the model of "
                    f"{folder} has {rows:,} embeddings. Use the tokenizer of the base model."
                )

    embeddings.register_forward_pre_hook(check)


@contextmanager
def enough_memory(folder: Path) -> Iterator[None]:
    """Turn a lack of host memory for a model into an error that says what to lower.

    A lack of accelerator memory is handled where the program exits.
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
