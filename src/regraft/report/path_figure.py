"""The figure of paths of gain: losses on calibration and held-out prompts by restored weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from regraft.report.drawing import PAPER, SERIES, legend_below, panels_height, to_svg
from regraft.restoration.methods.gain.path import GainPath

Points = tuple[tuple[int, float], ...]  # (weights restored, loss in nats)
_HELD_OUT, _CALIBRATION, _TRY = SERIES[2], SERIES[0], SERIES[3]
_MOST_TICKS = 6
_HEADROOM = 1.25  # of the highest loss on a line


def path_figure(panels: Sequence[tuple[str, Sequence[GainPath]]]) -> str:
    """Losses along paths, one panel a method and one pair of lines a path (a calibration seed).

    Weights are on an axis that is linear up to the least number above 0 and logarithmic from there
    on, since line searches try numbers many times as large as those taken. Empty text where there
    is no path.

    Args:
        panels: Title and paths; those without paths are left out.
    """
    drawn = [(title, paths) for title, paths in panels if paths]
    if not drawn:
        return ""
    handles = [
        Line2D([], [], color=_HELD_OUT, marker="o", lw=0.9, ms=3.5, label="held out"),
        Line2D(
            [], [], color=_CALIBRATION, marker="s", ls="--", lw=0.9, ms=3.5, label="calibration"
        ),
        Line2D([], [], color=_TRY, marker="o", ls="", ms=3, alpha=0.5, label="tried, held out"),
    ]
    counts = [count for _, paths in drawn for path in paths for count, _ in every_point(path)]
    least, most = min((count for count in counts if count), default=1), max(1, *counts)

    def draw(figure: Figure, planes: Any) -> None:
        for axes, (title, paths) in zip(np.atleast_1d(planes), drawn, strict=True):
            for path in paths:
                _draw_path(axes, path)
            lines = [loss for path in paths for loss in _line_losses(path)]
            axes.set_xscale("symlog", linthresh=least, linscale=0.3)
            axes.set_xticks(ticks(least, most), [f"{tick:,}" for tick in ticks(least, most)])
            axes.minorticks_off()
            axes.set(xlim=(0, 1.15 * most), ylim=(0, _HEADROOM * max(lines) or 1))
            axes.set_ylabel("loss, nats (lower is better)")
            axes.tick_params(labelbottom=True)
            axes.grid()
            axes.set_title(title, loc="left", size=9.5)
        axes.set_xlabel("weights restored")
        legend_below(figure, handles)

    return to_svg(panels_height(len(drawn), handles), "Paths of gain", draw, len(drawn))


def ticks(least: int, most: int) -> list[int]:
    """0 and round numbers from `least` to `most`, few enough to be written side by side."""
    decades = range(len(str(most)))
    fine, coarse = (
        [m * 10**e for e in decades for m in steps if least <= m * 10**e <= most]
        for steps in ((1, 2, 5), (1,))
    )
    return [0, *(fine if len(fine) <= _MOST_TICKS else coarse)]


def held_out_points(path: GainPath) -> Points:
    """Of the pruned model and after every step."""
    after = ((step.restored, step.held_out.sum) for step in path.steps)
    return ((0, path.start.sum), *after)


def calibration_points(path: GainPath) -> Points:
    """Before every step."""
    before = accumulate(path.taken, initial=0)
    return tuple((count, step.fit.sum) for count, step in zip(before, path.steps, strict=False))


def tried_points(path: GainPath) -> Points:
    """What the line searches tried, weights of earlier steps included."""
    before = accumulate(path.taken, initial=0)
    return tuple(
        (count + one.restored, one.loss)
        for count, step in zip(before, path.steps, strict=False)
        for one in step.tries
    )


def every_point(path: GainPath) -> Points:
    """All that may be drawn."""
    return (*held_out_points(path), *calibration_points(path), *tried_points(path))


def _line_losses(path: GainPath) -> list[float]:
    return [loss for _, loss in (*held_out_points(path), *calibration_points(path))]


def _draw_path(axes: Axes, path: GainPath) -> None:
    looks: dict[str, Any] = {"lw": 0.9, "ms": 3.5, "mec": PAPER, "mew": 0.4, "clip_on": False}
    tried = tried_points(path)
    axes.plot(*_columns(tried), "o", color=_TRY, ms=3, mew=0, alpha=0.5)
    axes.plot(*_columns(calibration_points(path)), "s--", color=_CALIBRATION, **looks)
    axes.plot(*_columns(held_out_points(path)), "o-", color=_HELD_OUT, **looks)


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [count for count, _ in points], [loss for _, loss in points]
