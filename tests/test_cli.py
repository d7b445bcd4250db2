"""Bad input on the command line: a message that names the thing, exit code 2, nothing written."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

import pico
from commands import exit_code
from disk import rewrite, shards, tree, write_data
from methods import method, restored
from regraft import loading, stages
from regraft.cli import COMMANDS, GROUPS, app, application
from regraft.console import show_preview
from regraft.data.collate import prompt_batch
from regraft.data.example import KINDS
from regraft.data.readers.demo import demo_model
from regraft.data.sources import DataSource
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.files import write_json
from regraft.errors import RegraftError
from regraft.models.checkpoint import Checkpoint, open_checkpoint
from regraft.models.load import load_processor, open_source
from regraft.pruning.base import prune_settings
from regraft.pruning.pruners.wanda import Wanda
from regraft.recipes.file import read_recipe
from regraft.recipes.parts import parse_pruning
from regraft.restoration.base import METHODS, needs_of
from regraft.runs import pipeline
from regraft.runs.run_dir import RunDir
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages import evaluation_cache, steps
from regraft.stages.gathering import check_heads
from regraft.stages.pruning import spilled_bytes
from regraft.stages.reading import _made_from_demo
from regraft.stages.steps import Step

FAMILY = "qwen2_5_vl"
WIDTHS = "rows of 64"
HSR = {"method": "hsr", "top_heads": 2}
CALLED = {  # by what is tested: the words of a command
    **{name: ["analyse", name] for name in ("model", "heads", "statistics", "defence")},
    "revert": ["apply", "--revert"],
}


@dataclass(frozen=True)
class World:
    """A folder with a model, the same pruned, a patch, data and room for mischief."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def pruned(self) -> Path:
        return self.root / "pruned"

    @property
    def patch(self) -> Path:
        return self.root / "patch.safetensors"

    @property
    def data(self) -> Path:
        return self.root / "data" / "data.jsonl"

    def copy(self, of: Path, name: str) -> Path:
        return Path(shutil.copytree(of, self.root / name))

    def recipe(self, **fields: Any) -> Path:
        content = {
            "model": str(self.model),
            "calibration": {"data": str(self.data), "samples": 4},
            "heads": {"r_max": 2},
            "realign": [HSR],
            "evaluate": {"suite": str(self.data), "max_new_tokens": 2},
            "compute": {"device": "cpu"},
            **fields,
        }
        path = self.root / "recipe.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; every test works on a copy."""
    root = tmp_path_factory.mktemp("cli") / "world"
    pico.save(FAMILY, root / "model", torch.bfloat16, max_shard_size="100KB")
    data = write_data(root / "data", 4)
    source = open_source(root / "model")
    calibration = CalibrationSettings(data=DataSource(name="jsonl", path=data), samples=4)
    compute = ComputeSettings(device="cpu")
    settings = prune_settings(order="one-shot")
    pruned = stages.prune_checkpoint(
        stages.Setup(source, calibration, compute), root / "pruned", settings
    )
    some_heads = method(method="hsr-a", heads="random", top_heads=3)
    restored(source, pruned, root / "patch.safetensors", some_heads)
    (root / "patch.safetensors.ranking").unlink()
    return root


@pytest.fixture
def world(template: Path, tmp_path: Path) -> World:
    return World(Path(shutil.copytree(template, tmp_path / "world")))


