"""Sweeps, rank correlation, overlap: by hand, by brute force, and through the commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from commands import exit_code
from disk import write_data
from regraft import stages
from regraft.analysis.overlap import by_chance, overlaps, write_overlap
from regraft.analysis.relation import ModelPoint, correlate, spearman
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.heads.score import load_heads
from regraft.models.load import open_source
from regraft.progress import Progress
from regraft.pruning.statistics import load_statistics
from regraft.recipes.file import read_recipe
from regraft.recipes.recipe import Recipe
from regraft.report.summary import correlation_text
from regraft.runs.run_dir import RunDir
from regraft.runs.sweep import swept
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings


def test_rho_of_the_six_models_whose_squared_differences_sum_to_4() -> None:
    rho, p = spearman([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 5, 6])
    assert rho is not None
    assert round(rho, 4) == 0.8857
    assert p == pytest.approx(24 / 720)  # orders as extreme, either way


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=6))
def test_rho_and_p_by_brute_force(pairs: list[tuple[int, int]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    rho, p = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert (rho, p) == (None, None)
        return
    assert rho is not None
    assert rho == pytest.approx(float(spearmanr(x, y).statistic))
    all_rho = [float(spearmanr(x, list(order)).statistic) for order in permutations(y)]
    extreme = sum(abs(one) >= abs(rho) - 1e-9 for one in all_rho)
    assert p == pytest.approx(extreme / math.factorial(len(y)))


def test_rho_of_many_models_by_students_t() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    found, wanted = spearman(x.tolist(), y.tolist()), spearmanr(x, y)
    assert found == (pytest.approx(wanted.statistic), pytest.approx(wanted.pvalue))
    assert spearman(x.tolist(), x.tolist()) == (pytest.approx(1), 0)


def test_several_prunings_of_a_model_have_no_p_value() -> None:
    """They share its Ships: three models cannot get below 1 / 3, six points of them would."""
    rises = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    several = [ModelPoint(f"{i}", f"model {i // 2}", i // 2, r) for i, r in enumerate(rises)]
    found = correlate(several)
    assert found.rho is not None and found.rho > 0.9
    assert found.p is None
    alone = correlate([replace(one, model=one.name) for one in several])
    assert alone.rho == found.rho
    assert alone.p is not None


def test_p_of_many_models_is_not_called_exact() -> None:
    many = [ModelPoint(f"{i}", f"{i}", i, rise) for i, rise in enumerate([*range(1, 12), 0])]
    text = correlation_text(correlate(many))
    assert "(p = 0.071, n = 12)" in text, "by Student's t"


def test_rho_needs_three_pairs() -> None:
    with pytest.raises(ValueError, match="3 pairs or more"):
        spearman([1, 2], [1, 2])


@pytest.fixture(scope="module")
def gathered(pico_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("gathered")
    dense, data = open_source(pico_dir("llava")), write_data(root / "data", 4)
    calibration = CalibrationSettings(data=DataSource.model_validate(str(data)), samples=2)
    compute = ComputeSettings(device="cpu", batch_size=2)
    stages.write_statistics(
        stages.Setup(dense, calibration, compute), root / "statistics.safetensors"
    )
    return dense, root / "statistics.safetensors"


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_overlap_by_brute_force(gathered: Any, share: float) -> None:
    dense, file = gathered
    statistics = load_statistics(file)
    found = list(overlaps(dense, statistics, share))
    assert [one.layer for one in found] == [layer.index for layer in dense.architecture.layers]
    for one, layer in zip(found, dense.architecture.layers, strict=True):
        shared = either = 0
        for linear in layer.linears:
            weight = dense.checkpoint.read(linear.tensor).float().abs()
            sets = []
            for statistic in (statistics.safety, statistics.utility):
                score = (weight * statistic.values[linear.key].sqrt()).flatten()
                left_out = math.floor(round((1 - share) * score.numel(), 6))
                sets.append(set(torch.argsort(score, stable=True)[left_out:].tolist()))
            shared += len(sets[0] & sets[1])
            either += len(sets[0] | sets[1])
        assert (one.shared, one.either) == (shared, either)
    if share == 1:
        assert {one.jaccard for one in found} == {1.0} == {by_chance(1)}


def test_overlap_is_written(gathered: Any, tmp_path: Path) -> None:
    dense, file = gathered
    write_overlap(dense, file, (0.2, 0.1), "row", tmp_path / "out", Progress())
    content = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert [one["share"] for one in content["shares"]] == [0.1, 0.2]
    assert content["shares"][0]["by_chance"] == pytest.approx(0.1 / 1.9)
    ElementTree.fromstring((tmp_path / "out" / "overlap.svg").read_text())


@pytest.mark.parametrize("shares", [(), (0.0,), (1.5,)])
def test_overlap_of_impossible_shares(gathered: Any, tmp_path: Path, shares: Any) -> None:
    with pytest.raises(RegraftError, match="Shares must be above 0"):
        write_overlap(*gathered, shares, "row", tmp_path / "out", Progress())
    assert not (tmp_path / "out").exists()


def test_overlap_with_another_models_statistics(
    gathered: Any, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RegraftError, match="made from another model"):
        other = open_source(pico_dir("qwen2_vl"))
        write_overlap(other, gathered[1], (0.1,), "row", tmp_path / "out", Progress())


# Sweeps


def test_a_swept_recipe() -> None:
    ways = [{"name": "a", "method": "hsr", "q": 0.3}, {"name": "b", "method": "hsr", "q": 0.5}]
    recipe = Recipe.model_validate({"prune": {"n_m": "2:4"}, "realign": ways})
    counted = Recipe.model_validate({"realign": {"method": "random", "count": 9}})
    by_budget = swept(counted, "budget", [1, 2]).realign
    assert [(one.budget, one.count) for one in by_budget] == [(1, None), (2, None)]
    of_q = swept(recipe, "q", [0.1, 0.25])
    assert [(one.name, one.q, one.checkpoint) for one in of_q.realign] == [
        ("q-0.1", 0.1, False),
        ("q-0.25", 0.25, False),
    ]
    assert of_q.prune == recipe.prune
    sparse = swept(recipe, "sparsity", [0.3, 0.6])
    assert [(p.name, p.sparsity, p.n_m) for p in sparse.prune] == [
        ("sparsity-0.3", 0.3, None),
        ("sparsity-0.6", 0.6, None),
    ]
    assert sparse.realign == ()
    with pytest.raises(RegraftError, match=r"one calibration seed: .*calibration\.seed"):
        swept(Recipe.model_validate({**HSR, "seeds": [0, 1]}), "q", [0.1])
    heads = swept(recipe, "top-heads", [1, 8])
    assert [one.top_heads for one in heads.realign] == [1, 8]
    shares = swept(recipe, "p-max", [0.7, 0.8])
    assert [(one.p_max, one.q) for one in shares.realign] == [(0.7, 0.3), (0.8, 0.3)]


HSR = {"realign": [{"method": "hsr"}]}


@pytest.mark.parametrize(
    ("content", "setting", "values", "message"),
    [
        ({}, "q", [], "needs values that differ"),
        ({}, "q", [0.1, 0.1], "needs values that differ"),
        (HSR, "top-heads", [1.5], "valid integer"),
        ({"realign": []}, "q", [0.1], "there is no q to vary"),
        ({"realign": [{"method": "gain", "budget": 2}]}, "q", [0.1], "q is no setting of 'gain'"),
        ({"realign": [{"method": "hsr", "budget": 2}]}, "q", [0.1], "takes the place of `q`"),
        (
            {"realign": [{"method": "hsr", "heads": "all"}]},
            "top-heads",
            [1],
            "has no effect when",
        ),
        (
            {"realign": [{"method": "set-difference"}]},
            "q",
            [0.1],
            r"another variant first, or sweep",
        ),
        (HSR, "method", [1], "method is no setting"),
        (HSR, "checkpoint", [1], "checkpoint is no setting"),
        ({"pruned": "x"}, "sparsity", [0.1], "its sparsity is fixed"),
        ({"models": ["a/b"]}, "sparsity", [0.1], "A sweep takes one model"),
        (HSR, "q", [2.0], "less than or equal to 1"),
    ],
)
def test_impossible_sweeps(content: Any, setting: Any, values: Any, message: str) -> None:
    with pytest.raises((RegraftError, ValueError), match=message):
        swept(Recipe.model_validate(content), setting, values)


@pytest.fixture(scope="module")
def recipe_file(pico_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    write_data(root / "data", 4)
    content = {
        "title": "pico",
        "model": str(pico_dir("llava")),
        "calibration": {"data": str(next((root / "data").glob("*.jsonl"))), "samples": 2},
        "prune": {"sparsity": 0.5},
        "heads": {"r_max": 1},
        "realign": [{"method": "hsr", "top_heads": 2, "q": 0.5}],
        "evaluate": {"suite": str(next((root / "data").glob("*.jsonl"))), "max_new_tokens": 2},
        "compute": {"device": "cpu", "batch_size": 4},
    }
    path = root / "recipe.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def _run(*words: object, code: int = 0) -> None:
    assert exit_code(*words) == code


def test_sweep_and_relate_commands(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_q = tmp_path / "q"
    _run("analyse", "sweep", recipe_file, "q", "--values", 0.9, 0.2, "--out", by_q)
    content = json.loads((by_q / "sweep.json").read_text())
    assert [one["value"] for one in content["points"]] == [0.2, 0.9]
    assert content["points"][0]["restored"] < content["points"][1]["restored"]
    assert set(content["references"]) == {"dense", "pruned"}
    ElementTree.fromstring((by_q / "sweep.svg").read_text())
    for i, sparsity in enumerate((0.3, 0.5, 0.7)):
        out = tmp_path / f"run-{i}"
        recipe = read_recipe(recipe_file)
        prune = {**recipe.prune[0].model_dump(), "sparsity": sparsity}
        path = tmp_path / f"{i}.yaml"
        path.write_text(json.dumps(recipe.model_dump(mode="json") | {"prune": [prune]}))
        _run("run", path, "--out", out)
    capsys.readouterr()
    runs = [tmp_path / f"run-{i}" for i in range(3)]
    _run("analyse", "relate", *runs, "--out", tmp_path / "relation")
    relation = json.loads((tmp_path / "relation" / "relation.json").read_text())
    assert len({one["ships"] for one in relation["points"]}) == 1  # one dense model
    assert relation["spearman"] is None
    assert relation["note"] is None
    assert {one["estimated"] for one in relation["points"]} == {0}
    assert "is undefined" in capsys.readouterr().out
    ElementTree.fromstring((tmp_path / "relation" / "relation.svg").read_text())
    _run("analyse", "relate", runs[0], "--out", tmp_path / "other", code=2)
    assert "3 pruned models or more" in capsys.readouterr().err
    _run("analyse", "relate", by_q / "evaluation", "--out", tmp_path / "other", code=2)
    assert not (tmp_path / "other").exists()


def test_totals_of_screened_heads_are_told_to_be_estimates(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(recipe_file)
    prune = [
        {**recipe.prune[0].model_dump(), "name": f"p{i}", "sparsity": (3 + i) / 10}
        for i in range(3)
    ]
    heads = {**recipe.heads.model_dump(), "mode": "screened", "candidates": 2}
    path = tmp_path / "screened.yaml"
    content = recipe.model_dump(mode="json") | {"prune": prune, "heads": heads}
    path.write_text(json.dumps(content))
    _run("run", path, "--out", tmp_path / "run")
    capsys.readouterr()
    _run("analyse", "relate", tmp_path / "run", "--out", tmp_path / "relation")
    dense = open_source(recipe.model)
    scores = load_heads(RunDir(tmp_path / "run").heads, dense.architecture)
    assert scores.exact is not None
    exact, every = int(scores.exact.sum()), scores.exact.numel()
    assert 0 < exact < every
    relation = json.loads((tmp_path / "relation" / "relation.json").read_text())
    told = [(one["estimated"], one["heads"]) for one in relation["points"]]
    assert told == [(every - exact, every)] * 3
    note = f"Ships are estimates for {every - exact} of {every} heads of "
    assert note in relation["note"]
    assert note in capsys.readouterr().out


def test_sparsity_sweep(recipe_file: Path, tmp_path: Path) -> None:
    _run("analyse", "sweep", recipe_file, "sparsity", "--values", 0.2, 0.8, "--out", tmp_path / "s")
    content = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [one["value"] for one in content["points"]] == [0.2, 0.8]
    assert set(content["references"]) == {"dense"}
