"""The Python API does what the command line does, and says what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
import regraft
from disk import write_data, write_jsonl
from regraft.cli import main
from regraft.data.readers.demo import demo_model
from regraft.data.sources import DataSource
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.patch.format import Patch
from regraft.restoration.ranking import load_ranking
from regraft.runs import comparing
from regraft.settings.data import CalibrationSettings
from regraft.settings.searching import SearchSettings, with_held_out
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
    realigned = open_source(tmp_path / "realigned").checkpoint
    again = open_source(tmp_path / "again")
    for linear in linears:
        assert pruned.checkpoint.read(linear.tensor).equal(again.checkpoint.read(linear.tensor))

    regraft.apply(pruned, patch, tmp_path / "of-objects")
    for changed in ("realigned", "of-objects"):
        assert open_source(tmp_path / changed).checkpoint.fingerprint == realigned.fingerprint
    with pytest.raises(RegraftError, match="A patch in memory has no file"):
        regraft.apply(pruned, replace(patch, file=None), tmp_path / "nothing")

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


def test_what_is_held_out_is_of_the_file_of_the_seed() -> None:
    data = DataSource(name="jsonl", path=Path("prompts-{seed}.jsonl"))
    given, notes = CalibrationSettings(data=data, seed=3), list[str]()
    choice, rest = with_held_out(SearchSettings(), "model", given, notes.append)
    assert choice.validation is not None
    assert choice.validation.path == rest.source.path == Path("prompts-3.jsonl")
    assert "a quarter of the calibration prompts is held out" in notes[0]


def test_bad_settings_are_named(root: Path, tmp_path: Path) -> None:
    dense = root / "dense"
    with pytest.raises(RegraftError, match=r"no setting 'sparsty' here\. Did you mean 'sparsity'"):
        regraft.prune(dense, tmp_path / "x", sparsty=0.5)
    with pytest.raises(RegraftError, match="sparsity"):
        regraft.prune(dense, tmp_path / "x", sparsity=50)
    with pytest.raises(RegraftError, match=r"restoration method 'gian'; expected .*gain"):
        regraft.realign(dense, dense, tmp_path / "x", method="gian")
    with pytest.raises(RegraftError, match=r"no setting 'top_heads' here\.$"):
        regraft.realign(dense, dense, tmp_path / "x", top_heads=3)
    for named in (Path("prompts#harmful"), "prompts.md"):
        with pytest.raises(RegraftError, match=r"Invalid data set:\n.*prompts"):
            regraft.evaluate(dense, named, tmp_path / "x")
    with pytest.raises(AttributeError, match="no attribute 'graft'"):
        regraft.graft  # noqa: B018
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model, out: regraft.open_source(None), "A model is named by .* not by NoneType"),
        (lambda model, out: regraft.prune(3, out), "A model is named by .* not by int"),
        (lambda model, out: regraft.prune(model, None), "A path is a string .* not NoneType"),
        (lambda model, out: regraft.prune(model, out, data=3), "expected NAME:PATH .* not int"),
        (lambda model, out: regraft.prune(model, out, data=None), "NAME:PATH .* not NoneType"),
        (lambda model, out: regraft.prune(model, out, ignore="*.q"), r"a list, such as \['\*.q'\]"),
        (
            lambda model, out: regraft.realign(model, model, out, search=True),
            "Settings are a mapping, not bool",
        ),
        (lambda model, out: regraft.apply(model, None, out), "A path is .* not NoneType"),
        (
            lambda model, out: regraft.export(model, "patch", out, to="onnx"),
            "no tool 'onnx' to export for; expected peft or vllm",
        ),
        (lambda model, out: regraft.evaluate(model, [], out), "No suite is named"),
        (
            lambda model, out: regraft.evaluate(model, model, out),
            "expected NAME:PATH .* not Source",
        ),
        (lambda model, out: regraft.check(model, {}, out), "A model is named by .* not by dict"),
        (lambda model, out: regraft.compare(None, out), "A path is .* not NoneType"),
        (
            lambda model, out: regraft.prune(model, out, progress=None),
            "`progress` is True or False, not None",
        ),
        (lambda model, out: regraft.prune(model, out, method=[]), r"A pruner is a name, not \[\]"),
        (lambda model, out: regraft.apply(b"pruned", "patch", out), "A model is .* not by bytes"),
        (lambda model, out: regraft.apply(model, b"patch", out), "A path is .* not bytes"),
        (
            lambda model, out: regraft.evaluate(model, {"name": "nothing", "path": out}, out),
            "unknown data set 'nothing'",
        ),
        (
            lambda model, out: regraft.apply(model, "patch", Patch({}, {})),
            "A path is .* not Patch",
        ),
    ],
)
def test_an_argument_of_another_type_is_refused(
    root: Path, tmp_path: Path, act: Callable[[Any, Path], object], message: str
) -> None:
    with pytest.raises(RegraftError, match=message):
        act(open_source(root / "dense"), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_progress_is_shown_on_request(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"method": "magnitude", "device": "cpu"}
    regraft.prune(root / "dense", tmp_path / "silent", **given)
    assert capsys.readouterr().out == ""
    regraft.prune(root / "dense", tmp_path / "shown", progress=True, **given)
    assert f"Writing {tmp_path / 'shown'}" in capsys.readouterr().out.replace("\n", "")


def test_one_method_to_compare_with_need_not_be_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(comparing, "compare_runs", lambda *arguments: given.append(arguments))
    regraft.compare("run", tmp_path, against="hsr")
    regraft.compare(["run"], str(tmp_path), against=("hsr",))
    assert given == [([Path("run")], tmp_path, ["hsr"])] * 2


ENDPOINT = "endpoint:http://localhost:1/v1#m"


@pytest.mark.parametrize(
    ("act", "command", "message"),
    [
        (
            lambda root, out: regraft.prune(root / "dense", out, method="magnitude", samples=3),
            "prune {dense} --method magnitude --samples 3 --out {out}",
            "magnitude uses no data: settings of the data would have no effect.",
        ),
        (
            lambda root, out: regraft.prune(root / "dense", out, n_m="2:4", sparsity=0.4),
            "prune {dense} --n-m 2:4 --sparsity 0.4 --out {out}",
            "`n-m` 2:4 takes the place of `sparsity` 0.4",
        ),
        (
            lambda root, out: regraft.score_heads(
                root / "dense", out, responses="given", max_response_tokens=3
            ),
            "analyse heads {dense} --responses given --max-response-tokens 3 --out {out}",
            "`max-response-tokens` has no effect when `responses` are given",
        ),
        (
            lambda root, out: regraft.realign(
                root / "dense", root / "dense", out, method="hsr", heads_file="x", r_max=3
            ),
            "realign hsr {dense} {dense} --heads-file x --r-max 3 --out {out}",
            "--heads-file has the scores: settings of scoring would have no effect.",
        ),
        (
            lambda root, out: regraft.realign(
                root / "dense", root / "dense", out, method="hsr", search={}
            ),
            "realign hsr {dense} {dense} --search --out {out}",
            "--search chooses a number of weights: give a --budget too.",
        ),
        (
            lambda root, out: regraft.evaluate(root / "dense", "demo:test", out, concurrency=2),
            "eval {dense} --suite demo:test --concurrency 2 --out {out}",
            "--concurrency is for requests to an endpoint: leave it out.",
        ),
        (
            lambda root, out: regraft.evaluate(ENDPOINT, "demo:test", out, batch_size=2),
            f"eval {ENDPOINT} --suite demo:test --batch-size 2 --out {{out}}",
            "An endpoint runs as its server was started: leave out --batch-size.",
        ),
        (
            lambda root, out: regraft.check(
                ENDPOINT, ENDPOINT, out, suites="demo:test", device="cpu"
            ),
            f"check {ENDPOINT} {ENDPOINT} --suite demo:test --device cpu --out {{out}}",
            "An endpoint runs as its server was started: leave out --device.",
        ),
        (
            lambda root, out: regraft.check(
                root / "dense", root / "dense", out, suites="demo:test", concurrency=2
            ),
            "check {dense} {dense} --suite demo:test --concurrency 2 --out {out}",
            "--concurrency is for requests to an endpoint: leave it out.",
        ),
        (
            lambda root, out: regraft.check(root / "evaluated", ENDPOINT, out, dtype="float32"),
            f"check {{dense}}/../evaluated {ENDPOINT} --dtype float32 --out {{out}}",
            "Neither of the two models is run here: leave out --dtype.",
        ),
        (
            lambda root, out: regraft.evaluate(
                root / "dense", "demo:test", out, judge="gcg-1", keywords=("no",)
            ),
            "eval {dense} --suite demo:test --judge gcg-1 --keywords no --out {out}",
            "`keywords` take the place of the judge gcg-1",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused_as_by_the_command_line(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    act: Callable[[Path, Path], object],
    command: str,
    message: str,
) -> None:
    (root / "evaluated").mkdir(exist_ok=True)
    (root / "evaluated" / "results.json").touch()
    out = tmp_path / "out"
    with pytest.raises(RegraftError) as refused:
        act(root, out)
    assert message in str(refused.value).replace("_", "-")
    with pytest.raises(SystemExit, match="2"):
        main(command.format(dense=root / "dense", out=out).split())
    assert message in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]


def test_the_word_demo_is_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_source("demo").folder == demo_model()
    with pytest.raises(RegraftError, match="The model folder demo does not exist"):
        open_source(Path("demo"))


def test_a_pruned_model_is_opened_as_the_dense_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code may run too, and a folder may be called as the bundled model."""
    dense = open_source(root / "dense", trust_remote_code=True)
    monkeypatch.chdir(tmp_path)
    pruned = regraft.prune(dense, "demo", method="magnitude", device="cpu")
    assert pruned.trust_remote_code
    assert pruned.folder == Path("demo")


