"""A pruner of another package: one file, and nothing else is changed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
import truth
from disk import write_data
from regraft import registry
from regraft.cli import main
from regraft.data.collate import batches, response_batch
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.patch.format import load_patch
from regraft.pruning.base import PRUNERS, prune_settings
from regraft.pruning.masks import Pattern
from regraft.recipes.file import read_recipe
from regraft.runs.run_dir import RunDir

TOY = '''
"""|W_ij| times the sum of |x_j|; the first rows of every matrix stay dense."""

from typing import Literal

from pydantic import Field
from regraft.pruning.base import InputPruner, LayerwiseSettings


class ToySettings(LayerwiseSettings):
    method: Literal["toy"] = "toy"
    dense_rows: int = Field(1, ge=0, description="Rows that stay dense.")

    @property
    def kinds(self):
        return ("utility",)


class Toy(InputPruner):
    """|W| times the sum of the sizes of its inputs."""

    name, label, settings_type = "toy", "Toy", ToySettings

    def accumulate(self, inputs):
        return inputs.float().abs().sum(dim=0)

    def score(self, weight, statistic):
        return weight.float().abs() * statistic

    def prune(self, weights, found, patterns, settings, note=lambda _: None):
        for linear, pruned in super().prune(weights, found, patterns, settings, note):
            pruned.mask[: settings.dense_rows] = False
            yield linear, pruned


PLUGIN = Toy()
'''
COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
import quick
from regraft.cli import main

quick.hasten()
done = []
for words in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages as pip writes it, with the toy and a pruner that cannot be imported."""
    site = tmp_path / "site"
    about = site / "toy_pruner-1.dist-info"
    about.mkdir(parents=True)
    (site / "toy_pruner.py").write_text(TOY)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-pruner\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[regraft.pruners]\ntoy = toy_pruner:PLUGIN\nbroken = no_such_module:PLUGIN\n"
    )
    monkeypatch.setattr(registry, "entry_points", entry_points)  # conftest's are remembered
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield site
    sys.modules.pop("toy_pruner", None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    pico.save("llama", tmp_path / "model", torch.bfloat16)
    write_data(tmp_path / "data", 4, images=False)
    return tmp_path / "model"


def _cli(site: Path, commands: Sequence[Sequence[object]]) -> list[tuple[int, str, str]]:
    """Commands in a new process, which has never seen another set of packages.

    Returns:
        (exit code, what went to stdout, to stderr) of each.
    """
    paths = os.pathsep.join([str(site), *filter(None, sys.path)])
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        check=True,
    )
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def _zeros(folder: Path) -> list[tuple[int, int, int]]:
    """(zeros in the first two rows, zeros, weights) of every prunable matrix."""
    source = open_source(folder)
    weights = [source.checkpoint.read(one.tensor) == 0 for one in source.architecture.linears]
    return [(int(one[:2].sum()), int(one.sum()), one.numel()) for one in weights]


def test_it_prunes_by_its_own_formula(installed: Path, pico_dir: Any, tmp_path: Path) -> None:
    opened = truth.opened(pico_dir("llama"))
    examples = truth.examples("llama", tmp_path, 3, harmful=False)
    cut = [response_batch(opened.processor, rows) for rows in batches(examples, 2)]
    settings = prune_settings("toy", dense_rows=3, order="one-shot")
    pattern = Pattern(0.5)
    found = truth.prune(opened, opened.model, cut, pattern, tmp_path / "r", settings=settings)
    modules = dict(opened.model.named_modules())
    for layer in opened.architecture.layers:
        masks = found.load(layer)
        assert masks is not None
        for linear in layer.linears:
            sizes: Any = 0
            for batch in (response_batch(opened.processor, [one]) for one in examples):
                inputs = truth.linear_inputs(opened.model, batch, [linear.module])[linear.module]
                sizes = sizes + inputs[batch.response].abs().sum(dim=0)
            expected = pattern.mask(modules[linear.module].weight.abs() * sizes)
            expected[:3] = False
            mask = masks[linear.key].mask
            assert mask is not None and int((mask ^ expected).sum()) <= 2, linear.key


