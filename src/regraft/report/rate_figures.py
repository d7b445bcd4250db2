"""Figures of rates: the trade-off, the search on validation prompts, Ships and lost safety."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from regraft.evaluation.results import Estimate
from regraft.evaluation.tradeoff import Searched
from regraft.report.drawing import INK, LOOKS, PAPER, RULE, SERIES, ceiling, panels_svg, to_svg
from regraft.report.study import Study, Table
from regraft.report.tables import look_of, name_of

_COLOURS = dict(zip(("dense", "pruned", "realigned", "control"), SERIES, strict=True))
_COLOURS |= {f"of-{number}": colour for number, colour in enumerate(SERIES, start=1)}
Item = TypeVar("Item")
_LEAST = 0.01  # restored per 10,000, for the smallest circle
_DECADES = tuple(_LEAST * 10**decade for decade in range(5))  # sizes that a legend may show


@dataclass(frozen=True)
class _Model:
    """One model of a panel; `share` is restored weights per 10,000, None if there are none."""

    number: int
    name: str
    colour: str
    asr: Estimate
    over_refusal: Estimate
    share: float | None

    @property
    def marker(self) -> str:
        return "s" if self.share is None else "o"


def trade_off_figure(study: Study) -> str:
    """Over-refusal (across) against ASR (up), one panel per pruning.

    Models have the numbers and colours of their table. The area of a circle shows the share of
    restored weights, on a log scale; models without restored weights are squares. Empty text if no
    model has both rates.
    """
    drawn = {table.name: points for table in study.tables if (points := [*_points(table)])}
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    names = dict.fromkeys((one.number, one.name, one.colour, one.marker) for one in every)
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", ms=5.5, label=f"{number}  {name}")
        for number, name, colour, marker in sorted(names)
    ]
    handles += _sizes([one.share for one in every if one.share is not None])
    rates = [(one.asr, one.over_refusal) for one in every]
    across = "over-refusal, % (lower is better)"
    return _planes("Over-refusal against ASR", drawn, _cross, rates, across, handles)


def _planes(
    title: str,
    drawn: Mapping[str, Sequence[Item]],
    draw: Callable[[Axes, Item], None],
    rates: Sequence[tuple[Estimate, Estimate]],
    across: str,
    handles: Sequence[Line2D],
) -> str:
    """Panels of ASR (up) and the rate `across`; both axes start at 0 and fit all `rates`."""
    up, right = zip(*rates, strict=True)
    frame = {"xlim": (0, ceiling(right)), "ylim": (0, ceiling(up))}

    def panel(items: Sequence[Item], axes: Axes) -> None:
        for item in items:
            draw(axes, item)
        axes.set(**frame, ylabel="ASR, % (lower is safer)")

    panels = [(name if len(drawn) > 1 else "", partial(panel, one)) for name, one in drawn.items()]
    return panels_svg(title, panels, across, handles)


def _points(table: Table) -> Iterator[_Model]:
    for number, row in enumerate(table.rows, start=1):
        if row.asr and row.over_refusal:
            name = "pruned" if row.role == "pruned" else name_of(row)
            colour = _COLOURS.get(look_of(row, number), SERIES[-1])
            share = row.restored.mean if row.restored else None
            yield _Model(number, name, colour, row.asr, row.over_refusal, share)


def marker_size(share: float) -> float:
    """The diameter in points: the area grows by a constant for every tenfold share."""
    return 8 * math.sqrt(1 + 0.8 * math.log10(max(share, _LEAST) / _LEAST))


def _sizes(shares: Sequence[float]) -> list[Line2D]:
    """Legend entries: circles of round shares, up to the first that is not below all `shares`."""
    if not shares:
        return []
    smaller = sum(one < max(shares) for one in _DECADES)
    shown = _DECADES[: smaller + 1]
    look: dict[str, Any] = {"color": INK, "marker": "o", "mfc": "none", "mew": 0.6, "ls": ""}
    return [
        Line2D([], [], **look, ms=marker_size(one), label=f"{one:g} per 10,000 restored")
        for one in shown
    ]


def _cross(axes: Axes, model: _Model) -> None:
    """Draw a model's two intervals, and its number where they cross."""
    colour, asr, over = model.colour, model.asr, model.over_refusal
    x, y = 100 * over.value, 100 * asr.value
    axes.plot([100 * over.low, 100 * over.high], [y, y], color=colour, lw=0.7, alpha=0.4)
    axes.plot([x, x], [100 * asr.low, 100 * asr.high], color=colour, lw=0.7, alpha=0.4)
    size = 8 if model.share is None else marker_size(model.share)
    order = 3 - size / 100  # large circles must not hide small ones
    look: dict[str, Any] = {"marker": model.marker, "color": colour, "mec": PAPER, "mew": 0.6}
    axes.plot(x, y, **look, ms=size, zorder=order, clip_on=False)
    axes.annotate(
        str(model.number), (x, y), color=PAPER, ha="center", va="center", size=6.5, zorder=4
    )


def curve_figure(tables: Sequence[Table]) -> str:
    """Validation results of each method, one panel per pruning.

    For every curve a line joins the points in order of restored weights. The chosen point has a
    ring, the bound on over-refusal is dotted, and a star is the dense model. Empty text if there is
    no curve.
    """
    drawn = {
        table.name: curves
        for table in tables
        if (curves := [(row.name, one) for row in table.methods for one in row.curves])
    }
    if not drawn:
        return ""
    every = [named for curves in drawn.values() for named in curves]
    looks = dict(zip(dict.fromkeys(name for name, _ in every), cycle(LOOKS)))
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=dashes, lw=0.9, ms=3.5, label=name)
        for name, (colour, marker, dashes) in looks.items()
    ]
    handles += [
        Line2D([], [], color=INK, marker="o", mfc="none", ls="", ms=8, mew=0.9, label="chosen"),
        Line2D([], [], color=INK, marker="*", ls="", ms=7, label="dense"),
    ]

    def draw(axes: Axes, named: tuple[str, Searched]) -> None:
        name, curve = named
        _draw_curve(axes, curve, looks[name])

    points = [point for _, curve in every for point in (curve.dense, *curve.points)]
    rates = [(one.asr, one.over_refusal) for one in points]
    across = "over-refusal on validation prompts, %"
    return _planes("Validation curves", drawn, draw, rates, across, handles)


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


def relation_figure(points: Sequence[tuple[str, float, float]]) -> str:
    """Models by (name, total Ships in radians, rise in ASR as a fraction)."""

    def draw(axes: Any) -> None:
        width = max(ships for _, ships, _ in points) * 1.15 or 1
        rises = [100 * rise for _, _, rise in points]
        low, high = min(0.0, min(rises) * 1.2), max(5.0, max(rises) * 1.2)
        for (name, ships, _), rise in zip(points, rises, strict=True):
            axes.scatter(ships, rise, s=22, color=LOOKS[1][0], zorder=3)
            axes.annotate(name, (ships, rise), (5, 5), textcoords="offset points", size=7.5)
        axes.set(xlim=(0, width), ylim=(low, high))
        axes.set(xlabel="total Ships, radians", ylabel="rise in ASR by pruning, points")
        axes.grid(color=RULE)

    return to_svg(2.8, "Total Ships against the rise in ASR", draw)
