"""Numbers in words: how the report writes a rate, a p value and the verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from regraft.evaluation.results import Answer, Estimate, EvalResult, TextResult
from regraft.evaluation.significance import PairedTest
from regraft.evaluation.verdicts import Agreement
from regraft.report.model import (
    SIGNIFICANCE,
    Comparison,
    Report,
    Variant,
    measured,
    paired_attacks,
)

PASSES_NOTE = (
    "Passes: the compute of choosing the weights (scores of heads, statistics, ranking, search, "
    "training), in forward and backward passes over all calibration prompts of the run. One pass "
    "is 6 operations for each prunable weight of the decoder and each token of the prompts, "
    "without responses. The operations measured include those of the vision tower and the LM head. "
    "What methods share counts fully for each; responses that the dense model writes count for the "
    "stage that first needs them. Pruning and the evaluation on test prompts are not counted. "
    "A dash: not measured."
)
DASH = "–"
NO_OVER_REFUSAL = (
    "Over-refusal was not measured: without harmless prompts that test it, a low ASR may come from "
    "a model that refuses everything."
)
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


def passes_text(value: float | None) -> str:
    """Passes over the calibration prompts: "0", "< 0.1", "12.3", "1,240.0"."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    return "< 0.1" if value < 0.1 else f"{value:,.1f}"


def passes_note(report: Report) -> str:
    """What the column of passes means, with the size of one; "" where no method has any."""
    one_pass = report.one_pass
    if one_pass is None or all(one.passes is None for one in report.variants):
        return ""
    return (
        f"{PASSES_NOTE} Here one pass is over {one_pass.prompts:,} prompts, {one_pass.tokens:,} "
        "tokens."
    )


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


def cell(estimate: Estimate | None) -> str:
    """A rate with its interval in a few characters: "12.5 [8.8, 16.7]", in %."""
    if estimate is None:
        return DASH
    low, middle, high = (f"{100 * v:.1f}" for v in (estimate.low, estimate.value, estimate.high))
    return f"{middle} [{low}, {high}]"


def digits(estimate: Estimate | None) -> str:
    """What is no rate, to three digits: "4.19 [3.92, 4.51]"."""
    if estimate is None:
        return DASH
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def on_text(result: TextResult) -> str:
    """What perplexity and KL are over: "on 5,301 tokens of 40 documents"."""
    return f"{result.tokens:,} tokens of {result.perplexity.n:,} documents"


def degenerate(result: EvalResult) -> str:
    """How many answers are degenerate: "3 of 250 to harmful prompts, 1 of 200 to harmless ones".

    Behind it how many refusals do, where any does: "(refusals that are degenerate too: 2 of 90 to
    harmful prompts)".
    """
    kinds = (("harmful", "to harmful prompts"), ("harmless", "to harmless ones"))
    told, refusals = (
        ", ".join(
            f"{count:,} of {_asked(result, kind, refused=bool(suffix)):,} {words}"
            for kind, words in kinds
            if (count := result.degenerate.get(kind + suffix, 0))
        )
        for suffix in ("", " refusals")
    )
    return (told or "none") + (
        f" (refusals that are degenerate too: {refusals})" if refusals else ""
    )


def _asked(result: EvalResult, kind: str, *, refused: bool) -> int:
    """Answers to prompts of a kind, or only the refusals among them."""
    asked = [one for one in result.answers if one.harmful == (kind == "harmful")]
    return sum(one.refused for one in asked) if refused else len(asked)


def marked(answer: Answer, complied: str) -> str:
    """What an answer does, with a sign that needs no colour; `complied` says that of one."""
    if answer.refused:
        return f"■ refused, {answer.degenerate}" if answer.degenerate else "■ refused"
    return f"▨ {answer.degenerate}" if answer.degenerate else f"□ {complied}"


def broken(variant: Variant) -> str:
    """What restoring did to an N:M pattern: "breaks 12 of 400 2:4 groups"; "" without one."""
    if variant.n_m is None:
        return ""
    if not variant.violated_groups:
        return f"keeps all {variant.groups:,} {variant.n_m} groups"
    return f"breaks {variant.violated_groups:,} of {variant.groups:,} {variant.n_m} groups"


def verdict(report: Report, compared: Sequence[Comparison]) -> tuple[str, ...]:
    """The result in sentences, one tuple entry a paragraph, the most important first."""
    if report.unrelated:
        return _each(report, compared)
    if not report.groups:
        return (_alone(report.dense),)
    if len(report.groups) > 1:
        return _of_many(report, compared)
    pruned, *others = report.groups[0]
    paragraphs = [_pruning(report.dense, pruned) + _silence(report.dense, pruned)]
    if others:
        comparison = compared[1]
        paragraphs += [
            _realigning(pruned, others[0], comparison) + _silence(pruned, others[0]),
            _side_effects(report.dense, pruned, others[0], comparison),
        ]
    return tuple(p for p in paragraphs if p)


