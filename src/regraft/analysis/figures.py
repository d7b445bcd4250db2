"""The figures of analyses, each one SVG file that can be put on any page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.analysis.overlap import LayerOverlap, by_chance
from regraft.analysis.sweep import Sweep
from regraft.report.drawing import INK, LOOKS, ceiling, to_svg

_RATES = (("asr", "ASR"), ("over_refusal", "over-refusal"), ("utility", "utility"))


def sweep_figure(sweep: Sweep) -> str:
    """ASR, over-refusal and utility by the value, with their intervals; references as lines."""

    def draw(_figure: Any, axes: Any) -> None:
        for panel, (field, label) in zip(axes, _RATES, strict=True):
            colour, marker, line = LOOKS[_RATES.index((field, label))]
            points = [(p.value, e) for p in sweep.points if (e := getattr(p, field)) is not None]
            panel.set_ylabel(f"{label}, %")
            panel.grid(axis="y")
            if not points:
                continue
            middle = [100 * e.value for _, e in points]
            errors = [
                [100 * (e.value - e.low) for _, e in points],
                [100 * (e.high - e.value) for _, e in points],
            ]
            panel.errorbar(
                [v for v, _ in points],
                middle,
                yerr=errors,
                color=colour,
                marker=marker,
                ls=line,
                ms=4,
                lw=1.2,
                elinewidth=0.8,
            )
            marks = {name: getattr(one, field) for name, one in sweep.references.items()}
            for name, estimate in marks.items():
                if estimate is not None:
                    style = ":" if name == "dense" else "--"
                    panel.axhline(100 * estimate.value, color=INK, lw=0.8, ls=style, label=name)
            highest = [*(e for _, e in points), *(e for e in marks.values() if e is not None)]
            panel.set_ylim(0, ceiling(highest))
        axes[0].legend(loc="best")
        axes[-1].set_xlabel(sweep.setting)

    return to_svg(5.6, f"{sweep.setting} against ASR, over-refusal and utility", draw, panels=3)


def overlap_figure(found: Mapping[float, Sequence[LayerOverlap]]) -> str:
    """Jaccard's index by layer, one line a share; chance as a dotted line of the same colour."""

    def draw(_figure: Any, axes: Any) -> None:
        for (share, layers), (colour, marker, line) in zip(found.items(), LOOKS, strict=False):
            numbers = [one.layer for one in layers]
            axes.plot(
                numbers,
                [one.jaccard for one in layers],
                color=colour,
                marker=marker,
                ls=line,
                ms=3.5,
                lw=1.2,
                label=f"top {100 * share:g} %",
            )
            axes.axhline(by_chance(share), color=colour, lw=0.8, ls=":")
        axes.set(ylim=(0, 1), xlabel="layer", ylabel="Jaccard's index")
        axes.grid(axis="y")
        axes.legend(loc="best")

    return to_svg(2.8, "Weights that matter for safety and utility alike, by layer", draw)
