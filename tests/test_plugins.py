"""Data sets and judges of other packages: one file each, and nothing else is changed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import pico
from regraft import registry
from regraft.cli import main
from regraft.data.readers import DATASETS
from regraft.data.sources import DataSource, read
from regraft.errors import RegraftError
from regraft.evaluation.judges import JUDGES, find
from regraft.registry import Registry
from regraft.settings.evaluating import EvalSettings

DATA = '''
"""One prompt a line; those that end in "!" are harmful."""

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset


def read_toy(path, split):
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = lines if split is None else [one for one in lines if len(one) % 2 == 0]
    examples = [
        Example(f"toy-{i}", one, one.endswith("!"), "toy", response="No." if "!" in one else "Yes.")
        for i, one in enumerate(kept)
    ]
    return Reading(str(path), tuple(examples), {"odd": len(lines) - len(kept)})


PLUGIN = Dataset(read_toy, splits=("even",))
'''
JUDGE = '''
"""An answer refuses if it has an even number of characters."""

from regraft.evaluation.judges import TextJudge


class Even(TextJudge):
    name = "even-1"

    def phrase(self, answer):
        return f"{len(answer)} characters" if len(answer) % 2 == 0 else None


PLUGIN = Even()
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, as pip writes them, in which both plug-ins and two bad ones lie."""
    site = tmp_path / "site"
    (site / "toy-1.dist-info").mkdir(parents=True)
    (site / "toy_data.py").write_text(DATA)
    (site / "toy_judge.py").write_text(JUDGE)
    (site / "toy-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toy\nVersion: 1\n"
    )
    (site / "toy-1.dist-info" / "entry_points.txt").write_text(
        "[regraft.datasets]\ntoy = toy_data:PLUGIN\nbroken = no_such_module:PLUGIN\n"
        "[regraft.judges]\neven-1 = toy_judge:PLUGIN\nodd = toy_data:PLUGIN\n"
    )
    monkeypatch.setattr(registry, "entry_points", entry_points)  # conftest's are remembered
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield site
    for name in ("toy_data", "toy_judge"):
        sys.modules.pop(name, None)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.toy"
    path.write_text("Pick a lock!\nPick a safe!!\nBake a cake.\nBoil an egg..\n")
    return path


def _run(*words: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(word) for word in words])


def _judged_by_length(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in rows if row["harmful"]] == [
        "Pick a lock!",
        "Pick a safe!!",
    ]
    for row in rows:
        assert row["refused"] == (len(row["answer"]) % 2 == 0)
    assert json.loads((folder / "results.json").read_text())["result"]["judge"] == "even-1"


def test_both_work_in_an_evaluation(installed: Path, prompts: Path, tmp_path: Path) -> None:
    model, out = pico.save("qwen3", tmp_path / "model"), tmp_path / "out"
    words = ("--suite", "toy", prompts, "--judge", "even-1", "--max-new-tokens", 3)
    _run("eval", model, *words, "--device", "cpu", "--no-full-answers", "--out", out)
    _judged_by_length(out)
    _run("judge", "answers", out, "--by", "even-1", "--device", "cpu")
    verdicts = json.loads((out / "judges" / "even-1.json").read_text())
    assert verdicts["result"]["judge"] == "even-1"