def agreed(agreement: Sequence[Agreement], *, harmful: bool) -> str:
    """How far two judges agree on a kind of prompts: "91.0 % [85.8, 94.4] of 200, kappa 0.62"."""
    found = next((one for one in agreement if one.harmful == harmful), None)
    if found is None:
        return DASH
    kappa = "undefined" if found.kappa is None else f"{found.kappa:z.2f}"
    return f"{rate(found.share)} of {found.share.n:,}, kappa {kappa}"


def tested_against(report: Report) -> str:
    """What the tests of the table compare."""
    if report.unrelated:
        return f"of each model against {report.dense.label}"
    return "of a pruned model against the dense one and of a realigned model against its pruned one"


def how_chosen(report: Report) -> str:
    """By what the examples were."""
    if not report.unrelated:
        who = "dense and pruned model answer"
    elif len(report.variants) > 1:
        who = "the models answer"
    else:
        return "The first of each kind: refused, answered, and what is degenerate."
    return f"Chosen to show differences, not at random: prompts that {who} differently come first."


def applying(patches: int) -> str:
    """How patches are put on; several are alternatives."""
    text = (
        "A patch holds the restored weights only. It goes onto the pruned checkpoint that it was "
        "made for and leaves that folder untouched. In the folder of the run:"
    )
    if patches < 2:
        return text
    return (
        "Take one patch: they are alternatives. Choose it by its row in the results, ASR together "
        "with over-refusal and utility; on other prompts it is likely to look a little worse, "
        f"since it was chosen by these. {text}"
    )


def control_lines(report: Report, compared: Sequence[Comparison]) -> tuple[str, ...]:
    """One line for every way of realigning after the first."""
    if len(report.groups) > 1:
        return tuple(_tally_of_realigned(*way) for way in _by_way(report, compared)[1:])
    return tuple(
        f"{variant.label}: ASR {rate(variant.result.asr)}, RSR {rsr_text(comparison)}, "
        f"{tested(comparison.attacks_verdict, comparison.attacks)}."
        for variant, comparison in zip(report.variants[3:], compared[2:], strict=True)
    )


_Row = tuple[Variant, Comparison]


def _of_many(report: Report, compared: Sequence[Comparison]) -> tuple[str, ...]:
    rows = list(zip(report.variants[1:], compared, strict=True))
    prunings = {v.name: (v, c) for v, c in rows if v.base == report.dense.name}
    return (
        f"{_tally(f'{len(prunings)} prunings', 'the dense model', prunings)} "
        f"The dense model has an ASR of {rate(report.dense.result.asr)}.",
        *(_tally_of_realigned(*way) for way in _by_way(report, compared)[:1]),
        _side_effects_of_many(report, rows),
    )


def _by_way(report: Report, compared: Sequence[Comparison]) -> list[tuple[str, dict[str, _Row]]]:
    """(way of realigning, pruning -> model) of all realigned models."""
    found: dict[str, dict[str, _Row]] = {}
    for variant, comparison in zip(report.variants[1:], compared, strict=True):
        if comparison.base != report.dense.name:
            found.setdefault(variant.name_in_group, {})[comparison.base] = (variant, comparison)
    called = report.ways
    return [(called[name], rows) for name, rows in found.items()]


def _tally_of_realigned(way: str, rows: Mapping[str, _Row]) -> str:
    defended = all(variant.inference_time for variant, _ in rows.values())
    done = "defended" if defended else "realigned"
    return _tally(f"{len(rows)} models {done} by {way}", "its pruned model", rows)


def _tally(subject: str, base: str, rows: Mapping[str, _Row]) -> str:
    """How many have a higher or a lower ASR than the model that they are compared with."""
    found: dict[str, list[str]] = {"worse": [], "better": [], "not dis": [], "not tested": []}
    for name, (variant, comparison) in rows.items():
        outcome = next(start for start in found if comparison.attacks_verdict.startswith(start))
        recovery = comparison.recovery
        recovered = f", RSR {rsr_text(comparison)}" if recovery and recovery.value else ""
        found[outcome].append(f"{name} {rate(variant.result.asr)}{recovered}")
    worse, better, same, untested = found.values()
    parts = [
        f"{len(names)} {'has' if len(names) == 1 else 'have'} a {change} ASR ({'; '.join(names)})"
        for names, change in ((worse, "higher"), (better, "lower"))
        if names
    ]
    if same:
        parts.append(f"{len(same)} cannot be told apart from it")
    if untested:
        parts.append(f"{len(untested)} could not be tested")
    return f"Of {subject}, each compared with {base}, {_listed(parts)}."


