"""The report's figures, as SVG text that takes its colours and its font from the page.

Every figure is drawn at one narrow width, so that it can be read on a phone and stand beside
others on a laptop. Colours are CSS variables with a fallback for a page that sets none.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from regraft.evaluation.results import Estimate
from regraft.report.model import HeadMap, Report, Variant, measured

_WIDTH = 4.6  # inches
_PLANE = (285, 205)  # points, about what the trade-off has between its axes
_FONT = "DejaVu Sans"  # shipped with matplotlib, so that layouts agree on every machine

# matplotlib draws in these colours; the page's own take their place afterwards.
_INK, _RULE, _PAPER = "#010203", "#040506", "#fefdfc"
_SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004")
_HATCHES = ("", "////", "|||")
_LOOKS = (  # colour, marker, line
    (_SERIES[0], "o", "-"),
    (_SERIES[1], "s", "-"),
    (_SERIES[2], "D", "-"),
    (_SERIES[3], "^", "--"),
    (_SERIES[3], "v", ":"),
    (_SERIES[3], "P", "-."),
)
_RATES = {"asr": "ASR, %", "over_refusal": "over-refusal, %", "utility": "utility, ANLS x 100"}
_CSS = {
    _INK: "currentColor",
    _RULE: "var(--rule, #c8c8c8)",
    _PAPER: "var(--paper, #ffffff)",
    _SERIES[0]: "var(--dense, #0b62a4)",
    _SERIES[1]: "var(--pruned, #b8480a)",
    _SERIES[2]: "var(--realigned, #0a7a5a)",
    _SERIES[3]: "var(--control, #75707f)",
    f"'{_FONT}'": "var(--figure-font, sans-serif)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regraft",
    "font.family": [_FONT],
    "font.size": 8.5,
    "text.parse_math": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


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
    cell = min(0.85 * _WIDTH / heads, 3.8 / layers)

    def draw(figure: Figure, axes: Axes) -> None:
        _tiles(figure, axes, values, f"{head_map.name} ({head_map.unit})")
        axes.set_aspect("equal")
        axes.set(xlabel="head", ylabel="layer")
        rings = [(h, n) for n, h in marked if n < layers and h < heads]
        for width, colour in ((2.4, "black"), (1.1, "white")):
            axes.scatter(
                *_columns(rings), s=(40 * cell) ** 2, facecolor="none", edgecolor=colour, lw=width
            )

    return _svg(max(1.6, 1.1 + cell * layers), f"{head_map.name} of each head", draw)


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

    return _svg(1.1 + 0.26 * len(modules), f"Weights restored in {variant.label}", draw)


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

    return _svg(1.1 + len(names) * (0.12 + 0.12 * len(shown)), "ASR by harm category", draw)


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
        axes.set_xlim(0, _ceiling(asr for _, _, asr, _ in points))
        axes.set_ylim(0, _ceiling(over for _, _, _, over in points))
        axes.grid()
        figure.legend(loc="outside lower left", ncols=1, handletextpad=0.2)

    return _svg(3.2 + 0.19 * len(points), "ASR against over-refusal", draw)


def trade_off_map(report: Report) -> str:
    """ASR against over-refusal of several prunings.

    The dense and the pruned models have the numbers of the variants' order; a line leads from each
    pruned model to those realigned from it. Empty text where no model has
    both rates.
    """
    spots = [
        _Spot(number, variant, _way(variant, role), asr, over)
        for number, (variant, role) in enumerate(
            zip(report.variants, report.roles, strict=True), start=1
        )
        if (asr := measured(variant.result.asr)) and (over := measured(variant.result.over_refusal))
    ]
    if not spots:
        return ""
    looks = dict(zip(dict.fromkeys(spot.way for spot in spots), cycle(_LOOKS)))
    bases = {spot.variant.name: spot for spot in spots if spot.way == "pruned"}
    right, top = (_ceiling(getattr(spot, rate) for spot in spots) for rate in ("asr", "over"))

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
                mec=_PAPER,
                mew=0.5,
                zorder=3,
                clip_on=False,
            )
        axes.set(xlabel="ASR, % (lower is safer)", ylabel="over-refusal, % (lower is better)")
        axes.set(xlim=(0, right), ylim=(0, top))
        axes.grid()
        _write_numbers(axes, spots, (right, top))
        handles = [
            Line2D([], [], color=colour, marker=marker, ls="", ms=5.5, label=way)
            for way, (colour, marker, _) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside lower left", handletextpad=0.2)

    return _svg(3.7 + 0.19 * len(looks), "ASR against over-refusal", draw)


def sparsity_figure(report: Report, series: str) -> str:
    """ASR, over-refusal and utility of one series by sparsity, with 95 % bands.

    One line for the pruned models and one for each way of realigning them; the dense model is a
    level. Empty text where fewer than two sparsities were measured.
    """
    lines: dict[str, list[tuple[float, Variant]]] = {}
    for group in report.groups:
        if group[0].series == series:
            for variant, role in zip(group, ("pruned", *("realigned",) * len(group)), strict=False):
                point = (100 * group[0].sparsity, variant)
                lines.setdefault(_way(variant, role), []).append(point)
    sparsities = sorted({x for line in lines.values() for x, _ in line})
    rates = [one for one in _RATES if measured(getattr(report.dense.result, one))]
    if len(sparsities) < 2 or not rates:
        return ""
    looks = dict(zip(lines, cycle(_LOOKS[1:])))

    def draw(figure: Figure, panels: Any) -> None:
        for axes, rate in zip(np.atleast_1d(panels), rates, strict=True):
            level = getattr(report.dense.result, rate)
            axes.axhspan(100 * level.low, 100 * level.high, color=_SERIES[0], alpha=0.12, lw=0)
            axes.axhline(100 * level.value, color=_SERIES[0], lw=1, ls="--", label="dense")
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
    return _svg(height, f"{series}: rates by sparsity", draw, len(rates))


def _way(variant: Variant, role: str) -> str:
    """What all models made in the same way from their pruning are called in a legend."""
    return role if role in ("dense", "pruned") else variant.label_in_group


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


def _write_numbers(axes: Axes, spots: Sequence[_Spot], ends: tuple[float, float]) -> None:
    """Number the dense and the pruned models, each beside its spot where nothing is yet."""
    width, height = _PLANE
    centres = [(width * spot.x / ends[0], height * spot.y / ends[1]) for spot in spots]
    taken = [(x, y, 3.0, 3.0) for x, y in centres]  # centre, half width, half height
    for spot, (x, y) in zip(spots, centres, strict=True):
        if spot.way not in ("dense", "pruned"):
            continue
        places = [
            (radius * math.cos(turn * math.pi / 4), radius * math.sin(turn * math.pi / 4))
            for radius in (9, 13, 18, 24, 31, 39)
            for turn in (1, 3, 5, 7, 0, 4, 2, 6)
        ]
        half = (2.4 * len(str(spot.number)) + 0.8, 4.2)
        inside = [p for p in places if half[0] < x + p[0] < width and half[1] < y + p[1] < height]
        boxes = [(x + dx, y + dy, *half) for dx, dy in inside]
        free = (i for i, box in enumerate(boxes) if not any(_overlap(box, one) for one in taken))
        chosen = next(free, 0)
        taken.append(boxes[chosen])
        axes.annotate(
            str(spot.number),
            (spot.x, spot.y),
            xytext=inside[chosen],
            textcoords="offset points",
            ha="center",
            va="center",
            size=7.5,
            zorder=4,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": _INK, "shrinkA": 0, "shrinkB": 2},
        )


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]


def _category_bars(
    axes: Axes, names: Sequence[str], variant: Variant, i: int, bar: float, offset: float
) -> None:
    rates = variant.result.asr_by_category
    found = [(row, rate) for row, name in enumerate(names) if (rate := measured(rates.get(name)))]
    axes.barh(
        [row + offset for row, _ in found],
        [100 * rate.value for _, rate in found],
        height=0.9 * bar,
        color=_SERIES[i],
        edgecolor=_PAPER,
        hatch=_HATCHES[i],
        linewidth=0,
        label=variant.label,
    )
    for row, rate in found:
        ends = (100 * rate.low, 100 * rate.high)
        axes.plot(ends, [row + offset] * 2, color=_PAPER, lw=2.2, solid_capstyle="butt")
        axes.plot(ends, [row + offset] * 2, color=_INK, lw=0.9, solid_capstyle="butt")


def _cross(axes: Axes, number: int, label: str, asr: Estimate, over: Estimate) -> None:
    colour = _SERIES[min(number, len(_SERIES)) - 1]
    x, y = 100 * asr.value, 100 * over.value
    axes.plot([100 * asr.low, 100 * asr.high], [y, y], color=colour, lw=1)
    axes.plot([x, x], [100 * over.low, 100 * over.high], color=colour, lw=1)
    axes.plot(
        x, y, "o", ms=11, color=colour, mec=_PAPER, mew=0.8, label=f"{number}  {label}", zorder=3
    )
    axes.annotate(str(number), (x, y), color=_PAPER, ha="center", va="center", size=7.5, zorder=4)


def _ceiling(estimates: Iterable[Estimate]) -> float:
    """The end of an axis in %: the highest interval and a little room."""
    return min(105.0, 100 * max(e.high for e in estimates) * 1.08 + 1)


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


def _svg(height: float, title: str, draw: Callable[[Figure, Any], None], panels: int = 1) -> str:
    """Draw on a figure `height` inches high; the same drawing always gives the same text.

    `draw` gets its axes, or an array of them where there is more than one panel.
    """
    buffer = io.StringIO()
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure, figure.subplots(panels, sharex=True))
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, css in _CSS.items():
        svg = svg.replace(drawn, css)
    name = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r"<svg [^>]*>", lambda tag: _opening(tag.group(), title), svg, count=1)


def _opening(tag: str, title: str) -> str:
    """The <svg> tag without a fixed size, named for readers who cannot see it."""
    box = re.findall(r'viewBox="[^"]*"', tag)[0]
    spaces = " ".join(re.findall(r'xmlns\S*="[^"]*"', tag))
    return f'<svg {spaces} {box} role="img" aria-label="{escape(title)}">'
