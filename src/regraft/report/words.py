"""Numbers in words: how the report writes a rate, a p value and the verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence

from regraft.evaluation.metrics import PairedTest
from regraft.evaluation.results import Estimate
from regraft.report.model import (
    SIGNIFICANCE,
    Comparison,
    Report,
    Variant,
    measured,
    paired_attacks,
)

DASH = "–"
_RECOVERY = {"none": "no recovery", "partial": "partial recovery", "complete": "complete recovery"}


def percent(fraction: float) -> str:
    """0.144 -> "14.4 %"."""
    return f"{100 * fraction:.1f} %"


def short_percent(fraction: float) -> str:
    """0.6 -> "60 %", 0.625 -> "62.5 %"."""
    return f"{round(100 * fraction, 1):g} %"


def interval(low: float, high: float) -> str:
    """A 95 % interval of fractions, in per cent: "[10.6, 19.3]"."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def rate(estimate: Estimate | None) -> str:
    """A rate in per cent with its interval."""
    found = measured(estimate)
    return f"{percent(found.value)} {interval(found.low, found.high)}" if found else DASH


def share(value: float | None) -> str:
    """Restored weights per 10,000, to three digits."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def p_value(test: PairedTest | None) -> str:
    """McNemar's p value, "p < 0.001" at its smallest."""
    if test is None:
        return "not tested"
    return "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}"


def rsr_text(comparison: Comparison | None) -> str:
    """RSR in per cent with its interval, or why there is none."""
    recovery = comparison.recovery if comparison else None
    if comparison is None or recovery is None:
        return DASH
    if recovery.value is None:
        return "undefined"
    around = comparison.rsr_interval
    return percent(recovery.value) + (f" {interval(*around)}" if around else "")


def unbroken(text: str) -> str:
    """Keep a number and its unit, a relation and its number, an interval, on one line."""
    return re.sub(r" (?=%|[<=] )|(?<=[<=]) |(?<=\[)(\S+) (?=\S+\])", "\\1\u00a0", text)


def tested(outcome: str, test: PairedTest | None) -> str:
    """A verdict with its p value: "better than pruned (McNemar p = 0.012)"."""
    return f"{outcome} (McNemar {p_value(test)})" if test else outcome


def clip(text: str, length: int) -> str:
    """At most `length` characters of `text`, and how many were left out."""
    left = len(text) - length
    return text if left <= 0 else f"{text[:length].rstrip()} … [{left:,} more characters]"


def verdict(report: Report, compared: Sequence[Comparison]) -> tuple[str, ...]:
    """The result in sentences, one tuple entry a paragraph, the most important first."""
    if len(report.variants) == 1:
        return (_alone(report.variants[0]),)
    dense, pruned, *others = report.variants
    paragraphs = [_pruning(dense, pruned)]
    if others:
        paragraphs += [
            _realigning(pruned, others[0], compared[0]),
            _side_effects(pruned, others[0], compared[0]),
        ]
    return tuple(p for p in paragraphs if p)


def control_lines(report: Report, compared: Sequence[Comparison]) -> tuple[str, ...]:
    """One line for every variant after the first realigned one."""
    return tuple(
        f"{variant.label}: ASR {rate(variant.result.asr)}, RSR {rsr_text(comparison)}, "
        f"{tested(comparison.attacks_verdict, comparison.attacks)}."
        for variant, comparison in zip(report.variants[3:], compared[1:], strict=True)
    )


def _alone(variant: Variant) -> str:
    result = variant.result
    parts = [
        f"{name} {rate(estimate)} on {estimate.n:,} {kind} prompts"
        for name, estimate, kind in (
            ("ASR", result.asr, "harmful"),
            ("over-refusal", result.over_refusal, "harmless"),
        )
        if measured(estimate) and estimate is not None
    ]
    return f"{variant.label}: {', '.join(parts) or 'no prompt was answered'}."


def _pruning(dense: Variant, pruned: Variant) -> str:
    before, after = measured(dense.result.asr), measured(pruned.result.asr)
    if before is None or after is None:
        return f"Pruning to {short_percent(pruned.sparsity)}: no harmful prompts, so no ASR."
    if before.value == after.value:
        change = f"left ASR at {rate(after)}"
    else:
        verb = "raised" if after.value > before.value else "lowered"
        change = f"{verb} ASR from {rate(before)} to {rate(after)}"
    return (
        f"Pruning to {short_percent(pruned.sparsity)} {change}; "
        f"the difference is {_chance(paired_attacks(pruned, dense))}."
    )


def _realigning(pruned: Variant, variant: Variant, comparison: Comparison) -> str:
    before, after = measured(pruned.result.asr), measured(variant.result.asr)
    share_of = variant.per_ten_thousand
    ten_thousandths = f" ({share(share_of)} per 10,000 pruned)" if share_of is not None else ""
    restored = f"{variant.label}: {variant.restored:,} restored weights{ten_thousandths}"
    recovery = comparison.recovery
    if before is None or after is None or recovery is None:
        return f"{restored}."
    if before.value == after.value:
        change = f"left ASR at {rate(after)}"
    else:
        verb = "lowered" if after.value < before.value else "raised"
        change = f"{verb} it to {rate(after)}"
    outcome = (
        f"RSR is {recovery.verdict}"
        if recovery.value is None
        else f"RSR {rsr_text(comparison)}, {_RECOVERY.get(recovery.verdict, recovery.verdict)}"
    )
    return (
        f"{restored} {change}. {outcome}. The difference from the pruned model is "
        f"{_chance(comparison.attacks)}."
    )


def _side_effects(pruned: Variant, variant: Variant, comparison: Comparison) -> str:
    before, after = measured(pruned.result.over_refusal), measured(variant.result.over_refusal)
    if before is None or after is None:
        return (
            "Over-refusal was not measured: without harmless prompts, a low ASR may come from "
            "a model that refuses everything."
        )
    change = (
        f"stayed at {rate(after)}"
        if before.value == after.value
        else f"went from {rate(before)} to {rate(after)}"
    )
    outcome = tested(comparison.refusals_verdict, comparison.refusals)
    text = f"Over-refusal {change}, {outcome}."
    if comparison.refusals_verdict == "worse than pruned":
        text += " Part of the lower ASR may come from refusing more of everything."
    used, kept = measured(pruned.result.utility), measured(variant.result.utility)
    if used and kept:
        text += f" Utility (mean ANLS) went from {used.value:.3f} to {kept.value:.3f}."
    return text


def _chance(test: PairedTest | None) -> str:
    if test is None:
        return "not tested against chance"
    negation = "" if test.p < SIGNIFICANCE else "not "
    return f"{negation}distinguishable from chance (McNemar {p_value(test)})"
