"""Methods set beside each other over several seeds: statistics, tables, figures, folders."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import forked
import pico
import quick
from commands import exit_code
from disk import write_data
from regraft import stages
from regraft.console import show_study
from regraft.data.example import Example
from regraft.disk.files import file_digest, write_json
from regraft.errors import RegraftError
from regraft.evaluation.keywords import REGRAFT_1
from regraft.evaluation.metrics import rsr, wilson
from regraft.evaluation.pairing import holm
from regraft.evaluation.perplexity import result_of
from regraft.evaluation.results import Answer, result_to_json, write_answers
from regraft.evaluation.summary import judge_answer, summarise
from regraft.evaluation.tradeoff import Bounds, Point, Searched
from regraft.recipes.file import read_recipe, write_recipe
from regraft.recipes.recipe import Recipe
from regraft.report.examples import pictures
from regraft.report.page import CURVES_CAPTION, render_html, render_markdown
from regraft.report.pooling import study_of
from regraft.report.rate_figures import _points, curve_figure, marker_size, trade_off_figure
from regraft.report.run import Run, Variant
from regraft.report.study import Outcome, Row, Spread, Study, Table
from regraft.restoration.base import METHODS, settings_in
from regraft.runs import comparing, pipeline
from regraft.runs.bundle import write_bundle
from regraft.runs.bundle_check import read_bundle
from regraft.runs.reporting import read_run
from truth import mcnemar, paired_rsr

JUDGE = REGRAFT_1
REFUSAL = "I'm sorry, I can't help with that."
SUITES = ("safebench:/data/figstep#even", "jsonl:/data/mmsb.jsonl")


def answers(attacks: Sequence[bool], refusals: Sequence[bool]) -> list[Answer]:
    """Harmful prompts, alternately of two suites, then harmless ones."""
    unsafe = [
        judge_answer(
            Example(f"h{i}", f"prompt {i}", True, "fraud", suite=SUITES[i % 2]),
            "Sure, like this!" if attack else REFUSAL,
            JUDGE,
        )
        for i, attack in enumerate(attacks)
    ]
    safe = [
        judge_answer(
            Example(f"u{i}", f"question {i}", False, "shops", None, "nine", SUITES[i % 2]),
            REFUSAL if refusal else "nine" if i % 3 else "ten",
            JUDGE,
        )
        for i, refusal in enumerate(refusals)
    ]
    return unsafe + safe


def variant(name: str, attacks: Sequence[bool], refusals: Sequence[bool], **fields: Any) -> Variant:
    result = summarise(", ".join(SUITES), JUDGE, answers(attacks, refusals))
    return Variant(name, result, "a method", **fields)


Shares = Mapping[str, tuple[float, float]]
SHARES: Shares = {
    "dense": (0.15, 0.10),
    "pruned": (0.45, 0.08),
    "hsr": (0.30, 0.09),
    "random-1": (0.43, 0.08),
    "random-2": (0.44, 0.09),
    "worse": (0.70, 0.02),
}
PROMPTS = 120
RANDOM = {"heads": "random", "top_heads": 4}


def run(seed: int, methods: Shares = SHARES, prompts: int = PROMPTS) -> Run:
    """Every model draws its outcomes; the dense one's are the same for every seed."""
    easy = np.random.default_rng(0).random((2, prompts))

    def drawn(place: int, share: float, kind: int) -> list[bool]:
        own = np.random.default_rng(1000 * seed + place).random(prompts)
        mixed = easy[kind] if place == 0 else 0.7 * easy[kind] + 0.3 * own
        return (mixed < np.quantile(mixed, share)).tolist()

    made = []
    for place, (name, (asr, over)) in enumerate(methods.items()):
        base = {"dense": None, "pruned": "dense"}.get(name, "pruned")
        restored = None if base != "pruned" else 10 ** (place % 5) * (10 + seed)
        asr += 0.01 * seed * (place == 2)  # so that seeds can be told apart
        fields = {"base": base, "pruned": 100_000, "restored": restored}
        made.append(variant(name, drawn(place, asr, 0), drawn(place, over, 1), **fields))
    realign = [
        {"name": name, "method": "hsr", "q": 0.5}
        | (
            RANDOM | {"draw_seed": place + 100 * seed}
            if name.startswith("random")
            else {"heads": "top"}
        )
        for place, name in enumerate(methods)
    ]
    recipe = {"calibration": {"seed": seed}, "realign": realign}
    return Run("A title", "pico", tuple(made), recipe=recipe, seed=seed)


RUNS = tuple(run(seed) for seed in (0, 1, 2))


@pytest.fixture(scope="module")
def pooled() -> Study:
    return study_of(RUNS, ("hsr",))


def rows_of(study: Study) -> dict[str, Row]:
    return {row.name: row for row in study.tables[0].rows}


def attacks_of(of: Run, name: str) -> list[bool]:
    return [not answer.refused for answer in answers_of(of, name) if answer.harmful]


def answers_of(of: Run, name: str) -> tuple[Answer, ...]:
    return next(one for one in of.variants if one.name == name).result.answers


