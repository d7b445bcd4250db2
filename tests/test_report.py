"""The report on made-up results: complete, self-contained, escaped and always the same."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from disk import full_beyond, tree
from regraft.console import show_study
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.evaluation.keywords import REGRAFT_1
from regraft.evaluation.metrics import rsr, wilson
from regraft.evaluation.pairing import holm
from regraft.evaluation.perplexity import result_of
from regraft.evaluation.results import Answer, Estimate
from regraft.evaluation.summary import judge_answer, summarise
from regraft.evaluation.verdicts import Agreement, Judged
from regraft.report import tables
from regraft.report.cards import render_card
from regraft.report.examples import choose_examples, shown_variants
from regraft.report.formatting import (
    clip,
    p_value,
    pattern,
    rsr_cell,
    share,
    short_names,
    unbroken,
)
from regraft.report.page import escape_cell, escape_markdown, fenced, render_html, render_markdown
from regraft.report.pooling import study_of
from regraft.report.rate_figures import trade_off_figure
from regraft.report.run import DataAccount, HeadMap, Opinion, Run, Variant, paired_answers
from regraft.report.study import Outcome, Recovered, Row, Table
from regraft.report.summary import _method, controls, notes, summary
from regraft.report.weight_figures import head_map_figure, restored_figure
from regraft.report.write import check_report_folder, report_to_json, write_report
from truth import mcnemar, paired_rsr

JUDGE = REGRAFT_1
REFUSAL = "I'm sorry, I can't help with that."
ATTACK = "Sure: <script>alert('x')</script> & more ```"


def answers(attacks: int, refusals: int, harmful: int = 40, harmless: int = 20) -> list[Answer]:
    """The first `attacks` harmful prompts are answered, the first `refusals` harmless refused."""
    unsafe = [
        judge_answer(
            Example(f"h{i}", f"<img src=x> prompt {i}", True, f"category {i % 3}"),
            ATTACK if i < attacks else REFUSAL,
            JUDGE,
        )
        for i in range(harmful)
    ]
    safe = [
        judge_answer(
            Example(f"u{i}", f"question {i}", False, "shops", Path("at/home/u.png"), "nine"),
            REFUSAL if i < refusals else "nine",
            JUDGE,
        )
        for i in range(harmless)
    ]
    return unsafe + safe


def variant(name: str, attacks: int, refusals: int, **numbers: object) -> Variant:
    result = summarise("suite", JUDGE, answers(attacks, refusals))
    return Variant(name, result, f"the {name} model", **numbers)  # type: ignore[arg-type]


DENSE = variant("dense", 5, 1)
PRUNED = variant("pruned", 25, 2, base="dense", sparsity=0.6, pruned=1_000_000, checkpoint="pruned")
REALIGNED = variant(
    "realigned",
    10,
    3,
    base="pruned",
    sparsity=0.5995,
    restored=500,
    pruned=1_000_000,
    restored_by_module={"self_attn.q_proj": (300, 0, 17), "mlp.up_proj": (100, 83, 0)},
    heads=((0, 1), (1, 0)),
    patch="patches/the realigned.safetensors",
)
RANDOM = variant("random", 24, 2, base="pruned", sparsity=0.5995, restored=500, pruned=1_000_000)
BACKWARDS = (
    replace(PRUNED, name="dense", base=None),
    replace(DENSE, name="pruned", base="dense"),
    REALIGNED,
)
REPORT = Run(
    "A title & more",
    "pico <model>",
    (DENSE, PRUNED, REALIGNED, RANDOM),
    (HeadMap("Ships", "degrees", ((1.0, None, None), (2.0, 3.0, 0.5))),),
    (DataAccount("calibration", "VLGuard", 2000, 128, {"not drawn": 1872}),),
    {"prune": {"method": "wanda", "sparsity": 0.6}, "heads": (1, 2), "out": Path("some/out")},
    {"regraft": "0.1.0"},
    ("A note.",),
)


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(study_of([REPORT]))


@pytest.fixture(scope="module")
def text() -> str:
    return render_markdown(study_of([REPORT]))


class Outline(HTMLParser):
    """The table rows, tags and attribute values of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "path", "rect", "image", "use", "link", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def row(self, start: str) -> list[str]:
        return next(row for row in self.rows if row and start in row[0])


def rows_of(run: Run) -> dict[str, Row]:
    """By the names of the models; methods of several prunings by pruning and name."""
    return {row.first.name: row for table in study_of([run]).tables for row in table.rows}


# Comparisons


def test_comparisons_equal_the_metrics_on_the_same_prompts() -> None:
    dense, pruned, realigned = ([i < n for i in range(40)] for n in (5, 25, 10))
    rows = rows_of(REPORT)
    first, pruning = rows["realigned"], rows["pruned"]
    assert first.rsr is not None and first.attacks is not None and first.refusals is not None
    assert first.rsr.value == rsr(5 / 40, 25 / 40, 10 / 40)
    assert first.rsr.interval == paired_rsr(dense, pruned, realigned)
    assert first.attacks.p == pytest.approx(mcnemar(realigned, pruned).p)
    assert (first.attacks.outcome, first.attacks.against) == (Outcome.BETTER, "pruned")
    refusals = mcnemar([i < 3 for i in range(20)], [i < 2 for i in range(20)])
    assert first.refusals.p == pytest.approx(refusals.p)
    assert first.refusals.outcome is Outcome.SAME
    assert pruning.attacks is not None and pruning.refusals is not None
    assert (pruning.rsr, pruning.attacks.against) == (None, "dense")
    assert pruning.attacks.p == pytest.approx(mcnemar(pruned, dense).p)
    assert pruning.attacks.outcome is Outcome.WORSE
    assert pruning.refusals.outcome is Outcome.SAME


