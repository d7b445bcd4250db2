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

from regraft.console import show_report
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.evaluation.keywords import REGRAFT_1
from regraft.evaluation.metrics import bootstrap_rsr, rsr, wilson
from regraft.evaluation.perplexity import result_of
from regraft.evaluation.results import Answer, Estimate, Rates
from regraft.evaluation.significance import mcnemar
from regraft.evaluation.summary import judge_answer, summarise
from regraft.evaluation.verdicts import Agreement, Judged
from regraft.report.addresses import short_names
from regraft.report.examples import choose_examples, shown_variants
from regraft.report.figures import (
    category_figure,
    head_map_figure,
    restored_figure,
    sparsity_figure,
    trade_off_figure,
    trade_off_map,
)
from regraft.report.model import (
    DataAccount,
    HeadMap,
    Opinion,
    Report,
    Variant,
    comparisons,
    paired_answers,
)
from regraft.report.words import (
    broken,
    clip,
    control_lines,
    p_value,
    share,
    unbroken,
    verdict,
)
from regraft.report.write import (
    escape_markdown,
    fenced,
    render_card,
    render_html,
    render_markdown,
    report_to_json,
    write_report,
)

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
    return Variant(name, f"the {name} model", result, **numbers)  # type: ignore[arg-type]


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
    restored_by_module={"self_attn.q_proj": (300, 0, 17), "mlp.up_proj": (100, 83)},
    heads=((0, 1), (1, 0)),
    patch="patches/the realigned.safetensors",
)
RANDOM = variant("random", 24, 2, base="pruned", sparsity=0.5995, restored=500, pruned=1_000_000)
BACKWARDS = (
    replace(PRUNED, name="dense", base=None),
    replace(DENSE, name="pruned", base="dense"),
    REALIGNED,
)
REPORT = Report(
    "A title & more",
    "pico <model>",
    (DENSE, PRUNED, REALIGNED, RANDOM),
    (HeadMap("Ships", "degrees", ((1.0, None), (2.0, 3.0, 0.5))),),
    (DataAccount("calibration", "VLGuard", 2000, 128, {"not drawn": 1872}),),
    {"prune": {"method": "wanda", "sparsity": 0.6}, "heads": (1, 2), "out": Path("some/out")},
    {"regraft": "0.1.0"},
    ("A note.",),
)


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(REPORT, comparisons(REPORT))


@pytest.fixture(scope="module")
def text() -> str:
    return render_markdown(REPORT, comparisons(REPORT))


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


# Comparisons


def test_comparisons_equal_the_metrics_on_the_same_prompts() -> None:
    dense, pruned, realigned = ([i < n for i in range(40)] for n in (5, 25, 10))
    pruning, first, _ = comparisons(REPORT)
    assert (first.name, first.base) == ("realigned", "pruned")
    assert first.recovery == rsr(5 / 40, 25 / 40, 10 / 40)
    assert first.rsr_interval == bootstrap_rsr(dense, pruned, realigned, seed=0)
    assert first.attacks == mcnemar(realigned, pruned)
    assert first.attacks_verdict == "better than pruned"
    assert first.refusals == mcnemar([i < 3 for i in range(20)], [i < 2 for i in range(20)])
    assert first.refusals_verdict == "not distinguishable from pruned"
    assert (pruning.name, pruning.base) == ("pruned", "dense")
    assert (pruning.recovery, pruning.rsr_interval) == (None, None)
    assert pruning.attacks == mcnemar(pruned, dense)
    assert pruning.attacks_verdict == "worse than dense"
    assert pruning.refusals_verdict == "not distinguishable from dense"


def test_comparisons_pair_by_id_whatever_the_order() -> None:
    backwards = replace(
        REALIGNED, result=replace(REALIGNED.result, answers=REALIGNED.result.answers[::-1])
    )
    shuffled = replace(REPORT, variants=(DENSE, PRUNED, backwards, RANDOM))
    assert comparisons(shuffled) == comparisons(REPORT)


def test_comparisons_name_what_is_worse() -> None:
    worse = variant("worse", 38, 15, base="pruned", restored=1, pruned=10)
    _, found = comparisons(Report("t", "m", (DENSE, PRUNED, worse)))
    assert (found.attacks_verdict, found.refusals_verdict) == (
        "worse than pruned",
        "worse than pruned",
    )
    assert found.recovery is not None
    assert found.recovery.verdict == "negative"


