"""SNIP in the form of Wei et al. (2024, arXiv 2402.05162): mean over samples of |W_ij * dL/dW_ij|.

    run the dense model forward, saving every layer's inputs to disk
    for each layer, last to first:
        for each sample: g = dL/dW of the mean cross-entropy L of its response
        s_ij  = mean over samples of |g_ij|
        score = |W_ij| * s_ij
        W_ij  = 0                                       where the score is lowest in the matrix

`pruning/gradients.py` takes the gradients, `pruning/masks.py` finds the lowest scores.

The original SNIP (Lee et al. 2019, arXiv 1810.02340) takes the absolute value after summing over
samples, so that samples which disagree cancel, and lets the weights of the whole network compete;
here weights compete within a row or a matrix.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from regraft.pruning.base import CalibratedSettings, GradientPruner
from regraft.pruning.gradients import product
from regraft.pruning.masks import Scope


class SnipSettings(CalibratedSettings):
    """Settings of SNIP."""

    method: Literal["snip"] = "snip"
    scope: Scope = Field("matrix", description="Weights compete within their row or the matrix.")


class Snip(GradientPruner):
    """|W| times the mean size of its gradient: the change of loss by removal, to first order."""

    name, label, settings_type = "snip", "SNIP", SnipSettings

    def accumulate(self, dy: Tensor, x: Tensor) -> Tensor:
        """Sum over samples of |dL/dW|, `[out, in]`, from `[B, T, out]` and `[B, T, in]`."""
        first, *rest = (product(one, inputs).abs_() for one, inputs in zip(dy, x, strict=True))
        for magnitude in rest:
            first.add_(magnitude)
        return first

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """|W_ij| s_ij, `[out, in]` float32."""
        return weight.float().abs().mul_(statistic)


PLUGIN = Snip()