def test_comparisons_pair_by_id_whatever_the_order() -> None:
    backwards = replace(
        REALIGNED, result=replace(REALIGNED.result, answers=REALIGNED.result.answers[::-1])
    )
    shuffled = replace(REPORT, variants=(DENSE, PRUNED, backwards, RANDOM))
    for name, row in rows_of(shuffled).items():
        same = rows_of(REPORT)[name]
        assert (row.attacks, row.refusals, row.rsr) == (same.attacks, same.refusals, same.rsr)


def test_comparisons_name_what_is_worse() -> None:
    worse = variant("worse", 38, 15, base="pruned", restored=1, pruned=10)
    found = rows_of(Run("t", "m", (DENSE, PRUNED, worse)))["worse"]
    assert found.attacks is not None and found.refusals is not None
    assert (found.attacks.outcome, found.refusals.outcome) == (Outcome.WORSE, Outcome.WORSE)
    assert found.rsr is not None and found.rsr.value is not None
    assert found.rsr.value < 0


def test_without_answers_there_is_no_report() -> None:
    bare = replace(REALIGNED, result=replace(REALIGNED.result, answers=()))
    with pytest.raises(RegraftError, match="keeps no answers"):
        study_of([Run("t", "m", (DENSE, PRUNED, bare))])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"judge": "other"}, "judged by other, the other by regraft-keywords-1"),
        ({"answers": REALIGNED.result.answers[1:]}, "prompt 'h0'"),
    ],
    ids=["judge", "missing prompt"],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], named: str) -> None:
    odd = replace(REALIGNED, result=replace(REALIGNED.result, **change))  # type: ignore[arg-type]
    with pytest.raises(RegraftError, match=named):
        study_of([Run("t", "m", (DENSE, PRUNED, odd))])


# Several prunings


def group(
    name: str, sparsity: float, attacks: int, refusals: int, back: int
) -> tuple[Variant, ...]:
    """A pruning, its realigned model, which answers `back` attacks, and a control."""
    more = {"pruned": 1_000}
    ways = (("hsr", "HSR, top", back), ("random", "HSR, random", attacks))
    pruned = variant(name, attacks, refusals, base="dense", sparsity=sparsity, **more)
    return (
        replace(pruned, method=""),
        *(
            replace(
                variant(f"{name}/{way}", count, refusals, base=name, **more),
                method=method,
                restored=5,
                sparsity=sparsity - 0.005,
            )
            for way, method, count in ways
        ),
    )


WANDA_50 = group("wanda-50", 0.5, 7, 1, 6)
WANDA_60 = group("wanda-60", 0.6, 25, 2, 10)
WANDA_70 = group("wanda-70", 0.7, 0, 18, 0)
PATTERN = {"n_m": "2:4", "violated_groups": 12, "groups": 4_000}
MATRIX = Run(
    "A matrix",
    "pico",
    (
        replace(DENSE, method=""),
        *WANDA_50,
        *WANDA_60,
        *WANDA_70,
        *(
            replace(v, **(PATTERN if i else {}))  # type: ignore[arg-type]
            for i, v in enumerate(group("wanda-2-4", 0.5, 24, 2, 12))
        ),
    ),
)


def test_each_is_compared_with_its_own_base() -> None:
    """Against the metrics on outcomes written down here."""
    attacks = {"dense": 5, "wanda-50": 7, "wanda-60": 25, "wanda-60/hsr": 10, "wanda-50/hsr": 6}
    refusals = {"dense": 1, "wanda-50": 1, "wanda-60": 2, "wanda-60/hsr": 2, "wanda-50/hsr": 1}
    found = rows_of(MATRIX)
    assert set(found) == {v.name for v in MATRIX.variants}
    for name, base in (
        ("wanda-50", "dense"),
        ("wanda-60", "dense"),
        ("wanda-50/hsr", "wanda-50"),
        ("wanda-60/hsr", "wanda-60"),
    ):
        hits, theirs = ([i < attacks[one] for i in range(40)] for one in (name, base))
        refused, their = ([i < refusals[one] for i in range(20)] for one in (name, base))
        row = found[name]
        assert row.attacks is not None and row.refusals is not None
        assert row.attacks.against == ("dense" if base == "dense" else "pruned")
        assert row.attacks.p == pytest.approx(mcnemar(hits, theirs).p)
        assert row.refusals.p == pytest.approx(mcnemar(refused, their).p)
        if base != "dense":
            assert row.rsr is not None
            assert row.rsr.value == rsr(5 / 40, attacks[base] / 40, attacks[name] / 40)
    for name, outcome in (("wanda-60", Outcome.WORSE), ("wanda-60/hsr", Outcome.BETTER)):
        attack = found[name].attacks
        assert attack is not None and attack.outcome is outcome
    refusal = found["wanda-70"].refusals
    assert refusal is not None and refusal.outcome is Outcome.WORSE


def test_groups_and_roles() -> None:
    assert [[v.name for v in group] for group in MATRIX.groups] == [
        [name, f"{name}/hsr", f"{name}/random"]
        for name in ("wanda-50", "wanda-60", "wanda-70", "wanda-2-4")
    ]
    tables = study_of([MATRIX]).tables
    assert [table.pruning for table in tables] == [group[0].name for group in MATRIX.groups]
    for table in (*tables, *study_of([REPORT]).tables):
        assert [row.role for row in table.rows] == ["dense", "pruned", "method", "method"]


def test_the_summary_of_many_has_a_paragraph_for_each() -> None:
    paragraphs = summary(study_of([MATRIX]))
    assert [text.partition(":")[0] for text in paragraphs] == [
        *("wanda-50", "wanda-60", "wanda-70", "wanda-2-4"),
    ]
    assert paragraphs[1].startswith(
        "wanda-60: Pruning (60 % of the weights) raised ASR from 12.5 % [5.5, 26.1] to 62.5 % "
        "[47.0, 75.8], worse than dense (p < 0.001). hsr (HSR, top), 5 restored weights (50 per "
        "10,000 pruned): ASR 25.0 % [14.2, 40.2], better than pruned (p < 0.001). RSR 75.0 % ["
    )
    assert "not distinguishable from dense" in paragraphs[0]
    assert controls(study_of([MATRIX])) == ()


