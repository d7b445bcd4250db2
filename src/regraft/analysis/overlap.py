"""Which weights matter for safety and for utility alike: Jaccard's index, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from regraft.models.load import Source
from regraft.pruning.statistics import SavedStatistics
from regraft.restoration.methods.hsr import RankingScope, top


@dataclass(frozen=True)
class LayerOverlap:
    """Weights of a layer among the top of both, and among the top of either."""

    layer: int
    shared: int
    either: int

    @property
    def jaccard(self) -> float:
        """In [0, 1]; 1 if both take the same weights."""
        return self.shared / self.either


def overlaps(
    dense: Source, statistics: SavedStatistics, share: float, scope: RankingScope = "matrix"
) -> Iterator[LayerOverlap]:
    """Take the top `share` of every weight matrix by importance on D^s and on D^u.

    One weight matrix is in memory at a time. Matrices without statistics, of layers that did not
    run on the calibration data or that the method keeps none of, are left out.

    Args:
        dense: The dense checkpoint.
        statistics: From `regraft analyse statistics`.
        share: Above 0, at most 1.
        scope: Weights compete within their row or their matrix.
    """
    safety, utility = statistics.safety, statistics.utility
    for layer in dense.architecture.layers:
        shared = either = 0
        for linear in layer.linears:
            if not (linear.key in safety.values and linear.key in utility.values):
                continue
            weight = dense.checkpoint.read(linear.tensor)
            by_safety, by_utility = (
                top(one.scorer(linear, weight)(slice(None)), share, scope, ())
                for one in (safety, utility)
            )
            shared += int((by_safety & by_utility).sum())
            either += int((by_safety | by_utility).sum())
        if either:
            yield LayerOverlap(layer.index, shared, either)


def by_chance(share: float) -> float:
    """Jaccard's index of two independent choices of a `share` of many weights."""
    return share / (2 - share)
