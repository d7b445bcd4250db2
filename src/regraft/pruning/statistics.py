"""Importance statistics, gathered once and saved in a file.

Every score is a function of a weight and a statistic of the calibration data, so statistics are
stored instead of scores: `in` floats per matrix for Wanda and SparseGPT, `[out, in]` for SNIP. HSR
and set difference use those of harmful prompts (D^s) and of harmless ones (D^u).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from regraft import distributed
from regraft.disk.artifact import (
    load_unfinished,
    read_artifact,
    require_finite,
    save_unfinished,
    write_artifact,
)
from regraft.disk.parsing import EXACT, from_json
from regraft.errors import RegraftError
from regraft.models.architecture import Architecture, LayerArchitecture, LinearArchitecture
from regraft.models.layerwise import LayerwisePass
from regraft.progress import Advance
from regraft.pruning.base import NO_STATISTIC, PRUNERS, Note, Pruner, ScoreName
from regraft.pruning.prune import each_layer
from regraft.settings.base import Settings

FORMAT = "regraft-statistics-2"


class StatisticsSettings(Settings):
    """Settings of the statistics that are gathered on D^s and D^u."""

    score: ScoreName = Field("wanda", description="Pruner whose score is used, such as wanda.")

    @field_validator("score")
    @classmethod
    def _check(cls, score: str) -> str:
        if not PRUNERS.get(score).reads_data:
            raise ValueError(f"importance by {score} needs no statistics")
        return score


@dataclass(frozen=True)
class ImportanceStatistics:
    """The statistics of one pruner on one data set.

    Attributes:
        method: The pruner's name.
        values: `LinearArchitecture.key` -> `[in]` or `[out, in]`, float32 on CPU, as its score
            takes it; empty if it reads no data.
        samples: Number of samples.
    """

    method: str
    values: Mapping[str, Tensor]
    samples: int

    def reached(self, linear: LinearArchitecture) -> bool:
        """Whether a linear's importance is known; it is not for experts that got no token."""
        known = linear.key in self.values or linear.expert is None
        return known or not PRUNERS.get(self.method).reads_data

    def of(self, linear: LinearArchitecture) -> Tensor:
        """The statistic of one weight; empty if the pruner reads no data."""
        if not PRUNERS.get(self.method).reads_data:
            return NO_STATISTIC
        if linear.key not in self.values and linear.expert is not None:
            return torch.zeros(linear.shape[1])  # an expert that got no token of these prompts
        if linear.key not in self.values:
            raise RegraftError(
                f"There are no {self.method} statistics for {linear.key}: its layer did not run on "
                "the calibration data (text-only prompts skip cross-attention), they belong to "
                f"another model, or {self.method} keeps those of attention only (its `every_linear`"
                " is False)."
            )
        value = self.values[linear.key]
        if tuple(value.shape) not in ((linear.shape[1],), linear.shape):
            raise RegraftError(
                f"The {self.method} statistics for {linear.key} are {list(value.shape)}, the "
                f"weight {list(linear.shape)}: they belong to another model."
            )
        return value

    def scorer(self, linear: LinearArchitecture, weight: Tensor) -> Callable[[slice], Tensor]:
        """A function from a slice of rows to the importance of these weights, `[rows, in]`.

        It raises `RegraftError` where a score is negative or NaN.
        """
        value, pruner = self.of(linear), PRUNERS.get(self.method)

        def importance(rows: slice) -> Tensor:
            part = value if value.ndim == 1 else value[rows]
            return pruner.checked_score(linear, weight[rows], part.to(weight.device))

        return importance


def gather(
    layerwise: LayerwisePass,
    architecture: Architecture,
    pruner: Pruner,
    scratch: Path,
    advance: Advance,
    note: Note = lambda _: None,
) -> dict[str, Tensor]:
    """Run the samples through the model and compute the statistic of every linear to keep.

    Statistics are saved to `scratch` layer by layer: those of SNIP are as large as the weights and
    must not be in memory together. If all layers are saved already, nothing is computed. The
    arguments are those of `each_layer`; `note` is called with the pruner's messages.

    Returns:
        `LinearArchitecture.key` -> float32 on CPU, memory-mapped from the files in `scratch`.
    """
    scratch.mkdir(parents=True, exist_ok=True)

    def part(layer: LayerArchitecture) -> Path:
        return scratch / f"statistics_{layer.index:03d}.safetensors"

    layers = architecture.layers if pruner.reads_data else ()
    if not distributed.decided(lambda: all(part(layer).exists() for layer in layers)):
        for layer, found in each_layer(
            layerwise, architecture, pruner, pruner.keeps, scratch / "states", advance
        ):
            kept = filter(pruner.keeps, layer.linears)
            # Experts that saw no token are left out: their importance is 0.
            ran = [li for li in kept if found.ran(li) and not found.unseen(li)]
            # Copied: linears with the same input share a sum, and safetensors allows no aliases.
            made = {
                linear.key: one.cpu().clone() for linear, one in pruner.statistics(ran, found, note)
            }
            found.sums.clear()  # freed before the next layer's are accumulated
            if distributed.first():
                save_unfinished(part(layer), made)
        distributed.barrier()
    return {key: value for layer in layers for key, value in load_unfinished(part(layer)).items()}


@dataclass(frozen=True)
class SavedStatistics:
    """The statistics of both data sets, and how they were made."""

    safety: ImportanceStatistics
    utility: ImportanceStatistics
    about: Mapping[str, Any]


def save_statistics(path: Path, saved: SavedStatistics) -> None:
    """Write the statistics of both data sets to one safetensors file."""
    both = {"safety": saved.safety, "utility": saved.utility}
    tensors = {
        f"{kind}.{n}": value for kind, one in both.items() for n, value in one.values.items()
    }
    samples = {kind: one.samples for kind, one in both.items()}
    header = {"method": saved.safety.method, "samples": samples, "about": saved.about}
    write_artifact(path, FORMAT, header, tensors)


@EXACT
@dataclass(frozen=True)
class _Samples:
    """Numbers of samples, as in the header."""

    safety: Annotated[int, Field(ge=1)]
    utility: Annotated[int, Field(ge=1)]


def load_statistics(path: Path) -> SavedStatistics:
    """Read a file that `save_statistics` wrote."""
    header, tensors = read_artifact(path, FORMAT, "importance statistics")
    where = f"{path}: its header"
    method = from_json(str, header["method"], f"{where}: method")
    samples = from_json(_Samples, header["samples"], f"{where}: samples")
    require_finite(path, tensors)
    safety, utility = (
        ImportanceStatistics(
            method,
            {n.removeprefix(f"{k}."): t for n, t in tensors.items() if n.startswith(f"{k}.")},
            getattr(samples, k),
        )
        for k in ("safety", "utility")
    )
    return SavedStatistics(safety, utility, header["about"])
