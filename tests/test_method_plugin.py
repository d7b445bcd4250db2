"""A restoration method from one file of another package works everywhere, as a built-in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import pico
from disk import write_data
from regraft.models.load import open_source
from regraft.patch.format import load_patch
from regraft.restoration.ranking import load_ranking
from truth import pruned_at_random

pytest.importorskip("optuna")
METHOD = '''
"""Restore the largest dense values in the top heads."""

from typing import ClassVar, Literal

from pydantic import Field
from regraft.restoration.base import Between, Budgeted, HeadChoice, Method, Needs
from regraft.restoration.ranking import Best
from regraft.restoration.selection import inside, regions_of


class Settings(Budgeted):
    """The largest |W| in the top heads."""

    method: Literal["top-magnitude"] = "top-magnitude"
    top_heads: int = Field(2, ge=1, description="How many heads.")


class TopMagnitude(Method[Settings]):
    name: ClassVar[str] = "top-magnitude"
    settings_type = Settings

    def needs(self, settings):
        return Needs(heads=HeadChoice("ships", settings.top_heads))

    def rank(self, settings, context):
        heads = context.heads.best("ships", settings.top_heads)
        regions = regions_of(context.dense, heads)
        best = Best(context.count)
        for one in context.matrices():
            chosen = one.free & inside(one.weight.shape, regions(one.linear), one.weight.device)
            best.add(one.index, one.weight.float().abs().masked_fill(~chosen, float("-inf")))
        return best.ranked(heads)

    def label(self, settings):
        return f"largest weights of {settings.top_heads} heads"

    def space(self, settings, dense, kept):
        return {"top_heads": Between(1, 4, whole=True)}


TOP_MAGNITUDE = TopMagnitude()
'''
COMMANDS = """
import json, sys
import quick
from regraft.cli import main

quick.hasten()
with quick.without_figures():
    for arguments in json.loads(sys.argv[1]):
        try:
            main(arguments)
        except SystemExit as end:
            assert not end.code, (arguments, end.code)
"""
ENDINGS = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from regraft.cli import main

found = []
for arguments in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()) as out, redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit as end:
            found.append((end.code or 0, out.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned pico model, data, and an installed package of one file."""
    root = tmp_path_factory.mktemp("plugin")
    dense = open_source(pico.save("qwen2_vl", root / "dense", torch.bfloat16))
    pruned_at_random(dense, root / "pruned", 0.5)
    write_data(root / "data", 4)
    (root / "site" / "other-1.0.dist-info").mkdir(parents=True)
    (root / "site" / "top_magnitude.py").write_text(METHOD)
    (root / "site" / "other-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n"
    )
    (root / "site" / "other-1.0.dist-info" / "entry_points.txt").write_text(
        "[regraft.methods]\ntop-magnitude = top_magnitude:TOP_MAGNITUDE\n"
    )
    return root


def recipe(root: Path) -> dict[str, object]:
    """Two seeds, a budget, a search, and HSR beside it."""
    data = str(root / "data" / "data.jsonl")
    ours = {"method": "top-magnitude", "count": 8, "checkpoint": False}
    return {
        "model": str(root / "dense"),
        "pruned": str(root / "pruned"),
        "seeds": [0, 1],
        "calibration": {"data": data, "samples": 4},
        "heads": {"r_max": 2},
        "realign": [
            {"name": "largest", **ours},
            {"name": "searched", **ours, "search": {"validation": data, "points": 2}},
            {"name": "hsr", "method": "hsr", "budget": 20, "top_heads": 2, "checkpoint": False},
        ],
        "against": ["hsr"],
        "evaluate": {"suite": data, "max_new_tokens": 2},
        "compute": {"device": "cpu"},
    }


@pytest.mark.slow
def test_it_realigns_runs_is_compared_and_tuned(world: Path) -> None:
    data = str(world / "data" / "data.jsonl")
    models = [str(world / "dense"), str(world / "pruned")]
    common = ["--data", data, "--samples", "4", "--r-max", "2", "--device", "cpu"]
    ours = ["top-magnitude", *models, "--count", "8"]
    search = ["--validation", data, "--max-new-tokens", "2"]
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe(world)))
    commands = [
        ["realign", *ours, "--top-heads", "3", *common, "--out", str(world / "patch")],
        ["run", str(world / "recipe.yaml"), "--out", str(world / "run")],
        ["tune", *ours, *common, *search, "--trials", "2", "--out", str(world / "tuned")],
    ]
    path = os.pathsep.join([str(world / "site"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    patch = load_patch(world / "patch")
    assert (patch.restored, len(patch.about["heads"])) == (8, 3)
    dense, ranking = open_source(world / "dense"), load_ranking(world / "patch.ranking.safetensors")
    linears = list(dense.architecture.linears)
    sizes = [
        float(dense.checkpoint.read(linears[i].tensor).flatten()[at].abs())
        for i, at in zip(ranking.linear.tolist(), ranking.position.tolist(), strict=True)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == pytest.approx(ranking.score.tolist())

    compared = (world / "run" / "report" / "report.json").read_text()
    rows = json.loads(compared)["tables"][0]["rows"]
    assert {"largest", "searched"} <= {one["name"] for one in rows}
    page = (world / "run" / "seed-0" / "report" / "report.md").read_text()
    assert "largest weights of 2 heads" in page
    tuned = json.loads((world / "tuned" / "tuned.json").read_text())
    assert [one["settings"].keys() for one in tuned["trials"]] == [{"top_heads", "r_max"}] * 2


def test_methods_that_cannot_be_used_say_why_and_leave_others_alone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "other-1.0.dist-info").mkdir(parents=True)
    needy = METHOD.replace("Field(2, ge=1", "Field(ge=1")
    (site / "needy.py").write_text(needy.replace("top-magnitude", "needy"))
    (site / "half.py").write_text(METHOD.replace('Literal["top-magnitude"]', 'Literal["half"]'))
    (site / "other-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n"
    )
    (site / "other-1.0.dist-info" / "entry_points.txt").write_text(
        "[regraft.methods]\nneedy = needy:TOP_MAGNITUDE\nmissing = nowhere:METHOD\n"
        "half = half:TOP_MAGNITUDE\ntop-magnitude = half:TOP_MAGNITUDE\n"
    )

    whys = {
        "needy": "needs settings with valid defaults: top_heads: Field required",
        "missing": "cannot be imported",
        "half": "has another name of its own, 'top-magnitude'",
        "top-magnitude": "needs settings with valid defaults: method: Input should be 'half'",
    }
    commands = [["realign", name, "dense", "pruned", "--out", "patch"] for name in whys]
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS, json.dumps([["realign", "hsr", "--help"], *commands])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    (code, shown), *refused = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and "--top-heads" in shown
    for (name, why), (code, words) in zip(whys.items(), refused, strict=True):
        shown = " ".join(words.split())
        assert code == 2 and f"'{name}'" in shown and why in shown and "Traceback" not in shown