def test_examples_are_of_the_pruning_with_the_highest_asr() -> None:
    assert [v.name for v in shown_variants(MATRIX)] == ["dense", "wanda-60", "wanda-60/hsr"]
    assert [v.name for v in shown_variants(REPORT)] == ["dense", "pruned", "realigned"]


def test_the_matrix_page() -> None:
    study = study_of([MATRIX])
    outline = Outline(render_html(study))
    rows = [row for row in outline.rows if row]
    (overview,) = [row for row in rows if row[0] == "2 wanda-60" and "p <" in " ".join(row)]
    assert "62.5 % [47.0, 75.8] 25 of 40" in overview
    assert "p < 0.001 worse than dense" in overview
    models = [row[0] for row in rows if re.match(r"\d+ ", row[0])]
    assert models[4:8] == [
        *("1 dense", "2 wanda-60", "3 hsr HSR, top", "4 random HSR, random"),
    ]
    details = [row for row in rows if row[0] == "3 hsr HSR, top"]
    assert ["5 breaks 12 of 4,000 2:4 groups" in row for row in details].count(True) == 1
    names = [a["aria-label"] for tag, a in outline.tags if tag == "svg"]
    assert names == [
        "Over-refusal against ASR",
    ]
    text = render_markdown(study)
    assert "5, breaks 12 of 4,000 2:4 groups" in text


def test_the_summary_warns_of_degenerate_answers() -> None:
    gone = [
        replace(a, answer="", refused=False, degenerate="empty") for a in REALIGNED.result.answers
    ]
    mute = replace(REALIGNED, result=summarise(REALIGNED.result.suite, REGRAFT_1, gone))
    study = study_of([Run("t", "m", (DENSE, PRUNED, mute))])
    warning = "Degenerate answers rose from 0.0 % [0.0, 6.0] to 100.0 % [94.0, 100.0],"
    assert warning in summary(study)[1]
    assert warning in render_card(study)
    said = "Degenerate answers rose from 0.0 % [0.0, 6.0] to 10.0 % [4.7, 20.1], worse than pruned"
    for silent, p in ((1, ""), (5, ""), (6, f"{said} (p = 0.031).")):  # 2 ** (1 - 6) = 0.031
        few = summarise("suite", JUDGE, [*gone[:silent], *REALIGNED.result.answers[silent:]])
        found = " ".join(
            summary(study_of([Run("t", "m", (DENSE, PRUNED, replace(REALIGNED, result=few)))]))
        )
        assert p in found, "a paired test finds it where the two intervals overlap"
        assert ("Degenerate" in found) == bool(p)


def test_patterns_in_words() -> None:
    def of(model: Variant) -> str:
        return pattern(rows_of(Run("t", "m", (DENSE, PRUNED, model)))[model.name])

    assert of(REALIGNED) == ""
    assert of(replace(REALIGNED, n_m="2:4", groups=1_000)) == "keeps all 1,000 2:4 groups"


def test_without_realigned_models_their_columns_go() -> None:
    prunings = (MATRIX.dense, *(group[0] for group in MATRIX.groups))
    report = replace(MATRIX, variants=prunings)
    page = render_html(study_of([report]))
    row, details = (one for one in Outline(page).rows if one[:1] == ["2 wanda-2-4"])
    assert (row[1], row[3]) == ("60.0 % [44.6, 73.7] 24 of 40", "10.0 % [2.8, 30.1] 2 of 20")
    assert details[1] == "50 %"
    assert "RSR" not in page


# Words


def test_the_summary_tells_the_whole_story() -> None:
    pruning, realigning, regained, effects = summary(study_of([REPORT]))
    assert pruning.startswith(
        "Pruning (60 % of the weights) raised ASR from 12.5 % [5.5, 26.1] to 62.5 %"
    )
    assert pruning.endswith("worse than dense (p < 0.001).")
    assert "500 restored weights (5 per 10,000 pruned): ASR 25.0 %" in realigning
    assert "better than pruned (p < 0.001)" in realigning
    assert re.search(r"RSR 75\.0 % \[[\d.]+, [\d.]+\]\.", realigning)
    assert regained == (
        "Of the 20 harmful prompts that dense refuses and pruned does not, it refuses 75.0 % "
        "[53.1, 88.8]; of the 5 that neither refuses, 0.0 % [0.0, 43.4]."
    )
    assert "Over-refusal is 15.0 % [5.2, 36.0], not distinguishable from pruned" in effects
    assert "pruned 10.0 % [2.8, 30.1], dense 5.0 % [0.9, 23.6]" in effects
    (control,) = controls(study_of([REPORT]))
    assert control.startswith("random (the random model), 500 restored weights")


def test_side_effects_of_pruning_alone_are_told() -> None:
    alone = replace(REPORT, variants=REPORT.variants[:2])
    pruning, effects = summary(study_of([alone]))
    assert pruning.startswith("Pruning (60 % of the weights) raised ASR")
    assert effects == (
        "Over-refusal is 10.0 % [2.8, 30.1], not distinguishable from dense (p = 1.000); dense "
        "5.0 % [0.9, 23.6]. Utility is 90.0 % [69.9, 97.2]; dense 95.0 % [76.4, 99.1]."
    )


def only(one: Variant, *, harmful: bool) -> Variant:
    kept = [answer for answer in one.result.answers if answer.harmful == harmful]
    return replace(one, result=summarise("suite", JUDGE, kept))


def test_of_what_was_not_asked_nothing_is_told() -> None:
    attacked = [only(one, harmful=True) for one in REPORT.variants]
    paragraphs = summary(study_of([replace(REPORT, variants=tuple(attacked))]))
    assert paragraphs[-1].startswith("Over-refusal was not measured") and all(paragraphs)
    asked = replace(REPORT, variants=tuple(only(one, harmful=False) for one in REPORT.variants))
    assert any("Holm: p corrected" in note for note in notes(study_of([asked])))


