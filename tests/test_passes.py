"""Compute in passes: the unit against what torch counts, sums against arithmetic, the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import pico
from disk import write_data
from regraft import stages
from regraft.costs import CalibrationPass, Cost, read_pass
from regraft.data.example import KINDS, Example
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.models.load import load_model, load_processor, open_source
from regraft.recipes.recipe import Recipe
from regraft.report.formatting import passes as passes_text
from regraft.report.page import render_html, render_markdown
from regraft.report.pooling import study_of
from regraft.report.run import Run
from regraft.report.summary import PASSES_NOTE
from regraft.runs import pipeline
from regraft.runs.passes import MethodPasses, count_pass, has_passes
from regraft.runs.run_dir import RunDir
from regraft.settings.data import CalibrationSettings
from test_compare import RUNS
from test_report import REPORT, Outline

UNIT = CalibrationPass(prompts=8, tokens=100, flops=1000)


def by_hand(family: str, root: Path, examples: list[Example]) -> tuple[int, list[dict[str, Any]]]:
    """The tokens of prompts, each alone, and the model's inputs, without regraft's collating."""
    processor = load_processor(open_source(root / "dense"))
    inputs = []
    for one in examples:
        content: Any = one.instruction
        if family != "llama":
            content = [{"type": "text", "text": content}]
            if one.image is not None:
                content = [{"type": "image", "path": str(one.image)}, *content]
        inputs.append(
            dict(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            )
        )
    return sum(one["input_ids"].numel() for one in inputs), inputs


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_pass_is_what_torch_counts_in_the_decoder(family: str, tmp_path: Path) -> None:
    pico.save(family, tmp_path / "dense")
    write_data(tmp_path / "data", 4, images=family == "llava")
    dense, out = open_source(tmp_path / "dense"), tmp_path / "pass.json"
    data = DataSource(name="jsonl", path=tmp_path / "data" / "data.jsonl")
    setup = stages.Setup(dense, CalibrationSettings(data=data, samples=3))
    for _ in range(2):  # the second time it is there
        count_pass(setup, out)
    found = read_pass(out)
    assert found is not None and found.prompts == 6
    examples = [one for kind in KINDS for one in setup.drawn(kind).examples]
    tokens, inputs = by_hand(family, tmp_path, examples)
    assert found.tokens == tokens
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if "_proj" in name]  # noqa: SIM118
    if family == "llama":
        assert found.flops == 6 * tokens * sum(rows * columns for rows, columns in shapes)
        model = load_model(dense).requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            for one in inputs:
                model(**one).logits.sum().backward()
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        head = 6 * tokens * model.lm_head.weight.numel()
        assert found.flops == products - head
    else:
        assert found.flops == 6 * tokens * dense.architecture.prunable
    with pytest.raises(RegraftError, match="made with something else"):
        other = setup.calibration.model_copy(update={"samples": 2})
        count_pass(stages.Setup(dense, other), out)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    assert read_pass(tmp_path / "pass.json") is None
    (tmp_path / "pass.json").write_text(json.dumps({"prompts": 3}))
    with pytest.raises(RegraftError, match=r"pass\.json holds no calibration pass"):
        read_pass(tmp_path / "pass.json")


VALIDATION = "demo:validation"
RECIPE = Recipe.model_validate(
    {
        "prune": [{"name": "wanda"}, {"name": "snip", "method": "snip"}],
        "realign": [
            {"name": "gain", "method": "gain", "budget": 1},
            {"name": "gain-less", "method": "gain", "budget": 0.1},
            {"name": "swaps", "method": "gain", "budget": 1, "swap": True},
            {"name": "hsr", "method": "hsr"},
            {"name": "hsr-all", "method": "hsr", "heads": "all"},
            {"name": "hsr-a", "method": "hsr-a"},
            {"name": "by-snip", "method": "hsr", "score": "snip"},
            {"name": "set", "method": "set-difference"},
            {"name": "random", "method": "random"},
            {
                "name": "tuned",
                "method": "hsr",
                "budget": 2,
                "search": {"validation": VALIDATION},
            },
            {
                "name": "tuned-rsr",
                "method": "hsr",
                "budget": 2,
                "search": {"target_rsr": 90},
            },
            {"name": "tuned-set", "method": "set-difference", "search": {}},
            {"name": "trained", "method": "fine-tune", "positions": "gain", "count": 3},
            {"name": "drawn", "method": "fine-tune", "positions": "random", "count": 3},
            {"name": "elsewhere", "method": "fine-tune", "positions": "a/ranking", "count": 3},
        ],
    }
)
FLOPS: dict[tuple[str, str], float | None] = {
    ("prune", "wanda"): 7e9,
    ("evaluate", "wanda/hsr"): 7e9,
    ("answer", ""): 1_000,
    ("score heads", ""): 20_000,
    ("statistics for wanda", ""): 4_000,
    ("rank", "wanda/gain"): 12_000,  # the path of gain-less too
    ("rank", "snip/gain"): 13_000,
    ("rank", "wanda/set"): 0,
    ("evaluate for search", "wanda"): 6_000,
    ("search", "wanda/tuned"): 30_000,
    ("search", "wanda/tuned-rsr"): 500,  # what was not tried before
    ("search", "wanda/tuned-set"): 40_000,
    ("rank", "wanda/trained"): 9_000,
    ("rank", "wanda/drawn"): 8_000,
    ("defend", "wanda/direction"): 2_000,
}


def costs(flops: dict[tuple[str, str], float]) -> list[Cost]:
    return [Cost(stage, of, 1, spent, 1, "card") for (stage, of), spent in flops.items()]


def passes(name: str, flops: Any = FLOPS, pruning: int = 0, unit: Any = UNIT) -> float | None:
    variant = next(one for one in RECIPE.realign if one.name == name)
    place = RunDir(Path("run"), several=True)
    found = MethodPasses(RECIPE, place, costs(flops), unit)
    return found.of_variant(RECIPE.prune[pruning], variant)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("gain", 1 + 12),
        ("gain-less", 1 + 12),
        ("swaps", None),
        ("hsr", 20 + 4),
        ("hsr-all", 4),
        ("hsr-a", 20),
        ("by-snip", None),
        ("set", 4),
        ("random", 0),
        ("tuned", 20 + 4 + 6 + 30.5),
        ("tuned-rsr", 20 + 4 + 6 + 30.5),
        ("tuned-set", 4 + 6 + 40),
        ("trained", 1 + 12 + 9),
        ("drawn", 1 + 8),
        ("elsewhere", None),
    ],
)
def test_what_a_method_needs_is_added_up(name: str, taken: float | None) -> None:
    assert passes(name) == taken
    assert passes(name, unit=None) is None


def test_what_was_not_measured_is_not_guessed() -> None:
    assert passes("gain", pruning=1) == 1 + 13
    assert passes("tuned", pruning=1) is None, "searched, but no search was measured"
    assert passes("gain", FLOPS | {("rank", "wanda/gain"): 0}) is None, "only seen to be done"
    without = {key: value for key, value in FLOPS.items() if key[0] != "statistics for wanda"}
    assert passes("hsr", without) is None
    found = MethodPasses(RECIPE, RunDir(Path("run"), several=True), costs(FLOPS), UNIT)
    assert found.of_defence("wanda/direction", by_prompt=False) == 2
    assert found.of_defence("wanda/other", by_prompt=False) is None
    assert found.of_defence("wanda/prompt", by_prompt=True) == 0


def test_compute_is_shown_in_passes_where_these_are_of_one_size(pico_dir: Any) -> None:
    architecture = open_source(pico_dir("llama")).architecture
    assert has_passes(RECIPE, architecture)
    prunes = RECIPE.model_copy(update={"realign": tuple(v for v in RECIPE.realign if v.drawn)})
    assert has_passes(prunes, architecture), "fine-tuned at random positions"
    assert not has_passes(RECIPE.model_copy(update={"realign": ()}), architecture)
    mixture = open_source(pico_dir("qwen3_vl_moe")).architecture
    assert not has_passes(RECIPE, mixture), "a token runs through some experts only"


def test_of_two_sets_of_validation_prompts_none_is_guessed() -> None:
    tuned = [one for one in RECIPE.realign if one.search]
    assert tuned[2].search is not None
    fewer = tuned[2].search.model_copy(update={"validation_limit": 3})
    realign = (*tuned[:2], tuned[2].model_copy(update={"search": fewer}))
    recipe = RECIPE.model_copy(update={"realign": realign})
    place = RunDir(Path("run"), several=True)
    found = MethodPasses(recipe, place, costs(FLOPS), UNIT)
    assert [found.of_variant(recipe.prune[0], one) for one in realign] == [None] * 3


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (0.04, "< 0.1"), (12.34, "12.3"), (1240, "1,240.0")],
)
def test_passes_in_words(value: float | None, told: str) -> None:
    assert passes_text(value) == told


@pytest.mark.usefixtures("undrawn")
def test_a_run_counts_its_own_passes(tmp_path: Path) -> None:
    pico.save("llama", tmp_path / "dense")
    write_data(tmp_path / "data", 4, images=False)
    data = str(tmp_path / "data" / "data.jsonl")
    search = {"validation": data, "points": 1}
    content = {
        "model": str(tmp_path / "dense"),
        "calibration": {"data": data, "samples": 4},
        "prune": {"method": "magnitude", "sparsity": 0.5},
        "realign": [
            {"name": "gain", "method": "gain", "count": 20, "checkpoint": False},
            {"name": "gain-search", "method": "gain", "search": search, "checkpoint": False},
            {"name": "set", "method": "set-difference", "checkpoint": False},
            {"name": "random", "method": "random", "count": 20, "checkpoint": False},
        ],
        "evaluate": {"suite": data, "max_new_tokens": 2},
        "compute": {"device": "cpu", "batch_size": 4},
    }
    made = pipeline.run_one(Recipe.model_validate(content), tmp_path / "run").runs[0]
    spent = {
        (one["stage"], one["of"]): one["flops"]
        for one in json.loads((tmp_path / "run" / "costs.json").read_text())
    }
    tokens = json.loads((tmp_path / "run" / "calibration-pass.json").read_text())["tokens"]
    one = 6 * tokens * open_source(tmp_path / "dense").architecture.prunable
    ranked, searched = spent["rank", "gain"], spent["search", "gain-search"]
    references, answers = spent["evaluate for search", "pruned"], spent["answer", ""]
    found = {variant.name: variant.passes for variant in made.variants}
    assert min(ranked, searched, references, answers) > 0
    assert ("rank", "gain-search") not in spent, "the path is shared"
    assert found == {
        "dense": None,
        "pruned": None,
        "gain": pytest.approx((answers + ranked) / one),
        "gain-search": pytest.approx((answers + ranked + references + searched) / one),
        "set": pytest.approx(spent["statistics for wanda", ""] / one),
        "random": 0,
    }
    statistics = found["set"]
    assert statistics is not None and 1 / 3 < statistics < 1, "one forward pass, with responses"
    assert pipeline.run_one(Recipe.model_validate(content), tmp_path / "run").runs[0] == made


def test_reports_have_a_column_where_passes_were_measured() -> None:
    dense, pruned, realigned, random = REPORT.variants
    variants = (dense, pruned, replace(realigned, passes=12.34), replace(random, passes=0.0))
    report = replace(REPORT, variants=variants, one_pass=UNIT)
    page, text = (one(study_of([report])) for one in (render_html, render_markdown))
    outline = Outline(page)
    start = next(i for i, row in enumerate(outline.rows) if "Passes" in row)
    heading, *rows = outline.rows[start : start + 1 + len(variants)]
    place = heading.index("Passes")
    named = [row[place] for row in rows]
    assert [row[0].split()[0] for row in rows] == ["1", "2", "3", "4"]
    assert named == ["–", "–", "12.3", "0"]
    lines = text.splitlines()
    header = next(line for line in lines if " Passes |" in line).strip("|").split(" | ")
    after = next(i for i, line in enumerate(lines) if " Passes |" in line)
    row = next(line for line in lines[after:] if line.startswith("| 3. "))
    assert row.strip("| ").split(" | ")[[one.strip() for one in header].index("Passes")] == "12.3"
    for shown in (" ".join(page.split()), text):
        assert "Here one pass is over 8 prompts, 100 tokens." in shown.replace("\xa0", " ")
    bare = study_of([replace(REPORT, one_pass=UNIT)])
    for render in (render_html, render_markdown):
        assert "Passes" not in render(bare)


def test_comparisons_have_a_column_of_passes_over_the_seeds() -> None:
    def taking(run: Run) -> Run:
        taken = {"hsr": 12.0 + run.seed, "random-1": 0.0, "random-2": 0.0}
        taken |= {} if run.seed == 1 else {"worse": 3.0}
        variants = tuple(replace(v, passes=taken.get(v.name)) for v in run.variants)
        return replace(run, variants=variants)

    study = study_of([taking(run) for run in RUNS])
    text, page = render_markdown(study), render_html(study)
    header = next(line for line in text.splitlines() if " Passes |" in line).strip("|").split(" | ")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    place = [one.strip() for one in header].index("Passes")
    told = {row[0].split(", ")[0]: row[place].strip() for row in rows if len(row) == len(header)}
    assert told[" 3. hsr"] == "13.0, 12.0 to 14.0" and told[" 4. random (x2)"] == "0"
    assert told[" 5. worse"] == "–", "one seed was not measured"
    assert "12.0 to 14.0" in page and PASSES_NOTE in text
    bare = study_of(RUNS)
    assert "Passes" not in render_markdown(bare) + render_html(bare)
