"""Wanda (Sun et al. 2024, arXiv 2306.11695): |W_ij| * ||X_:,j||_2.

The score is rank one, so only the input norms are kept: `in` floats a weight matrix.
"""

from __future__ import annotations

from torch import Tensor


def sum_of_squares(inputs: Tensor) -> Tensor:
    """Add up squared inputs over tokens: `[tokens, in]` -> `[in]`, float32."""
    return inputs.float().square().sum(dim=0)


def wanda_score(weight: Tensor, input_squares: Tensor) -> Tensor:
    """Wanda's importance of every weight.

    Args:
        weight: `[out, in]`, any float dtype.
        input_squares: Sum over response tokens of squared inputs, `[in]`, float32.

    Returns:
        `[out, in]`, float32.
    """
    return weight.float().abs().mul_(input_squares.sqrt())