def test_one_run_is_wilson_and_mcnemar() -> None:
    rows = rows_of(study_of(RUNS[:1]))
    base, dense = attacks_of(RUNS[0], "pruned"), attacks_of(RUNS[0], "dense")
    for name in ("hsr", "worse"):
        own = attacks_of(RUNS[0], name)
        row = rows[name]
        assert row.asr == wilson(sum(own), PROMPTS)
        assert row.attacks is not None
        assert row.attacks.p == pytest.approx(mcnemar(own, base).p)
        assert row.rsr is not None
        assert row.rsr.value == pytest.approx(rsr(sum(dense), sum(base), sum(own)))
        assert row.rsr.interval == paired_rsr(dense, base, own)
        assert row.rsr.by_seed == (row.rsr.value,)
        right = [a.similarity == 1 for a in answers_of(RUNS[0], name) if a.similarity is not None]
        assert row.utility == replace(wilson(sum(right), PROMPTS), count=None)
    methods = [row.attacks for row in rows.values() if row.attacks and row.role == "method"]
    assert [test.adjusted for test in methods] == list(holm([test.p for test in methods]))
    damage = rows["pruned"].attacks
    assert damage is not None
    assert damage.p == damage.adjusted == pytest.approx(mcnemar(base, dense).p)
    assert (damage.against, damage.outcome) == ("dense", Outcome.WORSE)
    assert rows["hsr"].attacks is not None
    assert rows["hsr"].attacks.outcome == "better"
    assert rows["worse"].attacks is not None
    assert rows["worse"].attacks.outcome == "worse"
    assert rows["random"].attacks is not None
    assert rows["random"].attacks.outcome == "not distinguishable"


def drawn(ours: np.ndarray, theirs: np.ndarray, times: int = 40_000) -> float:
    """The p value by drawing which of a prompt's outcomes, `[draws, prompts]`, are ours."""
    both = np.concatenate([ours, theirs])
    order = np.random.default_rng(9).random((times, *both.shape)).argsort(axis=1)[:, : len(ours)]
    sums = np.take_along_axis(both[None], order, axis=1).sum(axis=(1, 2))
    tails = (sums <= ours.sum()).mean(), (sums >= ours.sum()).mean()
    return float(min(1.0, 2 * min(tails)))


def test_seeds_are_pooled_by_prompt(pooled: Study) -> None:
    rows = rows_of(pooled)
    own, base, dense = (
        np.array([attacks_of(one, name) for one in RUNS], dtype=int)
        for name in ("hsr", "pruned", "dense")
    )
    row = rows["hsr"]
    assert row.asr is not None
    assert row.asr.value == pytest.approx(own.mean())
    assert row.asr.n == PROMPTS, "answers to one prompt were taken for independent ones"
    resampled = np.random.default_rng(4).integers(PROMPTS, size=(20_000, PROMPTS))
    low, high = np.quantile(own.mean(axis=0)[resampled].mean(axis=1), [0.025, 0.975])
    assert low - 0.02 < row.asr.low < low < high < row.asr.high < high + 0.02
    assert row.attacks is not None
    assert row.attacks.p == pytest.approx(drawn(own.sum(0)[None], base.sum(0)[None]), abs=0.01)
    assert row.attacks.difference == pytest.approx(own.mean() - base.mean()), "not of the rates"
    assert row.rsr is not None
    value = (base.mean() - own.mean()) / (base.mean() - dense.mean())
    assert row.rsr.value == pytest.approx(value)
    one_by_one = (base.mean(1) - own.mean(1)) / (base.mean(1) - dense.mean(1))
    assert row.rsr.by_seed == pytest.approx(tuple(one_by_one))
    assert row.restored is not None
    assert (row.restored.least, row.restored.mean, row.restored.most) == (100, 110, 120)
    assert rows["dense"].asr == wilson(int(dense[0].sum()), PROMPTS)


@pytest.mark.parametrize("runs", [RUNS[:1], RUNS])
def test_lost_refusals_are_counted_prompt_by_prompt(runs: tuple[Run, ...]) -> None:
    rows = rows_of(study_of(runs))
    for name, draws in {"hsr": ("hsr",), "random": ("random-1", "random-2")}.items():
        seen: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}
        for one in runs:
            dense, pruned = attacks_of(one, "dense"), attacks_of(one, "pruned")
            for draw in draws:
                for prompt, attacked in enumerate(attacks_of(one, draw)):
                    if pruned[prompt]:
                        seen[not dense[prompt]].append((prompt, not attacked))
        for found, by_dense in ((rows[name].regained, True), (rows[name].added, False)):
            assert found is not None
            refused = [one for _, one in seen[by_dense]]
            assert found.value == pytest.approx(sum(refused) / len(refused))
            assert found.n == len({prompt for prompt, _ in seen[by_dense]})
            if len(runs) == len(draws) == 1:
                assert found == wilson(sum(refused), len(refused))
    assert rows["dense"].regained is rows["pruned"].regained is None


def test_a_pruned_model_that_refuses_as_before_has_lost_nothing() -> None:
    kept = run(0, {"dense": (0.2, 0.1), "pruned": (0.0, 0.1), "hsr": (0.1, 0.1)})
    row = rows_of(study_of([kept]))["hsr"]
    assert (row.regained, row.added) == (None, None)


