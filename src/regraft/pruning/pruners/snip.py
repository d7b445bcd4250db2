"""SNIP as Wei et al. (2024, arXiv 2402.05162) take it: mean over samples of |W_ij * dL/dW_ij|.

    run the dense model forward, keeping every layer's inputs on disk
    for each layer, last to first:
        for each sample: g = dL/dW of the mean cross-entropy L of its response
        s_ij  = mean over samples of |g_ij|
        score = |W_ij| * s_ij
        W_ij  = 0                                       where the score is least in the matrix

`pruning/gradients.py` takes the gradients, `pruning/masks.py` finds the least scores.

Lee et al. (2019, arXiv 1810.02340), who named it, take the absolute value of the sum over samples,
so that samples which disagree cancel, and let the weights of the whole network compete; here those
of a row or a matrix do.
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
    """|W| times the mean size of its gradient, to first order the loss that removing it costs."""

    name, label, settings_type = "snip", "SNIP", SnipSettings

    def accumulate(self, dy: Tensor, x: Tensor) -> Tensor:
        """The sum over samples of |dL/dW|, from `[B, T, out]` and `[B, T, in]`."""
        first, *rest = (product(one, inputs).abs_() for one, inputs in zip(dy, x, strict=True))
        for magnitude in rest:
            first.add_(magnitude)
        return first

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """|W_ij| s_ij."""
        return weight.float().abs().mul_(statistic)


PLUGIN = Snip()