@pytest.mark.parametrize("score", ["weight.float() * statistic", "statistic * 0 / 0"])
def test_scores_that_have_no_order_are_refused(
    installed: Path, pico_dir: Any, tmp_path: Path, score: str
) -> None:
    """Negative ones and NaN: masks take neither."""
    (installed / "toy_pruner.py").write_text(TOY.replace("weight.float().abs() * statistic", score))
    opened = truth.opened(pico_dir("llama"))
    examples = truth.examples("llama", tmp_path, 1, harmful=False)
    settings, cut = prune_settings("toy"), [response_batch(opened.processor, examples)]
    with pytest.raises(RegraftError, match=r"layers.0.*: a score of toy is negative or NaN"):
        truth.prune(opened, opened.model, cut, Pattern(0.5), tmp_path / "r", settings=settings)


def test_the_command_has_its_flags_for_it_alone(installed: Path, model: Path) -> None:
    words = ["prune", model, "--data", model.parent / "data" / "data.jsonl", "--samples", 4]
    words += ["--device", "cpu", "--out", model.parent / "out"]
    unknown = (("toy", "--damp"), ("wanda", "--dense-rows"))
    other = [*words[:-1], model.parent / "other", "--method"]
    pruned, *refused, shown, broken = _cli(
        installed,
        [
            [*words, "--method", "toy", "--dense-rows", 2],
            *([*other, method, flag, 1] for method, flag in unknown),
            ["prune", "--help"],
            [*other, "broken"],
        ],
    )
    assert pruned[0] == 0, pruned
    for first, zeros, count in _zeros(model.parent / "out"):
        assert first == 0 < zeros <= count // 2
    about = read_json(model.parent / "out" / "regraft.json")
    assert about["settings"]["method"] == "toy" and about["settings"]["dense_rows"] == 2
    for (method, flag), (code, _, said) in zip(unknown, refused, strict=True):
        assert code == 2 and f"{flag}: unknown setting of method {method}" in said
    assert "toy: |W| times the sum of the sizes of its inputs." in " ".join(shown[1].split())
    assert broken[0] == 2
    assert "The pruner 'broken' (no_such_module:PLUGIN) cannot be imported" in broken[2]
    assert not (model.parent / "other").exists()


def _recipe(folder: Path, **prune: object) -> Path:
    data = str(folder / "data" / "data.jsonl")
    content = {
        "model": str(folder / "model"),
        "calibration": {"data": data, "samples": 4},
        "heads": {"r_max": 2},
        "prune": prune,
        "realign": {"name": "by-toy", "method": "hsr", "score": "toy", "top_heads": 4},
        "evaluate": {"suite": data, "max_new_tokens": 2},
        "compute": {"device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def test_a_run_prunes_by_it_and_restores_by_its_score(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = _recipe(tmp_path, method="toy", dense_rows=2, sparsity=0.6)
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(recipe), "--out", str(out)])
    written = read_recipe(out / "recipe.yaml")
    assert written.prune[0].only() == prune_settings("toy", dense_rows=2, sparsity=0.6)
    assert all(first == 0 < zeros for first, zeros, _ in _zeros(out / "pruned"))
    patch = load_patch(RunDir(out).patch("pruned", "by-toy"))
    assert patch.about["settings"]["score"] == "toy" and patch.restored > 0


def test_bad_settings_are_told_as_those_of_other_pruners(installed: Path, tmp_path: Path) -> None:
    pico.save("llama", tmp_path / "model")
    with pytest.raises(RegraftError, match=r"prune.dense_rows: Input should be greater than or"):
        read_recipe(_recipe(tmp_path, method="toy", dense_rows=-1))
    with pytest.raises(RegraftError, match=r"prune.damp: unknown setting of method toy"):
        read_recipe(_recipe(tmp_path, method="toy", damp=0.1))
    with pytest.raises(RegraftError, match=r"'broken' \(no_such_module:PLUGIN\) cannot be import"):
        read_recipe(_recipe(tmp_path, method="broken"))
    assert read_recipe(_recipe(tmp_path, method="wanda")).prune[0].method == "wanda"


def test_without_the_package_there_is_no_such_pruner() -> None:
    with pytest.raises(RegraftError, match="no pruner 'toy'; expected magnitude, safety-potential"):
        prune_settings("toy")
    assert "toy" not in PRUNERS.names()


def test_a_name_that_is_not_its_own(installed: Path, tmp_path: Path) -> None:
    about = installed / "toy_pruner-1.dist-info" / "entry_points.txt"
    about.write_text("[regraft.pruners]\nplaything = toy_pruner:PLUGIN\n")
    importlib.invalidate_caches()
    with pytest.raises(RegraftError, match=r"prune.method: .*'plaything' .* its own, 'toy'"):
        read_recipe(_recipe(tmp_path, method="plaything"))
