"""The stage of sparse fine-tuning: positions, minibatches, resuming, its patch and its report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import pico
import truth
from disk import differing, write_data
from methods import method
from regraft import stages
from regraft.data.sources import DataSource
from regraft.disk.files import file_digest
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.patch.format import Patch, load_patch
from regraft.recipes.recipe import Recipe
from regraft.restoration.methods import fine_tune as fine_tuning
from regraft.restoration.methods.fine_tune import is_trained
from regraft.restoration.ranking import Ranking, load_ranking, save_ranking
from regraft.runs import pipeline
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.restoring import patch_steps
from regraft.stages.steps import plan_steps

COMPUTE = ComputeSettings(device="cpu", batch_size=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine-tuning")
    dense = open_source(pico.save("qwen2_vl", folder / "dense", torch.bfloat16, "100KB"))
    truth.pruned_at_random(dense, folder / "pruned", 0.5)
    write_data(folder / "data", 5)
    return folder


def calibration(root: Path) -> CalibrationSettings:
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    return CalibrationSettings(data=data, samples=5)


def tuned(root: Path, out: Path, ranking: Path | None = None, **settings: Any) -> Patch:
    dense, pruned = open_source(root / "dense"), open_source(root / "pruned")
    given = {"passes": 2, "learning_rate": 0.02, "count": 60} | settings
    how, there = method("fine-tune", **given), out.with_name(f"{out.name}.ranking")
    inputs = stages.Inputs(positions=ranking)
    stages.write_ranking(
        stages.Setup(dense, calibration(root), COMPUTE), pruned, there, how, inputs
    )
    return stages.write_patch(dense, pruned, out, how, there)


def ranked(root: Path, out: Path, count: int = 60) -> Ranking:
    dense, pruned = open_source(root / "dense"), open_source(root / "pruned")
    settings = method(method="random", count=count)
    return stages.write_ranking(
        stages.Setup(dense, calibration(root), COMPUTE), pruned, out, settings
    )


def places(patch: Patch) -> set[tuple[str, int]]:
    return {(name, at) for name, one in patch.tensors.items() for at in one.positions.tolist()}


def test_random_positions_are_those_that_random_restores(root: Path, tmp_path: Path) -> None:
    patch, ranking = tuned(root, tmp_path / "patch"), ranked(root, tmp_path / "ranking")
    linears = list(open_source(root / "dense").architecture.linears)
    at = zip(ranking.linear.tolist(), ranking.position.tolist(), strict=True)
    assert places(patch) == {(linears[i].tensor, position) for i, position in at}
    dense = open_source(root / "dense").checkpoint
    for name, one in patch.tensors.items():
        there = dense.read(name).flatten()[one.positions]
        assert (one.values != there).float().mean() > 0.9, "these are the dense values"
        assert (one.before == 0).all() and one.values.dtype == torch.bfloat16
    losses = [step["loss"] for step in load_patch(tmp_path / "patch").about["passes"]]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert is_trained(patch) and patch.restored == 60


def test_it_is_put_on_and_taken_off_to_the_byte(root: Path, tmp_path: Path) -> None:
    patch = tuned(root, tmp_path / "patch")
    stages.patch_checkpoint("apply", root / "pruned", tmp_path / "patch", tmp_path / "on")
    stages.patch_checkpoint("revert", tmp_path / "on", tmp_path / "patch", tmp_path / "off")
    pruned, on, off = (
        open_source(folder).checkpoint
        for folder in (root / "pruned", tmp_path / "on", tmp_path / "off")
    )
    assert differing(pruned, on) == set(patch.tensors)
    assert not differing(pruned, off)


def test_the_first_of_a_ranking(root: Path, tmp_path: Path) -> None:
    ranking = ranked(root, tmp_path / "ranking", 80)
    linears = list(open_source(root / "dense").architecture.linears)
    for count in (30, None):
        name, first = f"patch-{count}", ranking.first(count or 80)
        patch = tuned(root, tmp_path / name, tmp_path / "ranking", count=count, positions="ranking")
        assert places(patch) == {
            (linears[i].tensor, at)
            for i, at in zip(first.linear.tolist(), first.position.tolist(), strict=True)
        }


def test_killed_after_a_pass_it_ends_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(root, tmp_path / "whole", passes=3)
    train, calls = fine_tuning.train, []

    def twice(*arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(fine_tuning, "train", twice)
    with pytest.raises(KeyboardInterrupt):
        tuned(root, tmp_path / "patch", passes=3)
    assert not (tmp_path / "patch").exists()
    tuned(root, tmp_path / "patch", passes=3)
    assert len(calls) == 4, "one pass is left"
    assert file_digest(tmp_path / "patch") == file_digest(tmp_path / "whole")


def test_minibatches_have_both_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fine_tuning, "MINIBATCH", 2)
    harmful, harmless = (
        pico.write_examples(tmp_path, n, harmful=kind, images=False)
        for n, kind in ((5, True), (3, False))
    )
    cut = fine_tuning.minibatches((harmful, harmless), COMPUTE)
    assert [[len(chunk) for chunk in one] for one in cut] == [[2, 1], [2, 1], [1, 1]]
    for i, examples in enumerate((harmful, harmless)):
        assert sorted(e.id for one in cut for e in one[i]) == sorted(e.id for e in examples)
    assert len(fine_tuning.minibatches((harmful, harmless[:1]), COMPUTE)) == 1


def test_rankings_that_cannot_be_trained_at(root: Path, tmp_path: Path) -> None:
    ranking = ranked(root, tmp_path / "ranking", 20)
    with pytest.raises(RegraftError, match=r"ranking has 20 weights, and 60 are to be trained"):
        tuned(root, tmp_path / "patch", tmp_path / "ranking", positions="ranking")
    swaps = Ranking(
        ranking.linear, ranking.position, ranking.position + 1, ranking.score, ranking.about
    )
    save_ranking(tmp_path / "swaps", swaps)
    with pytest.raises(RegraftError, match=r"swaps.*--swap"):
        tuned(root, tmp_path / "patch", tmp_path / "swaps", positions="swaps", count=10)
    dense = open_source(root / "dense")
    truth.pruned_at_random(dense, tmp_path / "other", 0.3)
    with pytest.raises(RegraftError, match="another pruned checkpoint than"):
        stages.write_ranking(
            stages.Setup(dense, calibration(root), COMPUTE),
            open_source(tmp_path / "other"),
            tmp_path / "patch.ranking",
            method("fine-tune", positions="ranking"),
            stages.Inputs(positions=tmp_path / "ranking"),
        )
    assert not list(tmp_path.glob("patch*"))


def test_positions_are_checked_with_the_plan(root: Path, tmp_path: Path) -> None:
    """Before anything is pruned, answered or evaluated."""
    ranking = ranked(root, tmp_path / "ranking", 20)
    swaps = replace(ranking, removed=ranking.position + 1)
    other = {**ranking.about, "inputs": {"dense": "another", "pruned": "one"}}
    for found, message in ((swaps, "swaps"), (replace(ranking, about=other), "another dense")):
        save_ranking(tmp_path / "given", found)
        settings = method("fine-tune", positions=str(tmp_path / "given"))
        setup = stages.Setup(open_source(root / "dense"), calibration(root), COMPUTE)
        paths = stages.ArtifactPaths.beside(tmp_path / "patch")
        steps = patch_steps(setup, pytest.fail, settings, paths)
        with pytest.raises(RegraftError, match=message):
            plan_steps(setup, steps)


def test_values_beyond_the_dtype_are_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match=r"overflow|diverged"):
        tuned(root, tmp_path / "patch", learning_rate=1e38)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"method": "fine-tune", "positions": "f", "draw_seed": 3}, "draw_seed"),
        ({"method": "fine-tune", "score": "snip"}, "score"),
        ({"method": "fine-tune", "top_heads": 3}, "top_heads"),
        ({"method": "gain", "learning_rate": 0.1}, "learning_rate"),
        ({"method": "random", "passes": 9}, "passes"),
        ({"method": "hsr", "positions": "f"}, "positions"),
    ],
)
def test_what_is_not_read_is_refused(settings: dict[str, Any], unread: str) -> None:
    with pytest.raises(ValidationError, match=unread):
        method(**settings)


def test_random_positions_are_drawn() -> None:
    assert method("fine-tune", draw_seed=3).drawn
    assert method("fine-tune", draw_seed=3).reseeded(2).draw_seed == 5
    assert not method("fine-tune", positions="f").drawn


def variants(*realign: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"model": "demo", "realign": realign})


@pytest.mark.parametrize(
    ("realign", "message"),
    [
        ([{"method": "fine-tune", "positions": "hsr", "count": 3}, {"method": "hsr", "count": 9}],
         "must come before it"),
        ([{"method": "hsr"}, {"method": "fine-tune", "positions": "hsr", "count": 3}],
         "have a budget or a count"),
        ([{"method": "gain", "swap": True}, {"method": "fine-tune", "positions": "gain"}],
         "no swaps"),
        ([{"method": "fine-tune", "count": 3, "search": {}}], "no number of weights to search"),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense(realign: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants(*realign)


def test_a_random_control_is_no_name_of_positions() -> None:
    recipe = variants({"method": "random", "count": 3}, {"method": "fine-tune", "count": 3})
    assert recipe.source_of_positions(recipe.realign[1]) is None
    named = variants({"method": "gain"}, {"method": "fine-tune", "positions": "gain"})
    assert named.source_of_positions(named.realign[1]) == named.realign[0]


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Iterator[Path]:
    data = {"name": "jsonl", "path": str(root / "data" / "data.jsonl")}
    recipe = Recipe.model_validate(
        {
            "model": str(root / "dense"),
            "calibration": {"data": data, "samples": 4},
            "prune": {"sparsity": 0.5},
            "realign": [
                {"name": "drawn", "method": "random", "count": 40, "checkpoint": False},
                {
                    "name": "there",
                    "method": "fine-tune",
                    "positions": "drawn",
                    "count": 30,
                    "learning_rate": 0.02,
                },
                {"name": "anywhere", "method": "fine-tune", "count": 40, "checkpoint": False},
            ],
            "evaluate": {"suite": [data], "max_new_tokens": 3},
            "compute": {"device": "cpu", "batch_size": 2},
        }
    )
    pipeline.run_one(recipe, tmp_path / "run")
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run")


@pytest.mark.usefixtures("undrawn")
def test_a_run_says_that_values_are_trained(run: Path) -> None:
    read = pipeline.report_recipe(run).runs[0]
    labels = {one.name: one for one in read.variants}
    assert labels["there"].label == "there (fine-tuned, positions of drawn: trained values)"
    assert labels["anywhere"].label == "anywhere (fine-tuned, random positions: trained values)"
    assert [one.name for one in read.variants if one.trained] == ["there", "anywhere"]
    assert len(read.notes) == 2 and all("not the dense model's" in note for note in read.notes)
    text = (run / "report" / "report.md").read_text()
    assert "the values are trained, not the dense model's" in text
    patch = load_patch(run / "patches" / "there.safetensors")
    ranking = load_ranking(next((run / "rankings").glob("random-*")))
    assert patch.restored == 30 and patch.about["inputs"]["ranking"]
    assert sorted(at for _, at in places(patch)) == sorted(ranking.first(30).position.tolist())