def test_repeats_of_a_random_control_are_one_row(pooled: Study) -> None:
    assert list(rows_of(pooled)) == ["dense", "pruned", "hsr", "random", "worse"]
    row = rows_of(pooled)["random"]
    assert (len(row.draws), row.method, row.label) == (2, "a method", "random (a method)")
    both = [np.array([attacks_of(one, f"random-{i}") for one in RUNS], dtype=int) for i in (1, 2)]
    base, hsr = (
        np.array([attacks_of(one, name) for one in RUNS], dtype=int) for name in ("pruned", "hsr")
    )
    assert row.asr is not None
    assert row.asr.value == pytest.approx(np.mean(both))
    assert row.attacks is not None
    draws = np.array(both).sum(axis=1)  # [draws, prompts]
    assert row.attacks.p == pytest.approx(drawn(draws, base.sum(0)[None]), abs=0.01)
    assert list(row.against) == ["hsr"]
    assert row.against["hsr"].p == pytest.approx(drawn(draws, hsr.sum(0)[None]), abs=0.01)
    assert row.against["hsr"].outcome == "worse"
    assert "hsr" not in rows_of(pooled)["hsr"].against
    tests = [one.attacks for one in pooled.tables[0].methods if one.attacks]
    tests += [one.against["hsr"] for one in pooled.tables[0].rows if one.against]
    assert len(tests) == 5
    assert [one.adjusted for one in tests] == list(holm([one.p for one in tests]))


def test_two_methods_are_one_test_whichever_is_named_first() -> None:
    """A draw of a random control stands for its row; a name given twice counts once."""
    study = study_of(RUNS, ("hsr", "random-2", "hsr"))
    assert study.against == ("hsr", "random")
    rows = rows_of(study)
    one, other = rows["random"].against["hsr"], rows["hsr"].against["random"]
    assert (one.p, one.adjusted) == pytest.approx((other.p, other.adjusted), rel=1e-9)
    assert {one.outcome, other.outcome} == {"better", "worse"}
    tests = [row.attacks for row in study.tables[0].methods if row.attacks]
    tests += [rows[name].against["hsr"] for name in ("random", "worse")]
    tests.append(rows["worse"].against["random"])
    adjusted = holm([one.p for one in tests])
    assert [one.adjusted for one in tests] == pytest.approx(adjusted, rel=1e-9)


def test_random_controls_with_other_settings_stay_apart() -> None:
    runs = []
    for one in RUNS[:2]:
        recipe = json.loads(json.dumps(one.recipe))
        recipe["realign"][4]["top_heads"] = 8
        runs.append(replace(one, recipe=recipe))
    assert {"random-1", "random-2"} <= rows_of(study_of(runs)).keys()


def test_rows_of_one_stem_keep_their_own_answers() -> None:
    """Draws of two controls that share a stem, and a method that is called by it."""
    shares: Shares = {
        "dense": (0.15, 0.1),
        "pruned": (0.45, 0.1),
        "random": (0.80, 0.1),
        "random-1": (0.45, 0.1),
        "random-2": (0.45, 0.1),
        "random-3": (0.20, 0.1),
        "random-4": (0.20, 0.1),
    }
    one = run(0, shares)
    settings = [dict(found) for found in one.recipe["realign"]]
    for found in settings:
        found |= {"budget": 50 if found["name"] in ("random-3", "random-4") else 5}
        if found["name"] == "random":
            found |= {"heads": "top", "draw_seed": 0}
    recipe = {**one.recipe, "realign": settings}
    rows = rows_of(study_of([replace(one, recipe=recipe)]))
    assert list(rows) == ["dense", "pruned", "random", "random-1", "random-3"]
    found_rates = [row.asr.value for row in rows.values() if row.asr]
    assert found_rates == pytest.approx([0.15, 0.45, 0.80, 0.45, 0.20], abs=0.01)


def test_a_verdict_says_where_seeds_disagree() -> None:
    """Better by far with one seed and a little worse with the other is not simply better."""
    runs = [run(0, {**SHARES, "hsr": (0.2, 0.1)}), run(1, {**SHARES, "hsr": (0.47, 0.1)})]
    test = rows_of(study_of(runs))["hsr"].attacks
    assert test is not None
    assert test.outcome is Outcome.BETTER
    assert test.verdict == "better than pruned, but not by every seed"
    assert test.by_seed == pytest.approx((-0.25, 0.03), abs=0.01)
    assert "better than pruned, but not by every seed" in render_html(study_of(runs))


def silenced(variant: Variant) -> Variant:
    """The same model with nothing but gibberish to say."""
    mute = [
        replace(one, answer="", refused=False, degenerate="empty") for one in variant.result.answers
    ]
    return replace(variant, result=summarise(variant.result.suite, JUDGE, mute))


def test_models_that_say_nothing_are_shown_to() -> None:
    one = run(0)
    models = [silenced(v) if v.name == "hsr" else v for v in one.variants]
    study = study_of([replace(one, variants=tuple(models))])
    row = rows_of(study)["hsr"]
    assert row.degenerate is not None
    assert row.degenerate.value == 1
    for page in (render_html(study), render_markdown(study)):
        assert "Degenerate" in page
    for one_study, there in ((study, True), (study_of([one]), False)):
        with (console := Console(width=200)).capture() as shown:
            show_study(console, one_study)
        assert ("Degenerate" in shown.get()) == there
    assert "Degenerate" not in render_markdown(study_of([one]))


def test_what_seeds_chose_differently_is_not_the_label_of_all() -> None:
    def relabelled(one: Run, method: str) -> Run:
        models = [replace(v, method=method) if v.name == "hsr" else v for v in one.variants]
        return replace(one, variants=tuple(models))

    rows = rows_of(study_of([relabelled(RUNS[0], "layer 3"), relabelled(RUNS[1], "layer 7")]))
    assert rows["hsr"].label == "hsr"
    assert rows_of(study_of(RUNS))["hsr"].label == "hsr (a method)"


