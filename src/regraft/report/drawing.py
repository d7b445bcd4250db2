"""Drawing of all figures, as SVG text that takes its colours and font from the page.

All have the same narrow width, to be readable on a phone and fit side by side on a laptop. Colours
are CSS variables with a fallback for pages that do not set them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from regraft.evaluation.results import Estimate

WIDTH = 4.6  # inches
_PANEL = 3.1  # inches, height of a panel
_LINE = 0.19  # inches, height of a line of a legend
_NARROW = 28  # characters that fit in one of two columns of a legend
_FONT = "DejaVu Sans"  # shipped with matplotlib, so that layouts agree on every machine

# matplotlib draws in these placeholder colours, which are replaced by the page's.
INK, RULE, PAPER = "#010203", "#040506", "#fefdfc"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004")
LOOKS = (  # colour, marker, line
    (SERIES[0], "o", "-"),
    (SERIES[1], "s", "-"),
    (SERIES[2], "D", "-"),
    (SERIES[3], "^", "--"),
    (SERIES[3], "v", ":"),
    (SERIES[3], "P", "-."),
)
_CSS = {
    INK: "currentColor",
    RULE: "var(--rule, #c8c8c8)",
    PAPER: "var(--paper, #ffffff)",
    SERIES[0]: "var(--dense, #0b62a4)",
    SERIES[1]: "var(--pruned, #b8480a)",
    SERIES[2]: "var(--realigned, #0a7a5a)",
    SERIES[3]: "var(--control, #75707f)",
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
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


def to_svg(height: float, title: str, draw: Callable[[Any], None], panels: int = 1) -> str:
    """Draw a figure `height` inches high; the same drawing always gives the same text.

    `draw` gets the axes, or an array of axes if there are several panels.
    """
    buffer = io.StringIO()
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots(panels, sharex=True))
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
    """The <svg> tag without a fixed size, with a label for screen readers."""
    box = re.findall(r'viewBox="[^"]*"', tag)[0]
    spaces = " ".join(re.findall(r'xmlns\S*="[^"]*"', tag))
    return f'<svg {spaces} {box} role="img" aria-label="{escape(title)}">'


def standalone(svg: str) -> str:
    """The figure for a separate file: fallback colours and font, on white."""
    svg = re.sub(r"var\(--[\w-]+, ([^()]+)\)", r"\1", svg).replace("currentColor", "#1c1b22")
    return svg.replace("<svg ", '<svg style="background: #ffffff" ', 1)


def ceiling(estimates: Iterable[Estimate]) -> float:
    """The end of an axis in %: the highest interval with some headroom."""
    return min(105.0, 100 * max(e.high for e in estimates) * 1.08 + 1)


def panels_svg(
    title: str,
    panels: Sequence[tuple[str, Callable[[Axes], None]]],
    across: str,
    handles: Sequence[Line2D],
) -> str:
    """Panels one above the other with a shared horizontal axis `across` and one legend below.

    A panel is its title, which may be "", and the function that draws it on its axes.
    """
    narrow = max(len(str(handle.get_label())) for handle in handles) <= _NARROW
    columns = 2 if narrow else 1
    height = _PANEL * len(panels) + 0.4 + _LINE * math.ceil(len(handles) / columns)

    def draw(planes: Any) -> None:
        for axes, (name, draw_panel) in zip(np.atleast_1d(planes), panels, strict=True):
            draw_panel(axes)
            axes.tick_params(labelbottom=True)
            axes.grid()
            if name:
                axes.set_title(name, loc="left", size=9.5)
        axes.set_xlabel(across)
        axes.figure.legend(handles=list(handles), loc="outside lower left", ncols=columns)

    return to_svg(height, title, draw, len(panels))