def test_without_methods_their_tests_are_not_explained() -> None:
    pruning = notes(study_of([replace(REPORT, variants=(DENSE, PRUNED))]))
    (tests,) = (note for note in pruning if note.startswith("Tests compare"))
    assert tests.startswith("Tests compare the pruned model with the dense one: ")
    assert "mean p <" in tests
    assert not any("Holm" in note or "each method" in note for note in pruning)


def test_a_search_may_choose_to_restore_nothing() -> None:
    """Its number of weights is known: it is no defence, which restores none by nature."""
    none = replace(REALIGNED, name="none", restored=0, restored_by_module={})
    shield = replace(none, name="shield", restored=None, patch="", inference_time=True)
    study = study_of([Run("t", "m", (DENSE, PRUNED, none, shield))])
    assert [tables.results(study)[0].rows[i][1].value for i in (2, 3)] == ["0", "–"]
    assert "none (the realigned model), 0 restored weights (0 per 10,000 pruned)" in (
        " ".join(summary(study))
    )
    assert study.rows[2].weights is not None and study.rows[3].weights is None


def without_over_refusal(one: Variant) -> Variant:
    """Its harmless prompts are questions of a benchmark."""
    asked = [
        answer if answer.harmful else replace(answer, scored_by="references")
        for answer in one.result.answers
    ]
    return replace(one, result=summarise("suite", JUDGE, asked))


def test_the_summary_tells_of_utility_where_no_refusals_were_measured() -> None:
    """An attack suite and a benchmark, as in the paper."""
    report = replace(REPORT, variants=tuple(map(without_over_refusal, REPORT.variants)))
    effects, warning = summary(study_of([report]))[-2:]
    assert warning.startswith("Over-refusal was not measured")
    assert effects.startswith("Utility is 85.0 % [")
    assert "pruned 90.0 % [" in effects


def test_to_refuse_as_the_dense_model_does_is_no_price() -> None:
    dense, pruned = variant("dense", 5, 20), variant("pruned", 25, 2, base="dense", pruned=10)
    restored = variant("restored", 6, 20, base="pruned", restored=9, pruned=10)
    report = Run("t", "m", (dense, pruned, restored))
    said = " ".join(summary(study_of([report])))
    assert "worse than pruned" in said and "dense 100.0 %" in said
    assert "refusing more of everything" not in said


def test_the_verdict_warns_of_a_model_that_refuses_everything() -> None:
    refuser = variant("refuser", 0, 20, base="pruned", restored=9, pruned=10)
    report = Run("t", "m", (DENSE, PRUNED, refuser))
    assert "refusing more of everything" in summary(study_of([report]))[1]
    riskier = variant("riskier", 30, 20, base="pruned", restored=9, pruned=10)
    report = Run("t", "m", (DENSE, PRUNED, riskier))
    said = " ".join(summary(study_of([report])))
    assert "worse than pruned" in said
    assert "lower ASR" not in said, "it rose"


def test_the_summary_claims_no_more_than_the_tests_show() -> None:
    pruned = variant("pruned", 7, 2, base="dense", pruned=100)
    method = variant("method", 8, 3, base="pruned", restored=9, pruned=100)
    pruning, restoring, *_ = summary(study_of([Run("t", "m", (DENSE, pruned, method))]))
    assert pruning == (
        "Pruning (0 % of the weights): ASR 17.5 % [8.7, 31.9], not distinguishable from dense "
        "(p = 0.500); dense 12.5 % [5.5, 26.1]."
    )
    assert restoring.endswith(
        "not distinguishable from pruned (p = 1.000). RSR -50.0 %, no interval: the rise in ASR is "
        "uncertain."
    )


def test_refusing_more_is_a_side_effect_only_where_it_is_surely_more_than_dense() -> None:
    for refusals, warned in ((7, False), (9, True)):
        strict = variant("strict", 0, refusals, base="pruned", restored=9, pruned=100)
        mild = variant("pruned", 25, 0, base="dense", pruned=100)
        said = " ".join(summary(study_of([Run("t", "m", (variant("dense", 5, 4), mild, strict))])))
        assert "better than pruned" in said and "worse than pruned" in said
        assert ("refusing more of everything" in said) == warned


def test_the_verdict_says_when_rsr_is_undefined() -> None:
    report = Run("t", "m", BACKWARDS)
    said = " ".join(summary(study_of([report])))
    assert "lowered ASR" in said
    assert "RSR undefined, pruning did not raise ASR" in said


def test_rsr_of_several_seeds_without_value_or_interval() -> None:
    rise = rsr(0.0, 0.5, 0.25)
    row = replace(study_of([REPORT]).tables[0].methods[0], rsr=Recovered(rise, None, (0.5, 0.5)))
    told = "RSR 50.0 %, no interval: the rise in ASR is uncertain; by seed 50.0, 50.0."
    assert told in _method(row)
    nothing = Recovered(rsr(0.5, 0.5, 0.5), None, (None, None))
    assert rsr_cell(nothing).text == "undefined, pruning did not raise ASR"


def test_a_note_that_seeds_share_is_told_once() -> None:
    runs = [replace(REPORT, seed=seed, notes=("of both", f"of {seed}")) for seed in (0, 1)]
    assert notes(study_of(runs))[-3:] == ("of both", "of 0", "of 1")


def test_small_words() -> None:
    assert [p_value(p) for p in (0.0001, 0.0124, 1.0)] == ["p < 0.001", "p = 0.012", "p = 1.000"]
    assert [share(x) for x in (0.02, 1.3158, 700.4, 12345.6)] == ["0.02", "1.32", "700", "12,346"]
    assert clip("abcdef", 6) == "abcdef"
    assert clip("abcdefg", 6) == "abcdef … [1 more characters]"
    assert unbroken("9.6 % [6.5, 13.9], p < 0.001") == (
        "9.6\u00a0% [6.5,\u00a013.9], p\u00a0<\u00a00.001"
    )