def test_utility_of_right_and_wrong_answers_has_a_rates_interval() -> None:
    """Also where seeds disagree: the bootstrap of three thirds had no width."""
    row = rows_of(study_of(RUNS))["hsr"]
    assert row.utility is not None
    assert row.utility.count is None
    assert row.utility_from_dense is not None
    assert row.utility_from_dense.low < row.utility_from_dense.value < row.utility_from_dense.high


@pytest.mark.parametrize("name", METHODS.names())
def test_everything_drawn_is_told_from_what_is_not(name: str) -> None:
    own = METHODS.get(name).settings_type
    choices = ("top", "random", "all") if "heads" in own.model_fields else (None,)
    for heads in choices:
        settings = own(method=name, **({} if heads is None else {"heads": heads}))
        assert settings_in(settings.model_dump(mode="json")) == settings
        assert settings.drawn == (settings.reseeded(1) != settings)
        assert settings.drawn == (heads == "random" or name in ("random", "fine-tune"))


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("control", [{"method": "random"}, {"method": "hsr", "heads": "random"}])
def test_random_controls_leave_recipes_comparable(control: dict[str, Any], repeats: int) -> None:
    one = {"name": "control", "repeats": repeats} | control
    recipe = Recipe.model_validate({"seeds": [0, 3], "realign": [one]})
    first, second = (
        comparing._without_seed(recipe.for_seed(seed).model_dump(mode="json"))
        for seed in recipe.seeds
    )
    assert first == second


def test_repeats_of_random_weights_are_one_row() -> None:
    runs = []
    for one in RUNS[:2]:
        recipe = json.loads(json.dumps(one.recipe))
        for settings in recipe["realign"][3:5]:
            settings |= {"method": "random"}
        runs.append(replace(one, recipe=recipe))
    assert len(rows_of(study_of(runs))["random"].draws) == 2


def test_price_is_set_beside_the_gain(pooled: Study) -> None:
    def refusals(name: str) -> np.ndarray:
        models = [next(v for v in one.variants if v.name == name) for one in RUNS]
        return np.array(
            [[a.refused for a in one.result.answers if not a.harmful] for one in models], dtype=int
        )

    row = rows_of(pooled)["worse"]
    assert row.over_refusal is not None
    assert row.over_refusal.value == pytest.approx(refusals("worse").mean())
    for other, found in (
        ("pruned", row.over_refusal_from_pruned),
        ("dense", row.over_refusal_from_dense),
    ):
        assert found is not None
        assert found.value == pytest.approx(refusals("worse").mean() - refusals(other).mean())
        assert found.low < found.value < found.high
    dense = rows_of(pooled)["dense"]
    assert dense.over_refusal_from_dense is None
    assert row.utility is not None
    assert dense.utility is not None
    assert row.utility_from_dense is not None
    assert row.utility_from_dense.value == pytest.approx(row.utility.value - dense.utility.value)


def test_each_harmful_suite_has_its_own_numbers(pooled: Study) -> None:
    assert pooled.suites == dict(zip(SUITES, ("safebench#even", "mmsb"), strict=True))
    row = rows_of(pooled)["hsr"]
    for place, suite in enumerate(pooled.suites):
        own, base, dense = (
            np.mean([attacks_of(one, name)[place::2] for one in RUNS])
            for name in ("hsr", "pruned", "dense")
        )
        found = row.by_suite[suite]
        assert (found.asr.value, found.asr.n) == (pytest.approx(own), PROMPTS // 2)
        assert found.rsr is not None
        assert found.rsr.value == pytest.approx((base - own) / (base - dense))


def test_without_harmless_prompts_or_suites() -> None:
    runs = []
    for one in RUNS[:2]:
        made = []
        for old in one.variants:
            kept = [replace(a, suite="") for a in old.result.answers if a.harmful]
            made.append(replace(old, result=summarise("suite", JUDGE, kept)))
        runs.append(replace(one, variants=tuple(made)))
    found = study_of(runs)
    row = rows_of(found)["hsr"]
    assert found.suites == {"suite": "suite"}
    assert row.by_suite == {}
    assert (row.over_refusal, row.utility, row.utility_from_dense) == (None, None, None)
    assert row.attacks is not None
    assert trade_off_figure(found) == ""
    assert "hsr" in render_html(found)


def test_a_pruning_that_is_only_evaluated_has_no_methods_to_test() -> None:
    bare = [
        replace(
            one,
            variants=(*one.variants, replace(one.variants[1], name="other", method="")),
        )
        for one in RUNS
    ]
    study = study_of(bare, ["hsr"])
    assert [any(row.against for row in table.rows) for table in study.tables] == [True, False]
    markdown = render_markdown(study)
    header, rule, first = markdown.split("**other**")[1].strip().splitlines()[:3]
    assert header.count("|") == rule.count("|") == first.count("|")


@pytest.mark.parametrize(
    ("runs", "against", "named"),
    [
        ([], (), "no run"),
        ([RUNS[0], RUNS[0]], (), "Two of the runs have the calibration seed 0"),
        (
            RUNS,
            ("hrs",),
            "against hrs: there is no such method; expected one of hsr, random, worse",
        ),
        ([RUNS[0], run(1, prompts=100)], (), "cannot be compared: the prompt"),
    ],
)
def test_runs_that_cannot_be_compared(
    runs: Sequence[Run], against: tuple[str, ...], named: str
) -> None:
    with pytest.raises(RegraftError, match=named):
        study_of(runs, against)


# What is shown


def test_page_and_text_show_every_row(pooled: Study) -> None:
    tables = (replace(pooled.tables[0], rows=(*pooled.tables[0].rows[:-1], _at_inference(pooled))),)
    page = render_html(replace(pooled, title="A <b> title", tables=tables))
    text = render_markdown(replace(pooled, tables=tables))
    for shown in (page, text):
        for words in ("random (x2)", "worse †", "not distinguishable", "better", "safebench#even"):
            assert words in shown, words
    assert "A &lt;b&gt; title" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the page is not self-contained"
    assert page.count("<svg") == 1
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths[:7])) == 1, "a row of the first table has another number of cells"
    header = next(i for i, line in enumerate(text.splitlines()) if line.startswith("| Model"))
    assert text.splitlines()[header + 1].startswith("|---|---|"), "the table has no rule"
    assert page == render_html(replace(pooled, title="A <b> title", tables=tables))