@pytest.fixture
def refused(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run the command line, expect exit code 2, one error and an untouched folder."""
    monkeypatch.chdir(world.root)

    def run(*arguments: object) -> str:
        before = tree(world.root)
        capsys.readouterr()
        code = exit_code(*arguments)
        message = capsys.readouterr().err
        assert code == 2, f"exit code {code}: {message}"
        assert message.startswith("Error: "), f"not told as an error: {message}"
        assert "Traceback" not in message
        changed = {k for k, v in tree(world.root).items() if before.get(k) != v}
        assert not changed, f"something was written: {sorted(changed)}"
        assert tree(world.root).keys() == before.keys(), "something was removed"
        return " ".join(message.removeprefix("Error: ").split())

    return run


Refused = Callable[..., str]


def run_ok(*words: object) -> None:
    """Run the command line and expect exit code 0."""
    assert exit_code(*words) == 0


def called(command: str) -> list[object]:
    """The words of a command, with the group that it is in."""
    return [*CALLED.get(command, [command])]


def has(message: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in message, f"{part!r} is not named in: {message}"


def prune(world: World, *more: object) -> list[object]:
    return ["prune", world.model, "--data", world.data, "--out", "out", "--device", "cpu", *more]


# Models


@pytest.mark.parametrize("command", ["model", "prune", "heads", "statistics", "eval"])
def test_missing_model(world: World, refused: Refused, command: str) -> None:
    words = [*called(command), "nowhere"]
    if command == "eval":
        words += ["--suite", world.data]
    if command != "model":
        words += ["--out", "out"]
    has(refused(*words), "The model folder nowhere does not exist")


def test_missing_folders_of_apply(world: World, refused: Refused) -> None:
    has(refused("apply", "nowhere", world.patch, "--out", "out"), "nowhere does not exist")
    has(refused("apply", world.pruned, "no.safetensors", "--out", "o"), "no.safetensors", "a patch")
    words = [*called("revert"), world.pruned, world.pruned, "--out", "o"]
    has(refused(*words), world.pruned, "is a folder")


def test_hub_model_without_network(refused: Refused) -> None:
    has(
        refused("analyse", "model", "nobody/nothing"),
        "nobody/nothing",
        "could not be downloaded from the hub",
        ". Without a network give the path",
    )


@pytest.mark.parametrize("name", ["./nope", "../nope", "a/b--c"])
def test_mistyped_folder(refused: Refused, name: str) -> None:
    message = refused("analyse", "model", name)
    has(message, name)
    assert "does not exist" in message or "could not be downloaded" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantised_weights(world: World, refused: Refused, dtype: torch.dtype) -> None:
    """They keep names and shapes, but not what a value means."""
    for shard in world.pruned.glob("*.safetensors"):
        tensors = load_file(shard)
        quantised = {k: v.to(dtype) if "mlp" in k else v for k, v in tensors.items()}
        save_file(quantised, shard, metadata={"format": "pt"})
    words = ["realign", "hsr-a", world.model, world.pruned, "--data", world.data]
    has(refused(*words, "--out", "x"), "mlp", "it is quantised", "BF16")


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"realign": [{"method": "gain", "budget": 50}]}, "by gain"),
        ({"prune": {"method": "snip"}}, "Pruning by SNIP"),
        ({"realign": [HSR | {"score": "snip"}]}, "Importance by SNIP"),
    ],
)
def test_float16_has_no_gradients(
    world: World, refused: Refused, recipe: dict[str, Any], what: str
) -> None:
    compute = {"device": "cpu", "dtype": "float16"}
    message = refused("run", world.recipe(**recipe, compute=compute), "--out", "run")
    has(message, what, "vanish in float16", "compute.dtype")


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "model", "--method", "snip"],
        ["analyse", "statistics", "model", "--score", "snip"],
        ["tune", "hsr", "model", "pruned", "--score", "snip", "--budget", 9],
    ],
)
def test_commands_refuse_float16_before_they_load_a_model(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch, words: list[object]
) -> None:
    monkeypatch.setattr(loading, "load_placed", lambda *_args, **_kw: pytest.fail("loaded"))
    monkeypatch.setattr(loading, "load_model", lambda *_args, **_kw: pytest.fail("loaded"))
    if words[0] == "tune":
        words = [*words, "--validation", world.data]
    words = [*words, "--data", world.data, "--out", "out", "--dtype", "float16"]
    has(refused(*words, "--device", "cpu"), "by SNIP needs gradients", "--dtype bfloat16")


def test_no_config(world: World, refused: Refused) -> None:
    (world.model / "config.json").unlink()
    has(refused(*prune(world)), "model holds no config.json")


def test_broken_config(world: World, refused: Refused) -> None:
    (world.model / "config.json").write_text("{")
    has(refused(*prune(world)), "model/config.json: not valid JSON")


def test_unknown_family(world: World, refused: Refused) -> None:
    (world.model / "config.json").write_text('{"model_type": "tomorrow"}')
    has(refused(*prune(world)), world.model, "config.json", "tomorrow", "Update transformers")


def test_code_in_the_checkpoint(world: World, refused: Refused) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (world.model / "config.json").write_text(json.dumps(config))
    (world.model / "own.py").write_text("raise SystemExit('code was run')")
    has(refused(*prune(world)), "--trust-remote-code")


def _other_model(kind: str) -> Any:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "clip":
        towers = {**small, "intermediate_size": 16}
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config=towers, vision_config={**towers, "image_size": 32})
        )
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**small, intermediate_size=16))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("clip", "neither a vision-language model nor"),
        ("t5", "neither a vision-language model nor"),
        ("bert", "no text decoder with its layers"),
        ("gpt2", "have no linears to prune"),
    ],
)
def test_model_of_another_kind(world: World, refused: Refused, kind: str, why: str) -> None:
    _other_model(kind).save_pretrained(world.root / kind)
    message = refused("prune", kind, "--data", world.data, "--out", "out")
    has(message, kind, why)


def test_only_pickled_weights(world: World, refused: Refused) -> None:
    for shard in world.model.glob("*.safetensors*"):
        shard.unlink()
    bomb = b"cbuiltins\nexec\n(S'raise SystemExit(\"unpickled\")'\ntR."
    (world.model / "pytorch_model.bin").write_bytes(bomb)
    has(refused(*prune(world)), "pytorch_model.bin", "never unpickles", "save_pretrained")


def test_truncated_weights(world: World, refused: Refused) -> None:
    shard = sorted(world.model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    has(refused(*prune(world)), shard.name, "is truncated", "Download")
    shard.write_bytes(b"")
    has(refused(*prune(world)), shard.name, "is truncated")


def test_missing_shard(world: World, refused: Refused) -> None:
    shard = sorted(world.model.glob("*.safetensors"))[1]
    shard.unlink()
    has(refused(*prune(world)), shard.name, "is missing")


def test_missing_weights(world: World, refused: Refused) -> None:
    """transformers would fill them with random numbers and say nothing."""
    index = world.model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tensors = {}
    for shard in sorted(world.model.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    index.unlink()
    gone = next(name for name in content["weight_map"] if "visual" in name and "weight" in name)
    tensors.pop(gone)
    save_file(tensors, world.model / "model.safetensors", metadata={"format": "pt"})
    has(refused(*prune(world)), "holds no weights for", "visual", "config.json")


def test_no_processor(world: World, refused: Refused) -> None:
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json"):
        (world.model / name).unlink(missing_ok=True)
    has(refused(*prune(world)), world.model.name, "processor could not be loaded")


def test_no_chat_template(world: World, refused: Refused) -> None:
    (world.model / "chat_template.jinja").unlink()
    has(refused(*prune(world)), "no chat template", "chat_template.jinja")


# Pairs


def _realign(world: World, dense: object, pruned: object, by: str = "hsr") -> list[object]:
    return ["realign", by, dense, pruned, "--data", world.data, "--out", "new.safetensors"]


def test_pair_of_other_shape(world: World, refused: Refused) -> None:
    pico.save("llava_next-vicuna", world.root / "vicuna")
    pico.save("llava_next-mistral", world.root / "mistral")
    message = refused(*_realign(world, "vicuna", "mistral"))
    has(message, "vicuna and mistral are different models", "k_proj", "[64, 64]", "[32, 64]")


def test_pair_of_other_names(world: World, refused: Refused) -> None:
    pico.save("mllama", world.root / "mllama")
    message = refused(*_realign(world, "model", "mllama"))
    has(message, "model and mllama are different models", "missing")


def test_pruned_without_zeros(world: World, refused: Refused) -> None:
    message = refused(*_realign(world, "model", "model"))
    has(message, "has the prunable weights of", "nothing was pruned", "dense checkpoint first")


def test_pair_in_a_recipe(world: World, refused: Refused) -> None:
    has(refused("run", world.recipe(pruned="model"), "--out", "run"), "nothing was pruned")
    has(refused("run", world.recipe(pruned="gone"), "--out", "run"), "gone does not exist")


def test_prompts_beyond_the_positions_are_refused_before_a_run_prunes(
    world: World, refused: Refused
) -> None:
    evaluate = {"suite": str(world.data), "max_new_tokens": 10**9}
    recipe = world.recipe(evaluate=evaluate)
    has(refused("run", recipe, "--out", "run"), "prompts are too long for the model")


@pytest.mark.parametrize("heads", ["top", "random"])
def test_more_heads_than_there_are(world: World, refused: Refused, heads: str) -> None:
    words = _realign(world, "model", "pruned")
    message = refused(*words, "--heads", heads, "--top-heads", 17)
    has(message, "top_heads is 17", "16 heads")
    recipe = world.recipe(realign=[{"method": "hsr", "heads": heads, "top_heads": 17}])
    has(refused("run", recipe, "--out", "run"), "top_heads is 17", "16 heads")


BUDGETS = [
    ("hsr-a", ["--budget", 2], ["--budget"]),
    ("hsr", ["--budget", 2, "--count", 9], ["`budget` and `count` exclude each other; give one"]),
    ("hsr", ["--swap"], ["--swap"]),
    ("random", ["--budget", 2, "--swap"], ["--swap"]),
    ("hsr", ["--budget", 0], ["budget", "0"]),
    ("hsr", ["--budget", 10_000], ["budget", "10000"]),
    ("hsr", ["--search"], ["--search chooses a number of weights: give a --budget too"]),
    ("hsr-a", ["--search"], ["--search"]),
    ("random", ["--budget", 1e-3], ["A budget of 0.001 per 10,000", "less than one"]),
    (
        "random",
        ["--count", 9, "--target-asr", 5, "--target-rsr", 5],
        ["`target-asr` and `target-rsr` exclude each other"],
    ),
]


@pytest.mark.parametrize(("by", "words", "parts"), BUDGETS, ids=lambda one: str(one)[:40])
def test_budgets(
    world: World, refused: Refused, by: str, words: list[object], parts: list[str]
) -> None:
    has(refused(*_realign(world, world.model, world.pruned, by), *words), *parts)


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ({"method": "hsr", "search": {}}, ["realign.0", "'hsr' searches for a number of weights"]),
        (
            {"method": "hsr-a", "count": 4},
            ["realign.0.count: unknown setting of method hsr-a"],
        ),
        (
            {"method": "random", "swap": True},
            ["realign.0.swap: unknown setting of method random"],
        ),
        (
            {"method": "random", "count": 4, "search": {"target_asr": 1, "target_rsr": 1}},
            ["realign.0.search", "exclude each other"],
        ),
        (
            {"method": "random", "count": 4, "search": {"points": 0}},
            ["realign.0.search.points", "got 0"],
        ),
    ],
    ids=lambda one: json.dumps(one)[:40],
)
def test_budgets_in_a_recipe(
    world: World, refused: Refused, variant: dict[str, Any], parts: list[str]
) -> None:
    has(refused("run", world.recipe(realign=[variant]), "--out", "run"), *parts)


@pytest.mark.parametrize(
    ("command", "wanted", "unwanted"),
    [
        ("realign hsr", "Prompts to choose on, not to report on;", "Direction"),
        ("tune hsr", "Prompts to choose on, not to report on;", "Direction"),
        (
            "analyse defence refusal-direction",
            "Harmful and harmless prompts for choosing layer",
            "search",
        ),
    ],
)
def test_validation_is_explained_by_each_command(
    command: str,
    wanted: str,
    unwanted: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run_ok(*command.split(), "--help")
    told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    about = told.rpartition("--validation ")[2].partition("--validation-limit ")[0]
    assert wanted in about
    assert unwanted not in about


def test_validation_prompts_must_be_named_for_another_model(world: World, refused: Refused) -> None:
    words = ["realign", "random", world.model, world.pruned, "--count", 4, "--search"]
    words += ["--out", "out"]
    missing = "No validation prompts are named to choose on"
    too_few = "none of its 4 prompts are in this part"  # of so few, that are then held out
    has(refused(*words, "--data", world.data), too_few, "--validation")
    tune = ["tune", "hsr", world.model, world.pruned, "--count", 4, "--out", "out"]
    has(refused(*tune, "--data", world.data), too_few, "--validation")
    words += ["--validation", "vlguard#unsafe", "gone"]
    has(refused(*words, "--data", world.data), "vlguard:gone#unsafe: gone does not exist")
    defend = ["analyse", "defence", "refusal-direction", world.pruned, "--out", "out"]
    has(refused(*defend, "--data", world.data), missing)
    variant = {"name": "r", "method": "random", "count": 4, "search": {"points": 1}}
    has(refused("run", world.recipe(realign=[variant]), "--out", "run"), "realign: 'r'", missing)
    direction = {"name": "d", "method": "refusal-direction", "layer": 0}
    has(refused("run", world.recipe(defend=[direction]), "--out", "run"), "defend: 'd'", missing)


def test_prompts_of_one_kind_only(world: World, refused: Refused) -> None:
    """For gain and for the search; found before anything is pruned or ranked."""
    lines = world.data.read_text().splitlines(keepends=True)
    harmful = world.data.with_name("harmful.jsonl")
    harmful.write_text("".join(line for line in lines if json.loads(line)["harmful"]))
    search = {"validation": str(harmful)}
    variant = {"method": "random", "count": 4, "search": search}
    recipe = world.recipe(realign=[variant])
    has(refused("run", recipe, "--out", "run"), "harmful.jsonl", "harmless")
    gain = {"calibration": {"data": str(harmful)}, "realign": [{"method": "gain", "count": 4}]}
    recipe = world.recipe(pruned=str(world.pruned), **gain)
    has(refused("run", recipe, "--out", "run"), "harmful.jsonl", "harmless")
    words = _realign(world, world.model, world.pruned, "random")
    words += ["--count", 4, "--search", "--validation", harmful]
    has(refused(*words), "harmful.jsonl", "harmless")


# Data


def _edit_rows(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _missing_field(world: World) -> Sequence[str]:
    _edit_rows(world.data, lambda row: row.pop("instruction"))
    return "data.jsonl, line 2", "'instruction' is missing"


def _missing_image(world: World) -> Sequence[str]:
    next((world.data.parent / "images").glob("harmful-0-1*")).unlink()
    return "data.jsonl", "1 of 8 examples have no image file", "harmful-0-1"


def _unreadable_image(world: World) -> Sequence[str]:
    path = next((world.data.parent / "images").glob("harmful-0-2*"))
    path.write_bytes(path.read_bytes()[:50])
    return "unreadable image", "harmful-0-2"


def _empty_set(world: World) -> Sequence[str]:
    world.data.write_text("\n")
    return "data.jsonl", "no examples"


def _no_json(world: World) -> Sequence[str]:
    world.data.write_text("{\n")
    return "data.jsonl, line 1", "JSON"


def _no_file(world: World) -> Sequence[str]:
    world.data.unlink()
    return "data.jsonl", "does not exist"


MISCHIEF = [_missing_field, _missing_image, _unreadable_image, _empty_set, _no_json, _no_file]


@pytest.mark.parametrize("break_it", MISCHIEF, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("command", ["heads", "statistics", "eval", "run"])
def test_bad_data(
    world: World, refused: Refused, command: str, break_it: Callable[[World], Sequence[str]]
) -> None:
    recipe = world.recipe()
    expected = break_it(world)
    words: dict[str, list[object]] = {
        "heads": [world.model, "--data", world.data, "--r-max", 2, "--out", "out"],
        "statistics": [world.model, "--data", world.data, "--out", "out"],
        "eval": [world.model, "--suite", world.data, "--out", "new/deep/out"],
        "run": [recipe, "--out", "run"],
    }
    has(refused(*called(command), *words[command]), *expected)


def test_no_harmless_examples(world: World, refused: Refused) -> None:
    lines = world.data.read_text().splitlines()[:4]
    world.data.write_text("\n".join(lines) + "\n")
    has(refused(*prune(world)), "no harmless examples", "4 rows were read, 0 of them harmless")


def test_bad_suite_of_a_run_is_found_before_it_starts(world: World, refused: Refused) -> None:
    suite = world.root / "data" / "suite.jsonl"
    suite.write_text('{"instruction": "x", "image": "gone.png"}\n')
    has(refused("run", world.recipe(evaluate={"suite": str(suite)}), "--out", "run"), "gone.png")


@pytest.mark.parametrize("command", ["prune", "heads", "statistics", "eval", "run"])
def test_images_with_a_text_only_model(world: World, refused: Refused, command: str) -> None:
    pico.save("llama", world.root / "llama")
    words = [*called(command), "llama", "--data", world.data, "--out", "out"]
    if command == "heads":
        words += ["--r-max", 2]
    if command == "eval":
        words[words.index("--data")] = "--suite"
    if command == "run":
        words = ["run", world.recipe(model="llama"), "--out", "out"]
    has(refused(*words), "has an image", "llama reads text only", "vision-language model")


@pytest.mark.parametrize("command", ["heads", "run"])
def test_r_max_too_large(world: World, refused: Refused, command: str) -> None:
    words = [*called("heads"), world.model, "--data", world.data, "--out", "out"]
    words += ["--r-max", 4]
    if command == "run":
        words = ["run", world.recipe(heads={"r_max": 4}), "--out", "run"]
    has(refused(*words), "r_max is 4", "4 different prompts", "at most 3", "use more prompts")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("tomorrow", ["--data: unknown data set 'tomorrow'", "demo", "vlguard", ".jsonl"]),
        ("demo:nosplit", ["nosplit", "calibration", "validation", "test"]),
        ("vlguard:gone", ["gone does not exist"]),
        ("safebench:gone", ["gone does not exist"]),
    ],
)
def test_unknown_data(world: World, refused: Refused, data: str, parts: list[str]) -> None:
    has(refused("prune", world.model, "--data", data, "--out", "out"), *parts)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["vlguard#safe-safe", "gone"], "vlguard:gone#safe-safe: gone does not exist"),
        (["vlguard", "gone#safe-safe"], "vlguard:gone#safe-safe: gone does not exist"),
        (["xstest#harmless:gone"], "xstest:gone#harmless: gone does not exist"),
        (["safebench#half", "gone"], "safebench has the splits even, odd, tiny; there is no"),
        (["vlgard#unsafe", "gone"], "unknown data set 'vlgard#unsafe"),
    ],
)
def test_parts_behind_the_name(world: World, refused: Refused, words: list[str], part: str) -> None:
    has(refused("eval", world.model, "--suite", *words, "--out", "out"), part)
    has(refused("prune", world.model, "--data", *words, "--out", "out"), part)


# Settings


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("0", ["--sparsity", "greater than 0", "got 0.0"]),
        ("1", ["--sparsity", "less than 1", "got 1.0"]),
        ("1.5", ["--sparsity", "less than 1", "got 1.5"]),
        ("-1", ["--sparsity", "greater than 0", "got -1.0"]),
        ("nan", ["--sparsity", "got nan"]),
        ("abc", ["--sparsity", "valid number", "abc"]),
    ],
)
def test_sparsity(world: World, refused: Refused, value: str, parts: list[str]) -> None:
    has(refused(*prune(world, "--sparsity", value)), *parts)
    number = float(value) if value not in ("abc", "nan") else value
    message = refused("run", world.recipe(prune={"sparsity": number}), "--out", "run")
    has(message, "recipe.yaml", "prune.sparsity", value)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("4:4", ["4:4 is no N:M pattern", "less than M"]),
        ("5:4", ["5:4 is no N:M pattern", "less than M"]),
        ("0:4", ["0:4 is no N:M pattern", "at least 1"]),
        ("2-4", ["'2-4' is no N:M pattern", "2:4"]),
        ("2:3", ["2:3 needs rows of a multiple of 3", "layers.0.self_attn.q_proj", WIDTHS]),
    ],
)
def test_n_m(world: World, refused: Refused, value: str, parts: list[str]) -> None:
    has(refused(*prune(world, "--n-m", value)), *parts)
    recipe = world.recipe()
    content = json.loads(recipe.read_text())
    content.pop("prune", None)
    recipe.write_text(f"{json.dumps(content)[:-1]},\nprune: {{n_m: {value}}}}}\n")
    has(refused("run", recipe, "--out", "run"), *parts)


@pytest.mark.parametrize("command", ["prune", "heads", "eval", "realign", "run"])
def test_unknown_device(world: World, refused: Refused, command: str) -> None:
    words: dict[str, list[object]] = {
        "prune": [world.model, "--data", world.data, "--out", "out"],
        "heads": [world.model, "--data", world.data, "--out", "out", "--r-max", 2],
        "eval": [world.model, "--suite", world.data, "--out", "out"],
        "realign": ["gain", world.model, world.pruned, "--data", world.data],
    }
    if command == "run":
        recipe = world.recipe(compute={"device": "tpux"})
        has(refused("run", recipe, "--out", "run"), "The device 'tpux' cannot be used")
        return
    if command == "realign":
        words["realign"] += ["--out", "new.safetensors"]
    words[command] += ["--device", "tpux"]
    has(refused(*called(command), *words[command]), "The device 'tpux' cannot be used")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"sparcity": 0.5}, ["sparcity", "unknown setting"]),
        ({"prune": {"sparcity": 0.5}}, ["prune.sparcity", "unknown setting"]),
        ({"realign": [{"name": "a"}, {"name": "a"}]}, ["names of `realign` must differ", "a"]),
        ({"realign": [{"name": "pruned"}]}, ["realign.0.name", "not be 'dense' or 'pruned'"]),
        ({"realign": [{"name": "../x"}]}, ["realign.0.name", "../x"]),
        ({"realign": [HSR | {"p": 0.7, "p_max": 0.5}]}, ["realign.0", "p < p_max"]),
        ({"evaluate": {"suite": "tomorrow"}}, ["evaluate.suite", "unknown data set 'tomorrow'"]),
        ({"realign": [{"method": "random", "repeats": 10**5}]}, ["repeats", "or equal to 100"]),
        ({"compute": {"batch_size": 0}}, ["compute.batch_size", "got 0"]),
        ({"heads": {"target": "head"}}, ["heads.target", "'head'"]),
    ],
    ids=lambda v: json.dumps(v)[:40] if isinstance(v, dict) else "",
)
def test_recipe_fields(
    world: World, refused: Refused, fields: dict[str, Any], parts: list[str]
) -> None:
    has(refused("run", world.recipe(**fields), "--out", "run"), "recipe.yaml", *parts)


def test_recipe_files(world: World, refused: Refused) -> None:
    has(refused("run", "no.yaml", "--out", "run"), "no.yaml does not exist. A recipe is needed")
    has(refused("run", "model", "--out", "run"), "model is a folder; a file is needed. A recipe")
    (world.root / "bad.yaml").write_text("a: [")
    has(refused("run", "bad.yaml", "--out", "run"), "bad.yaml is not valid YAML")
    (world.root / "list.yaml").write_text("- a")
    has(refused("run", "list.yaml", "--out", "run"), "list.yaml", "each a name and a value")


def test_settings_that_would_change_nothing(world: World, refused: Refused) -> None:
    realign = _realign(world, world.model, world.pruned)
    has(refused(*realign, "--heads-file", "h", "--r-max", 3), "--heads-file has the scores")
    has(refused(*realign, "--max-new-tokens", 12), "answers in a search", "--search")
    gain = _realign(world, world.model, world.pruned, "gain")
    has(refused(*gain, "--q", 0.1), "--q")
    has(refused(*prune(world, "--n-m", "2:4", "--sparsity", 0.6)), "takes the place of `sparsity`")
    has(
        refused(*prune(world, "--method", "magnitude", "--order", "one-shot")),
        "--order: unknown setting of method magnitude",
    )
    has(refused(*realign, "--heads", "all", "--top-heads", 3), "`heads` is all")
    has(refused(*realign, "--heads", "random", "--r-max", 3), "These settings score no heads")
    everywhere = [*realign, "--heads", "all"]
    has(refused(*everywhere, "--heads-file", "h"), "leave out --heads-file")
    has(refused(*gain, "--heads-file", "h"), "--heads-file")
    by_size = [*realign, "--score", "magnitude"]
    has(refused(*by_size, "--statistics-file", "s"), "leave out --statistics-file")
    random = _realign(world, world.model, world.pruned, "random")
    has(refused(*random, "--statistics-file", "s"), "--statistics-file")
    has(refused(*random, "--responses", "given"), "--responses")
    has(
        refused(*realign, "--responses", "given", "--max-response-tokens", 5),
        "`max-response-tokens` has no effect",
    )
    magnitude = prune(world, "--method", "magnitude")
    has(refused(*magnitude, "--samples", 3), "magnitude uses no data")
    scored: list[object] = ["analyse", "heads", world.model, "--out", "h", "--candidates", 4]
    has(refused(*scored), "`candidates` has no effect when `mode` is exact")
    shield: list[object] = ["analyse", "defence", "adashield", world.pruned, "--out", "d"]
    has(refused(*shield, "--layer", 1), "--layer")
    has(refused(*shield, "--data", "demo"), "--data")
    given: list[object] = ["analyse", "defence", "refusal-direction", world.pruned, "--out", "d"]
    given += ["--layer", 1, "--strength", 2]
    has(refused(*given, "--prompt", "x"), "--prompt")
    has(refused(*given, "--max-over-refusal", 2), "`max-over-refusal` has no effect when")
    statistics = [
        "analyse",
        "statistics",
        world.model,
        "--out",
        "s",
        "--responses",
        "given",
        "--max-response-tokens",
        9,
    ]
    has(refused(*statistics), "`max-response-tokens` has no effect")


def test_settings_that_would_change_nothing_in_tuning(world: World, refused: Refused) -> None:
    pair = [world.model, world.pruned, "--out", "t", "--validation", world.data]
    tune, difference = ["tune", "hsr", *pair], ["tune", "set-difference", *pair]
    has(refused(*difference, "--q", 0.3), "--q")
    has(refused(*difference, "--top-heads", 3), "--top-heads")
    has(refused(*tune, "--window", 9), "`window` has no effect when `mode` is exact")
    has(refused(*tune, "--points", 3), "Without a --budget there is no number")


def test_bad_input_is_found_before_heads_are_scored(world: World, refused: Refused) -> None:
    realign = _realign(world, world.model, world.pruned)
    has(
        refused(*realign, "--statistics-file", "gone", "--r-max", 2),
        "gone does not exist. It should hold importance statistics.",
    )
    screened = ["--mode", "screened", "--candidates", 2, "--r-max", 2]
    has(refused(*realign, *screened, "--top-heads", 3), "only the 2 best", "--candidates 3")
    has(refused(*realign, "--budget", 0.001, "--r-max", 2), "less than one weight")
    harmful = world.root / "harmful.jsonl"
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for row in rows:
        row["image"] = f"data/{row['image']}"
    harmful.write_text("".join(json.dumps(row) + "\n" for row in rows if row["harmful"]))
    words = [word if word != world.data else harmful for word in realign]
    has(refused(*words, "--r-max", 2), "no harmless examples")
    twice = world.root / "twice.jsonl"
    harmful_first = sorted(rows, key=lambda row: not row["harmful"])
    copies = [{**row, "id": f"{i}-{row['id']}"} for i in range(3) for row in harmful_first[:3]]
    rows = [*copies, *harmful_first[-1:]]
    twice.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word if word != world.data else twice for word in realign]
    has(refused(*words, "--r-max", 3), "r_max is 3", "different prompts")


def test_heads_decide_only_where_they_are_asked(world: World) -> None:
    """A model with fewer heads than the default, by a method that has none to choose."""
    pruned = open_source(world.pruned)
    check_heads(pruned, needs_of(method("random", count=3)), None)
    check_heads(pruned, needs_of(method("hsr", heads="all")), None)
    with pytest.raises(RegraftError, match="top_heads is 99"):
        check_heads(pruned, needs_of(method(top_heads=99)), None)


def test_a_search_in_the_place_of_a_patch_without_one(world: World, refused: Refused) -> None:
    words = ["realign", "random", world.model, world.pruned, "--count", 4]
    run_ok(*words, "--out", world.root / "p.safetensors", "--device", "cpu")
    words += ["--search", "--validation", world.data]
    has(refused(*words, "--out", "p.safetensors"), "was made without a search")


def test_a_model_that_is_pruned_already(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.pruned / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    out = world.root / "twice"
    run_ok("prune", world.pruned, "--method", "magnitude", "--out", out)
    has(
        " ".join(capsys.readouterr().out.split()),
        "Warning: 50 % of the first layer",
        "dense model?",
    )
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n> **Pruned** by regraft (magnitude, 50 %")
    assert card.endswith("# Card\n")


def test_a_file_in_the_place_of_a_model(world: World, refused: Refused) -> None:
    has(refused("apply", world.patch, world.pruned, "--out", "x"), "is a file", "come first")


def test_reverting_one_of_two_patches(world: World, refused: Refused) -> None:
    words = ["realign", "random", world.model, world.pruned, "--count", 4]
    run_ok(*words, "--out", world.root / "p.safetensors", "--device", "cpu")
    run_ok(
        "apply", world.pruned, world.patch, world.root / "p.safetensors", "--out", world.root / "b"
    )
    has(
        refused(*called("revert"), "b", world.patch, "--out", "x"),
        "name them too",
        "apply again those",
    )


def test_output_places(world: World, refused: Refused) -> None:
    """Found before the work, and said as it is."""
    data = ["--data", world.data]
    for out in (".", "/"):
        words = ("realign", "random", world.model, "pruned", "--out", out)
        has(refused(*words), f"'{out}' is no name of a file")
    (world.root / "mine").write_text("mine")
    message = refused("analyse", "statistics", world.model, *data, "--out", "mine")
    has(message, "The output mine exists, and is not what", "Choose another output or remove it")
    has(refused("analyse", "compare", "model", "--out", "pruned"), "pruned holds something other")
    has(
        refused("analyse", "overlap", world.model, "gone", "--out", "pruned"), "pruned is not empty"
    )
    has(refused("analyse", "relate", "model", "--out", "pruned"), "pruned is not empty")
    has(refused("apply", "pruned", world.patch, "--out", "pruned"), "itself", "a new folder")


def test_words_that_are_no_text(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    has(refused("analyse", "model", "a\udce9"), "is not UTF-8, as all names must be. Rename it.")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    has(refused("analyse", "model", "a\udcc3\udca9"), "for ascii in this locale: set PYTHONUTF8=1")


def test_numbers_that_no_artifact_could_hold(world: World, refused: Refused) -> None:
    has(
        refused(*prune(world), "--seed", "9" * 20), "--seed: expected an integer of at most 64 bits"
    )


def test_suites_named_twice(world: World, refused: Refused) -> None:
    words: list[object] = ["eval", world.model, "--suite", world.data, "--suite", world.data]
    has(refused(*words, "--out", "out"), "named twice", "count twice")


def test_folders_that_are_no_evaluation(world: World, refused: Refused) -> None:
    below = world.root / "run" / "evaluation" / "dense"
    below.mkdir(parents=True)
    (below / "results.json").write_text("{}")
    message = refused("judge", "answers", "run", "--by", "vlguard-1")
    has(message, "run is no evaluation", "Evaluations in it: run/evaluation/dense")
    message = refused("check", "run", "run", "--out", "out")
    has(message, "run is neither a model", "Evaluations in it: run/evaluation/dense")
    has(refused("report", "model", "--out", "out"), "model has no results.json, so it is not")


def test_paths_are_not_emoji(world: World, refused: Refused) -> None:
    has(refused("analyse", "model", "run:key:x:"), "run:key:x:")


def test_the_bundled_model_pruned_is_known(tmp_path: Path) -> None:
    dense = open_checkpoint(demo_model()).fingerprint
    pruned = {"stage": "prune", "inputs": {"dense": dense}}
    write_json(tmp_path / ABOUT_FILE, {"stage": "apply", "inputs": {}, "before": pruned})
    assert _made_from_demo(tmp_path)
    write_json(tmp_path / ABOUT_FILE, {"stage": "apply", "inputs": {}, "before": None})
    assert not _made_from_demo(tmp_path)
    assert not _made_from_demo(tmp_path / "none")
    for damaged in ("prune", ["prune"], {"inputs": []}, {"before": {"inputs": {"dense": 1}}}):
        write_json(tmp_path / ABOUT_FILE, {"stage": "apply", "inputs": {}, "before": damaged})
        with pytest.raises(RegraftError, match=rf"{ABOUT_FILE}: .*before"):
            _made_from_demo(tmp_path)


def test_bundled_data_for_another_model_is_said(
    world: World,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world.root)
    flags = ("--samples", 1, "--out", "mine", "--device", "cpu")
    has(refused("prune", world.model, *flags), "No calibration prompts are named", "--data")
    run_ok("prune", world.model, "--data", "demo:calibration", *flags)
    said = " ".join(capsys.readouterr().out.split())
    has(said, "Warning: demo:calibration are the bundled images")
    run_ok("prune", world.model, "--data", world.data, "--out", "own", "--device", "cpu")
    assert "Warning" not in capsys.readouterr().out


def test_flags(world: World, refused: Refused) -> None:
    has(refused(*prune(world, "--sparcity", "0.5")), "--sparcity")
    has(refused("prune", world.model), "--out")
    has(refused("tomorrow"), "tomorrow")


# Patches


def test_patch_for_another_base(world: World, refused: Refused) -> None:
    message = refused("apply", world.model, world.patch, "--out", "out")
    has(message, "model is not the base of this patch", "layers.", "pruned checkpoint")
    message = refused(
        "eval", world.model, "--patch", world.patch, "--suite", world.data, "--out", "out"
    )
    has(message, "model is not the base of this patch")
    pico.save("llava", world.root / "llava", torch.bfloat16)
    has(refused("apply", "llava", world.patch, "--out", "out"), "llava is not the base")
    has(refused(*called("revert"), "llava", world.patch, "--out", "out"), "llava is not the base")


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_where_to_patch(world: World, refused: Refused, command: str) -> None:
    words = [*called(command), world.pruned]
    has(refused(*words, world.patch), "--out")
    has(refused(*words, "--out", "x"), "No patch is named")
    has(refused(*words, world.patch, world.pruned, "--out", "x"), "is a folder")


def test_a_preview_of_a_run_reads_no_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 70B that would take minutes."""
    monkeypatch.setattr(Checkpoint, "fingerprint", property(lambda _: pytest.fail("weights read")))
    run_ok("run", world.recipe(), "--out", world.root / "run", "--dry-run")


def test_dry_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(world.root)
    run_ok("apply", world.pruned, world.patch, "--out", world.root / "out", "--dry-run")
    shown = capsys.readouterr().out
    has(shown, "weights", "already applied", "would change, in", "Nothing was written")
    assert tree(world.root) == before


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["prune", "model"], "prune"),
        (["analyse", "heads", "model", "--r-max", 2], "score heads"),
        (["analyse", "statistics", "model"], "statistics for wanda"),
        (["analyse", "defence", "refusal-direction", "pruned"], "defend"),
    ],
)
def test_a_dry_run_shows_the_step_and_writes_nothing(
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    step: str,
) -> None:
    monkeypatch.chdir(world.root)
    before = tree(world.root)
    if step == "defend":
        words = [*words, "--validation", world.data]
    words = [*words, "--data", world.data, "--samples", 4, "--out", "out", "--device", "cpu"]
    run_ok(*words, "--dry-run")
    has(
        " ".join(capsys.readouterr().out.split()), step, "Steps left: 1 of 1", "Nothing was written"
    )
    assert tree(world.root) == before


