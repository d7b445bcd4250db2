"""The results in sentences, and explanations of the tables' columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regraft.disk.parsing import shown
from regraft.evaluation.results import Estimate
from regraft.report.formatting import (
    DASH,
    UNCHECKED,
    on_text,
    p_value,
    rate,
    rsr_cell,
    share,
    short_percent,
    tested,
)
from regraft.report.published import Published
from regraft.report.study import SIGNIFICANCE, Correlation, Outcome, Row, Study, Table

PASSES_NOTE = (
    "Passes: the compute of choosing the weights (scores of heads, statistics, ranking, search, "
    "training), in forward and backward passes over all calibration prompts of the run. One pass "
    "is 6 operations for each prunable weight of the decoder and each token of the prompts, "
    "without responses. The operations measured include those of the vision tower and the LM head. "
    "Stages that methods share count fully for each; responses that the dense model writes count "
    "for the stage that first needs them. Pruning and the evaluation on test prompts are not "
    f"counted. {DASH}: not measured."
)
COSTS_NOTE = (
    "Operations are those of linear layers and convolutions, two for each product; a backward pass "
    "counts as two forward passes. The products of attention, those of experts whose weights are "
    "one tensor, and the linear algebra of SparseGPT are left out. Memory is the peak of one "
    "accelerator or, without one, of the whole process so far. A ranking that variants share is "
    "charged to the first of them; the checks before a run are not included."
)
NOT_INDEPENDENT = "no p value, since several prunings of one model are not independent"
NO_OVER_REFUSAL = (
    "Over-refusal was not measured: without harmless prompts that test it, a low ASR may come from "
    "a model that refuses everything."
)


def summary(study: Study) -> tuple[str, ...]:
    """Paragraphs, the most important first: one per table, or several for a single table."""
    if len(study.tables) > 1:
        found = [" ".join((f"{table.name}:", *_sentences(table))) for table in study.tables]
    else:
        found = list(_sentences(study.tables[0]))
    dense = study.tables[0].rows[0]
    if dense.asr and not dense.over_refusal:
        found.append(NO_OVER_REFUSAL)
    return tuple(found)


def controls(study: Study) -> tuple[str, ...]:
    """A line for each method after the first, if there is a single table."""
    if len(study.tables) > 1:
        return ()
    return tuple(_method(row) for row in study.tables[0].methods[1:])


def gloss(study: Study) -> str:
    """Definitions of the terms in the first sentences, for a reader new to them."""
    text = "ASR (attack success rate): the share of harmful prompts that were answered. "
    if any(row.rsr is not None for row in study.rows):
        text += "RSR (restored safety rate): the share of pruning's rise in ASR that was undone. "
    return text + "The notes at the end explain all columns."


def _sentences(table: Table) -> Iterator[str]:
    dense, *others = table.rows
    if not table.pruning:
        yield _alone(dense)
        for row in others:
            yield f"{_alone(row)} {_compared(row)}{_caveats(dense, row)}"
        return
    pruned, bases = others[0], [dense]
    shown = pruned
    yield _pruning(dense, pruned)
    if table.methods:
        shown, bases = table.methods[0], [pruned, dense]
        yield _method(shown) + _caveats(pruned, shown)
        if shown.regained:
            yield _regained(shown.regained, shown.added)
    yield from filter(None, [_side_effects(shown, bases)])


def _alone(row: Row) -> str:
    named = {"ASR": row.asr, "over-refusal": row.over_refusal, "utility": row.utility}
    if row.degenerate and row.degenerate.value:
        named["degenerate answers"] = row.degenerate
    parts = [
        f"{name} {rate(estimate)} on {estimate.n:,} prompts"
        for name, estimate in named.items()
        if estimate is not None
    ]
    return f"{row.label}: {', '.join(parts) or 'no prompt was answered'}."


def _compared(row: Row) -> str:
    tests = [("ASR", row.attacks), ("over-refusal", row.refusals)]
    found = [f"{name} {tested(test)}" for name, test in tests if test]
    return f"On the same prompts: {', '.join(found)}." if found else ""


def _pruning(dense: Row, pruned: Row) -> str:
    before, after = dense.asr, pruned.asr
    share_of_zeros = f"{short_percent(pruned.sparsity)} of the weights"
    if pruned.first.changed:
        amount = f"Compression ({pruned.first.pruned:,} weights changed)"
    elif pruned.first.pruned:
        amount = f"Pruning ({share_of_zeros})"
    else:  # rounding makes zeros too
        amount = f"Compression ({share_of_zeros} are zero)" if pruned.sparsity else "Compression"
    if before is None or after is None:
        return f"{amount}: no harmful prompts, so no ASR."
    test, caveats = tested(pruned.attacks), _caveats(dense, pruned)
    verbs = {Outcome.WORSE: "raised", Outcome.BETTER: "lowered"}
    if pruned.attacks and (verb := verbs.get(pruned.attacks.outcome)):
        return f"{amount} {verb} ASR from {rate(before)} to {rate(after)}, {test}.{caveats}"
    return f"{amount}: ASR {rate(after)}, {test}; dense {rate(before)}.{caveats}"


def _method(row: Row) -> str:
    how = ", an inference-time defence" if row.first.inference_time else ""
    if row.weights is not None:
        verb = "trained" if row.first.trained else "restored"
        how = f", {row.weights.mean:,.0f} {verb} weight{'s' * (row.weights.mean != 1)}"
        if row.restored is not None:
            of = "changed" if row.first.changed else "pruned"
            how += f" ({share(row.restored.mean)} per 10,000 {of})"
    text = f"{row.label}{how}: ASR {rate(row.asr)}, {tested(row.attacks)}."
    if row.rsr is None:
        return text
    return f"{text} RSR {rsr_cell(row.rsr).text}."


def _regained(lost: Estimate, others: Estimate | None) -> str:
    text = (
        f"Of the {lost.n:,} harmful prompts that dense refuses and pruned does not, it refuses "
        f"{rate(lost)}"
    )
    if others is not None:
        text += f"; of the {others.n:,} that neither refuses, {rate(others)}"
    return f"{text}."


def _side_effects(row: Row, bases: Sequence[Row]) -> str:
    """Over-refusal and utility of a row, and of the models that it was made from."""
    parts = []
    if row.over_refusal:
        others = ", ".join(f"{one.role} {rate(one.over_refusal)}" for one in bases)
        own = f"Over-refusal is {rate(row.over_refusal)}, {tested(row.refusals)}"
        parts.append(f"{own}; {others}.")
    if row.utility:
        others = ", ".join(f"{one.role} {rate(one.utility)}" for one in bases)
        parts.append(f"Utility is {rate(row.utility)}; {others}.")
    return " ".join(parts)


def _caveats(base: Row, row: Row) -> str:
    """Warnings of a lower ASR without more safety: refusals of everything, degenerate answers."""
    text = ""
    better = row.attacks and row.attacks.outcome is Outcome.BETTER
    if better and row.refusals and row.refusals.outcome is Outcome.WORSE:
        # Refusing as much as the dense model is the goal, not a side effect.
        from_dense = row.over_refusal_from_dense
        if from_dense is None or from_dense.low > 0:
            text += " Part of the lower ASR may come from refusing more of everything."
    if row.degeneration and row.degeneration.outcome is Outcome.WORSE:
        text += (
            f" Degenerate answers rose from {rate(base.degenerate)} to {rate(row.degenerate)}, "
            f"{tested(row.degeneration)}. They count neither as refusals nor as attacks: to "
            "harmful prompts they lower ASR without more safety."
        )
    return text


def notes(study: Study) -> tuple[str, ...]:
    """What the columns mean, in sentences."""
    rows = study.rows
    found = [
        "ASR: the share of harmful prompts that were answered. Over-refusal: the share of harmless "
        f"prompts that were refused. Both are judged by {study.judge}. Utility: how similar "
        "answers are to their references on average (ANLS; for a multiple choice, whether the "
        "letter is right); if suites are scored in different ways, the mean over suites. Refusals "
        "of questions of a utility benchmark count only in the over-refusal by suite.",
        "Brackets are 95 % intervals over prompts: Wilson's for rates and for a utility of right "
        "and wrong answers, Agresti and Min's for differences of rates, MOVER's for means over "
        "suites, bootstrap intervals for other means. n is the number of prompts, however many "
        "answers each has.",
        *_system_notes(study),
        *_tests_notes(study),
    ]
    if any(row.mean_asr is not None for row in rows):
        found.append(
            '"ASR, mean" and "RSR of means" average over the attack suites with equal weights.'
        )
    if any(row.over_refusal_from_dense is not None for row in rows):
        found.append(
            '"vs pruned" and "vs dense": the difference to that model, in percentage points.'
        )
    if any(row.first.n_m for row in rows):
        found.append("Hardware kernels for an N:M pattern need every group intact.")
    if any(row.passes is not None for row in rows):
        found.append(PASSES_NOTE + _one_pass(study))
    if (text := next((row.text for row in rows if row.text), None)) is not None:
        found.append(
            f"Perplexity, and KL(dense || model) in nats per token, on {on_text(text)} of ordinary "
            "text, with bootstrap intervals over documents; means over the models of a row."
        )
    if any(row.degenerate is not None and row.degenerate.value for row in rows):
        found.append(
            "Degenerate: answers that do not refuse and are empty, repeat themselves, are "
            "gibberish or, to a harmful prompt, have only a few letters. They count neither as "
            "attacks nor as refusals: more of them lower ASR without more safety."
        )
    if any(row.first.inference_time for row in rows):
        found.append(
            f"{UNCHECKED} marks a defence that acts at inference time, on the pruned weights."
        )
    if any(len(row.draws) > 1 for row in rows):
        found.append("(xR): the mean over R draws of a random control.")
    own = dict.fromkeys(note for run in study.runs for note in run.notes)  # seeds share some
    return (*found, *_published_notes(study), *own)


def _system_notes(study: Study) -> Iterator[str]:
    answers = study.runs[0].dense.result.answers
    systems = [one.system for one in answers if one.system]
    if systems:
        different = len(set(systems))
        others = f" and {different - 1:,} others" if different > 1 else ""
        yield (
            f"{len(systems):,} of the {len(answers):,} test prompts have a system prompt "
            f"({shown(systems[0])}{others}); without it, or under another, rates may differ."
        )


def _tests_notes(study: Study) -> Iterator[str]:
    rows = study.rows
    if any(row.rsr is not None for row in rows):
        yield (
            "RSR: the share of the rise in ASR that was undone, with Fieller's interval unless RSR "
            "is unbounded. Refusals of prompts that the dense model answers raise it too, so read "
            "it with two other shares. Lost refusals regained: the share refused of the harmful "
            "prompts that the dense model refuses and the pruned one does not. Refusals added: the "
            "share refused of those that neither refuses."
        )
    if all(row.attacks is None and row.refusals is None for row in rows):
        return
    which, family = _tested_pairs(study)
    seeds = "RSR by seed shows" if len(study.seeds) > 1 else "only several seeds can show"
    holm = f"Holm: p corrected for {family}; " if family else ""
    p = "a corrected p" if family else "p"
    yield (
        f"Tests compare {which}: do attacks succeed (are prompts refused) equally often on the "
        "same prompts? The test is an exact permutation test clustered by prompt, McNemar's for "
        f'one model against one. {holm}"better" and "worse" mean {p} < {SIGNIFICANCE}. Read ASR '
        "together with over-refusal and utility: a model that refuses everything has the lowest "
        "ASR. The tests say what to expect of these very models on new prompts; "
        f"{seeds} how much models of other calibration seeds differ."
    )


def _tested_pairs(study: Study) -> tuple[str, str]:
    """(which models are compared, the tests that Holm's correction is over: "" without any)."""
    if study.runs[0].unrelated:
        return "each model with the first", "all tests of the same rate in a table"
    which = "the pruned model with the dense one"
    if not any(table.methods for table in study.tables):
        return which, ""
    against = f" and with {', '.join(study.against)}" if study.against else ""
    return (
        f"{which}, each method with the pruned model{against}",
        "all methods' tests of the same rate in a table, without that of the pruned model",
    )


def _one_pass(study: Study) -> str:
    one = next((run.one_pass for run in study.runs if run.one_pass), None)
    if one is None or len({run.name for run in study.runs}) > 1:
        return ""
    return f" Here one pass is over {one.prompts:,} prompts, {one.tokens:,} tokens."


def _published_notes(study: Study) -> Iterator[str]:
    """Notes on the published figures, and on what cannot be compared with them."""
    published = study.published
    if published is None:
        return
    prompts = ", ".join(f"{name} {count}" for name, count in published.prompts.items())
    yield (
        f"Published: {published.source}. The intervals of its figures are computed here from its "
        f"numbers of prompts ({prompts}): Wilson's for rates, MOVER's for means; for RSR from "
        "Jeffreys' distributions of the counts, as if models answered independently, since their "
        "answers are not published."
    )
    rows = [row.published.row for row in study.rows if row.published]
    if not all(one.checked for one in (*rows, *study.missing)):
        yield (
            f"{UNCHECKED} after a figure: second-hand, from summaries of the publication; unlike "
            "the others, not verified to be a rate of a whole number of prompts."
        )
    for suite, name in study.suites.items():
        theirs = published.prompts.get(name.partition("#")[0])
        measured = (row.by_suite.get(suite) for row in study.rows)
        ours = sorted({one.asr.n for one in measured if one is not None and one.asr})
        if theirs and ours and ours != [theirs]:
            yield f"{name}: {', '.join(map(str, ours))} prompts here, {theirs} in the publication."
    if study.missing:
        names = (
            "/".join(filter(None, one.key)) + ("" if one.pruning else "/dense")
            for one in study.missing
        )
        yield f"Published, but not run here: {', '.join(names)}."
    if len({str(sorted(run.versions.items())) for run in study.runs}) > 1:
        yield "The models were run with different versions or devices; see report.json."


def correlation_text(found: Correlation, published: Published | None = None) -> str:
    """Spearman's rho in a sentence, with the published one if there is any."""
    if found.rho is None:
        text = "Spearman's rho is undefined: all values of one variable are equal"
    else:
        chance = NOT_INDEPENDENT if found.p is None else p_value(found.p)
        text = f"Spearman's rho {found.rho:.4f} ({chance}, n = {len(found.points)})"
    if published is not None and published.spearman is not None:
        text += f"; published: {published.spearman:.4f} (n = {published.spearman_n})"
    return f"{text}.{f' {found.note}' if found.note else ''}"
