"""Wanda (Sun et al. 2024, arXiv 2306.11695): |W_ij| * ||X_:,j||_2.

    for each layer, first to last:
        s_j   = sum over response tokens of x_j^2       for the inputs x of each of its linears
        score = |W_ij| * sqrt(s_j)
        W_ij  = 0                                       where the score is least in row i
        run the pruned layer: its outputs are the next layer's inputs

Weights compete within a row: the paper found that better for language models than a whole matrix.
The score is rank one, so that only s is kept: `in` floats a weight matrix (9 MB for D^s and D^u
together on a 7B model). `pruning/prune.py` goes from layer to layer, `pruning/masks.py` finds the
least scores.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from regraft.pruning.base import CalibratedSettings, InputPruner, LayerwiseSettings


class WandaSettings(LayerwiseSettings, CalibratedSettings):
    """Settings of Wanda."""

    method: Literal["wanda"] = "wanda"


class Wanda(InputPruner):
    """|W| times the norm of what it is fed."""

    name, label, settings_type = "wanda", "Wanda", WandaSettings
    every_linear = True

    def accumulate(self, inputs: Tensor) -> Tensor:
        """s_j: squared inputs `[tokens, in]` added up over tokens, `[in]` float32."""
        return inputs.float().square().sum(dim=0)

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """|W_ij| sqrt(s_j), `[out, in]` float32."""
        return weight.float().abs().mul_(statistic.sqrt())


PLUGIN = Wanda()
