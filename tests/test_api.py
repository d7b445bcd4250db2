"""The Python API does what the command line does, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pico
import regraft
from disk import write_data
from regraft.cli import main
from regraft.disk.files import read_json
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.restoration.ranking import load_ranking
from truth import pruned_at_random

QUICK = {"device": "cpu", "samples": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense pico model, and data."""
    root = tmp_path_factory.mktemp("api")
    pico.save("qwen2_vl", root / "dense", torch.bfloat16)
    write_data(root / "data", 4)
    return root


def test_it_is_what_the_command_line_makes(root: Path, tmp_path: Path) -> None:
    data = str(root / "data" / "data.jsonl")
    pruned = regraft.prune(root / "dense", tmp_path / "pruned", sparsity=0.5, data=data, **QUICK)
    flags = ["--data", data, "--samples", "4", "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        main(["prune", str(root / "dense"), "--sparsity", "0.5", *flags, "-o", str(tmp_path / "b")])
    linears = list(pruned.architecture.linears)
    other = open_source(tmp_path / "b")
    for linear in linears:
        assert pruned.checkpoint.read(linear.tensor).equal(other.checkpoint.read(linear.tensor))

    scores = regraft.score_heads(root / "dense", tmp_path / "heads", r_max=2, data=data, **QUICK)
    assert scores.ships.shape == scores.kl.shape
    patch = regraft.realign(
        str(root / "dense"),
        pruned,
        tmp_path / "hsr",
        method="hsr",
        count=9,
        top_heads=2,
        heads_file=tmp_path / "heads",
        data=data,
        **QUICK,
    )
    assert patch.restored == 9
    assert len(load_ranking(tmp_path / "hsr.ranking.safetensors")) == 9
    regraft.apply(pruned.folder, tmp_path / "hsr", tmp_path / "realigned")
    regraft.revert(tmp_path / "realigned", [tmp_path / "hsr"], tmp_path / "again")
    again = open_source(tmp_path / "again")
    for linear in linears:
        assert pruned.checkpoint.read(linear.tensor).equal(again.checkpoint.read(linear.tensor))

    suite, given = [data], {"device": "cpu", "max_new_tokens": 2}
    in_memory = regraft.evaluate(pruned, suite, tmp_path / "e", patch=tmp_path / "hsr", **given)
    on_disk = regraft.evaluate(tmp_path / "realigned", data, tmp_path / "f", **given)
    assert in_memory.asr == on_disk.asr
    assert in_memory.utility == on_disk.utility


def test_a_search_without_prompts_holds_a_quarter_out(root: Path, tmp_path: Path) -> None:
    pruned_at_random(open_source(root / "dense"), tmp_path / "pruned", 0.5)
    write_data(tmp_path / "data", 16)
    data = tmp_path / "data" / "data.jsonl"
    given = {"data": str(data), "device": "cpu", "samples": 4, "budget": 20}
    models = root / "dense", tmp_path / "pruned"
    regraft.realign(*models, tmp_path / "a", method="random", search={"points": 2}, **given)
    chosen_on = read_json(tmp_path / "a.curve.json")["about"]["data"]["validation"]
    assert 0 < chosen_on["used"] <= 32 // 4
    assert chosen_on["used"] + chosen_on["skipped"]["not held-out"] == 32


def test_bad_settings_are_named(root: Path, tmp_path: Path) -> None:
    dense = root / "dense"
    with pytest.raises(RegraftError, match="no setting 'sparsty' here"):
        regraft.prune(dense, tmp_path / "x", sparsty=0.5)
    with pytest.raises(RegraftError, match="sparsity"):
        regraft.prune(dense, tmp_path / "x", sparsity=50)
    with pytest.raises(RegraftError, match=r"restoration method 'gian'; expected .*gain"):
        regraft.realign(dense, dense, tmp_path / "x", method="gian")
    with pytest.raises(RegraftError, match="no setting 'top_heads' here"):
        regraft.realign(dense, dense, tmp_path / "x", top_heads=3)
    with pytest.raises(AttributeError, match="no attribute 'graft'"):
        regraft.graft  # noqa: B018
    assert not [*tmp_path.iterdir()]


def test_naming_the_package_imports_nothing_heavy() -> None:
    code = "import sys, regraft; assert not {'torch', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_and_documented() -> None:
    for name in regraft.__all__:
        assert getattr(regraft, name).__doc__