def test_text_is_the_mean_over_seeds_and_shown_where_it_was_measured(pooled: Study) -> None:
    def with_text(of: Run, kl: float) -> Run:
        text = result_of([(8.0, kl, 4), (9.0, 3 * kl, 4)])
        models = (replace(v, result=replace(v.result, text=text)) for v in of.variants)
        return replace(of, variants=tuple(models))

    study = study_of([with_text(run(0), 0.4), with_text(run(1), 0.8)])
    for row in study.tables[0].rows:
        assert row.text is not None
        assert row.text.kl is not None
        assert row.text.kl.value == pytest.approx((0.6 + 1.8) / 8)
        assert row.text.perplexity.value == pytest.approx(math.exp(17 / 8))
    text, page = render_markdown(study), render_html(study)
    headings = [line for line in text.splitlines() if line.startswith("| Model")]
    rows = [line for line in text.splitlines() if re.match(r"\| \d+\\?\. ", line)]
    for name, value in (("KL to dense", "0.3 [0.15, 0.45]"), ("Perplexity", "8.37 [7.39, 9.49]")):
        (heading,) = (line for line in headings if line.endswith(f" {name} |"))
        found = [line.count("|") for line in rows if line.endswith(f" {value} |")]
        assert found == [heading.count("|")] * len(study.rows)
    assert "on 8 tokens of 2 documents of ordinary text" in page
    assert "KL to dense" not in render_markdown(pooled)
    assert "KL to dense" not in render_html(pooled)


def _at_inference(study: Study) -> Row:
    last = study.tables[0].rows[-1]
    defended = replace(last.first, inference_time=True)
    return replace(last, members=((defended,),), restored=None)


def test_figures_name_and_number_every_model(pooled: Study) -> None:
    svg = trade_off_figure(pooled)
    names = ("dense", "pruned", "hsr", "random (x2)", "worse")
    for number, name in enumerate(names, start=1):
        assert f">{number}  {name}<" in svg
        assert f">{number}<" in svg
    several = replace(pooled, tables=(pooled.tables[0], replace(pooled.tables[0], pruning="more")))
    assert trade_off_figure(several).count(">more<") == 1


def test_a_circle_tells_the_restored_share(pooled: Study) -> None:
    """By its area, on a log scale; a square is a model with nothing restored."""
    table = pooled.tables[0]
    shares = {row.name: row.restored.mean if row.restored else None for row in table.rows}
    assert shares["hsr"] is not None and shares["dense"] is None
    assert {one.name.split(" ")[0]: one.share for one in _points(table)} == shares
    assert {one.share is None: one.marker for one in _points(table)} == {True: "s", False: "o"}
    areas = [marker_size(share) ** 2 for share in (0.001, 0.01, 0.1, 1, 10)]
    assert areas[0] == areas[1] == 64
    assert [b - a for a, b in pairwise(areas[1:])] == pytest.approx([51.2] * 3)

    def drawn(share: float | None) -> str:
        restored = None if share is None else Spread(share, share, share)
        rows = tuple(replace(row, restored=row.restored and restored) for row in table.rows)
        return trade_off_figure(replace(pooled, tables=(replace(table, rows=rows),)))

    legend = "per 10,000 restored"
    assert drawn(None).count(legend) == 0
    assert [f">{n:g} {legend}<" in drawn(0.5) for n in (0.01, 0.1, 1, 10)] == [1, 1, 1, 0]
    assert len({drawn(share) for share in (None, 0.01, 0.02, 0.09)}) == 4, "areas look the same"


def test_curves_ring_the_chosen_point(pooled: Study) -> None:
    unchosen = searched([100 * i for i in range(4)], None)

    (bare,) = pooled.tables

    def with_curves(*curves: Searched) -> Table:
        own = [(replace(rows_of(pooled)["hsr"].first, curve=one),) for one in curves]
        rows = [replace(r, members=tuple(own)) if r.name == "hsr" and own else r for r in bare.rows]
        return replace(bare, pruning="wanda-60", rows=tuple(rows))

    def drawn(*curves: Searched) -> str:
        return curve_figure([bare, with_curves(*curves)])

    assert drawn() == ""
    assert ">hsr<" in drawn(unchosen)
    assert ">wanda-60<" not in drawn(unchosen)
    assert len(drawn(replace(unchosen, chosen=200))) > len(drawn(unchosen))
    backwards = replace(unchosen, points=unchosen.points[::-1])
    assert drawn(replace(unchosen, chosen=300)) == drawn(replace(backwards, chosen=300))
    assert CURVES_CAPTION in render_html(replace(pooled, tables=(with_curves(unchosen),)))
    assert CURVES_CAPTION not in render_html(pooled)


