"""Figures of weights: scores of heads, restored weights by layer, paths of gain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from regraft.report.drawing import PAPER, SERIES, WIDTH, panels_svg, to_svg
from regraft.report.run import HeadMap, Variant
from regraft.restoration.methods.gain.path import GainPath

Points = tuple[tuple[int, float], ...]  # (weights restored, loss in nats)
_HELD_OUT, _GRADIENT, _TRY = SERIES[2], SERIES[0], SERIES[3]
_MOST_TICKS = 6
_HEADROOM = 1.25  # the axis ends at this multiple of the highest loss on a line


def head_map_figure(head_map: HeadMap, marked: Sequence[tuple[int, int]] = ()) -> str:
    """Scores by layer (down) and head (across); `marked` (layer, head) pairs get a ring.

    Empty text if no head was scored.
    """
    values = np.array(head_map.values, dtype=np.float64)
    if not np.isfinite(values).any():
        return ""
    layers, heads = values.shape
    cell = min(0.85 * WIDTH / heads, 3.8 / layers)

    def draw(axes: Axes) -> None:
        _tiles(axes, values, f"{head_map.name} ({head_map.unit})")
        axes.set_aspect("equal")
        axes.set(xlabel="head", ylabel="layer")
        rings = [(head, layer) for layer, head in marked]
        for width, colour in ((2.4, "black"), (1.1, "white")):
            axes.scatter(
                *_columns(rings), s=(40 * cell) ** 2, facecolor="none", edgecolor=colour, lw=width
            )

    return to_svg(max(1.6, 1.1 + cell * layers), f"{head_map.name} of each head", draw)


def restored_figure(variant: Variant) -> str:
    """Restored weights by layer (across) and module (down).

    Empty text if nothing was restored.
    """
    modules = variant.restored_by_module
    values = np.array(list(modules.values()), dtype=np.float64)
    values[values == 0] = np.nan
    if not np.isfinite(values).any():
        return ""

    def draw(axes: Axes) -> None:
        _tiles(axes, values, "restored weights")
        axes.set_aspect("auto")
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(modules)), list(modules))

    return to_svg(1.1 + 0.26 * len(modules), f"Weights restored in {variant.label}", draw)


def _tiles(axes: Axes, values: NDArray[np.float64], label: str) -> None:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    image = axes.imshow(
        values, cmap="viridis", vmin=min(low, 0), vmax=high or 1, interpolation="none"
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", label=label, aspect=40, pad=0.04)
    bar.outline.set_visible(False)
    if bar.solids:
        bar.solids.set_rasterized(True)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def path_figure(panels: Sequence[tuple[str, Sequence[GainPath]]]) -> str:
    """Losses along paths, one panel per method and two lines per path (calibration seed).

    The axis of weights is linear up to the smallest number above 0 and logarithmic from there on,
    since line searches try many more weights than they take. Panels without paths are left out;
    empty text if there is no path.
    """
    drawn = [(title, paths) for title, paths in panels if paths]
    if not drawn:
        return ""
    handles = [
        Line2D([], [], color=_HELD_OUT, marker="o", lw=0.9, ms=3.5, label="held out"),
        Line2D([], [], color=_GRADIENT, marker="s", ls="--", lw=0.9, ms=3.5, label="gradient"),
        Line2D([], [], color=_TRY, marker="o", ls="", ms=3, alpha=0.5, label="tried, held out"),
    ]
    every = [path for _, paths in drawn for path in paths]
    counts = [n for one in every for n, _ in (*held_out_points(one), *tried_points(one))]
    least, most = min((count for count in counts if count), default=1), max(1, *counts)

    def panel(paths: Sequence[GainPath], axes: Axes) -> None:
        for path in paths:
            _draw_path(axes, path)
        lines = [
            loss for path in paths for _, loss in (*held_out_points(path), *gradient_points(path))
        ]
        axes.set_xscale("symlog", linthresh=least, linscale=0.3)
        axes.set_xticks(ticks(least, most), [f"{tick:,}" for tick in ticks(least, most)])
        axes.minorticks_off()
        axes.set(xlim=(0, 1.15 * most), ylim=(0, _HEADROOM * max(lines) or 1))
        axes.set_ylabel("loss, nats (lower is better)")

    figures = [(title, partial(panel, paths)) for title, paths in drawn]
    return panels_svg("Paths of gain", figures, "weights restored", handles)


def ticks(least: int, most: int) -> list[int]:
    """0 and round numbers from `least` to `most`, few enough to fit as labels of an axis."""
    decades = range(len(str(most)))
    fine, coarse = (
        [m * 10**e for e in decades for m in steps if least <= m * 10**e <= most]
        for steps in ((1, 2, 5), (1,))
    )
    return [0, *(fine if len(fine) <= _MOST_TICKS else coarse)]


def held_out_points(path: GainPath) -> Points:
    """Held-out loss of the pruned model and after every step."""
    after = ((step.restored, step.held_out.sum) for step in path.steps)
    return ((0, path.start.sum), *after)


def gradient_points(path: GainPath) -> Points:
    """Loss on gradient prompts before every step."""
    before = accumulate(path.taken, initial=0)
    return tuple(
        (count, step.gradient.sum) for count, step in zip(before, path.steps, strict=False)
    )


def tried_points(path: GainPath) -> Points:
    """Points that the line searches tried; the counts include the weights of earlier steps."""
    before = accumulate(path.taken, initial=0)
    return tuple(
        (count + one.number, one.loss)
        for count, step in zip(before, path.steps, strict=False)
        for one in step.tries
    )


def _draw_path(axes: Axes, path: GainPath) -> None:
    looks: dict[str, Any] = {"lw": 0.9, "ms": 3.5, "mec": PAPER, "mew": 0.4, "clip_on": False}
    axes.plot(*_columns(tried_points(path)), "o", color=_TRY, ms=3, mew=0, alpha=0.5)
    axes.plot(*_columns(gradient_points(path)), "s--", color=_GRADIENT, **looks)
    axes.plot(*_columns(held_out_points(path)), "o-", color=_HELD_OUT, **looks)