def test_a_dry_run_needs_no_more_files_than_the_run(world: World) -> None:
    for file in world.model.iterdir():
        if "safetensors" not in file.name and file.name != "config.json":
            file.unlink()
    words = "prune", world.model, "--method", "magnitude", "--out", world.root / "out"
    run_ok(*words, "--dry-run")
    run_ok(*words)


def test_a_dry_run_refuses_what_the_run_refuses(world: World, refused: Refused) -> None:
    models = {"models": [str(world.model)], "published": "nowhere.yaml"}
    recipe = world.recipe(**{**models, "realign": []})
    content = json.loads(recipe.read_text())
    content.pop("model")
    recipe.write_text(json.dumps(content))
    has(refused("run", recipe, "--out", "run", "--dry-run"), "nowhere.yaml")
    (world.root / "run").mkdir()
    (world.root / "run" / "recipe.yaml").write_text("title: another\n")
    again = "run", world.recipe(), "--out", "run", "--dry-run"
    has(refused(*again), "holds a run of another recipe")
    pruning = "prune", world.model, "--data", world.data, "--out", "run", "--dry-run"
    has(refused(*pruning), "run is not empty")


def test_a_full_disk_is_told_before_any_step(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *_args, **_kw: pytest.fail("loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    for words in (prune(world), _realign(world, world.model, world.pruned, "gain")):
        has(refused(*words), "The disk is too full")


def test_a_method_is_named_first(refused: Refused) -> None:
    has(refused("realign", "model", "pruned"), "'model' is no method", "fine-tune, gain, hsr")
    has(refused("tune", "model", "pruned"), "'model' is no method", "hsr")
    has(refused("tune", "gain", "model", "pruned"), "'gain' is no method of `regraft tune`", "hsr")


def test_small_mistakes_of_analyses_and_reports(
    world: World, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = ["analyse", "heads", world.model, "--data", world.data, "--out", "heads"]
    has(refused(*heads, "--show", -3), "--show", ">= 0")
    has(refused("report", "gone", "--out", "page"), "gone does not exist.")
    assert exit_code("report", "--help") == 0
    assert "by default report in" in " ".join(capsys.readouterr().out.split())


def test_a_given_file_that_is_missing_is_told_before_all_weights_are_read(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_cache, "survey", lambda *_: pytest.fail("read all weights"))
    words = _realign(world, world.model, world.pruned)
    has(refused(*words, "--heads-file", "gone"), "gone does not exist. It should hold head scores")
    has(refused(*words, "--statistics-file", "gone"), "It should hold importance statistics")


def test_an_unknown_command_imports_no_other(refused: Refused) -> None:
    has(refused("prunee", "model"), "no command 'prunee'; did you mean prune?", "demo, run")
    code = """
import sys
from regraft.cli import main
try:
    main(["prunee"])
except SystemExit:
    assert "torch" not in sys.modules, "a command was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_patch(world: World, refused: Refused) -> None:
    whole = world.patch.read_bytes()
    words = ["apply", world.pruned, world.patch, "--out", "out"]
    world.patch.write_bytes(whole[:-10])
    has(refused(*words), "patch.safetensors is damaged")
    world.patch.write_bytes(b"")
    has(refused(*words), "patch.safetensors is damaged")
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    world.patch.write_bytes(flipped)
    has(refused(*words), "patch.safetensors is damaged")
    shutil.copy(next(world.model.glob("*.safetensors")), world.patch)
    has(refused(*words), "patch.safetensors does not hold a patch")


# Output


@pytest.mark.parametrize("command", ["prune", "heads", "statistics", "eval", "apply", "revert"])
def test_output_is_taken(world: World, refused: Refused, command: str) -> None:
    taken = world.root / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    data: list[object] = ["--data", world.data]
    words: dict[str, list[object]] = {
        "prune": [world.model, *data],
        "heads": [world.model, *data, "--r-max", 2],
        "statistics": [world.model, *data],
        "eval": [world.model, "--suite", world.data],
        "apply": [world.pruned, world.patch],
        "revert": [world.pruned, world.patch],
    }
    message = refused(*called(command), *words[command], "--out", taken)
    a_file = command in ("heads", "statistics")
    has(message, "taken", "is a folder" if a_file else "is not empty")
    message = refused(*called(command), *words[command], "--out", taken / "thesis.txt")
    has(message, "thesis.txt", "damaged" if a_file else "is a file")
    message = refused(*called(command), *words[command], "--out", taken / "thesis.txt" / "deeper")
    has(message, "thesis.txt", "Choose another output")


@pytest.mark.parametrize(("place", "what"), [(".", "is the current folder"), ("link", "is a link")])
def test_output_cannot_be_put_in_place(
    world: World, refused: Refused, place: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before the work: a finished folder gets its name by one rename."""
    here = world.root / "empty" / "here"
    here.mkdir(parents=True)
    (here.parent / "link").symlink_to(here)
    monkeypatch.chdir(here.parent if place == "link" else here)
    message = refused("eval", world.model, "--suite", world.data, "--out", place)
    has(message, f"The output folder {place} {what}")


def test_patch_of_other_settings_is_found_before_the_work(world: World, refused: Refused) -> None:
    words = ["realign", "gain", world.model, world.pruned, "--data", world.data]
    message = refused(*words, "--out", world.patch, "--budget", 100)
    has(message, "patch.safetensors exists", 'settings.method: "hsr-a" there, "gain" now')


def test_run_folder_is_taken(world: World, refused: Refused) -> None:
    has(refused("run", world.recipe(), "--out", "data"), "data is not empty")


@pytest.mark.usefixtures("undrawn")
def test_run_folder_of_another_recipe(world: World, refused: Refused) -> None:
    run_ok("run", world.recipe(), "--out", "run")
    message = refused("run", world.recipe(prune={"sparsity": 0.7}), "--out", "run")
    has(message, "run holds a run of another recipe", "prune.pruned.sparsity: 0.5 there, 0.7 now")
    grown = world.recipe(realign=[HSR, {"method": "random", "count": 4}])
    run_ok("run", grown, "--out", "run")
    has((world.root / "run" / "report" / "report.md").read_text(), "random")
    message = refused("run", world.recipe(), "--out", "run")
    has(message, "run holds a run of another recipe", "realign")
    message = refused("run", world.recipe(realign=[HSR | {"top_heads": 3}]), "--out", "run")
    has(message, "run holds a run of another recipe", "realign")
    shutil.rmtree(world.root / "run" / "evaluation" / "hsr")
    message = refused("report", "run")
    has(message, "run is not finished", "hsr has not been evaluated", "regraft run")


@pytest.mark.usefixtures("undrawn")
def test_a_run_goes_on_with_smaller_batches(world: World) -> None:
    """As it is told to where memory was short: what is finished stays."""
    run = world.root / "run"
    realign = [HSR, HSR | {"name": "other", "top_heads": 1, "checkpoint": False}]
    run_ok("run", world.recipe(realign=realign), "--out", run)
    shutil.rmtree(run / "evaluation" / "hsr")
    before = tree(run)
    compute = {"device": "cpu", "batch_size": 1}
    heads = {"r_max": 2, "tokens_per_pass": 64}
    smaller = world.recipe(realign=realign, compute=compute, heads=heads)
    run_ok("run", smaller, "--out", run)
    after = tree(run)
    assert {name for name in before if name.endswith(".safetensors")} == {
        name for name in after if name.endswith(".safetensors") and after[name] == before.get(name)
    }
    assert "batch_size: 1" in (run / "recipe.yaml").read_text()
    results = json.loads((run / "evaluation" / "hsr" / "results.json").read_text())
    assert results["about"]["compute"]["batch_size"] == 1


def test_report_of_nothing(refused: Refused) -> None:
    has(refused("report", "data"), "data holds no run")


def test_output_inside_the_model(world: World, refused: Refused) -> None:
    words: list[object] = ["prune", world.model, "--data", world.data, "--out"]
    has(refused(*words, world.model / "out"), "inside the checkpoint")
    has(refused(*words, "data/../model/out"), "inside the checkpoint")


@pytest.mark.parametrize("command", ["prune", "apply", "run"])
def test_disk_too_full(
    world: World, refused: Refused, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(world.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    words: dict[str, list[object]] = {
        "prune": prune(world),
        "apply": ["apply", world.pruned, world.patch, "--out", "out"],
        "run": ["run", world.recipe(), "--out", "out"],
    }
    has(refused(*words[command]), "disk is too full", "out", "MiB are free")


def test_space_of_a_run_is_what_is_there_at_once(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pruning keeps goes before realigning; work of a killed run counts; seeds add up."""
    dense = open_source(world.model)
    size = dense.checkpoint.bytes
    spilled = sum(dense.checkpoint.record(one.tensor).bytes for one in dense.architecture.linears)
    sparse = {"method": "sparsegpt"}
    out = world.root / "run"

    def needed(**fields: Any) -> tuple[int, int]:
        planned = pipeline.plan_run(read_recipe(world.recipe(**fields)), out)
        return planned.to_write, planned.peak

    alone = {"prune": sparse, "realign": []}
    assert needed(**alone) == (size, size + spilled)
    assert needed(prune=sparse) == (2 * size, 2 * size)
    two = [{**sparse, "name": "a"}, {**sparse, "name": "b", "realign": False}]
    assert needed(prune=two) == (3 * size, 3 * size), "both are pruned before one is realigned"
    work = out / ".pruned.regraft-work" / "key"
    work.mkdir(parents=True)
    (work / "layer").write_bytes(bytes(1000))
    assert needed(**alone) == (size - 1000, size + spilled - 1000)
    shutil.rmtree(out)
    usage = shutil.disk_usage(world.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + spilled))
    has(refused("run", world.recipe(**alone, seeds=[0, 1]), "--out", "run"), "disk is too full")


def test_what_a_backward_pass_keeps_needs_space_too(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of all layers, found before anything is pruned: of a 7B model more than itself."""
    dense = open_source(world.model)
    gain = {"realign": [{"method": "gain", "budget": 50, "checkpoint": False}]}
    fields = gain | {"calibration": {"data": str(world.data), "samples": 2}}
    made = read_recipe(world.recipe(**fields))
    processor, setup = load_processor(dense), stages.Setup(dense, made.calibration)
    tokens = [
        prompt_batch(processor, [one]).inputs["input_ids"].numel()
        for kind in KINDS
        for one in setup.drawn(kind).examples
    ]
    states = 4 * sum(tokens) * len(dense.architecture.layers) * dense.architecture.hidden_size
    planned = pipeline.plan_run(made, world.root / "run")
    size = dense.checkpoint.bytes
    assert planned.to_write == size
    assert abs(planned.peak - size - states) < 10_000 < states
    usage = shutil.disk_usage(world.root)
    for free in (size, size + states - 10_000):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=free: usage._replace(free=n))
        has(refused("run", world.recipe(**fields), "--out", "run"), "disk is too full")
        assert not (world.root / "run").exists()


def test_a_config_that_only_running_the_model_shows_to_be_wrong(
    world: World, refused: Refused
) -> None:
    file = world.model / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [1, 1]
    file.write_text(json.dumps(config))
    message = refused("eval", world.model, "--suite", world.data, "--out", "out")
    has(
        message,
        f"transformers cannot run the model of {world.model}",
        "split_with_sizes",
        "config.json",
        "--debug",
    )


def test_weights_that_are_no_numbers_are_named_by_a_pruner_without_data(
    world: World, refused: Refused
) -> None:
    source = open_source(world.model)
    linear = list(source.architecture.linears)[-1]
    file = world.model / source.checkpoint.record(linear.tensor).shard
    tensors = load_file(file)
    tensors[linear.tensor][1, 2] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    message = refused("prune", world.model, "--method", "magnitude", "--out", "out")
    has(message, linear.tensor, "NaN")


def test_names_and_devices_that_no_run_can_have(world: World, refused: Refused) -> None:
    recipe = world.recipe(realign=[HSR | {"name": "n" * 101}])
    has(refused("run", recipe, "--out", "out"), "realign.0.name", "at most 100 characters")
    words = ("eval", world.model, "--suite", world.data, "--out", "out")
    has(refused(*words, "--device", "meta"), "device 'meta'", "holds no numbers")


def test_a_home_of_nobody_is_a_folder_that_is_not_there(world: World, refused: Refused) -> None:
    has(refused("run", world.recipe(model="~nobody-here/x"), "--out", "out"), "~nobody-here/x")
    suite = {"suite": "~nobody-here/x.jsonl"}
    has(refused("run", world.recipe(evaluate=suite), "--out", "out"), "~nobody-here/x.jsonl")
    has(refused("eval", world.model, "--suite", "~nobody-here/x.jsonl", "--out", "out"), "~nobody")


def test_the_estimate_of_a_run_counts_what_each_stage_takes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads half of the layers each, the ten forward and backward passes of gain: of prompts."""
    monkeypatch.setattr(steps, "_speed", lambda *_: 1e9)
    monkeypatch.setattr(steps, "_EFFICIENCY", {"cpu": 1})
    dense = open_source(world.model)
    heads = sum(layer.heads for layer in dense.architecture.layers)

    def passes(answers: int = 0, **fields: Any) -> float:
        """What realigning takes in a run, in forward passes over a prompt of one kind, less that of
        so many answers to each.
        """
        made = read_recipe(world.recipe(**fields))
        planned = pipeline.plan_run(made, world.root / "run")
        alone = pipeline.plan_run(read_recipe(world.recipe(realign=[])), world.root / "run")
        one = planned.prompts.evaluated
        assert one is not None
        tokens = planned.setup.cache.prompt_tokens(dense, one.examples)
        flops = (planned.seconds() - alone.seconds()) * 1e9
        answered = len(one.examples) + answers * made.calibration.samples
        answered *= tokens + made.evaluate.max_new_tokens
        spent = flops / (2 * dense.architecture.parameters) - answered
        return spent / (tokens * made.calibration.samples)

    by_heads = passes(realign=[{"method": "hsr", "budget": 50}])
    assert by_heads == pytest.approx(heads / 2 + 2), "and both kinds once for statistics"
    screened = {"mode": "screened", "candidates": 1, "r_max": 2}
    fewer = passes(realign=[{"method": "hsr", "budget": 50, "top_heads": 1}], heads=screened)
    assert fewer == pytest.approx(heads / 12 + 1 / 2 + 2)
    with pytest.raises(
        RegraftError, match=r"only the 1 best will be .*in a recipe heads\.candidates"
    ):
        passes(realign=[{"method": "hsr", "budget": 50, "top_heads": 2}], heads=screened)
    ours = passes(answers=2, realign=[{"method": "gain", "budget": 50}])
    assert ours == pytest.approx(2 * 30), "both kinds"


def test_a_finished_run_has_nothing_to_estimate(tmp_path: Path) -> None:
    shown = io.StringIO()
    (tmp_path / "model.safetensors").touch()
    done = SimpleNamespace(steps=[Step("prune", "", tmp_path, lambda: None)])
    show_preview(Console(file=shown, width=100), tmp_path, cast(Any, done))
    assert "Steps done: all of 1. Nothing was written." in shown.getvalue()


def test_what_needs_no_backward_pass_needs_no_space_for_one(world: World) -> None:
    """Nor what is done, and of a data set only the kinds that are learnt from."""
    place = RunDir(world.root / "run")

    def needed(**fields: Any) -> int:
        """Beside the checkpoints, and what pruning keeps of finished layers."""
        steps = pipeline.plan_run(read_recipe(world.recipe(**fields)), place.path).steps
        pruner = parse_pruning(fields.get("prune", {}))
        spilled = spilled_bytes(open_source(world.model), pruner)
        return max(
            step.temporary_bytes() - spilled * (step.stage == "prune")
            for step in steps
            if not step.done
        )

    lines = world.data.read_text().splitlines(keepends=True)
    harmless = world.data.with_name("harmless.jsonl")
    harmless.write_text("".join(line for line in lines if not json.loads(line)["harmful"]))
    assert needed() == 0
    snip = {"prune": {"method": "snip"}, "realign": []}
    assert needed(**snip, calibration={"data": str(harmless), "samples": 4}) > 0
    bare = world.data.with_name("bare.jsonl")
    rows = [{k: v for k, v in json.loads(line).items() if k != "response"} for line in lines]
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gain = {"realign": {"method": "gain", "budget": 50}}
    fields = gain | {"calibration": {"data": str(bare), "samples": 4}}
    assert needed(**fields) > 0
    recipe = read_recipe(world.recipe(**fields))
    ranking = place.ranking("pruned", recipe.ranking_name(recipe.realign[0]))
    ranking.parent.mkdir(parents=True)
    ranking.touch()
    assert needed(**fields) == 0


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the code path of a full disk (EFBIG)."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        *[("prune", 1_000), ("heads", 1_000), ("statistics", 1_000)],
        *[("eval", 150), ("apply", 50_000), ("revert", 50_000), ("realign", 10_000)],
    ],
)
def test_disk_gets_full_while_writing(
    world: World, refused: Refused, command: str, limit: int
) -> None:
    data = ["--data", world.data]
    words: dict[str, list[object]] = {
        "prune": [world.model, *data],
        "heads": [world.model, *data, "--r-max", 2],
        "statistics": [world.model, *data],
        "eval": [world.model, "--suite", world.data],
        "apply": [world.pruned, world.patch],
        "revert": [world.pruned, world.patch],
        "realign": ["hsr-a", world.model, world.pruned, "--heads", "all"],
    }
    with file_size_limit(limit):
        message = refused(*called(command), *words[command], "--out", "a/b/out")
    has(message, "The disk is full: could not write a/b/", "Free some space")


@pytest.mark.usefixtures("undrawn")
def test_disk_gets_full_in_a_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished stays, pruned layers too, to go on from; nothing is half-written."""
    recipe, run = world.recipe(), world.root / "run"
    with file_size_limit(50_000):
        assert exit_code("run", recipe, "--out", run) == 2
    layers = {path.name for path in run.glob(".pruned.regraft-work/*/*")}
    assert layers == {f"layer_{i:03d}.safetensors" for i in range(4)}
    assert {path.name for path in run.glob("[!.]*")} == {"recipe.yaml", "costs.json"}
    assert not any(path.name.endswith("regraft-tmp") for path in run.rglob("*"))

    def again(*_: object, **__: object) -> None:
        raise AssertionError("a layer was pruned again")

    monkeypatch.setattr(Wanda, "prune", again)
    run_ok("run", recipe, "--out", run)
    assert not any(path.name.endswith("regraft-work") for path in run.rglob("*"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk"
)
def test_small_disk(world: World) -> None:
    disk = world.root / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(180_000))
        words_of_heads = ["--data", world.data, "--r-max", 2]
        for words in (
            ["apply", world.pruned, world.patch, "--out", disk / "out"],
            [*called("statistics"), world.model, "--data", world.data, "--out", disk / "out"],
            [*called("heads"), world.model, *words_of_heads, "--out", disk / "out"],
        ):
            if words[0] != "apply":  # apply is stopped by the check, these by the disk itself
                filler.write_bytes(bytes(256 * 1024 - 4096 * 2))
            assert exit_code(*words) == 2, words[0]
            assert {path.name for path in disk.glob("[!.]*")} == {"filler"}, words[0]
            assert not any(path.name.endswith("regraft-tmp") for path in disk.rglob("*")), words[0]
            shutil.rmtree(disk / ".out.regraft-work", ignore_errors=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_exit_codes_of_the_program(world: World) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "regraft.cli", *map(str, words)]
        return subprocess.run(command, cwd=world.root, capture_output=True, text=True, check=False)

    good = run("--help")
    assert good.returncode == 0, good.stderr
    assert all(name in good.stdout for name in ("prune", "analyse", "realign", "apply", "run"))
    bad = run("analyse", "model", "nowhere")
    assert bad.returncode == 2, bad.stderr
    assert bad.stdout == ""
    assert "nowhere does not exist" in bad.stderr
    assert "Traceback" not in bad.stderr


# What works


def test_whole_way_by_single_commands(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)

    def run(*words: object) -> str:
        run_ok(*words)
        return capsys.readouterr().out

    described = run("analyse", "model", world.model).partition("family")[2]
    assert "16" not in described.split("prunable")[0]
    shown = run("analyse", "model", world.model, "--names")
    has(shown, "qwen2_5_vl", "layers", "query heads", "layers.3.mlp.down_proj.weight", "BF16")
    data = ["--data", world.data, "--samples", 4]
    has(run("prune", world.model, *data, "--n-m", "2:4", "--out", "half"), "50.00 %")
    has(
        run("analyse", "heads", world.model, *data, "--r-max", 2, "--out", "heads.st"),
        "rank",
        "Ships",
    )
    has(
        run("analyse", "statistics", world.model, *data, "--out", "statistics.st"),
        "Wrote statistics.st",
    )
    files = ["--heads-file", "heads.st", "--statistics-file", "statistics.st"]
    shown = run("realign", "hsr", world.model, "half", *files, "--top-heads", 2, "--out", "hsr.st")
    has(shown, "weights restored", "per 10,000")
    has(run("apply", "half", "hsr.st", "--out", "realigned"), "Checkpoint: realigned")
    has(
        run("apply", "realigned", "hsr.st", "--revert", "--out", "reverted"), "Checkpoint: reverted"
    )
    answers = ["--suite", world.data, "--max-new-tokens", 2, "--device", "cpu"]
    has(run("eval", "realigned", *answers, "--out", "a"), "ASR", "over-refusal", "95 %")
    run("eval", "half", "--patch", "hsr.st", *answers, "--out", "b")
    first, second = ((world.root / x / "answers.jsonl").read_bytes() for x in "ab")
    assert first == second, "a patch in memory answers otherwise than the checkpoint written"
    sizes = [json.loads((world.root / x / "results.json").read_text())["sizes"] for x in "ab"]
    counts = {name: sizes[1].pop(name) for name in ("restored", "pruned")}
    assert counts["restored"] > 0 and counts["pruned"] == 122880 // 2
    assert sizes[0] == sizes[1], "sparsity is counted otherwise with the patch in memory"


def test_a_recipe_to_start_from_is_printed(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    from regraft.recipes.file import read_recipe
    from regraft.recipes.recipe import Recipe

    run_ok("run", "--template")
    (world.root / "printed.yaml").write_text(capsys.readouterr().out)
    assert read_recipe(world.root / "printed.yaml") == Recipe()


def test_realign_makes_its_own_inputs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.root)
    words = ["realign", "hsr", "model", "pruned", "--data", world.data, "--samples", 4]
    words += ["--r-max", 2]
    run_ok(*words, "--top-heads", 2, "--out", "hsr.safetensors")
    made = {path.name for path in world.root.glob("hsr*")}
    assert made == {
        "hsr.safetensors",
        "hsr.heads.safetensors",
        "hsr.statistics.safetensors",
        "hsr.ranking.safetensors",
    }


@pytest.mark.slow
def test_gain_and_search(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    words = ["realign", "gain", "model", "pruned", "--budget", 20]
    words += ["--data", world.data, "--samples", 4, "--device", "cpu", "--search", "--points", 2]
    words += ["--validation", world.data, "--max-new-tokens", 2, "--out", "gain.safetensors"]
    before = tree(world.root)
    run_ok(*words, "--dry-run")
    has(capsys.readouterr().out, "answer", "rank", "search", "Steps left: 4 of 4", "MiB of mem")
    assert tree(world.root) == before
    run_ok(*words)
    shown = " ".join(capsys.readouterr().out.split())
    has(shown, "gain.safetensors:", "weights restored", "per 10,000 of")
    made = {path.name for path in world.root.glob("gain*")}
    assert made == {
        "gain.safetensors",
        "gain.ranking.safetensors",
        "gain.responses",
        "gain.curve.json",
        "gain.curve",
    }
    curve = json.loads((world.root / "gain.curve.json").read_text())
    chosen = curve["chosen"]
    assert f"{chosen:,} weights restored" in shown
    before = tree(world.root)
    run_ok(*words)
    run_ok(*words, "--dry-run")
    has(capsys.readouterr().out, "Steps done: all of 4")
    assert tree(world.root) == before
    run_ok("apply", "pruned", "gain.safetensors", "--out", "realigned")
    run_ok("apply", "realigned", "gain.safetensors", "--revert", "--out", "off")
    assert shards(world.root / "off") == shards(world.pruned)


@pytest.mark.slow
def test_gain_with_swaps_tells_both(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    words = ["realign", "gain", "model", "pruned", "--count", 5]
    words += ["--swap", "--data", world.data, "--samples", 4, "--device", "cpu"]
    run_ok(*words, "--out", "swap.safetensors")
    shown = " ".join(capsys.readouterr().out.split())
    has(shown, "5 weights restored and 5 pruned in exchange")


def test_someone_elses_extra_tensors_are_no_obstacle(world: World) -> None:
    """`rewrite` keeps this honest: a tensor that the model does not know is ignored and kept."""
    shard = sorted(world.model.glob("*.safetensors"))[0]
    index = world.model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["masks.extra"] = shard.name
    index.write_text(json.dumps(content))
    rewrite(world.model, shard.name, {"masks.extra": torch.ones(3)})
    run_ok("analyse", "model", world.model)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_has_a_command_with_only_its_flags(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ok("realign", name, "--help")
    flags = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    fields = {
        one: set(METHODS.get(one).settings_type.model_fields) - {"method"}
        for one in METHODS.names()
    }
    own = {f"--{field.replace('_', '-')}" for field in fields[name]}
    others = {f"--{field.replace('_', '-')}" for some in fields.values() for field in some}
    assert own <= flags
    assert not (others - own) & flags


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("command", ["realign", "tune"])
def test_the_help_of_a_method_fits_two_screens(command: str, name: str, columns: int) -> None:
    if command == "tune" and not METHODS.get(name).tunes:
        pytest.skip(f"{name} has nothing to tune")
    shown = io.StringIO()
    console = Console(file=shown, width=columns)
    app([command, name, "--help"], console=console, result_action="return_value")
    lines = shown.getvalue().splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) == columns
    headings = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert headings[-1] == "Expert settings"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_of_itself_what_the_list_says(name: str) -> None:
    """The list is there before a command is imported."""
    where, listed = COMMANDS[name]
    module, _, attribute = where.partition(":")
    found = getattr(import_module(f"regraft.cli.{module}"), attribute)
    own = inspect.getdoc(found) if inspect.isfunction(found) else found.help
    first = " ".join((own or "").split("\n\n")[0].split())
    assert first == listed


def test_help_shows_defaults_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    run_ok("check", "--help")
    run_ok("judge", "bench", "--help")
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    has(
        shown,
        "[default: auto]",
        "[default: 5.0]",
        "[default: True]",
        "regraft-keywords-2, vlguard-1",
    )
    assert not re.search(r"default: (False|None|\()", shown)


def test_commands_of_a_command_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    run_ok("realign", "--help")
    shown = capsys.readouterr().out
    assert "Commands" in shown and "─ Options" not in shown


def test_commands_are_listed_in_a_few_groups() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    assert max(map(len, GROUPS.values())) <= 4


def test_there_are_few_commands_at_the_top() -> None:
    assert len([name for name in app if not name.startswith("-")]) <= 14


def test_two_applications_of_one_process_share_commands() -> None:
    for own in (app, application(listed=False), app):
        for name in COMMANDS:
            _ = own[name]
        own.parse_args(["report", "run"], exit_on_error=False, print_error=False)


def test_help_is_there_without_the_heavy_packages() -> None:
    code = (
        "import sys; from regraft.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