def searched(restored: Sequence[int], chosen: int | None) -> Searched:
    """Ever fewer attacks succeed and ever more harmless prompts are refused."""
    points = [
        Point(count, wilson(60 - 9 * i, 100), wilson(5 + i, 100), None)
        for i, count in enumerate(restored)
    ]
    dense = Point(0, wilson(20, 100), wilson(4, 100), None)
    return Searched(1000, chosen, Bounds(0.3, 0.06, None), dense, tuple(points))


# Folders

VARIANTS = [
    {"name": "hsr", "method": "hsr", "heads": "all", "q": 0.9, "checkpoint": False},
    {
        "name": "random",
        "method": "hsr-a",
        "heads": "random",
        "top_heads": 2,
        "checkpoint": False,
        "repeats": 2,
    },
]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A study of two seeds and two prunings in `run`, with `recipe.yaml` beside it."""
    root = tmp_path_factory.mktemp("study")
    pico.save("llava", root / "dense", torch.bfloat16, "100KB")
    write_data(root / "data", 6)
    content = {
        "model": str(root / "dense"),
        "seeds": [0, 3],
        "against": ["random"],
        "calibration": {"data": str(root / "data" / "data.jsonl"), "samples": 4},
        "prune": [{"sparsity": 0.5, "order": "one-shot"}, {"sparsity": 0.6, "order": "one-shot"}],
        "realign": VARIANTS,
        "evaluate": {"suite": str(root / "data" / "data.jsonl"), "max_new_tokens": 2},
        "compute": {"device": "cpu", "batch_size": 6},
    }
    (root / "recipe.yaml").write_text(write_recipe(Recipe.model_validate(content)))
    with quick.without_figures():
        pipeline.run_recipe(read_recipe(root / "recipe.yaml"), root / "run")
    return root


def evaluations(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.rglob("answers.jsonl"))


def test_a_study_is_a_run_a_seed_and_their_comparison(world: Path) -> None:
    run = world / "run"
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "seed-0", "seed-3", "report"}
    content = json.loads((run / "report" / "report.json").read_text())
    assert content["seeds"] == [0, 3]
    assert [table["pruning"] for table in content["tables"]] == ["wanda-50", "wanda-60"]
    assert [row["name"] for row in content["tables"][0]["rows"]] == [
        *("dense", "wanda-50", "hsr", "random"),
    ]
    assert content["against"] == ["random"]
    assert [row["name"] for row in content["tables"][0]["rows"] if row["against"]] == ["hsr"]
    recipes = [read_recipe(run / f"seed-{seed}" / "recipe.yaml") for seed in (0, 3)]
    assert [one.calibration.seed for one in recipes] == [0, 3]
    draws = [[(v.name, v.draw_seed) for v in one.realign if v.drawn] for one in recipes]
    assert draws == [[("random-1", 0), ("random-2", 1)], [("random-1", 6), ("random-2", 7)]]
    assert (run / "seed-3" / "report" / "report.html").exists()


def test_images_of_a_run_that_changed_since_are_not_shown(world: Path) -> None:
    shown = _pictures(world)
    name, image = next(iter(read_run(world / "run" / "seed-0").images().items()))
    content = image.read_bytes()
    Image.new("RGB", (8, 8), "blue").save(image)
    now = _pictures(world)
    image.write_bytes(content)
    assert now == {other: uri for other, uri in shown.items() if other != name} != shown


def _pictures(world: Path) -> dict[str, str]:
    run = read_run(world / "run" / "seed-0")
    return pictures(run.dense.result.answers, run.images())


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of evaluations that a test makes."""
    found: list[Path] = []
    evaluate = stages.evaluate_target

    def watched(model: Any, out: Path, *rest: Any, **named: Any) -> Any:
        if not out.exists():
            found.append(out)
        return evaluate(model, out, *rest, **named)

    monkeypatch.setattr(stages, "evaluate_target", watched)
    return found


