"""HSR-a, the paper's ablation: everything that pruning took from the chosen heads is restored."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from regraft.models.architecture import LinearArchitecture
from regraft.models.load import Source
from regraft.restoration.base import Context, Method, MethodSettings, Needs, Space
from regraft.restoration.methods.hsr import InHeads, chosen_heads, heads_space, regions_of
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import everything


class HSRASettings(InHeads):
    """HSR-a: whole heads."""

    method: Literal["hsr-a"] = "hsr-a"


class HSRAMethod(Method[HSRASettings]):
    """HSR-a, the paper's ablation: everything that pruning took from the heads."""

    name: ClassVar[str] = "hsr-a"
    Settings: ClassVar[type[MethodSettings]] = HSRASettings

    def needs(self, settings: HSRASettings) -> Needs:
        """Scored heads."""
        return settings.of_heads

    def rank(self, settings: HSRASettings, context: Context) -> Ranking:
        """All weights of the heads, in the order of the network."""
        heads = chosen_heads(context.dense, settings, context.heads)
        regions = regions_of(context.dense, heads)

        def score(_index: int, linear: LinearArchitecture, _weight: Tensor, free: Tensor) -> Tensor:
            return everything(free, regions(linear))

        return context.rank_by(score, heads)

    def label(self, settings: HSRASettings) -> str:
        """What tables call it."""
        return f"HSR-A, {settings.heads_label}"

    def space(self, settings: HSRASettings, dense: Source, kept: float) -> Space:
        """How many heads, and by what they are chosen."""
        return heads_space(settings, dense)


PLUGIN = HSRAMethod()
