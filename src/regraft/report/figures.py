"""The report's figures, each as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from regraft.evaluation.results import Estimate
from regraft.report.drawing import (
    INK,
    LOOKS,
    PAPER,
    SERIES,
    WIDTH,
    Spot,
    ceiling,
    to_svg,
    write_beside,
)
from regraft.report.model import HeadMap, Report, Variant, measured

_PLANE = (285, 205)  # points, about what the trade-off has between its axes
_HATCHES = ("", "////", "|||")
_RATES = {"asr": "ASR, %", "over_refusal": "over-refusal, %", "utility": "utility, %"}


@dataclass(frozen=True)
class _Spot:
    number: int
    variant: Variant
    way: str
    asr: Estimate
    over: Estimate

    @property
    def x(self) -> float:
        return 100 * self.asr.value

    @property
    def y(self) -> float:
        return 100 * self.over.value


def head_map_figure(head_map: HeadMap, marked: Sequence[tuple[int, int]] = ()) -> str:
    """Scores by layer (down) and head (across); `marked` (layer, head) pairs get a ring.

    Empty text where no head was scored.
    """
    values = _table(head_map.values)
    if not np.isfinite(values).any():
        return ""
    layers, heads = values.shape
    cell = min(0.85 * WIDTH / heads, 3.8 / layers)

    def draw(figure: Figure, axes: Axes) -> None:
        _tiles(figure, axes, values, f"{head_map.name} ({head_map.unit})")
        axes.set_aspect("equal")
        axes.set(xlabel="head", ylabel="layer")
        rings = [(h, n) for n, h in marked if n < layers and h < heads]
        for width, colour in ((2.4, "black"), (1.1, "white")):
            axes.scatter(
                *_columns(rings), s=(40 * cell) ** 2, facecolor="none", edgecolor=colour, lw=width
            )

    return to_svg(max(1.6, 1.1 + cell * layers), f"{head_map.name} of each head", draw)


def restored_figure(variant: Variant) -> str:
    """Restored weights by layer (across) and module (down), with the counts where they fit.

    Empty text where nothing was restored.
    """
    modules = variant.restored_by_module
    values = _table(list(modules.values()))
    values[values == 0] = np.nan
    if not np.isfinite(values).any():
        return ""

    def draw(figure: Figure, axes: Axes) -> None:
        _tiles(figure, axes, values, "restored weights")
        axes.set_aspect("auto")
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(modules)), list(modules))
        if values.shape[1] <= 12:
            _write_counts(axes, values)

    return to_svg(1.1 + 0.26 * len(modules), f"Weights restored in {variant.label}", draw)


def category_figure(variants: Sequence[Variant]) -> str:
    """ASR by harm category with 95 % intervals, for the first three variants.

    Empty text where no category was measured.
    """
    shown = variants[: len(_HATCHES)]
    names = sorted({name for v in shown for name in v.result.asr_by_category})
    if not names:
        return ""
    bar = 0.8 / len(shown)

    def draw(figure: Figure, axes: Axes) -> None:
        for i, variant in enumerate(shown):
            _category_bars(axes, names, variant, i, bar, (i - (len(shown) - 1) / 2) * bar)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="ASR, % of the prompts")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        abreast = sum(len(v.label) for v in shown) <= 45
        figure.legend(loc="outside upper left", ncols=len(shown) if abreast else 1)

    return to_svg(1.1 + len(names) * (0.12 + 0.12 * len(shown)), "ASR by harm category", draw)


def trade_off_figure(variants: Sequence[Variant]) -> str:
    """ASR (across) against over-refusal (up), numbered by the variants' order.

    Empty text where no variant has both.
    """
    points = [
        (number, variant.label, asr, over)
        for number, variant in enumerate(variants, start=1)
        if (asr := measured(variant.result.asr)) and (over := measured(variant.result.over_refusal))
    ]
    if not points:
        return ""

    def draw(figure: Figure, axes: Axes) -> None:
        for number, label, asr, over in points:
            _cross(axes, number, label, asr, over)
        axes.set(xlabel="ASR, % (lower is safer)", ylabel="over-refusal, % (lower is better)")
        axes.set_xlim(0, ceiling(asr for _, _, asr, _ in points))
        axes.set_ylim(0, ceiling(over for _, _, _, over in points))
        axes.grid()
        figure.legend(loc="outside lower left", ncols=1, handletextpad=0.2)

    return to_svg(3.2 + 0.19 * len(points), "ASR against over-refusal", draw)


def trade_off_map(report: Report) -> str:
    """ASR against over-refusal of several prunings.

    The dense and the pruned models have the numbers of the variants' order; a line leads from each
    pruned model to those realigned from it. Empty text where no model has
    both rates.
    """
    called = report.ways
    spots = [
        _Spot(number, variant, called.get(variant.name_in_group, role), asr, over)
        for number, (variant, role) in enumerate(
            zip(report.variants, report.roles, strict=True), start=1
        )
        if (asr := measured(variant.result.asr)) and (over := measured(variant.result.over_refusal))
    ]
    if not spots:
        return ""
    looks = dict(zip(dict.fromkeys(spot.way for spot in spots), cycle(LOOKS)))
    bases = {spot.variant.name: spot for spot in spots if spot.way == "pruned"}
    right, top = (ceiling(getattr(spot, rate) for spot in spots) for rate in ("asr", "over"))

    def draw(figure: Figure, axes: Axes) -> None:
        for spot in spots:
            colour, marker, _ = looks[spot.way]
            across, up = ([100 * e.low, 100 * e.high] for e in (spot.asr, spot.over))
            axes.plot(across, [spot.y] * 2, color=colour, lw=0.7, alpha=0.35)
            axes.plot([spot.x] * 2, up, color=colour, lw=0.7, alpha=0.35)
            if base := bases.get(spot.variant.base or ""):
                axes.plot([base.x, spot.x], [base.y, spot.y], color=colour, lw=0.9, ls=":")
            axes.plot(
                spot.x,
                spot.y,
                marker,
                ms=5.5,
                color=colour,
                mec=PAPER,
                mew=0.5,
                zorder=3,
                clip_on=False,
            )
        axes.set(xlabel="ASR, % (lower is safer)", ylabel="over-refusal, % (lower is better)")
        axes.set(xlim=(0, right), ylim=(0, top))
        axes.grid()
        numbered = [
            Spot(spot.x, spot.y, str(spot.number) if spot.way in ("dense", "pruned") else "")
            for spot in spots
        ]
        write_beside(axes, numbered, _PLANE)
        handles = [
            Line2D([], [], color=colour, marker=marker, ls="", ms=5.5, label=way)
            for way, (colour, marker, _) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside lower left", handletextpad=0.2)

    return to_svg(3.7 + 0.19 * len(looks), "ASR against over-refusal", draw)


def sparsity_figure(report: Report, series: str) -> str:
    """ASR, over-refusal and utility of one series by sparsity, with 95 % bands.

    One line for the pruned models and one for each way of realigning them; the dense model is a
    level. Empty text where fewer than two sparsities were measured.
    """
    lines: dict[str, list[tuple[float, Variant]]] = {}
    called = report.ways
    for group in report.groups:
        if group[0].series == series:
            for variant, role in zip(group, ("pruned", *("realigned",) * len(group)), strict=False):
                point = (100 * group[0].sparsity, variant)
                lines.setdefault(called.get(variant.name_in_group, role), []).append(point)
    sparsities = sorted({x for line in lines.values() for x, _ in line})
    rates = [one for one in _RATES if measured(getattr(report.dense.result, one))]
    if len(sparsities) < 2 or not rates:
        return ""
    looks = dict(zip(lines, cycle(LOOKS[1:])))

    def draw(figure: Figure, panels: Any) -> None:
        for axes, rate in zip(np.atleast_1d(panels), rates, strict=True):
            level = getattr(report.dense.result, rate)
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
    return to_svg(height, f"{series}: rates by sparsity", draw, len(rates))


def _line_with_band(
    axes: Axes,
    line: Sequence[tuple[float, Variant]],
    rate: str,
    label: str,
    look: tuple[str, str, str],
) -> None:
    colour, marker, dashes = look
    found = [(x, e) for x, variant in line if (e := measured(getattr(variant.result, rate)))]
    x = [x for x, _ in found]
    low, value, high = (
        [100 * getattr(e, end) for _, e in found] for end in ("low", "value", "high")
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.plot(x, value, color=colour, marker=marker, ms=4, lw=1.3, ls=dashes, label=label)


def _category_bars(
    axes: Axes, names: Sequence[str], variant: Variant, i: int, bar: float, offset: float
) -> None:
    rates = variant.result.asr_by_category
    found = [(row, rate) for row, name in enumerate(names) if (rate := measured(rates.get(name)))]
    axes.barh(
        [row + offset for row, _ in found],
        [100 * rate.value for _, rate in found],
        height=0.9 * bar,
        color=SERIES[i],
        edgecolor=PAPER,
        hatch=_HATCHES[i],
        linewidth=0,
        label=variant.label,
    )
    for row, rate in found:
        ends = (100 * rate.low, 100 * rate.high)
        axes.plot(ends, [row + offset] * 2, color=PAPER, lw=2.2, solid_capstyle="butt")
        axes.plot(ends, [row + offset] * 2, color=INK, lw=0.9, solid_capstyle="butt")


def _cross(axes: Axes, number: int, label: str, asr: Estimate, over: Estimate) -> None:
    colour = SERIES[min(number, len(SERIES)) - 1]
    x, y = 100 * asr.value, 100 * over.value
    axes.plot([100 * asr.low, 100 * asr.high], [y, y], color=colour, lw=1)
    axes.plot([x, x], [100 * over.low, 100 * over.high], color=colour, lw=1)
    axes.plot(
        x, y, "o", ms=11, color=colour, mec=PAPER, mew=0.8, label=f"{number}  {label}", zorder=3
    )
    axes.annotate(str(number), (x, y), color=PAPER, ha="center", va="center", size=7.5, zorder=4)


def _table(rows: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """Rows of unequal length as one table, NaN where a value is missing."""
    table = np.full((max(len(rows), 1), max(map(len, rows), default=0) or 1), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = [np.nan if value is None else value for value in row]
    return table


def _tiles(figure: Figure, axes: Axes, values: NDArray[np.float64], label: str) -> None:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    image = axes.imshow(
        values, cmap="viridis", vmin=min(low, 0), vmax=high or 1, interpolation="none"
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    bar = figure.colorbar(image, ax=axes, location="bottom", label=label, aspect=40, pad=0.04)
    bar.outline.set_visible(False)
    if bar.solids:
        bar.solids.set_rasterized(True)


def _write_counts(axes: Axes, values: NDArray[np.float64]) -> None:
    for (row, layer), count in np.ndenumerate(values):
        if np.isfinite(count):
            shade = "white" if count < 0.6 * np.nanmax(values) else "black"
            axes.text(layer, row, f"{count:.0f}", color=shade, ha="center", va="center", size=7.5)


def _columns(points: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [x for x, _ in points], [y for _, y in points]
