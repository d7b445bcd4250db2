"""What the importance of weights is computed from, gathered once and kept in a file.

Statistics are stored, not scores: `in` floats a weight matrix for Wanda and SparseGPT (9 MB for
Wanda on a 7B model, both data sets), `[out, in]` for SNIP (see `regraft.importance.score`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import ranks
from regraft.artifact import read_artifact, write_artifact
from regraft.errors import RegraftError
from regraft.files import atomic_file
from regraft.importance.observe import InputSums, observing
from regraft.importance.score import Method, score
from regraft.importance.snip import gradient_magnitudes
from regraft.importance.sparsegpt import factors, second_moments
from regraft.importance.wanda import sum_of_squares
from regraft.models.anatomy import HEAD_ROLES, Anatomy, LayerAnatomy, LinearAnatomy
from regraft.models.walk import Walk

FORMAT = "regraft-statistics-2"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ImportanceStatistics:
    """One statistic a weight matrix, `LinearAnatomy.key` -> float32 on CPU, for one method.

    `[in]` for "wanda" and "sparsegpt", `[out, in]` for "snip", nothing for "magnitude".
    """

    method: Method
    values: Mapping[str, Tensor]
    samples: int

    def of(self, linear: LinearAnatomy) -> Tensor | None:
        """The statistic of one weight; None for magnitude.

        Raises:
            RegraftError: nothing was gathered for it.
        """
        if self.method == "magnitude":
            return None
        if linear.key not in self.values:
            raise RegraftError(
                f"There are no {self.method} statistics for {linear.key}: its layer did not run on "
                "the calibration data (text-only prompts skip cross-attention) or they belong to "
                "another model."
            )
        value = self.values[linear.key]
        if tuple(value.shape) not in ((linear.shape[1],), linear.shape):
            raise RegraftError(
                f"The {self.method} statistics for {linear.key} are {list(value.shape)}, the "
                f"weight {list(linear.shape)}: they belong to another model."
            )
        return value

    def scorer(self, linear: LinearAnatomy, weight: Tensor) -> Callable[[slice], Tensor]:
        """A function from rows of a weight `[out, in]` to their importance `[rows, in]`."""
        value = self.of(linear)

        def importance(rows: slice) -> Tensor:
            part = value if value is None or value.ndim == 1 else value[rows]
            on_device = None if part is None else part.to(weight.device)
            return score(self.method, weight[rows], on_device)

        return importance


def is_kept(method: Method, linear: LinearAnatomy) -> bool:
    """Whether a statistics file holds this weight: all for Wanda, those of heads for the rest.

    HSR restores inside heads only, and the others' statistics are dear: SNIP's are as large as the
    weights, SparseGPT's take a Cholesky factorisation of the MLP's width.
    """
    return method == "wanda" or linear.role in HEAD_ROLES


def gather(
    walk: Walk,
    anatomy: Anatomy,
    method: Method,
    scratch: Path,
    progress: Progress,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Take the samples through the model and make the statistic of every kept weight.

    Each layer's are written to `scratch`, so that SNIP's, as large as the weights, are never in
    memory together; where all layers' are there, nothing is gathered again.

    Args:
        walk: The labelled samples, before the first layer.
        anatomy: Of the model.
        method: Whose statistic.
        scratch: A folder for unfinished work.
        progress: Called with the number of samples each time a layer has seen a batch (twice a
            layer for SNIP).
        note: Told of a damping of SparseGPT that had to grow.

    Returns:
        `LinearAnatomy.key` -> float32 on CPU (pages of the files in `scratch`).
    """
    scratch.mkdir(parents=True, exist_ok=True)

    def part(layer: LayerAnatomy) -> Path:
        return scratch / f"statistics_{layer.index:03d}.safetensors"

    if method != "magnitude" and not all(part(layer).exists() for layer in anatomy.layers):
        for layer, values in _by_layer(walk, anatomy, method, scratch, progress, note):
            if ranks.first():
                with atomic_file(part(layer)) as temporary:
                    save_file({key: value.cpu() for key, value in values.items()}, temporary)
        ranks.barrier()
    return {
        key: value
        for layer in (anatomy.layers if method != "magnitude" else ())
        for key, value in load_file(part(layer)).items()
    }


def _by_layer(
    walk: Walk,
    anatomy: Anatomy,
    method: Method,
    scratch: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> Iterator[tuple[LayerAnatomy, dict[str, Tensor]]]:
    if method == "snip":
        wanted = lambda linear: is_kept(method, linear)  # noqa: E731
        yield from gradient_magnitudes(walk, anatomy, scratch / "states", wanted, progress)
        return
    modules = dict(walk.model.network.named_modules())
    for layer in anatomy.layers:
        linears = {li: modules[li.module] for li in layer.linears if is_kept(method, li)}
        sums = InputSums(sum_of_squares if method == "wanda" else second_moments)
        with walk.model.layer(layer.index):
            walk.advance(layer.index, progress, observing(linears, sums))
        sums.gather()
        ran = [linear for linear in linears if linear.key in sums.source]
        if method == "wanda":
            yield layer, {linear.key: sums.of(linear)[0].clone() for linear in ran}
        else:
            yield layer, {linear.key: f.statistic for linear, f in factors(ran, sums, note=note)}


@dataclass(frozen=True)
class SavedStatistics:
    """Both data sets' statistics, and how they were made."""

    safety: ImportanceStatistics
    utility: ImportanceStatistics
    about: Mapping[str, Any]


def save_statistics(
    path: Path,
    safety: ImportanceStatistics,
    utility: ImportanceStatistics,
    about: Mapping[str, Any],
) -> None:
    """Write both data sets' statistics of one method and `about` to one safetensors file."""
    tensors = {
        f"{kind}.{name}": value
        for kind, statistics in (("safety", safety), ("utility", utility))
        for name, value in statistics.values.items()
    }
    header = {
        "method": safety.method,
        "samples": {"safety": safety.samples, "utility": utility.samples},
        "about": about,
    }
    write_artifact(path, FORMAT, header, tensors)


def load_statistics(path: Path) -> SavedStatistics:
    """Read what `save_statistics` wrote.

    Raises:
        RegraftError: the file is missing or something else.
    """
    header, tensors = read_artifact(path, FORMAT, "importance statistics")
    safety, utility = (
        ImportanceStatistics(
            header["method"],
            {n.removeprefix(f"{k}."): t for n, t in tensors.items() if n.startswith(f"{k}.")},
            header["samples"][k],
        )
        for k in ("safety", "utility")
    )
    return SavedStatistics(safety, utility, header["about"])
