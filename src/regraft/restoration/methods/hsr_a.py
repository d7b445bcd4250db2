"""HSR-a, the paper's ablation: everything that pruning took from the chosen heads is restored."""

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
    """HSR-a: whole heads."""

    method: Literal["hsr-a"] = "hsr-a"


class HSRAMethod(Method[HSRASettings]):
    """See the module."""

    name, settings_type = "hsr-a", HSRASettings

    def needs(self, settings: HSRASettings) -> Needs:
        """Scored heads."""
        return settings.of_heads

    def rank(self, settings: HSRASettings, context: Context) -> Ranking:
        """All weights of the heads, in the order of the network."""
        heads = settings.chosen(context.dense.architecture, context.heads)
        regions = regions_of(context.dense, heads)
        best = Best(context.count)
        for one in context.matrices():
            best.add(one.index, everything(one.free, regions(one.linear)))
        return best.ranked(heads)

    def label(self, settings: HSRASettings) -> str:
        return f"HSR-A, {settings.heads_label}"

    def space(self, settings: HSRASettings, dense: Source, kept: float) -> Space:
        return settings.heads_space(dense.architecture)


def everything(free: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The same score, 1, for every pruned weight of the regions; -inf elsewhere. `[out, in]`."""
    chosen = free & inside(free.shape, blocks, free.device)
    return torch.full(free.shape, -torch.inf, device=free.device).masked_fill_(chosen, 1.0)


PLUGIN = HSRAMethod()
