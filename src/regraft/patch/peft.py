"""Export a patch as a SHiRA adapter of PEFT (Bhardwaj et al. 2024, arXiv 2406.13175).

A patch assigns values; PEFT adds differences in float32 when it merges, and rounds to the weight's
dtype. Each difference is therefore chosen so that the sum is the patch's value to the bit. For a
pruned 0 it is the value itself; from other weights some values cannot be reached, and then the
patch has no adapter.

PEFT gives each adapted matrix `[out, in]` as many entries as a LoRA adapter of rank r has numbers,
r (out + in), with one r for all matrices. Unused entries hold -0.0, which leaves every value that
it is added to unchanged, zeros of either sign included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.checkpoint import bits
from regraft.patch.apply import Change

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = "base_model.model.{}.shira_{}"
_OTHERWISE = "Export it with --to vllm, which assigns values, or write it with `regraft apply`."


@dataclass(frozen=True)
class Adapter:
    """The adapter's files: `config` as JSON, `tensors` as safetensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def require_matrices(changes: Sequence[Change]) -> None:
    """Raise if a tensor is no matrix, such as one that holds several experts."""
    for change in changes:
        shape = change.record.shape
        if len(shape) != 2:
            experts = ", several experts in one" if len(shape) == 3 else ""
            raise RegraftError(
                f"PEFT's SHiRA adapts weights of linear layers, [out, in], and the patch changes "
                f"{change.record.name} of shape {list(shape)}{experts}. " + _OTHERWISE
            )


def shira(changes: Sequence[Change], held: Sequence[Tensor], modules: Mapping[str, str]) -> Adapter:
    """Make the adapter that has the effect of `changes`.

    Args:
        changes: The patch's changes to its base; at least one.
        held: The base's values at the positions of each change, `[k]`.
        modules: Name of a weight on disk -> dotted name of its linear layer in memory.

    Raises:
        RegraftError: a tensor is no linear layer's weight, too many of its weights change, or a sum
            cannot be exact; the message names the first tensor and counts all such weights.
    """
    require_matrices(changes)
    for change in changes:
        if change.record.name not in modules:
            raise RegraftError(
                f"The patch changes {change.record.name}, which is no linear layer of the model "
                f"in memory; PEFT's SHiRA adapts nothing else. {_OTHERWISE}"
            )
    rank = _rank(changes)
    deltas = [
        exact_delta(before, change.values) for change, before in zip(changes, held, strict=True)
    ]
    _require_exact(changes, [exact for _, exact in deltas])
    tensors: dict[str, Tensor] = {}
    for change, (delta, _) in zip(changes, deltas, strict=True):
        module = modules[change.record.name]
        positions, values = _filled(change, delta, rank)
        columns = change.record.shape[1]
        tensors[_KEY.format(module, "weight")] = values
        tensors[_KEY.format(module, "indices")] = torch.stack(
            [positions // columns, positions % columns]
        ).to(torch.int32)
    config = {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",  # `shira_indices` replace the positions that PEFT draws
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
        "target_modules": [modules[change.record.name] for change in changes],
    }
    return Adapter(config, tensors)


def exact_delta(before: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Differences that turn `before` into `values`, both `[k]`, when they are added as PEFT does.

    Returns:
        (differences `[k]`, float32 or wider; whether each sum is `values` to the bit, bool `[k]`).
        Where it is not, no number of this dtype makes it so, NaN aside.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    guess = (values.double() - before.double()).to(wide)
    infinite = torch.full_like(guess, torch.inf)
    candidates = (
        guess,
        torch.full_like(guess, -0.0),
        torch.nextafter(guess, infinite),
        torch.nextafter(guess, -infinite),
    )
    delta, exact = guess, torch.zeros_like(guess, dtype=torch.bool)
    for candidate in candidates:
        total = (before.to(wide) + candidate).to(before.dtype)
        hit = bits(total) == bits(values)
        delta = torch.where(hit & ~exact, candidate, delta)
        exact |= hit
    return delta, exact


def _rank(changes: Sequence[Change]) -> int:
    """The smallest r that gives every matrix enough entries for its changes."""
    largest = max(changes, key=lambda one: len(one.positions) / sum(one.record.shape))
    rank = -(-len(largest.positions) // sum(largest.record.shape))
    for change in changes:
        rows, columns = change.record.shape
        if rank * (rows + columns) > rows * columns:
            raise RegraftError(
                f"The patch changes {len(largest.positions):,} weights of {largest.record.name}, "
                f"for which PEFT's SHiRA needs r = {rank}, but {change.record.name}, "
                f"{rows} x {columns}, has fewer weights than r ({rows} + {columns}). {_OTHERWISE}"
            )
    return rank


def _require_exact(changes: Sequence[Change], exact: Sequence[Tensor]) -> None:
    missed = [int((~one).sum()) for one in exact]
    if not any(missed):
        return
    first = next(i for i, count in enumerate(missed) if count)
    change = changes[first]
    at = int((~exact[first]).nonzero()[0])
    raise RegraftError(
        f"{sum(missed):,} of {sum(len(one) for one in exact):,} weights cannot be reached by PEFT, "
        "which adds a number to the checkpoint's value and rounds: the first is weight "
        f"{int(change.positions[at])} of {change.record.name}, which should become "
        f"{float(change.values[at])!r} ({change.values.dtype}). {_OTHERWISE}"
    )


def _filled(change: Change, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fill up to r (out + in) ascending positions and differences with unused entries, -0.0."""
    size = rank * sum(change.record.shape)
    unused = torch.arange(size)  # the first `size` positions always include enough unused ones
    unused = unused[~torch.isin(unused, change.positions)][: size - len(change.positions)]
    positions = torch.cat([change.positions, unused])
    values = torch.cat([delta, torch.full((len(unused),), -0.0, dtype=delta.dtype)])
    order = positions.argsort()
    return positions[order], values[order].contiguous()