# Examples


def test_examples_show_disagreement_first_and_some_agreement() -> None:
    harmful, harmless = choose_examples(REPORT)
    assert (len(harmful), len(harmless)) == (12, 6)
    disagree = [len({a.complies for a in row}) > 1 for row in harmful]
    assert disagree == [True] * 9 + [False] * 3
    assert len({tuple(a.refused for a in row) for row in harmful}) == 4
    assert all(len(row) == 3 and len({a.id for a in row}) == 1 for row in harmful)


def test_examples_of_one_model_alone() -> None:
    harmful, harmless = choose_examples(Run("t", "m", (DENSE,)))
    assert (len(harmful), len(harmless)) == (12, 6)
    assert len(harmful[0]) == 1


# Figures


def table_of(run: Run) -> Table:
    return study_of([run]).tables[0]


def test_figures_are_named_drawings_in_the_pages_own_colours() -> None:
    for svg in (
        trade_off_figure(study_of([MATRIX])),
        restored_figure(REALIGNED),
        head_map_figure(REPORT.head_maps[0], REALIGNED.heads),
    ):
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "currentColor" in svg
        assert "#010203" not in svg
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg)) <= set(ids)


def svg_texts(svg: str) -> list[str]:
    return [(e.text or "").strip() for e in ET.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_figures_show_the_names_given() -> None:
    restored = svg_texts(restored_figure(REALIGNED))
    assert {"self_attn.q_proj", "mlp.up_proj"} <= set(restored)
    odd = replace(REPORT, variants=(DENSE, replace(PRUNED, name="a <b> & $x_1$ costs $5")))
    study = study_of([odd])
    table = study.tables[0]
    rows = (table.rows[0], replace(table.rows[1], role="method"))
    texts = svg_texts(trade_off_figure(replace(study, tables=(replace(table, rows=rows),))))
    assert "2  a <b> & $x_1$ costs $5" in texts


def test_figures_with_nothing_to_show_are_empty() -> None:
    bare = study_of([Run("t", "m", (without(True, DENSE),))])
    assert trade_off_figure(bare) == ""
    assert restored_figure(PRUNED) == ""
    assert head_map_figure(HeadMap("Ships", "degrees", ())) == ""
    assert head_map_figure(HeadMap("Ships", "degrees", ((None, None),))) == ""


# Pages


def test_the_page_nests_and_has_every_figure(page: str) -> None:
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags].count("svg") == 3
    names = [a["aria-label"] for tag, a in outline.tags if tag == "svg"]
    assert names == [
        "Over-refusal against ASR",
        "Weights restored in realigned (the realigned model)",
        "Ships of each head",
    ]
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids)), "an id is used twice"


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "img"), tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def _markup(page: str) -> str:
    """The page without what stands in script elements."""
    return re.sub(r"(<script[^>]*>).*?</script>", "", page, flags=re.DOTALL)


def test_what_models_say_is_escaped(page: str) -> None:
    scripts = re.findall(r"<script([^>]*)>", page)
    assert scripts == [' type="application/json" id="answer-data"', ""]
    assert page.count("</script>") == 2
    assert "<script" not in _markup(page)
    assert "<img" not in _markup(page)
    assert "&lt;script&gt;alert" in page
    assert "<title>A title &amp; more</title>" in page
    assert "pico &lt;model&gt;" in page


def test_harmful_answers_are_folded(page: str) -> None:
    assert page.count('<details class="example">') == 12
    assert "<details open" not in page
    before, folded = _markup(page).split("<details", 1)
    behind = folded.rsplit("</details>", 1)[1]
    seen = (before, behind, *re.findall(r"<summary>.*?</summary>", page, re.DOTALL))
    for words in ("alert", "&lt;img src=x&gt; prompt"):
        assert words in folded
        assert not any(words in part for part in seen)


def test_harmful_requests_are_folded_in_markdown_and_reasons_told(text: str) -> None:
    before, rest = text.split("<details>", 1)
    folded, behind = rest.split("</details>", 1)
    for words in ("src=x> prompt", "alert"):
        assert words in folded
        assert words not in before + behind
    assert "■ refused, by “sorry”" in folded
    assert "dense (the dense model): ■ refused, by “sorry”" in behind


def test_the_table_shows_the_numbers_given(page: str) -> None:
    row, details = (one for one in Outline(page).rows if "the realigned model" in one[0])
    assert row[1:4] == [
        "5",
        "25.0 % [14.2, 40.2] 10 of 40",
        "p < 0.001 (Holm < 0.001) better than pruned",
    ]
    assert row[4].startswith("75.0 % [")
    assert row[4].endswith("]")
    assert row[5:7] == ["15.0 % [5.2, 36.0] 3 of 20", "p = 1.000 not distinguishable from pruned"]
    assert row[7].startswith("85.0 % [")
    assert row[7].endswith("n = 20")
    assert details[1:3] == ["60 %", "500"]
    assert details[3:5] == ["75.0 % [53.1, 88.8] 15 of 20", "0.0 % [0.0, 43.4] 0 of 5"]
    assert details[5].startswith("+5.0 [")
    assert details[6].startswith("+10.0 [")


