"""The figure of searches: what each method gains and costs by the weights that it restores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from regraft.evaluation.tradeoff import Searched
from regraft.report.drawing import (
    INK,
    LOOKS,
    PAPER,
    ceiling,
    frame_rates,
    legend_below,
    panels_height,
    to_svg,
)

Named = tuple[str, Searched]  # of a method
CURVES_CAPTION = (
    "Validation: the points of every method, from the pruned model on by restored weights. "
    "Dotted: the bound of over-refusal."
)


def curve_figure(panels: Sequence[tuple[str, Sequence[Named]]]) -> str:
    """Validation results of each method by restored weights, one panel a pruning.

    A line goes through a method's points in the order of restored weights, one for every curve. The
    chosen point has a ring, the bound of over-refusal is dotted, and a star is the dense model.
    Empty text where there is no curve.

    Args:
        panels: Name and curves of every pruning; those without curves are left out.
    """
    drawn = [(name, curves) for name, curves in panels if curves]
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
