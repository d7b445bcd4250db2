"""Wanda (Sun et al. 2024, arXiv 2306.11695): |W_ij| * ||X_:,j||_2.

    for each layer, first to last:
        s_j   = sum over response tokens of x_j^2       for the inputs x of each of its linears
        score = |W_ij| * sqrt(s_j)
        W_ij  = 0                                       where the score is lowest in row i
        run the pruned layer: its outputs are the next layer's inputs

Weights compete within a row, which the paper found better for language models than competing
within the matrix. Since the score is |W| scaled by column, only s is stored: `in` floats per matrix
(9 MB for D^s and D^u together on a 7B model). `pruning/prune.py` has the loop over layers,
`pruning/masks.py` finds the lowest scores.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from regraft.pruning.base import CalibratedSettings, InputPruner, LayerwiseSettings


class WandaSettings(LayerwiseSettings, CalibratedSettings):
    """Settings of Wanda."""

    method: Literal["wanda"] = "wanda"


class Wanda(InputPruner):
    """|W| times the norm of its inputs."""

    name, label, settings_type = "wanda", "Wanda", WandaSettings
    every_linear = True

    def accumulate(self, inputs: Tensor) -> Tensor:
        """s_j: sum over tokens of squared inputs `[tokens, in]`, `[in]` float32."""
        return inputs.float().square().sum(dim=0)

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """|W_ij| sqrt(s_j), `[out, in]` float32."""
        return weight.float().abs().mul_(statistic.sqrt())


PLUGIN = Wanda()
