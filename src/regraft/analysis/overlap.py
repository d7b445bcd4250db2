"""Overlap of the weights that matter for safety and for utility: Jaccard's index per layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.analysis import write_new
from regraft.disk.files import require_new
from regraft.errors import RegraftError
from regraft.models.load import Source
from regraft.progress import Progress
from regraft.pruning.statistics import SavedStatistics, load_statistics
from regraft.report.drawing import LOOKS, to_svg
from regraft.restoration.importance import RankingScope, top


@dataclass(frozen=True)
class LayerOverlap:
    """Number of weights of a layer in the top share of both importances, and of either."""

    layer: int
    shared: int
    either: int

    @property
    def jaccard(self) -> float:
        """Jaccard's index, in [0, 1]; 1 if both select the same weights."""
        return self.shared / self.either


def write_overlap(
    dense: Source,
    statistics_file: Path,
    shares: Sequence[float],
    scope: RankingScope,
    out: Path,
    progress: Progress,
) -> dict[float, tuple[LayerOverlap, ...]]:
    """Compute the overlap per layer at several shares.

    Writes overlap.json and overlap.svg to the new folder `out`.

    Raises:
        RegraftError: the statistics are of another model, or a share is not in (0, 1].
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise RegraftError(f"Shares must be above 0 and at most 1; got {list(shares)}.")
    require_new(out)
    statistics = load_statistics(statistics_file)
    if statistics.about["inputs"]["dense"] != dense.checkpoint.fingerprint:
        raise RegraftError(f"{statistics_file} was made from another model than {dense.folder}.")
    found: dict[float, list[LayerOverlap]] = {share: [] for share in sorted(set(shares))}
    layers = len(dense.architecture.layers)
    with progress.task("Comparing importance", layers * len(found), "layers x shares") as done:
        for share, of_share in found.items():
            for one in overlaps(dense, statistics, share, scope):
                of_share.append(one)
                done(1)
    if not all(found.values()):
        raise RegraftError(f"{statistics_file} holds no statistics of this model's layers.")
    content = {
        "score": statistics.safety.method,
        "scope": scope,
        "shares": [
            {
                "share": share,
                "by_chance": by_chance(share),
                "layers": [{**asdict(one), "jaccard": one.jaccard} for one in of_share],
            }
            for share, of_share in found.items()
        ],
    }
    write_new(out, "overlap", content, _figure(found))
    return {share: tuple(of_share) for share, of_share in found.items()}


def overlaps(
    dense: Source, statistics: SavedStatistics, share: float, scope: RankingScope = "matrix"
) -> Iterator[LayerOverlap]:
    """Compare the top `share` of every weight matrix by importance on D^s and on D^u.

    One weight matrix is in memory at a time. Matrices without statistics are left out: those of
    layers that did not run on the calibration data, and those whose statistics are not kept.

    Args:
        share: Above 0, at most 1.
        scope: Weights compete within their row or their matrix.
    """
    safety, utility = statistics.safety, statistics.utility
    for layer in dense.architecture.layers:
        shared = either = 0
        for linear in layer.linears:
            if not (linear.key in safety.values and linear.key in utility.values):
                continue
            weight = dense.weight(linear)
            by_safety, by_utility = (
                top(one.scorer(linear, weight)(slice(None)), share, scope, ())
                for one in (safety, utility)
            )
            shared += int((by_safety & by_utility).sum())
            either += int((by_safety | by_utility).sum())
        if either:
            yield LayerOverlap(layer.index, shared, either)


def by_chance(share: float) -> float:
    """Expected Jaccard's index of two independent random choices of a `share` of many weights."""
    return share / (2 - share)


def _figure(found: Mapping[float, Sequence[LayerOverlap]]) -> str:
    """Plot Jaccard's index by layer, a line per share, with chance dotted in the same colour."""

    def draw(axes: Any) -> None:
        for (share, layers), (colour, marker, line) in zip(found.items(), LOOKS, strict=False):
            x, y = [one.layer for one in layers], [one.jaccard for one in layers]
            style = {"color": colour, "marker": marker, "ls": line, "ms": 3.5, "lw": 1.2}
            axes.plot(x, y, label=f"top {100 * share:g} %", **style)
            axes.axhline(by_chance(share), color=colour, lw=0.8, ls=":")
        axes.set(ylim=(0, 1), xlabel="layer", ylabel="Jaccard's index")
        axes.grid(axis="y")
        axes.legend(loc="best")

    return to_svg(2.8, "Weights that matter for safety and utility alike, by layer", draw)
