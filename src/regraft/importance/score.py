"""The importance of every weight under each method, from one statistic a weight matrix.

Every score is a power of the weight times a statistic of the calibration data, so that statistics
are stored instead of scores: `in` floats a matrix for Wanda and SparseGPT, `[out, in]` for SNIP.

    method     score                  statistic
    wanda      |W_ij| * sqrt(s_j)     s_j = sum of squared inputs
    sparsegpt  W_ij^2 * s_j           s_j = 1 / U_jj^2, U the upper Cholesky factor of H^-1
    snip       |W_ij| * s_ij          s_ij = mean over samples of |dL/dW_ij|
    magnitude  |W_ij|                 none
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from regraft.importance.sparsegpt import sparsegpt_score
from regraft.importance.wanda import wanda_score

Method = Literal["wanda", "sparsegpt", "snip", "magnitude"]


def score(method: Method, weight: Tensor, statistic: Tensor | None) -> Tensor:
    """Importance of every weight.

    Args:
        method: The criterion.
        weight: `[out, in]`, any float dtype, or some rows of it.
        statistic: `[in]`, or `[out, in]` (the same rows) for SNIP, float32, on the weight's
            device; None for magnitude.

    Returns:
        `[out, in]` float32, not negative.
    """
    if method == "magnitude":
        return weight.float().abs()
    assert statistic is not None, f"{method} needs a statistic"
    if method == "wanda":
        return wanda_score(weight, statistic)
    if method == "sparsegpt":
        return sparsegpt_score(weight, statistic)
    return weight.float().abs().mul_(statistic)
