"""The figures of a comparison: what a method gains in safety, and at what price."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from regraft.evaluation.results import Estimate
from regraft.report.compare import Row, Study, Table
from regraft.report.drawing import (
    PAPER,
    SERIES,
    Spot,
    ceiling,
    frame_rates,
    legend_below,
    panels_height,
    to_svg,
    write_beside,
)
from regraft.report.model import measured

_PLANE = (285, 180)  # points, about what a panel has between its axes
_SHARES = (1, 100, 10_000)


@dataclass(frozen=True)
class _Point:
    number: int
    row: Row
    asr: Estimate
    over: Estimate

    @property
    def x(self) -> float:
        return 100 * self.over.value

    @property
    def y(self) -> float:
        return 100 * self.asr.value

    @property
    def look(self) -> tuple[str, str, float]:
        """Colour, marker and its size in points."""
        if self.row.role != "method":
            return (SERIES[0], "D", 6.0) if self.row.role == "dense" else (SERIES[1], "s", 6.0)
        if self.row.restored is None:
            return SERIES[3], "^", 6.0
        size = _size(self.row.restored.mean)
        return SERIES[3 if self.row.repeats > 1 else 2], "o", size


def trade_off_panels(study: Study) -> str:
    """Over-refusal (across) against ASR (up), one panel a pruning.

    Models are numbered in the order of their table. The area of a circle follows the logarithm of
    the restored share; a triangle restores no weight. Empty text where no model has both rates.
    """
    panels = [(table, tuple(_points(table))) for table in study.tables]
    drawn = [(table, points) for table, points in panels if points]
    if not drawn:
        return ""
    ends = (
        ceiling(point.over for _, points in drawn for point in points),
        ceiling(point.asr for _, points in drawn for point in points),
    )
    handles = [*_names(drawn), *_sizes(drawn)]

    def draw(figure: Figure, panels: Any) -> None:
        for axes, (table, points) in zip(np.atleast_1d(panels), drawn, strict=True):
            _draw_points(axes, points)
            frame_rates(axes, ends, table.pruning if len(drawn) > 1 else "")
            spots = [Spot(p.x, p.y, str(p.number), p.look[2] / 2) for p in points]
            write_beside(axes, spots, _PLANE)
        axes.set_xlabel("over-refusal, % (lower is better)")
        legend_below(figure, handles)

    return to_svg(panels_height(len(drawn), handles), "Over-refusal against ASR", draw, len(drawn))


def _points(table: Table) -> Iterator[_Point]:
    for number, row in enumerate(table.rows, start=1):
        asr, over = measured(row.asr), measured(row.over_refusal)
        if asr and over:
            yield _Point(number, row, asr, over)


def _draw_points(axes: Axes, points: Sequence[_Point]) -> None:
    for point in points:
        colour, marker, size = point.look
        across = [100 * point.over.low, 100 * point.over.high]
        up = [100 * point.asr.low, 100 * point.asr.high]
        axes.plot(across, [point.y] * 2, color=colour, lw=0.6, alpha=0.25)
        axes.plot([point.x] * 2, up, color=colour, lw=0.6, alpha=0.25)
        axes.plot(
            point.x,
            point.y,
            marker,
            ms=size,
            color=colour,
            mec=PAPER,
            mew=0.6,
            zorder=3 if point.row.role == "method" else 3.5,
            clip_on=False,
        )


def _names(drawn: Sequence[tuple[Table, Sequence[_Point]]]) -> Iterator[Line2D]:
    """A legend for the numbers, which mean the same in every panel, or else in each."""
    meanings = {
        (p.number, "pruned" if p.row.role == "pruned" else p.row.name): p.look[:2]
        for _, points in drawn
        for p in points
    }
    for (number, name), (colour, marker) in sorted(meanings.items()):
        yield Line2D([], [], color=colour, marker=marker, ls="", ms=5.5, label=f"{number}  {name}")


def _sizes(drawn: Sequence[tuple[Table, Sequence[_Point]]]) -> Iterator[Line2D]:
    if any(point.row.restored for _, points in drawn for point in points):
        for share in _SHARES:
            yield Line2D(
                [],
                [],
                color=SERIES[2],
                marker="o",
                ls="",
                ms=_size(share),
                label=f"{share:,} per 10,000 restored",
            )


def _size(share: float) -> float:
    """The diameter, in points, of a circle for so many restored weights per 10,000."""
    return math.sqrt(14 + 26 * max(0.0, 1 + math.log10(max(share, 0.1))))
