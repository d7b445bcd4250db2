"""What a run cost, in words: by stage, and of each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from regraft.costs import Cost, if_all_known
from regraft.report.words import DASH

_OPERATIONS = (
    (1e21, "ZFLOP"),
    (1e18, "EFLOP"),
    (1e15, "PFLOP"),
    (1e12, "TFLOP"),
    (1e9, "GFLOP"),
    (1e6, "MFLOP"),
)


def by_stage(costs: Sequence[Cost]) -> tuple[tuple[Cost, int], ...]:
    """(the sum over all models, how many they are) of each stage, in the order of the first."""
    stages: dict[str, list[Cost]] = {}
    for cost in costs:
        stages.setdefault(cost.stage, []).append(cost)
    return tuple((_together(of_it), len(of_it)) for of_it in stages.values())


def total(costs: Sequence[Cost]) -> Cost:
    """Of the whole run."""
    return replace(_together(costs), stage="in all")


def _together(costs: Sequence[Cost]) -> Cost:
    """One after the other: the peak is the highest on any device."""
    return replace(
        costs[0],
        of="",
        seconds=sum(one.seconds for one in costs),
        flops=if_all_known(sum, [one.flops for one in costs]),
        peak_bytes=if_all_known(max, [one.peak_bytes for one in costs]),
    )


def devices(costs: Sequence[Cost]) -> str:
    """All that the run was on, each once."""
    return "; ".join(dict.fromkeys(cost.device for cost in costs))


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min", 61.2 -> "1 min 1 s", 4.26 -> "4.3 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def operations(flops: float | None) -> str:
    """2.34e12 -> "2.34 TFLOP"; a dash where they were not measured."""
    if flops is None:
        return DASH
    for size, unit in _OPERATIONS:
        if flops >= 0.9995 * size:
            return f"{_three_digits(flops / size)} {unit}"
    return f"{flops:,.0f} FLOP"


def memory(count: int | None) -> str:
    """Bytes: "640 MiB", "1.2 GiB", "79 GiB"; a dash where they were not measured."""
    if count is None:
        return DASH
    mebibytes = round(count / 2**20)
    if mebibytes < 1024:
        return f"{mebibytes} MiB"
    return f"{count / 2**30:.2g} GiB" if count < 10 * 2**30 else f"{count / 2**30:,.0f} GiB"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
