"""Input statistics of every prunable weight, gathered at response tokens in one pass.

Statistics are stored, not scores: Wanda needs `in` floats a weight matrix, 4.6 MB for a 7B model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.artifact import read_artifact, write_artifact
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.importance.wanda import sum_of_squares
from regraft.models.anatomy import Anatomy, LinearAnatomy
from regraft.models.load import placed
from regraft.models.replay import layer_inputs, text_inputs

FORMAT = "regraft-statistics-1"


@dataclass(frozen=True)
class InputStatistics:
    """Sums of squared inputs, `LinearAnatomy.key` -> `[in]` float32 on CPU."""

    squares: Mapping[str, Tensor]
    samples: int

    def of(self, linear: LinearAnatomy) -> Tensor:
        """The sums for one weight.

        Raises:
            RegraftError: nothing was gathered for it.
        """
        if linear.key not in self.squares:
            raise RegraftError(
                f"There are no input statistics for {linear.key}: its layer did not run on the "
                "calibration data (text-only prompts skip cross-attention) or they belong to "
                "another model."
            )
        squares = self.squares[linear.key]
        if len(squares) != linear.shape[1]:
            raise RegraftError(
                f"The input statistics for {linear.key} have {len(squares)} inputs, the weight "
                f"{linear.shape[1]}: they belong to another model."
            )
        return squares


@contextmanager
def observe(
    linears: Mapping[LinearAnatomy, nn.Module], batch: Batch, into: dict[str, Tensor]
) -> Iterator[None]:
    """Add up squared inputs of `linears` while the block runs forward passes of `batch`.

    Inputs `[B, S, in]` count at response tokens only. The vision tokens that Mllama's
    cross-attention reads have no such positions: those count that a response token attends to.

    Args:
        linears: The weights to watch and their modules.
        batch: What will be run, with labels.
        into: `LinearAnatomy.key` -> running sum `[in]`, float32; added to.
    """
    response, tiles = batch.response, _attended_tiles(batch)

    def watch(linear: LinearAnatomy) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0][tiles if linear.reads_vision else response].flatten(0, -2)
            total = sum_of_squares(inputs)  # [tokens, in] -> [in]
            into[linear.key] = into.get(linear.key, 0) + total

        return hook

    hooks = [module.register_forward_pre_hook(watch(linear)) for linear, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attended_tiles(batch: Batch) -> Tensor | None:
    """Which of Mllama's image tiles a response token attends to, `[B * images * tiles]` bool.

    The processor fills up to the largest number of tiles; those beyond an image are padding.
    """
    mask = batch.inputs.get("cross_attention_mask")  # [B, S, images, tiles]
    if mask is None:
        return None
    return (mask.bool() & batch.response[..., None, None]).any(dim=1).flatten()


def gather(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
) -> InputStatistics:
    """Run every batch through the model and add up squared inputs at its response tokens."""
    modules = dict(model.named_modules())
    linears = {linear: modules[linear.module] for linear in anatomy.linears}
    into: dict[str, Tensor] = {}
    samples = 0
    for batch in (placed(one, model) for one in batches):
        text = text_inputs(model, batch.inputs)
        with observe(linears, batch, into):
            layer_inputs(model, text)
        samples += len(batch.ids)
        if progress is not None:
            progress(len(batch.ids))
    squares = {name: total.cpu() for name, total in into.items()}
    for name, total in squares.items():
        if not torch.isfinite(total).all():
            raise RegraftError(
                f"The inputs of {name} overflow in this dtype. Use --dtype bfloat16 or float32."
            )
    return InputStatistics(squares, samples)


@dataclass(frozen=True)
class SavedStatistics:
    """Both data sets' statistics, and how they were made."""

    safety: InputStatistics
    utility: InputStatistics
    about: Mapping[str, Any]


def save_statistics(
    path: Path, safety: InputStatistics, utility: InputStatistics, about: Mapping[str, Any]
) -> None:
    """Write both data sets' statistics and `about` to one safetensors file."""
    tensors = {
        f"{kind}.{name}": total
        for kind, statistics in (("safety", safety), ("utility", utility))
        for name, total in statistics.squares.items()
    }
    header = {
        "samples": {"safety": safety.samples, "utility": utility.samples},
        "about": about,
    }
    write_artifact(path, FORMAT, header, tensors)


def load_statistics(path: Path) -> SavedStatistics:
    """Read what `save_statistics` wrote.

    Raises:
        RegraftError: the file is missing or something else.
    """
    header, tensors = read_artifact(path, FORMAT, "input statistics")
    safety, utility = (
        InputStatistics(
            {n.removeprefix(f"{k}."): t for n, t in tensors.items() if n.startswith(f"{k}.")},
            header["samples"][k],
        )
        for k in ("safety", "utility")
    )
    return SavedStatistics(safety, utility, header["about"])