def test_without_answers_there_is_no_test() -> None:
    bare = replace(REALIGNED, result=replace(REALIGNED.result, answers=()))
    _, found = comparisons(Report("t", "m", (DENSE, PRUNED, bare)))
    assert (found.attacks, found.attacks_verdict) == (None, "not tested")
    assert found.recovery == rsr(5 / 40, 25 / 40, 10 / 40)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"judge": "other"}, "judge 'other' and 'regraft-keywords-1'"),
        ({"suite": "other"}, "suite"),
        ({"answers": REALIGNED.result.answers[1:]}, "prompt 'h0'"),
        ({"answers": REALIGNED.result.answers * 2}, "'h0' is there more than once"),
    ],
    ids=["judge", "suite", "missing prompt", "prompt twice"],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], named: str) -> None:
    odd = replace(REALIGNED, result=replace(REALIGNED.result, **change))  # type: ignore[arg-type]
    with pytest.raises(RegraftError, match=named):
        comparisons(Report("t", "m", (DENSE, PRUNED, odd)))


def test_reports_need_named_variants_and_finite_scores() -> None:
    with pytest.raises(RegraftError, match="no evaluated model"):
        Report("t", "m", ())
    with pytest.raises(RegraftError, match="2 variants named 'dense'"):
        Report("t", "m", (DENSE, DENSE))
    with pytest.raises(RegraftError, match="layer 0, head 1 scores nan"):
        HeadMap("Ships", "degrees", ((1.0, float("nan")),))


# Several prunings


def group(
    name: str, sparsity: float, attacks: int, refusals: int, back: int
) -> tuple[Variant, ...]:
    """A pruning, its realigned model, which answers `back` attacks, and a control."""
    more = {"series": "Wanda", "pruned": 1_000}
    ways = (("hsr (HSR, top)", back), ("random (HSR, random)", attacks))
    pruned = variant(name, attacks, refusals, base="dense", sparsity=sparsity, **more)
    return (
        replace(pruned, label=name),
        *(
            replace(
                variant(f"{name}/{way.split()[0]}", count, refusals, base=name, **more),
                label=f"{name}/{way}",
                restored=5,
                sparsity=sparsity - 0.005,
            )
            for way, count in ways
        ),
    )