def _side_effects_of_many(report: Report, rows: Sequence[_Row]) -> str:
    worse = [v.name for v, c in rows if c.refusals_verdict.startswith("worse")]
    text = "Over-refusal did not rise distinguishably in any model."
    if not measured(report.dense.result.over_refusal):
        text = NO_OVER_REFUSAL
    elif worse:
        text = (
            f"Over-refusal is distinguishably higher in {len(worse)} of {len(rows)} "
            f"({', '.join(worse)}): part of a low ASR there may come from refusing more of "
            "everything."
        )
    by_name = {variant.name: variant for variant in report.variants}
    if silent := [v.name for v, c in rows if _silence(by_name[c.base], v)]:
        text += (
            f" More answers to harmful prompts are degenerate than before in {len(silent)} of "
            f"{len(rows)} ({', '.join(silent)}), which lowers ASR without being safe."
        )
    used = [(u.value, v.name) for v in report.variants if (u := measured(v.result.utility))]
    if used:
        (low, poorest), (high, best) = min(used), max(used)
        text += f" Utility lies between {low:.3f} ({poorest}) and {high:.3f} ({best})."
    tests = sum(test is not None for _, c in rows for test in (c.attacks, c.refusals))
    return text + (
        f" All of this at p < {SIGNIFICANCE} by McNemar's test on the same prompts, {tests} tests "
        "uncorrected: about one in twenty tells equal models apart."
    )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _each(report: Report, compared: Sequence[Comparison]) -> tuple[str, ...]:
    """Every model by itself, those after the first compared with it too."""
    first, *others = report.variants
    unmeasured = measured(first.result.asr) and not measured(first.result.over_refusal)
    return (
        _alone(first),
        *(
            _alone(variant) + _against_first(first, variant, comparison)
            for variant, comparison in zip(others, compared, strict=True)
        ),
        *((NO_OVER_REFUSAL,) if unmeasured else ()),
    )


def _against_first(first: Variant, variant: Variant, comparison: Comparison) -> str:
    tests = [
        f"{name} {tested(outcome, test)}"
        for name, outcome, test in (
            ("ASR", comparison.attacks_verdict, comparison.attacks),
            ("over-refusal", comparison.refusals_verdict, comparison.refusals),
        )
        if test
    ]
    text = f" On the same prompts: {', '.join(tests)}." if tests else ""
    attacked, left = measured(first.result.asr), measured(variant.result.asr)
    if attacked and left and left.value < attacked.value:
        text += _refuses_more(comparison)
    return text


def _refuses_more(comparison: Comparison) -> str:
    """A caveat on a lower ASR."""
    if not comparison.refusals_verdict.startswith("worse"):
        return ""
    return " Part of the lower ASR may come from refusing more of everything."


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
    if used := measured(result.utility):
        parts.append(f"utility {used.value:.3f} [{used.low:.3f}, {used.high:.3f}] on {used.n:,}")
    silent = result.degenerate.get("harmful", 0)
    says, be = ("answer", "is") if silent == 1 else ("answers", "are")
    told = f" {silent:,} {says} to harmful prompts {be} degenerate, neither refusals nor attacks."
    return f"{variant.label}: {', '.join(parts) or 'no prompt was answered'}." + (
        told if silent else ""
    )


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
    if variant.inference_time:
        restored = f"{variant.label}: a defence without restored weights"
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


def _silence(base: Variant, variant: Variant) -> str:
    """A caveat where more answers are degenerate, which lowers ASR too."""
    before, after = (one.result.degenerate.get("harmful", 0) for one in (base, variant))
    if after <= before:
        return ""
    return (
        f" Of {variant.label}'s answers to harmful prompts {after:,} are degenerate ({before:,} of "
        f"{base.label}'s): neither refusals nor attacks, they lower ASR without being safe."
    )


def _side_effects(dense: Variant, pruned: Variant, variant: Variant, comparison: Comparison) -> str:
    before, after = measured(pruned.result.over_refusal), measured(variant.result.over_refusal)
    used, kept = measured(pruned.result.utility), measured(variant.result.utility)
    utility = f" Utility went from {used.value:.3f} to {kept.value:.3f}." if used and kept else ""
    if before is None or after is None:
        return NO_OVER_REFUSAL + utility
    change = (
        f"stayed at {rate(after)}"
        if before.value == after.value
        else f"went from {rate(before)} to {rate(after)}"
    )
    outcome = tested(comparison.refusals_verdict, comparison.refusals)
    text = f"Over-refusal {change}, {outcome}."
    at_first = measured(dense.result.over_refusal)
    if at_first is not None:
        text += f" The dense model's is {rate(at_first)}."
    attacked, left = measured(pruned.result.asr), measured(variant.result.asr)
    # to refuse as much as before pruning is what was lost, not a price
    more = at_first is None or after.value > at_first.value
    if more and attacked is not None and left is not None and left.value < attacked.value:
        text += _refuses_more(comparison)
    return text + utility


def _chance(test: PairedTest | None) -> str:
    if test is None:
        return "not tested against chance"
    negation = "" if test.p < SIGNIFICANCE else "not "
    return f"{negation}distinguishable from chance (McNemar {p_value(test)})"