def test_naming_the_package_imports_nothing_heavy() -> None:
    code = "import sys, regraft; assert not {'torch', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_and_documented() -> None:
    assert set(regraft.__all__) <= set(dir(regraft))
    for name in regraft.__all__:
        assert getattr(regraft, name).__doc__


def test_a_local_model_answers_under_a_system_prompt(
    pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    examples = pico.write_examples(tmp_path, 2)
    plain = write_jsonl(tmp_path / "plain.jsonl", examples)
    asked = [replace(one, system="Describe this image. Be kind.") for one in examples]
    under = write_jsonl(tmp_path / "under.jsonl", asked)
    folder = pico_dir("qwen2_vl")
    given = {"max_new_tokens": 4, "device": "cpu"}
    without = regraft.evaluate(folder, plain, tmp_path / "a", **given)
    found = regraft.evaluate(folder, under, tmp_path / "b", **given)
    assert {one.system for one in found.answers} == {"Describe this image. Be kind."}
    assert [one.answer for one in found.answers] != [one.answer for one in without.answers]
    deaf = shutil.copytree(folder, tmp_path / "deaf")
    template = (deaf / "chat_template.jinja").read_text()
    (deaf / "chat_template.jinja").write_text(
        template.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    )
    with pytest.raises(RegraftError, match=r"system prompt of example .* it leaves it out"):
        regraft.evaluate(deaf, under, tmp_path / "c", **given)
    assert not (tmp_path / "c").exists()