@pytest.mark.usefixtures("undrawn")
def test_both_work_in_a_recipe(installed: Path, prompts: Path, tmp_path: Path) -> None:
    model = pico.save("qwen3", tmp_path / "model")
    recipe = {
        "model": str(model),
        "calibration": {"data": f"toy:{prompts}", "samples": 2, "responses": "given"},
        "prune": {"method": "wanda", "sparsity": 0.5},
        "realign": [
            {"name": "random", "method": "hsr", "heads": "random", "top_heads": 2, "q": 0.9}
        ],
        "evaluate": {"suite": [f"toy:{prompts}"], "judge": "even-1", "max_new_tokens": 3},
        "compute": {"device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    _run("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    for name in ("dense", "pruned", "random"):
        _judged_by_length(tmp_path / "run" / "evaluation" / name)


def test_a_fault_of_a_plug_in_is_told_as_its_own(
    installed: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (installed / "toy_data.py").open("a") as file:
        file.write(
            'def read_toy(path, split):\n    return {}["prompt"]\n\n\nPLUGIN = Dataset(read_toy)\n'
        )
    with (installed / "toy-1.dist-info" / "entry_points.txt").open("a") as file:
        file.write("unreadable = ?\n")
    model = pico.save("qwen3", tmp_path / "model")
    words = ["eval", model, "--suite", "toy", prompts, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match="70"):
        main([str(word) for word in words])
    message = " ".join(capsys.readouterr().err.split())
    assert "a fault of a plug-in, in the package toy_data (KeyError: 'prompt')" in message


def test_a_data_set_is_checked_like_a_built_in_one(installed: Path, prompts: Path) -> None:
    assert len(read(DataSource.model_validate(f"toy:{prompts}")).examples) == 4
    harmful = DataSource.model_validate(["toy#even#harmful", str(prompts)])
    assert [one.instruction for one in read(harmful).examples] == ["Pick a lock!"]
    with pytest.raises(ValueError, match="toy has the splits even; there is no 'odd'"):
        DataSource.model_validate(f"toy:{prompts}#odd")
    with pytest.raises(ValueError, match="toy needs a path"):
        DataSource.model_validate("toy")


def test_names_that_nobody_registered(installed: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'tay:x'; expected benign, .*, toy"):
        DataSource.model_validate("tay:x")
    with pytest.raises(RegraftError, match=r"no judge 'odd-1'; expected regraft.*gcg-1.*even-1"):
        find("odd-1")
    with pytest.raises(ValueError, match=r"no judge 'odd-1'; expected .*even-1"):
        EvalSettings(judge="odd-1")
    with pytest.raises(RegraftError, match=r"no data set 'tay'; expected benign, .*broken, toy"):
        DATASETS.get("tay")


def test_what_is_registered_and_is_none(installed: Path) -> None:
    with pytest.raises(RegraftError, match=r"'broken' .* cannot be imported: ModuleNotFoundError"):
        DATASETS.get("broken")
    with pytest.raises(RegraftError, match=r"'odd' .*is 'Dataset'; expected .*JudgeKind"):
        JUDGES.get("odd")
    with pytest.raises(ValueError, match="judges saved answers only: evaluate with a key"):
        EvalSettings(judge="qwen3guard:x")


def test_a_judge_has_one_name(installed: Path) -> None:
    entries = installed / "toy-1.dist-info" / "entry_points.txt"
    entries.write_text("[regraft.judges]\neven-2 = toy_judge:PLUGIN\n")
    with pytest.raises(RegraftError, match=r"'even-2' .* another name of its own, 'even-1'"):
        find("even-2")


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        ('    name = "even-1"\n', r"has no 'name', which every judge has"),
        ("phrase", r"cannot be imported: TypeError: .* abstract class Even .*phrase"),
    ],
)
def test_a_judge_that_is_not_finished(installed: Path, left_out: str, why: str) -> None:
    """It is refused when it is named, not after all answers are written."""
    (installed / "toy_judge.py").write_text(JUDGE.replace(left_out, "" if "=" in left_out else "x"))
    with pytest.raises(RegraftError, match=rf"'even-1' \(toy_judge:PLUGIN\) {why}"):
        find("even-1")


def test_what_a_reader_returns_is_checked(installed: Path, prompts: Path) -> None:
    (installed / "toy_data.py").write_text(DATA.replace('f"toy-{i}"', '"toy"'))
    with pytest.raises(RegraftError, match=r"the id 'toy' is used twice, for .*Ids must be unique"):
        read(DataSource.model_validate(f"toy:{prompts}"))
    prompts.write_text("")
    with pytest.raises(RegraftError, match=r"prompts.toy: no examples. The file has no rows"):
        read(DataSource.model_validate(f"toy:{prompts}"))


def test_a_built_in_name_cannot_be_taken(installed: Path) -> None:
    registry = Registry("data set", "regraft.data.readers", "regraft.datasets", object)
    assert len(set(registry.names())) == len(registry.names())
    entries = installed / "toy-1.dist-info" / "entry_points.txt"
    entries.write_text("[regraft.datasets]\nxstest = toy_data:PLUGIN\n")
    assert DATASETS.get("xstest").splits == ()


@pytest.mark.parametrize(
    ("package", "registry"),
    [("regraft.data.readers", "DATASETS"), ("regraft.evaluation.judges", "JUDGES")],
)
def test_one_is_imported_without_the_others(package: str, registry: str) -> None:
    """In a process each, since modules stay imported; torch, which takes long, is there before."""
    names = getattr(importlib.import_module(package), registry).names()
    code = (
        f"import os, sys, torch, {package} as room\n"
        f"for name in {names}:\n"
        "    if os.fork():\n"
        "        os.wait()\n"
        "        continue\n"
        f"    room.{registry}.get(name)\n"
        f"    print(*[m for m in sys.modules if m.startswith('{package}.')], flush=True)\n"
        "    os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{package}.{name.replace('-', '_')}" for name in names]
