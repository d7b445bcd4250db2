"""Magnitude pruning: the score is |W_ij|. It reads no data, so no model has to run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from regraft.pruning.base import Pruner, PruneSettings
from regraft.pruning.masks import Scope


class MagnitudeSettings(PruneSettings):
    """Settings of magnitude pruning."""

    method: Literal["magnitude"] = "magnitude"
    scope: Scope = Field("matrix", description="Weights compete within their row or the matrix.")


class Magnitude(Pruner):
    """|W|."""

    name, label, settings_type = "magnitude", "magnitude", MagnitudeSettings

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """|W_ij|, `[out, in]` float32; the statistic is empty."""
        return weight.float().abs()


PLUGIN = Magnitude()
