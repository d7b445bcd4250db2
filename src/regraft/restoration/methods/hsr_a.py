"""HSR-a, an ablation in the HSR paper: restore every pruned weight of the chosen heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from regraft.models.architecture import Block
from regraft.models.load import Source
from regraft.restoration.base import Context, Method, Needs, Space
from regraft.restoration.ranking import Best, Ranking
from regraft.restoration.selection import InHeads, inside, regions_of


class HSRASettings(InHeads):
    """HSR-a: every pruned weight of the chosen heads."""

    method: Literal["hsr-a"] = "hsr-a"


class HSRAMethod(Method[HSRASettings]):
    """See the module."""

    name, settings_type = "hsr-a", HSRASettings

    def needs(self, settings: HSRASettings) -> Needs:
        """Head scores."""
        return settings.of_heads

    def rank(self, settings: HSRASettings, context: Context) -> Ranking:
        """All pruned weights of the heads, in network order."""
        heads = settings.chosen(context.dense.architecture, context.heads)
        regions = regions_of(context.dense, heads)
        best = Best(context.count)
        for one in context.matrices():
            best.add(one.index, everything(one.free, regions(one.linear)))
        return best.ranked(heads)

    def label(self, settings: HSRASettings) -> str:
        return f"HSR-a, {settings.heads_label}"

    def space(self, settings: HSRASettings, dense: Source, kept: float) -> Space:
        return settings.heads_space(dense.architecture)


def everything(free: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Score 1 for every restorable weight in the regions, -inf elsewhere. `[out, in]` float32."""
    chosen = free & inside(free.shape, blocks, free.device)
    return torch.full(free.shape, -torch.inf, device=free.device).masked_fill_(chosen, 1.0)


PLUGIN = HSRAMethod()