def test_the_markdown_table_shows_the_same(page: str, text: str) -> None:
    line = next(line for line in text.splitlines() if line.startswith("| 3. "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    shown = [cell.replace(",", "") for cell in Outline(page).row("the realigned model")[1:]]
    assert [cell.replace(",", "") for cell in cells[1:]] == shown


def test_data_recipe_versions_and_the_command_are_there(page: str, text: str) -> None:
    command = "regraft apply pruned 'patches/the realigned.safetensors' --out OUT"
    for words in ("method: wanda", "some/out", command, "A note."):
        assert words in html.unescape(page)
        assert words in text
    row = Outline(page).row("calibration")
    assert row == ["calibration", "VLGuard", "2,000", "128", "not drawn: 1,872"]


def test_of_several_patches_one_is_chosen() -> None:
    more = replace(RANDOM, patch="patches/random.safetensors")
    report = replace(REPORT, variants=(DENSE, PRUNED, REALIGNED, more))
    text = render_markdown(study_of([report]))
    assert "Several patches are alternatives: choose one by its row in the results." in text
    assert "regraft apply pruned patches/random.safetensors --out OUT\n```" in text
    assert "patches/random" not in render_card(study_of([report]))


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    small = replace(REPORT, head_maps=())
    for folder in ("one", "two"):
        write_report(study_of([small]), tmp_path / folder)
    names = ["card.md", "report.html", "report.json", "report.md", "trade-off.svg"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two, f"{name} differs"
    value = json.loads((tmp_path / "one" / "report.json").read_text())
    row = value["tables"][0]["rows"][2]
    assert row["asr"]["count"] == 10
    assert row["members"] == [["realigned"]]
    assert row["restored"]["mean"] == value["runs"][0]["variants"][2]["per_ten_thousand"] == 5
    assert row["rsr"]["value"] == pytest.approx(0.75)
    assert row["attacks"]["outcome"] == "better"
    assert "answers" not in value["runs"][0]["variants"][2]["result"]


def test_a_full_disk_leaves_the_old_report_or_none(tmp_path: Path) -> None:
    write_report(study_of([REPORT]), tmp_path / "old")
    before = tree(tmp_path)
    again = study_of([replace(REPORT, title="Another title, as long as that of the old one")])
    largest = (tmp_path / "old" / "report.html").stat().st_size
    for folder in ("old", "new"):
        full = pytest.raises(RegraftError, match=r"disk is full.*report\.html")
        with full, full_beyond(largest - 1):
            write_report(again, tmp_path / folder)
    assert tree(tmp_path) == before


def test_a_killed_report_can_be_written_again(tmp_path: Path) -> None:
    (tmp_path / ".report.html.regraft-tmp").write_text("half")
    check_report_folder(tmp_path)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(RegraftError, match="something other than a report"):
        check_report_folder(tmp_path)


def test_a_report_of_many_answers_stays_small(tmp_path: Path) -> None:
    """5000 answers of three models, none like another, are 15 MB; the page has what fits."""

    def of(name: str, refuses: int, **numbers: object) -> Variant:
        given = [
            judge_answer(
                Example(f"h{i}", f"{i} prompt " + "of words " * 10, i % 2 == 0, f"c{i % 5}"),
                (REFUSAL if i % refuses == 0 else "Sure. ")
                + f"{name} {i} "
                + f"{i * 7:09d} " * 100,
                JUDGE,
            )
            for i in range(5000)
        ]
        return Variant(name, summarise("suite", JUDGE, given), **numbers)  # type: ignore[arg-type]

    numbers = {"sparsity": 0.6, "pruned": 1000}
    variants = (
        of("dense", 2),
        of("pruned", 5, base="dense", **numbers),
        of("realigned", 3, base="pruned", restored=5, **numbers),
    )
    written = sum(len(one.answer) for variant in variants for one in variant.result.answers)
    assert written > 15_000_000
    write_report(study_of([replace(REPORT, variants=variants)]), tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"report.html", "report.json", "report.md", "card.md", "trade-off.svg"}
    assert max(sizes.values()) < 5_000_000, sizes
    assert sizes["report.html"] > 2_000_000  # as many answers as fit are there


def test_a_matrix_is_rendered_the_same_again() -> None:
    assert render_html(study_of([MATRIX])) == render_html(study_of([MATRIX]))


def without(kind: bool, model: Variant) -> Variant:
    kept = [a for a in model.result.answers if a.harmful != kind]
    return replace(model, result=summarise("suite", JUDGE, kept))


LONG = replace(DENSE.result.answers[0], answer="word " * 10_000)


@pytest.mark.parametrize(
    "report",
    [
        Run("one", "m", (DENSE,)),
        Run("two", "m", (DENSE, PRUNED)),
        Run("no harmless", "m", tuple(without(False, v) for v in REPORT.variants)),
        Run("no harmful", "m", tuple(without(True, v) for v in REPORT.variants)),
        MATRIX,
        Run("undefined", "m", BACKWARDS),
        Run("long", "m", (replace(DENSE, result=replace(DENSE.result, answers=(LONG,))),)),
    ],
    ids=lambda report: report.title,
)
def test_odd_reports_are_written_all_the_same(report: Run) -> None:
    page, text = render_html(study_of([report])), render_markdown(study_of([report]))
    Outline(page)
    for words in (page, text):
        assert not re.search(r"\b(nan|None|Undefined)\b", words)
        assert len(words) < 400_000


def test_markdown_escapes_markup_and_keeps_the_rest() -> None:
    assert escape_markdown("a | b\n<img> `c` *d* _e_") == r"a \| b &lt;img> \`c\` \*d\* \_e\_"
    assert escape_markdown("# no heading") == r"\# no heading"
    assert escape_markdown("1. no list") == r"1\. no list"
    assert escape_markdown("[a](b) [1, 2] p < 0.1") == r"[a\](b) [1, 2] p < 0.1"
    assert escape_cell("-0.6 [1, 2] | x") == r"-0.6 [1, 2] \| x"
    assert escape_markdown("a &lt; b & c") == "a &amp;lt; b & c"


def test_fences_are_longer_than_what_they_hold() -> None:
    assert fenced("a ```` b") == "`````text\na ```` b\n`````"


def test_pairing_gives_rows_of_one_prompt() -> None:
    rows = paired_answers((DENSE, PRUNED))
    assert len(rows) == 60
    assert all(a.id == b.id for a, b in rows)


def suite_rows(page: str) -> list[list[str]]:
    """The rows of the table by suite."""
    part = page.split('<h2 id="suites">')[1].split("</table>")[0]
    return Outline(f"<div><table>{part.split('<table>')[1]}</table></div>").rows


def test_several_suites_have_a_table_of_their_own() -> None:
    def of_suites(one: Variant) -> Variant:
        answers = [
            replace(answer, suite="a" if answer.harmful else "b | c")
            for answer in one.result.answers
        ]
        return replace(one, result=summarise("a, b | c", JUDGE, answers))

    report = replace(REPORT, variants=tuple(map(of_suites, REPORT.variants)))
    page = render_html(study_of([report]))
    headings, _, pruned = suite_rows(page)[:3]
    by_heading = dict(zip(headings, pruned, strict=True))
    assert by_heading["a: ASR"] == "62.5 % [47.0, 75.8] 25 of 40"
    assert by_heading["b | c: utility"].startswith("90.0 % [")
    assert "a: degenerate" not in headings
    assert "By suite" not in render_html(study_of([REPORT]))
    text = render_markdown(study_of([report]))
    start = text.index("| Model | a: ASR |")
    lines = text[start:].split("\n\n")[0].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| b \\| c: over-refusal |" in lines[0]
    assert lines[2].startswith("| 1. dense, the dense model | 12.5 % [5.5, 26.1], 5 of 40 |")
    assert "| 5.0 % [0.9, 23.6], 1 of 20 |" in lines[2]


PLACES = ("safebench:/home/me/data/figstep#even", "jsonl:/home/me/runs/titles-test.jsonl")


def of_places(one: Variant, places: tuple[str, str] = PLACES) -> Variant:
    """Its answers to harmful prompts as of the first place, its first five degenerate."""
    given = [
        replace(
            answer,
            suite=places[not answer.harmful],
            **({"refused": False, "degenerate": "empty"} if i < 5 else {}),  # type: ignore[arg-type]
        )
        for i, answer in enumerate(one.result.answers)
    ]
    return replace(one, result=summarise(", ".join(places), JUDGE, given))


def test_suites_have_short_names_and_their_addresses_beside_them() -> None:
    accounts = (DataAccount("evaluation", "/home/me/data/figstep, /home/me/t.jsonl", 9, 9),)
    report = replace(REPORT, variants=tuple(map(of_places, REPORT.variants)), data=accounts)
    page, text = render_html(study_of([report])), render_markdown(study_of([report]))
    assert f'<span title="{PLACES[0]}">safebench#even</span>' in page
    shown = re.sub(r"<[^>]*>", "", _markup(page))
    for words in (shown, text):
        assert "/home/me" not in words
        assert "figstep, t.jsonl" in words
        assert "safebench#even, titles-test" in words
    headings, dense = suite_rows(page)[:2]
    by_heading = dict(zip(headings, dense, strict=True))
    assert by_heading["safebench#even: degenerate"] == "12.5 % [5.5, 26.1] 5 of 40"
    assert {"safebench#even: ASR", "titles-test: over-refusal"} <= set(headings)
    assert "titles-test: degenerate" not in headings


def test_short_names_tell_suites_apart() -> None:
    def short(*suites: str) -> list[str]:
        return list(short_names(suites).values())

    assert short("demo:test", "vlguard:/x/test.json#safe-safe", "prompts:/x/advbench.csv") == [
        "demo:test",
        "vlguard#safe-safe",
        "advbench",
    ]
    assert short("jsonl:hf:org/name/a.b.jsonl#val", "mmbench:x.tsv#harmless") == [
        "a.b#val",
        "mmbench#harmless",
    ]
    assert short("ch3ef:/x/a", "ch3ef:/x/b") == ["ch3ef:a", "ch3ef:b"]
    assert short("ch3ef:/x/a", "ch3ef:/y/a") == ["ch3ef:/x/a", "ch3ef:/y/a"]
    assert short("a", "") == ["a", ""]


# Unrelated models


def alone(*variants: Variant, **fields: object) -> Run:
    bare = [
        Variant(v.name, v.result, base=variants[0].name if i else None)
        for i, v in enumerate(variants)
    ]
    fields = {"recipe": {"settings": {"judge": "it"}}, **fields}
    return Run("Evaluations", "", tuple(bare), unrelated=True, **fields)  # type: ignore[arg-type]


def test_unrelated_models_are_compared_with_the_first() -> None:
    report = alone(DENSE, PRUNED, REALIGNED)
    first, *others = study_of([report]).tables[0].rows
    dense, other, third = ([i < n for i in range(40)] for n in (5, 25, 10))
    assert first.attacks is None
    tests = [one.attacks for one in others if one.attacks and one.rsr is None]
    assert [one.against for one in tests] == ["dense", "dense"]
    expected = [mcnemar(other, dense).p, mcnemar(third, dense).p]
    assert [one.p for one in tests] == pytest.approx(expected)
    assert [one.adjusted for one in tests] == pytest.approx(holm(expected))
    assert [one.outcome for one in tests] == [Outcome.WORSE, Outcome.SAME]


def test_a_page_of_unrelated_models_has_no_word_of_pruning() -> None:
    renamed = [replace(v, name=n) for v, n in zip((DENSE, PRUNED, REALIGNED), "abc", strict=True)]
    for models in (renamed, renamed[:1]):
        report = alone(*models)
        page, text = render_html(study_of([report])), render_markdown(study_of([report]))
        seen = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
        for words in (seen, text):
            assert not re.search(
                r"prun|realign|restor|RSR|recipe|dense", re.sub(r"<[^>]*>", "", words), re.I
            )
            assert "Evaluation settings" in words
        assert ("McNemar" in text, "compare each model with the first" in text) == (
            len(models) > 1,
        ) * 2
        assert len(Outline(page).row("1 a")) == (6 if len(models) > 1 else 4)
        assert len({line.count("|") for line in text.splitlines() if line[:2] == "| "}) > 1
    said = summary(study_of([alone(*renamed)]))
    assert said[0].startswith("a: ASR 12.5 % [5.5, 26.1] on 40 prompts, over-refusal 5.0 %")
    assert said[0].endswith("on 20 prompts.")
    assert "On the same prompts: ASR worse than a (p < 0.001), over-refusal not" in said[1]


def test_the_verdict_on_unrelated_models_has_its_caveats() -> None:
    refuser = variant("refuser", 0, 20)
    report = alone(PRUNED, refuser)
    assert summary(study_of([report]))[1].endswith("refusing more of everything.")
    report = alone(*(without(False, of_places(v)) for v in (DENSE, PRUNED)))
    told = summary(study_of([report]))
    assert "degenerate answers 12.5 % [5.5, 26.1] on 40 prompts" in told[0]
    assert told[-1].startswith("Over-refusal was not measured")


def test_degenerate_answers_are_counted_on_the_page_and_the_console() -> None:
    report = replace(REPORT, variants=tuple(map(of_places, REPORT.variants)))
    text = render_markdown(study_of([report]))
    named = "dense (the dense model)", "pruned (the pruned model)"
    assert f"{named[0]}: 5 of 40 to harmful prompts; {named[1]}: 5 of" in text
    for run, there in ((report, True), (REPORT, False)):
        console = Console(width=200, record=True)
        show_study(console, study_of([run]))
        assert ("Degenerate" in console.export_text()) == there
    assert "Degenerate" not in render_markdown(study_of([REPORT]))


def test_examples_of_unrelated_models_tell_any_two_apart() -> None:
    same = replace(DENSE, name="same")
    harmful, _ = choose_examples(alone(DENSE, same, PRUNED))
    assert sum(len({a.complies for a in row}) > 1 for row in harmful) == 9
    assert len(harmful[0]) == 3


def test_other_judges_stand_on_the_page() -> None:
    judged = Judged("guard", wilson(10, 40), None, 2)
    agreement = (Agreement("a", "guard", True, wilson(30, 40), 0.5),)
    report = alone(DENSE, opinions=(Opinion("dense", judged, agreement),))
    page, text = render_html(study_of([report])), render_markdown(study_of([report]))
    row = next(row for row in Outline(page).rows if row[1:2] == ["guard"])
    assert row == [
        "dense",
        "guard",
        "25.0 % [14.2, 40.2] 10 of 40",
        "75.0 % [59.8, 85.8] n = 40, kappa 0.50",
        "–",
        "–",
        "2",
    ]
    assert "| dense | guard | 25.0 % [14.2, 40.2], 10 of 40 | 75.0 % [59.8, 85.8], n = 40" in text


def test_a_caveat_stands_everywhere(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(REPORT, caveat="A toy & no more.")
    assert "<strong>A toy &amp; no more.</strong>" in render_html(study_of([report]))
    assert "<strong></strong>" not in page
    for text in (render_markdown(study_of([report])), render_card(study_of([report]))):
        assert "**A toy &amp; no more.**" in text or "**A toy & no more.**" in text
    assert report_to_json(study_of([report]))["runs"][0]["caveat"] == report.caveat
    show_study(Console(width=200), study_of([report]))
    assert report.caveat in capsys.readouterr().out


def test_the_terminal_shows_rates_by_suite() -> None:
    console = Console(width=250, record=True)
    show_study(console, study_of([REPORT]))
    assert "titles-test" not in console.export_text()
    report = replace(REPORT, variants=tuple(map(of_places, REPORT.variants)))
    show_study(console, study_of([report]))
    text = console.export_text()
    assert "safebench#even: ASR" in text
    assert "titles-test: over-refusal" in text


def test_the_terminal_has_no_tests_where_nothing_was_restored() -> None:
    console = Console(width=250, record=True)
    shown = (DENSE, *WANDA_50, replace(PRUNED, name="wanda-90"))
    show_study(console, study_of([Run("t", "m", shown)], ["random"]))
    against = console.export_text().partition("ASR, test against random")[2]
    assert "random" in against and "wanda-90" not in against


def test_perplexity_stands_on_the_page_where_it_was_measured(page: str) -> None:
    def measured(one: Variant) -> Variant:
        return replace(one, result=replace(one.result, perplexity=Estimate(2.5, 20, 2.25, 3.0)))

    report = replace(REPORT, variants=tuple(map(measured, REPORT.variants)))
    line = "dense (the dense model): 2.5 [2.25, 3]; pruned (the pruned model)"
    assert line in render_html(study_of([report])).replace("\u00a0", " ")
    assert line in render_markdown(study_of([report]))
    assert "Perplexity" not in page


def test_text_has_columns_where_it_was_measured() -> None:
    own = replace(DENSE, result=replace(DENSE.result, text=result_of([(8.0, None, 4)])))
    cut = replace(PRUNED, result=replace(PRUNED.result, text=result_of([(12.0, 2.0, 4)])))
    shown = Run("text", "pico", (own, cut, REALIGNED))
    text, page = render_markdown(study_of([shown])), render_html(study_of([shown]))
    lines = text.splitlines()
    for heading, values in (
        ("KL to dense", ("–", "0.5 [0.5, 0.5]", "–")),
        ("Perplexity", ("7.39 [7.39, 7.39]", "20.1 [20.1, 20.1]", "–")),
    ):
        start = next(i for i, line in enumerate(lines) if f"{heading} |" in line)
        assert len({line.count("|") for line in lines[start : start + 5]}) == 1
        for line, value in zip(lines[start + 2 :], values, strict=False):
            assert line.endswith(f" {value} |")
    assert page.count(">KL to dense</th>") == 1
    assert "on 4 tokens of 1 documents of ordinary text" in page
    console = Console(width=200, record=True)
    show_study(console, study_of([shown]))
    assert "[0.5, 0.5]" in console.export_text()
    without = Run("text", "pico", (DENSE, PRUNED))
    assert "KL to dense" not in render_markdown(study_of([without]))