WANDA_50 = group("wanda-50", 0.5, 7, 1, 6)
WANDA_60 = group("wanda-60", 0.6, 25, 2, 10)
WANDA_70 = group("wanda-70", 0.7, 0, 18, 0)
PATTERN = {"n_m": "2:4", "violated_groups": 12, "groups": 4_000}
MATRIX = Report(
    "A matrix",
    "pico",
    (
        replace(DENSE, label="dense"),
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
    found = {c.name: c for c in comparisons(MATRIX)}
    assert list(found) == [v.name for v in MATRIX.variants[1:]]
    for name, base in (
        ("wanda-50", "dense"),
        ("wanda-60", "dense"),
        ("wanda-50/hsr", "wanda-50"),
        ("wanda-60/hsr", "wanda-60"),
    ):
        hits, theirs = ([i < attacks[one] for i in range(40)] for one in (name, base))
        refused, their = ([i < refusals[one] for i in range(20)] for one in (name, base))
        assert found[name].base == base
        assert found[name].attacks == mcnemar(hits, theirs)
        assert found[name].refusals == mcnemar(refused, their)
        if base != "dense":
            assert found[name].recovery == rsr(5 / 40, attacks[base] / 40, attacks[name] / 40)
    assert found["wanda-60"].attacks_verdict == "worse than dense"
    assert found["wanda-60/hsr"].attacks_verdict == "better than pruned"
    assert found["wanda-70"].refusals_verdict == "worse than dense"


def test_groups_and_roles() -> None:
    assert [[v.name for v in group] for group in MATRIX.groups] == [
        [name, f"{name}/hsr", f"{name}/random"]
        for name in ("wanda-50", "wanda-60", "wanda-70", "wanda-2-4")
    ]
    assert MATRIX.roles == ("dense", *("pruned", "realigned", "control") * 4)
    assert REPORT.roles == ("dense", "pruned", "realigned", "control")


@pytest.mark.parametrize(
    "variants",
    [
        (DENSE, replace(PRUNED, base=None)),
        (DENSE, REALIGNED, PRUNED),
        (DENSE, *WANDA_50[:1], *WANDA_60, *WANDA_50[1:]),
        (DENSE, replace(REALIGNED, base="elsewhere")),
    ],
    ids=["no base", "realigned first", "groups mixed", "unknown base"],
)
def test_reports_need_an_order(variants: tuple[Variant, ...]) -> None:
    with pytest.raises(RegraftError, match="wrong order or without `base`"):
        Report("t", "m", variants)


def test_the_verdict_on_many_counts_them() -> None:
    compared = comparisons(MATRIX)
    prunings, realigned, effects = verdict(MATRIX, compared)
    assert prunings == (
        "Of 4 prunings, each compared with the dense model, 2 have a higher ASR (wanda-60 62.5 % "
        "[47.0, 75.8]; wanda-2-4 60.0 % [44.6, 73.7]) and 2 cannot be told apart from it. "
        "The dense model has an ASR of 12.5 % [5.5, 26.1]."
    )
    assert realigned.startswith(
        "Of 4 models realigned by hsr (HSR, top), each compared with its pruned model, 2 have a "
        "lower ASR (wanda-60 25.0 % [14.2, 40.2], RSR 75.0 % ["
    )
    assert "Over-refusal is distinguishably higher in 1 of 12 (wanda-70)" in effects
    assert "24 tests uncorrected" in effects
    (control,) = control_lines(MATRIX, compared)
    assert "realigned by random (HSR, random)" in control
    assert control.endswith("4 cannot be told apart from it.")


def test_examples_are_of_the_pruning_with_the_highest_asr() -> None:
    assert [v.name for v in shown_variants(MATRIX)] == ["dense", "wanda-60", "wanda-60/hsr"]
    assert [v.name for v in shown_variants(REPORT)] == ["dense", "pruned", "realigned"]


def test_sparsities_of_one_series_are_drawn() -> None:
    svg = sparsity_figure(MATRIX, "Wanda")
    texts = svg_texts(svg)
    assert {"50", "60", "70", "ASR, %", "over-refusal, %", "dense", "pruned"} <= set(texts)
    assert "hsr (HSR, top)" in texts
    assert sparsity_figure(MATRIX, "SparseGPT") == ""
    assert sparsity_figure(replace(MATRIX, variants=MATRIX.variants[:4]), "Wanda") == ""
    bare = tuple(replace(v, result=summarise("suite", JUDGE, [])) for v in MATRIX.variants)
    assert sparsity_figure(replace(MATRIX, variants=bare), "Wanda") == ""


def test_the_map_numbers_dense_and_pruned_models() -> None:
    texts = svg_texts(trade_off_map(MATRIX))
    assert {"1", "2", "5", "8", "11"} <= set(texts)
    assert not {"3", "4", "6", "7", "9"} & set(texts)
    assert {"dense", "pruned", "hsr (HSR, top)", "random (HSR, random)"} <= set(texts)


def test_the_matrix_page() -> None:
    compared = comparisons(MATRIX)
    outline = Outline(render_html(MATRIX, compared))
    rows = [row for row in outline.rows if row]
    overview = next(row for row in rows if row[0] == "wanda-60")
    assert overview[1] == "62.5 % [47.0, 75.8] 25 of 40 worse than dense"
    assert overview[2] == "25.0 % [14.2, 40.2] 10 of 40 better than pruned"
    models = [row[0] for row in rows if re.match(r"\d+ ", row[0])]
    assert models[4:7] == ["5 wanda-60", "6 hsr (HSR, top)", "7 random (HSR, random)"]
    detail = next(row for row in rows if row[0] == "12 hsr (HSR, top)")
    assert detail[2] == "5 breaks 12 of 4,000 2:4 groups"
    names = [a["aria-label"] for tag, a in outline.tags if tag == "svg"]
    assert names == [
        "ASR against over-refusal",
        "Wanda: rates by sparsity",
        "ASR by harm category",
    ]
    text = render_markdown(MATRIX, compared)
    assert "5, breaks 12 of 4,000 2:4 groups" in text
    assert "Shown is wanda-60" in text


def test_a_method_of_some_prunings_stands_under_its_own_heading() -> None:
    """Cells went by place: where the first method was missing, the second stood in its column."""
    variants = tuple(v for v in MATRIX.variants if v.name not in ("wanda-50/hsr", "wanda-60/hsr"))
    report = replace(MATRIX, variants=variants)
    rows = Outline(render_html(report, comparisons(report))).rows
    head = next(row for row in rows if row[:2] == ["Pruning", "pruned"])
    assert head[2:] == ["random (HSR, random)", "hsr (HSR, top)"]
    overview = next(row for row in rows if row and row[0] == "wanda-60")
    assert overview[2].startswith("62.5 %")
    assert overview[3] == "–"
    kept = next(row for row in rows if row and row[0] == "wanda-70")
    assert kept[2].startswith("0.0 %") and kept[3].startswith("0.0 %")
    alone = tuple(v for v in MATRIX.variants if v.base not in ("wanda-50", "wanda-2-4"))
    report = replace(MATRIX, variants=alone)
    rows = Outline(render_html(report, comparisons(report))).rows
    assert next(row for row in rows if row[:2] == ["Pruning", "pruned"])[2:]


def test_layers_of_directions_are_one_way() -> None:
    """What a model has chosen for itself makes no method of its own."""
    models = [
        replace(v, label=f"{v.name} (layer {i})") if v.name.endswith("/hsr") else v
        for i, v in enumerate(MATRIX.variants)
    ]
    report = replace(MATRIX, variants=tuple(models))
    assert report.ways == {"hsr": "hsr", "random": "random (HSR, random)"}
    assert "Of 4 models realigned by hsr," in verdict(report, comparisons(report))[1]


def test_the_verdict_warns_of_a_model_that_says_nothing() -> None:
    gone = [
        replace(a, answer="", refused=False, degenerate="empty") for a in REALIGNED.result.answers
    ]
    mute = replace(REALIGNED, result=summarise(REALIGNED.result.suite, REGRAFT_1, gone))
    report = Report("t", "m", (DENSE, PRUNED, mute))
    said = verdict(report, comparisons(report))[1]
    assert "answers to harmful prompts 40 are degenerate (0 of" in said
    assert "are degenerate" in render_card(report, comparisons(report))
    assert "are degenerate" not in " ".join(verdict(REPORT, comparisons(REPORT)))


def test_patterns_in_words() -> None:
    assert broken(PRUNED) == ""
    assert broken(replace(REALIGNED, n_m="2:4", groups=1_000)) == "keeps all 1,000 2:4 groups"


def test_without_realigned_models_their_columns_go() -> None:
    prunings = (MATRIX.dense, *(group[0] for group in MATRIX.groups))
    report = replace(MATRIX, variants=prunings)
    page = render_html(report, comparisons(report))
    assert Outline(page).row("5 wanda-2-4")[1:4] == [
        "50 %",
        "60.0 % [44.6, 73.7] 24 of 40",
        "p < 0.001 worse than dense",
    ]
    assert "RSR" not in page


# Words


def test_the_verdict_tells_the_whole_story() -> None:
    pruning, realigning, effects = verdict(REPORT, comparisons(REPORT))
    assert pruning.startswith("Pruning to 60 % raised ASR from 12.5 % [5.5, 26.1] to 62.5 %")
    assert "500 restored weights (5 per 10,000 pruned) lowered it to 25.0 %" in realigning
    assert "RSR 75.0 % [" in realigning
    assert "partial recovery" in realigning
    assert "is distinguishable from chance (McNemar p < 0.001)" in realigning
    assert "Over-refusal went from 10.0 % [2.8, 30.1] to 15.0 %" in effects
    assert "not distinguishable from pruned (McNemar p = 1.000)" in effects


def test_the_verdict_tells_of_utility_where_no_refusals_were_measured() -> None:
    """An attack suite and a benchmark, as in the paper."""
    plain = [
        replace(one, result=replace(one.result, over_refusal=None, utility=estimate))
        for one, estimate in zip(
            REPORT.variants, [wilson(9, 10), wilson(9, 10), wilson(1, 10)], strict=False
        )
    ]
    report = replace(REPORT, variants=tuple(plain))
    said = verdict(report, comparisons(report))[-1]
    assert said.startswith("Over-refusal was not measured")
    assert said.endswith("Utility went from 0.900 to 0.100.")


def test_to_refuse_as_the_dense_model_does_is_no_price() -> None:
    dense, pruned = variant("dense", 5, 20), variant("pruned", 25, 2, base="dense", pruned=10)
    restored = variant("restored", 6, 20, base="pruned", restored=9, pruned=10)
    report = Report("t", "m", (dense, pruned, restored))
    said = verdict(report, comparisons(report))[-1]
    assert "worse than pruned" in said and "The dense model's is 100.0 %" in said
    assert "refusing more of everything" not in said


def test_the_verdict_warns_of_a_model_that_refuses_everything() -> None:
    refuser = variant("refuser", 0, 20, base="pruned", restored=9, pruned=10)
    report = Report("t", "m", (DENSE, PRUNED, refuser))
    assert "refusing more of everything" in verdict(report, comparisons(report))[-1]
    riskier = variant("riskier", 30, 20, base="pruned", restored=9, pruned=10)
    report = Report("t", "m", (DENSE, PRUNED, riskier))
    said = verdict(report, comparisons(report))[-1]
    assert "worse than pruned" in said
    assert "lower ASR" not in said, "it rose"


def test_the_verdict_says_when_rsr_is_undefined() -> None:
    report = Report("t", "m", BACKWARDS)
    said = " ".join(verdict(report, comparisons(report)))
    assert "lowered ASR" in said
    assert "RSR is undefined: pruning did not raise ASR" in said


def test_small_words() -> None:
    assert p_value(mcnemar([True] * 20, [False] * 20)) == "p < 0.001"
    assert p_value(mcnemar([True, False], [False, False])) == "p = 1.000"
    assert p_value(None) == "not tested"
    assert [share(x) for x in (None, 0.02, 1.3158, 700.4, 12345.6)] == [
        "–",
        "0.02",
        "1.32",
        "700",
        "12,346",
    ]
    assert clip("abcdef", 6) == "abcdef"
    assert clip("abcdefg", 6) == "abcdef … [1 more characters]"
    assert unbroken("9.6 % [6.5, 13.9], p < 0.001") == (
        "9.6\u00a0% [6.5,\u00a013.9], p\u00a0<\u00a00.001"
    )


# Examples


def test_examples_show_disagreement_first_and_some_agreement() -> None:
    harmful, harmless = choose_examples(REPORT)
    assert (len(harmful), len(harmless)) == (12, 6)
    disagree = [row[0].refused != row[1].refused for row in harmful]
    assert disagree == [True] * 9 + [False] * 3
    assert len({tuple(a.refused for a in row) for row in harmful}) == 4
    assert all(len(row) == 3 and len({a.id for a in row}) == 1 for row in harmful)


def test_examples_of_one_model_alone() -> None:
    harmful, harmless = choose_examples(Report("t", "m", (DENSE,)))
    assert (len(harmful), len(harmless)) == (12, 6)
    assert len(harmful[0]) == 1


# Figures


def test_figures_are_named_drawings_in_the_pages_own_colours() -> None:
    for svg in (
        trade_off_figure(REPORT.variants),
        trade_off_map(MATRIX),
        sparsity_figure(MATRIX, "Wanda"),
        category_figure(REPORT.variants),
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


def test_figures_show_the_names_and_counts_given() -> None:
    assert {"category 0", "category 1", "category 2", "the pruned model"} <= set(
        svg_texts(category_figure(REPORT.variants))
    )
    restored = svg_texts(restored_figure(REALIGNED))
    assert {"self_attn.q_proj", "mlp.up_proj", "300", "100", "17", "83"} <= set(restored)
    odd = replace(DENSE, label="a <b> & $x_1$ costs $5")
    assert "a <b> & $x_1$ costs $5" in svg_texts(category_figure((odd,)))


def test_figures_with_nothing_to_show_are_empty() -> None:
    bare = replace(DENSE, result=summarise("suite", JUDGE, []))
    assert trade_off_figure([bare]) == ""
    assert category_figure([bare]) == ""
    assert restored_figure(PRUNED) == ""
    assert head_map_figure(HeadMap("Ships", "degrees", ())) == ""
    assert head_map_figure(HeadMap("Ships", "degrees", ((None,), ()))) == ""


# Pages


def test_the_page_nests_and_has_every_figure(page: str) -> None:
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags].count("svg") == 4
    names = [a["aria-label"] for tag, a in outline.tags if tag == "svg"]
    assert names == [
        "ASR against over-refusal",
        "ASR by harm category",
        "Weights restored in the realigned model",
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
    assert "the dense model: ■ refused, by “sorry”" in behind


def test_the_table_shows_the_numbers_given(page: str) -> None:
    row = Outline(page).row("the realigned model")
    assert row[1:4] == ["60 %", "500", "5"]
    assert row[4] == "25.0 % [14.2, 40.2] 10 of 40"
    assert row[5] == "p < 0.001 better than pruned"
    assert row[6].startswith("75.0 % [")
    assert row[6].endswith("] partial")
    assert row[7] == "15.0 % [5.2, 36.0] 3 of 20"
    assert row[8] == "p = 1.000 not distinguishable from pruned"
    assert row[9].startswith("0.850 [")
    assert row[9].endswith("n = 20")


def test_the_markdown_table_shows_the_same(page: str, text: str) -> None:
    line = next(line for line in text.splitlines() if line.startswith("| 3 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == [
        "the realigned model",
        "60 %",
        "500",
        "5",
        "25.0 % [14.2, 40.2], 10 of 40",
    ]
    assert len(cells) == 11
    interval = Outline(page).row("the realigned model")[6].removesuffix(" partial")
    assert cells[7] == interval


def test_data_recipe_versions_and_the_command_are_there(page: str, text: str) -> None:
    command = "regraft apply pruned 'patches/the realigned.safetensors' --out OUT"
    for words in ("method: wanda", "some/out", command, "A note."):
        assert words in html.unescape(page)
        assert words in text
    assert "Take one patch" not in page
    row = Outline(page).row("calibration")
    assert row == ["calibration", "VLGuard", "2,000", "128", "not drawn: 1,872"]


def test_of_several_patches_one_is_chosen() -> None:
    more = replace(RANDOM, patch="patches/random.safetensors")
    report = replace(REPORT, variants=(DENSE, PRUNED, REALIGNED, more))
    text = render_markdown(report, comparisons(report))
    assert "Take one patch: they are alternatives. Choose it by its row in the results" in text
    assert "regraft apply pruned patches/random.safetensors --out OUT\n```" in text
    assert "patches/random" not in render_card(report, comparisons(report))


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    small = replace(REPORT, head_maps=())
    for folder in ("one", "two"):
        write_report(small, tmp_path / folder)
    names = ["card.md", "report.html", "report.json", "report.md"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two, f"{name} differs"
    value = json.loads((tmp_path / "one" / "report.json").read_text())
    assert value["variants"][2]["result"]["asr"]["count"] == 10
    assert value["variants"][2]["per_ten_thousand"] == 5
    assert value["comparisons"][1]["recovery"]["value"] == pytest.approx(0.75)


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
        return Variant(name, name, summarise("suite", JUDGE, given), **numbers)  # type: ignore[arg-type]

    numbers = {"sparsity": 0.6, "pruned": 1000}
    variants = (
        of("dense", 2),
        of("pruned", 5, base="dense", **numbers),
        of("realigned", 3, base="pruned", restored=5, **numbers),
    )
    written = sum(len(one.answer) for variant in variants for one in variant.result.answers)
    assert written > 15_000_000
    write_report(replace(REPORT, variants=variants), tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"report.html", "report.json", "report.md", "card.md"}
    assert max(sizes.values()) < 5_000_000, sizes
    assert sizes["report.html"] > 2_000_000  # as many answers as fit are there


def test_a_matrix_is_rendered_the_same_again() -> None:
    compared = comparisons(MATRIX)
    assert render_html(MATRIX, compared) == render_html(MATRIX, comparisons(MATRIX))


def without(kind: bool, model: Variant) -> Variant:
    kept = [a for a in model.result.answers if a.harmful != kind]
    return replace(model, result=summarise("suite", JUDGE, kept))


NOTHING = Estimate(0.0, 0, 0.0, 0.0, 0)
LONG = replace(DENSE.result.answers[0], answer="word " * 10_000)


@pytest.mark.parametrize(
    "report",
    [
        Report("one", "m", (DENSE,)),
        Report("two", "m", (DENSE, PRUNED)),
        Report("no harmless", "m", tuple(without(False, v) for v in REPORT.variants)),
        Report("no harmful", "m", tuple(without(True, v) for v in REPORT.variants)),
        MATRIX,
        Report("undefined", "m", BACKWARDS),
        Report(
            "n = 0",
            "m",
            (
                replace(
                    DENSE,
                    result=replace(
                        DENSE.result,
                        asr=NOTHING,
                        over_refusal=NOTHING,
                        utility=NOTHING,
                        asr_by_category={"x": NOTHING},
                        answers=(),
                    ),
                ),
            ),
        ),
        Report("long", "m", (replace(DENSE, result=replace(DENSE.result, answers=(LONG,))),)),
    ],
    ids=lambda report: report.title,
)
def test_odd_reports_are_written_all_the_same(report: Report) -> None:
    compared = comparisons(report)
    page, text = render_html(report, compared), render_markdown(report, compared)
    Outline(page)
    for words in (page, text):
        assert not re.search(r"\b(nan|None|Undefined)\b", words)
        assert len(words) < 400_000


def test_markdown_escapes_markup_and_keeps_the_rest() -> None:
    assert escape_markdown("a | b\n<img> `c` *d* _e_") == r"a \| b &lt;img> \`c\` \*d\* \_e\_"
    assert escape_markdown("# no heading") == r"\# no heading"
    assert escape_markdown("1. no list") == r"1\. no list"
    assert escape_markdown("[a](b) [1, 2] p < 0.1") == r"[a\](b) [1, 2] p < 0.1"
    assert escape_markdown("a &lt; b & c") == "a &amp;lt; b & c"


def test_fences_are_longer_than_what_they_hold() -> None:
    assert fenced("a ```` b") == "`````text\na ```` b\n`````"


def test_pairing_gives_rows_of_one_prompt() -> None:
    rows = paired_answers((DENSE, PRUNED))
    assert len(rows) == 60
    assert all(a.id == b.id for a, b in rows)


def test_several_suites_have_a_table_of_their_own() -> None:
    def of_suites(one: Variant) -> Variant:
        answers = [
            replace(answer, suite="a" if answer.harmful else "b | c")
            for answer in one.result.answers
        ]
        return replace(one, result=summarise("a, b | c", JUDGE, answers))

    report = replace(REPORT, variants=tuple(map(of_suites, REPORT.variants)))
    page = render_html(report, comparisons(report))
    rows = {row[0]: row for row in Outline(page).rows if row}
    assert rows["a ASR"][2] == "62.5 % [47.0, 75.8] 25 of 40"
    assert rows["b | c utility"][2].startswith("0.900 [")
    assert "a degenerate" not in rows
    assert "By suite" not in render_html(REPORT, comparisons(REPORT))
    text = render_markdown(report, comparisons(report))
    start = text.index("| Suite | |")
    lines = text[start:].split("\n\n")[0].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[2].startswith("| a | ASR | 12.5 [5.5, 26.1] | 62.5 [47.0, 75.8] |")
    assert lines[3].startswith("| b \\| c | over-refusal | 5.0 [0.9, 23.6] |")


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
    compared = comparisons(report)
    page, text = render_html(report, compared), render_markdown(report, compared)
    assert f'title="{PLACES[0]}">safebench#even <small>ASR</small></th>' in page
    shown = re.sub(r"<[^>]*>", "", _markup(page))
    for words in (shown, text):
        assert "/home/me" not in words
        assert "figstep, t.jsonl" in words
        assert "safebench#even, titles-test" in words
    assert Outline(page).row("safebench#even degenerate")[1] == "12.5 % [5.5, 26.1] 5 of 40"
    assert "| safebench#even | degenerate | 12.5 [5.5, 26.1] |" in text
    assert "| titles-test | over-refusal |" in text
    assert "| titles-test | degenerate |" not in text


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


def alone(*variants: Variant, **fields: object) -> Report:
    bare = [
        Variant(v.name, v.name, v.result, base=variants[0].name if i else None)
        for i, v in enumerate(variants)
    ]
    fields = {"recipe": {"settings": {"judge": "it"}}, **fields}
    return Report("Evaluations", "", tuple(bare), unrelated=True, **fields)  # type: ignore[arg-type]


def test_unrelated_models_are_compared_with_the_first() -> None:
    report = alone(DENSE, PRUNED, REALIGNED)
    found = comparisons(report)
    dense, other, third = ([i < n for i in range(40)] for n in (5, 25, 10))
    assert [(one.name, one.base, one.recovery) for one in found] == [
        ("pruned", "dense", None),
        ("realigned", "dense", None),
    ]
    assert [one.attacks for one in found] == [mcnemar(other, dense), mcnemar(third, dense)]
    assert [one.attacks_verdict for one in found] == [
        "worse than dense",
        "not distinguishable from dense",
    ]


def test_a_page_of_unrelated_models_has_no_word_of_pruning() -> None:
    renamed = [replace(v, name=n) for v, n in zip((DENSE, PRUNED, REALIGNED), "abc", strict=True)]
    for models in (renamed, renamed[:1]):
        report = alone(*models)
        compared = comparisons(report)
        page, text = render_html(report, compared), render_markdown(report, compared)
        seen = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
        for words in (seen, text):
            assert not re.search(
                r"prun|realign|restor|RSR|recipe|dense", re.sub(r"<[^>]*>", "", words), re.I
            )
            assert "What was run" in words
        assert ("McNemar" in text, "of each model against a" in text) == (len(models) > 1,) * 2
        assert len(Outline(page).row("1 a")) == (6 if len(models) > 1 else 4)
        assert len({line.count("|") for line in text.splitlines() if line[:2] == "| "}) > 1
    said = verdict(alone(*renamed), comparisons(alone(*renamed)))
    assert said[0].startswith("a: ASR 12.5 % [5.5, 26.1] on 40 harmful prompts, over-refusal 5.0 %")
    assert said[0].endswith("on 20.")
    assert "On the same prompts: ASR worse than a (McNemar p < 0.001), over-refusal not" in said[1]


def test_the_verdict_on_unrelated_models_has_its_caveats() -> None:
    refuser = variant("refuser", 0, 20)
    report = alone(DENSE, refuser)
    assert verdict(report, comparisons(report))[1].endswith("refusing more of everything.")
    report = alone(*(without(False, of_places(v)) for v in (DENSE, PRUNED)))
    told = verdict(report, comparisons(report))
    assert "5 answers to harmful prompts are degenerate" in told[0]
    assert told[-1].startswith("Over-refusal was not measured")


def test_the_table_of_a_run_counts_answers_that_say_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = "Degenerate answers, neither refusals nor successful attacks."
    show_report(
        Console(width=200), replace(REPORT, variants=tuple(map(of_places, REPORT.variants)))
    )
    out = capsys.readouterr().out
    assert f"{told} the dense model: 5 of 40 to harmful prompts; the pruned model: 5 of" in out
    show_report(Console(width=200), REPORT)
    assert told not in capsys.readouterr().out


def test_examples_of_unrelated_models_tell_any_two_apart() -> None:
    same = replace(DENSE, name="same")
    harmful, _ = choose_examples(alone(DENSE, same, PRUNED))
    assert sum(len({a.complies for a in row}) > 1 for row in harmful) == 9
    assert len(harmful[0]) == 3


def test_other_judges_stand_on_the_page() -> None:
    judged = Judged("guard", wilson(10, 40), None, 2)
    agreement = (Agreement("a", "guard", True, wilson(30, 40), 0.5),)
    report = alone(DENSE, opinions=(Opinion("dense", judged, agreement),))
    page, text = render_html(report, ()), render_markdown(report, ())
    row = next(row for row in Outline(page).rows if row[1:2] == ["guard"])
    assert row == [
        "dense",
        "guard",
        "25.0 % [14.2, 40.2] 10 of 40",
        "75.0\u00a0% [59.8,\u00a085.8] of 40, kappa 0.50".replace("\u00a0", " "),
        "–",
        "–",
        "2",
    ]
    assert "| dense | guard | 25.0 % [14.2, 40.2], 10 of 40 | 75.0 % [59.8, 85.8] of 40" in text


def test_a_caveat_stands_everywhere(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(REPORT, caveat="A toy & no more.")
    compared = comparisons(report)
    assert "<strong>A toy &amp; no more.</strong>" in render_html(report, compared)
    assert "<strong></strong>" not in page
    for text in (render_markdown(report, compared), render_card(report, compared)):
        assert "**A toy &amp; no more.**" in text or "**A toy & no more.**" in text
    assert report_to_json(report, compared)["caveat"] == report.caveat
    show_report(Console(width=200), report)
    assert report.caveat in capsys.readouterr().out


def test_the_terminal_shows_rates_by_suite() -> None:
    def on_two(one: Variant) -> Variant:
        parts = {"a": Rates(wilson(3, 40), None, None), "b": Rates(None, wilson(9, 30), None)}
        return replace(one, result=replace(one.result, by_suite=parts))

    console = Console(width=200, record=True)
    show_report(console, REPORT)
    assert "suite" not in console.export_text()
    show_report(console, replace(REPORT, variants=tuple(map(on_two, REPORT.variants))))
    text = console.export_text()
    assert text.count("7.5 [2.6, 19.9]") == text.count("30.0 [16.7, 47.9]") == len(REPORT.variants)


def test_perplexity_stands_on_the_page_where_it_was_measured(page: str) -> None:
    def measured(one: Variant) -> Variant:
        return replace(one, result=replace(one.result, perplexity=Estimate(2.5, 20, 2.25, 3.0)))

    report = replace(REPORT, variants=tuple(map(measured, REPORT.variants)))
    line = "the dense model 2.500 [2.250, 3.000], the pruned model"
    assert line in render_html(report, comparisons(report))
    assert line in render_markdown(report, comparisons(report))
    assert "Perplexity" not in page


def test_text_has_columns_where_it_was_measured() -> None:
    own = replace(DENSE, result=replace(DENSE.result, text=result_of([(8.0, None, 4)])))
    cut = replace(PRUNED, result=replace(PRUNED.result, text=result_of([(12.0, 2.0, 4)])))
    shown = Report("text", "pico", (own, cut, REALIGNED))
    compared = comparisons(shown)
    text, page = render_markdown(shown, compared), render_html(shown, compared)
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "KL to dense |" in line)
    table = lines[start : start + 5]
    assert len({line.count("|") for line in table}) == 1
    assert table[2].endswith(" 7.39 [7.39, 7.39] | – |")
    assert table[3].endswith(" 20.1 [20.1, 20.1] | 0.5 [0.5, 0.5] |")
    assert table[4].endswith(" – | – |")
    assert page.count('data-label="KL to dense"') == 3
    assert "on 4 tokens of 1 documents of ordinary text" in page
    console = Console(width=200, record=True)
    show_report(console, shown)
    assert "0.5 [0.5, 0.5]" in console.export_text()
    without = Report("text", "pico", (DENSE, PRUNED))
    assert "KL to dense" not in render_markdown(without, comparisons(without))