@pytest.mark.usefixtures("undrawn")
def test_the_dense_model_answers_once(world: Path, done: list[Path]) -> None:
    recipe = read_recipe(world / "recipe.yaml")
    again = pipeline.run_recipe(recipe, world / "run")
    assert done == [], "a finished stage was repeated"
    shutil.copytree(world / "run", world / "half")
    shutil.rmtree(world / "half" / "seed-3")
    shutil.rmtree(world / "half" / "report")
    for work in (
        pipeline.report_recipe,
        lambda half: comparing.compare_runs([half], world / "comparison"),
        lambda half: write_bundle(half, world / "half.zip"),
    ):
        with pytest.raises(RegraftError, match="not finished: seed-3 has not been run"):
            work(world / "half")
    assert pipeline.run_recipe(recipe, world / "half").tables == again.tables
    assert len(done) == 2 * (1 + 3)
    other = recipe.model_copy(update={"against": ("hsr",)})
    assert pipeline.run_recipe(other, world / "half").against == ("hsr",), "tests of finished runs"
    assert pipeline.report_recipe(world / "half").against == ("hsr",)
    assert len(done) == 2 * (1 + 3)
    assert not [path for path in done if path.name == "dense"]
    dense = [world / "half" / f"seed-{seed}" / "evaluation" / "dense" for seed in (0, 3)]
    for name in ("answers.jsonl", "results.json"):
        assert (dense[0] / name).read_bytes() == (dense[1] / name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_a_study_can_be_made_alone(
    world: Path, tmp_path: Path, done: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last seed first, in any order; the dense model still answers once."""
    recipe, out = world / "recipe.yaml", tmp_path / "run"
    assert exit_code("run", recipe, "--out", out, "--only", "seed-3") == 0
    assert str(out / "seed-3" / "report" / "report.html") in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "seed-3"}
    message = refused(["report", out], capsys)
    assert "not finished: seed-0 has not been run" in message
    assert exit_code("run", recipe, "--out", out, "--only", "seed-0") == 0
    assert len(done) == 1 + 2 * 2 * (1 + 3), "dense once; of 2 seeds and prunings all"
    assert exit_code("run", recipe, "--out", out) == 0
    assert len(done) == 1 + 2 * 2 * (1 + 3), "a finished stage was repeated"
    whole, apart = (one / "report" / "report.json" for one in (world / "run", out))
    assert json.loads(apart.read_text())["tables"] == json.loads(whole.read_text())["tables"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_another_version_does_not_give_its_dense_answers(
    world: Path, tmp_path: Path, done: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it stop the report, which loads no model."""
    recipe, out = world / "recipe.yaml", tmp_path / "run"
    shutil.copytree(world / "run" / "seed-3", out / "seed-3")
    shutil.copy(world / "run" / "recipe.yaml", out)
    monkeypatch.setattr("regraft.__version__", "0.1.1")
    assert exit_code("run", recipe, "--out", out, "--only", "seed-0") == 0
    assert out / "seed-0" / "evaluation" / "dense" in done
    assert exit_code("report", out) == 0


def test_a_run_of_an_earlier_recipe_has_to_be_continued(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    recipe = read_recipe(world / "recipe.yaml")
    grown = Recipe.model_validate(
        {**recipe.model_dump(), "realign": [*recipe.realign, {"name": "more", "method": "random"}]}
    )
    pipeline.claim(tmp_path / "run", grown)
    pipeline.claim(tmp_path / "run" / "seed-0", grown.for_seed(0))
    with pytest.raises(
        RegraftError, match=r"not finished: seed-3 is of an earlier recipe \(realign"
    ):
        pipeline.report_recipe(tmp_path / "run")


def test_many_may_claim_a_new_folder_at_once(world: Path, tmp_path: Path) -> None:
    ready, folders = forked.CONTEXT.Barrier(4), [tmp_path / f"{i}" / "run" for i in range(20)]
    given = world / "recipe.yaml", folders, ready
    processes = [forked.CONTEXT.Process(target=_claimed, args=(i, *given)) for i in range(4)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    assert [one.exitcode for one in processes] == [0] * 4
    wanted = {"recipe.yaml", *(f"seed-{i}" for i in range(4))}
    assert all({one.name for one in folder.iterdir()} == wanted for folder in folders)


def _claimed(number: int, file: Path, folders: Sequence[Path], ready: Barrier) -> None:
    recipe = read_recipe(file)
    for folder in folders:
        ready.wait(20)
        pipeline.recipe_before(folder, recipe)
        pipeline.claim(folder, recipe)
        assert pipeline.recipe_before(folder, recipe) == recipe
        (folder / f"seed-{number}").mkdir()


@pytest.mark.slow
def test_the_runs_of_a_study_can_be_made_at_once(world: Path, tmp_path: Path) -> None:
    words = ("run", world / "recipe.yaml", "--out", tmp_path / "run")
    both = [forked.start(*words, "--only", f"seed-{seed}") for seed in (0, 3)]
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    assert exit_code("report", tmp_path / "run") == 0
    whole, apart = (one / "report" / "report.json" for one in (world / "run", tmp_path / "run"))
    assert json.loads(apart.read_text())["tables"] == json.loads(whole.read_text())["tables"]


def test_only_names_a_run_of_the_recipe(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    message = refused(["run", world / "recipe.yaml", "--out", out, "--only", "seed-1"], capsys)
    assert "no run 'seed-1'; --only takes one of seed-0, seed-3" in message
    single = world / "run" / "seed-0" / "recipe.yaml"
    message = refused(["run", single, "--out", out, "--only", "seed-0"], capsys)
    assert "this one has a single run" in message
    words = ("run", world / "recipe.yaml", "--out", out, "--only", "seed-3", "--dry-run")
    assert exit_code(*words) == 0
    shown = capsys.readouterr().out
    assert "seed-3" in shown
    assert "seed-0" not in shown
    assert not out.exists()


def synthetic(world: Path, out: Path) -> Path:
    """The study with other answers and a curve, as the real writers leave them."""
    shutil.copytree(world / "run", out)
    for seed in (0, 3):
        for place in evaluations(out / f"seed-{seed}"):
            found = stages.read_evaluation(place)
            draw = np.random.default_rng(len(place.name) + seed * (place.name != "dense"))
            attacks = {"dense": 0.1, "pruned": 0.9}.get(place.name, 0.4)
            changed = [
                replace(
                    answer, refused=bool(draw.random() < (1 - attacks if answer.harmful else 0))
                )
                for answer in found.result.answers
            ]
            result = summarise(found.result.suite, JUDGE, changed)
            content = json.loads((place / "results.json").read_text())
            write_answers(place / "answers.jsonl", changed)
            made = {
                "result": result_to_json(result),
                "answers": file_digest(place / "answers.jsonl"),
            }
            write_json(place / "results.json", content | made)
        curve = searched([2 * i for i in range(3)], 4)
        file = out / f"seed-{seed}" / "curves" / "wanda-60" / "hsr.json"
        write_json(file, {"about": {}, **asdict(curve)})
    return out


def test_compare_reads_what_the_runs_wrote(world: Path, tmp_path: Path) -> None:
    place = synthetic(world, tmp_path / "study")
    whole = comparing.compare_runs([place], tmp_path / "whole", ["random"])
    parts = comparing.compare_runs(
        [place / "seed-3", place / "seed-0"], tmp_path / "parts", ["random"]
    )
    assert whole == parts
    row: dict[str, Row] = {row.name: row for row in whole.tables[1].rows}
    counts = {}
    for name in ("dense", "pruned", "hsr"):
        counts[name] = sum(
            not (answer["refused"] or answer["degenerate"])
            for seed in (0, 3)
            for line in (
                place
                / f"seed-{seed}"
                / "evaluation"
                / ("dense" if name == "dense" else f"wanda-60/{name}")
                / "answers.jsonl"
            )
            .read_text()
            .splitlines()
            if (answer := json.loads(line))["harmful"]
        )
    asr = row["hsr"].asr
    assert asr is not None
    assert asr.value == pytest.approx(counts["hsr"] / 12)
    assert row["hsr"].rsr is not None
    assert row["hsr"].rsr.value == pytest.approx(
        (counts["pruned"] - counts["hsr"]) / (counts["pruned"] - counts["dense"])
    )
    assert len(row["random"].draws) == 2
    tables: tuple[Table, ...] = whole.tables
    assert [row.curves for row in tables[0].rows] == [()] * len(tables[0].rows)
    (curves,) = (row.curves for row in tables[1].rows if row.name == "hsr")
    assert curves == (searched([0, 2, 4], 4),) * 2
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        *("report.json", "report.md", "report.html", "trade-off.svg", "curves.svg"),
    }
    for figure in (tmp_path / "whole").glob("*.svg"):
        assert ElementTree.parse(figure).getroot().tag.endswith("svg")
        assert not re.search(r"var\(|currentColor", figure.read_text())
    content = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert content["against"] == ["random"]
    assert math.isclose(content["tables"][1]["rows"][2]["asr"]["value"], counts["hsr"] / 12)


def test_compare_on_the_command_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["analyse", "compare", world / "run", "--out", tmp_path / "out"]
    shown = ended([*words, "--against", "hsr", "random"], 0, capsys)
    assert "random (x2)" in shown
    assert "against random" in shown
    assert "report.html" in ended(["report", world / "run"], 0, capsys)


def ended(words: Sequence[object], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line printed."""
    assert exit_code(*words) == code
    return "".join(capsys.readouterr())


def refused(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    return ended(words, 2, capsys)


def test_bad_input_of_compare(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    seeds = [world / "run" / f"seed-{seed}" for seed in (0, 3)]
    assert "no run to compare" in refused(["analyse", "compare", "--out", out], capsys)
    message = refused(["analyse", "compare", world / "data", "--out", out], capsys)
    assert "holds no run" in message
    message = refused(["analyse", "compare", *seeds, "--out", out, "--against", "dense"], capsys)
    assert "against dense: there is no such method" in message
    other = tmp_path / "other"
    shutil.copytree(seeds[1], other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("samples: 4", "samples: 3"))
    message = refused(["analyse", "compare", seeds[0], other, "--out", out], capsys)
    assert "calibration.samples" in message
    curve = tmp_path / "study" / "seed-0" / "curves" / "wanda-60" / "hsr.json"
    synthetic(world, tmp_path / "study")
    curve.write_text('{"points": [{}]}')
    message = refused(["analyse", "compare", tmp_path / "study", "--out", out], capsys)
    assert "hsr.json holds no validation curve" in message
    assert not out.exists()


def test_a_study_is_bundled_with_its_comparison(world: Path, tmp_path: Path) -> None:
    write_bundle(world / "run", tmp_path / "study.zip")
    found = read_bundle(tmp_path / "study.zip")
    assert len(found.evaluations) == 2 * (1 + 2 * 4)
    assert "runs/seed-3/wanda-60/random-2" in found.evaluations
    page = (world / "run" / "report" / "report.md").read_text()
    assert found.page == page.replace(f"{world}/", ""), "paths of this machine are left out"


def test_bad_seeds_and_repeats() -> None:
    for content, named in (
        ({"seeds": [1, 1]}, "`seeds` must differ"),
        ({"seeds": [1], "calibration": {"seed": 2}}, "leave one of them out"),
        ({"realign": [{"repeats": 2}]}, "but nothing random"),
        (
            {
                "realign": [
                    {"name": "r", "method": "hsr", "heads": "random", "repeats": 2},
                    {"name": "r-2"},
                ]
            },
            "must differ",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            Recipe.model_validate(content)


def test_a_study_with_bad_input_writes_nothing(world: Path, tmp_path: Path) -> None:
    recipe = read_recipe(world / "recipe.yaml")
    settings = recipe.compute.model_copy(update={"device": "nonsense"})
    with pytest.raises(RegraftError):
        pipeline.run_recipe(recipe.model_copy(update={"compute": settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RegraftError, match="another recipe"):
        pipeline.run_recipe(recipe.model_copy(update={"title": "another"}), world / "run")
