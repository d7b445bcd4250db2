"""The figures of rates: the trade-off, the search on validation prompts, sparsities, categories."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from regraft.evaluation.results import Estimate
from regraft.evaluation.tradeoff import Searched
from regraft.report.drawing import (
    INK,
    LOOKS,
    PAPER,
    RULE,
    SERIES,
    Spot,
    ceiling,
    frame_rates,
    legend_below,
    panels_height,
    to_svg,
    write_beside,
)
from regraft.report.study import Row, Study, Table, measured
from regraft.report.tables import name_of

_PLANE = (285, 180)  # points, about what a panel has between its axes
_SHARES = (1, 100, 10_000)
_HATCHES = ("", "////", "|||")
_RATES = {"asr": "ASR, %", "over_refusal": "over-refusal, %", "utility": "utility, %"}


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
        if self.row.role == "other":
            return SERIES[min(self.number, len(SERIES)) - 1], "o", 6.0
        if self.row.role != "method":
            return (SERIES[0], "D", 6.0) if self.row.role == "dense" else (SERIES[1], "s", 6.0)
        if self.row.restored is None:
            return SERIES[3], "^", 6.0
        return SERIES[3 if self.row.drawn else 2], "o", _size(self.row.restored.mean)


def trade_off_figure(study: Study) -> str:
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
            frame_rates(axes, ends, table.name if len(drawn) > 1 else "")
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
        (p.number, "pruned" if p.row.role == "pruned" else name_of(p.row)): p.look[:2]
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


def curve_figure(tables: Sequence[Table]) -> str:
    """Validation results of each method by restored weights, one panel a pruning.

    A line goes through a method's points in the order of restored weights, one for every curve. The
    chosen point has a ring, the bound of over-refusal is dotted, and a star is the dense model.
    Empty text where there is no curve.
    """
    drawn = [
        (table.name, [(name, one) for name, curves in table.curves.items() for one in curves])
        for table in tables
        if table.curves
    ]
    if not drawn:
        return ""
    every = [named for _, curves in drawn for named in curves]
    looks = dict(zip(dict.fromkeys(name for name, _ in every), cycle(LOOKS)))
    points = [point for _, curve in every for point in (curve.dense, *curve.points)]
    ends = ceiling(one.over_refusal for one in points), ceiling(one.asr for one in points)
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=dashes, lw=0.9, ms=3.5, label=name)
        for name, (colour, marker, dashes) in looks.items()
    ]
    handles += [
        Line2D([], [], color=INK, marker="o", mfc="none", ls="", ms=8, mew=0.9, label="chosen"),
        Line2D([], [], color=INK, marker="*", ls="", ms=7, label="dense"),
    ]

    def draw(figure: Figure, planes: Any) -> None:
        for axes, (title, curves) in zip(np.atleast_1d(planes), drawn, strict=True):
            for name, curve in curves:
                _draw_curve(axes, curve, looks[name])
            frame_rates(axes, ends, title if len(drawn) > 1 else "")
        axes.set_xlabel("over-refusal on validation prompts, %")
        legend_below(figure, handles)

    return to_svg(panels_height(len(drawn), handles), "Validation curves", draw, len(drawn))


def _draw_curve(axes: Axes, curve: Searched, look: tuple[str, str, str]) -> None:
    colour, marker, dashes = look
    points = sorted(curve.points, key=lambda point: point.restored)
    across = [100 * point.over_refusal.value for point in points]
    up = [100 * point.asr.value for point in points]
    axes.plot(
        across, up, color=colour, marker=marker, ls=dashes, lw=0.9, ms=3.5, mec=PAPER, mew=0.4
    )
    axes.axvline(100 * curve.bounds.over_refusal, color=colour, ls=":", lw=0.8, alpha=0.7)
    dense = 100 * curve.dense.over_refusal.value, 100 * curve.dense.asr.value
    axes.plot(*dense, "*", ms=7, color=INK, zorder=3.5, clip_on=False)
    for point, x, y in zip(points, across, up, strict=True):
        if point.restored == curve.chosen:
            axes.plot(x, y, "o", ms=9, mfc="none", mec=INK, mew=0.9, zorder=4, clip_on=False)


def sparsity_figure(tables: Sequence[Table]) -> str:
    """ASR, over-refusal and utility of prunings of one series by sparsity, with 95 % bands.

    One line for the pruned models and one for each way of realigning them; the dense model is a
    level. Empty text where fewer than two sparsities were measured.
    """
    lines: dict[str, list[tuple[float, Row]]] = {}
    for table in tables:
        for row in table.rows[1:]:
            way = "pruned" if row.role == "pruned" else row.name
            lines.setdefault(way, []).append((100 * table.rows[1].sparsity, row))
    sparsities = sorted({x for line in lines.values() for x, _ in line})
    dense = tables[0].rows[0]
    rates = [one for one in _RATES if measured(getattr(dense, one))]
    if len(sparsities) < 2 or not rates:
        return ""
    looks = dict(zip(lines, cycle(LOOKS[1:])))

    def draw(figure: Figure, panels: Any) -> None:
        for axes, rate in zip(np.atleast_1d(panels), rates, strict=True):
            level = getattr(dense, rate)
            axes.axhspan(100 * level.low, 100 * level.high, color=SERIES[0], alpha=0.12, lw=0)
            axes.axhline(100 * level.value, color=SERIES[0], lw=1, ls="--", label="dense")
            for way, line in lines.items():
                _line_with_band(axes, sorted(line, key=itemgetter(0)), rate, way, looks[way])
            axes.set(ylabel=_RATES[rate])
            axes.set_ylim(bottom=0)
            axes.grid()
        axes.set(xlabel="sparsity, % of the prunable weights", xticks=sparsities)
        axes.set_xticklabels([f"{x:.3g}" for x in sparsities])
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left")

    height = 0.8 + 1.6 * len(rates) + 0.19 * len(lines)
    return to_svg(height, f"{tables[0].series}: rates by sparsity", draw, len(rates))


def _line_with_band(
    axes: Axes,
    line: Sequence[tuple[float, Row]],
    rate: str,
    label: str,
    look: tuple[str, str, str],
) -> None:
    colour, marker, dashes = look
    found = [(x, e) for x, row in line if (e := measured(getattr(row, rate)))]
    x = [x for x, _ in found]
    low, value, high = (
        [100 * getattr(e, end) for _, e in found] for end in ("low", "value", "high")
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.plot(x, value, color=colour, marker=marker, ms=4, lw=1.3, ls=dashes, label=label)


def category_figure(rows: Sequence[Row]) -> str:
    """ASR by harm category with 95 % intervals, for the first three rows.

    Empty text where no category was measured.
    """
    shown = rows[: len(_HATCHES)]
    names = sorted({name for one in shown for name in one.by_category})
    if not names:
        return ""
    bar = 0.8 / len(shown)

    def draw(figure: Figure, axes: Axes) -> None:
        for i, row in enumerate(shown):
            _category_bars(axes, names, row, i, bar, (i - (len(shown) - 1) / 2) * bar)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="ASR, % of the prompts")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        abreast = sum(len(one.label) for one in shown) <= 45
        figure.legend(loc="outside upper left", ncols=len(shown) if abreast else 1)

    return to_svg(1.1 + len(names) * (0.12 + 0.12 * len(shown)), "ASR by harm category", draw)


def _category_bars(
    axes: Axes, names: Sequence[str], row: Row, i: int, bar: float, offset: float
) -> None:
    rates = row.by_category
    found = [
        (place, rate) for place, name in enumerate(names) if (rate := measured(rates.get(name)))
    ]
    axes.barh(
        [place + offset for place, _ in found],
        [100 * rate.value for _, rate in found],
        height=0.9 * bar,
        color=SERIES[i],
        edgecolor=PAPER,
        hatch=_HATCHES[i],
        linewidth=0,
        label=row.label,
    )
    for place, rate in found:
        ends = (100 * rate.low, 100 * rate.high)
        axes.plot(ends, [place + offset] * 2, color=PAPER, lw=2.2, solid_capstyle="butt")
        axes.plot(ends, [place + offset] * 2, color=INK, lw=0.9, solid_capstyle="butt")


def relation_figure(points: Sequence[tuple[str, float, float]]) -> str:
    """Each model's rise in ASR by its total Ships, with its name beside it.

    Args:
        points: (name, total Ships in radians, rise in ASR as a fraction) of each.
    """

    def draw(_figure: Any, axes: Any) -> None:
        width = max(ships for _, ships, _ in points) * 1.15 or 1
        rises = [100 * rise for _, _, rise in points]
        low, high = min(0.0, min(rises) * 1.2), max(5.0, max(rises) * 1.2)
        spots = [Spot(ships, 100 * rise, name) for name, ships, rise in points]
        axes.scatter([s.x for s in spots], [s.y for s in spots], s=22, color=LOOKS[1][0], zorder=3)
        axes.set(xlim=(0, width), ylim=(low, high))
        axes.set(xlabel="total Ships, radians", ylabel="rise in ASR by pruning, points")
        axes.grid(color=RULE)
        write_beside(axes, spots, (270, 150))

    return to_svg(2.8, "Total Ships against the rise in ASR", draw)
