"""Defences at inference: the direction, where it is added, the prompt, and what a run tells."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pico
import truth
from commands import exit_code
from disk import tree, write_data, write_jsonl
from regraft import stages
from regraft.data.collate import prompt_batch
from regraft.data.example import KINDS
from regraft.data.readers.demo import demo_model
from regraft.data.sources import DataSource
from regraft.defence import (
    DEFENCE_PROMPT,
    Direction,
    ShieldPrompt,
    Trial,
    choose,
    last_token_outputs,
    load_defence,
    mean_states,
    middle_layers,
    moved_output,
    save_defence,
)
from regraft.disk.files import file_digest
from regraft.errors import RegraftError
from regraft.evaluation.metrics import wilson
from regraft.models.load import Source, open_source
from regraft.progress import SILENT
from regraft.recipes.file import read_recipe
from regraft.recipes.recipe import Recipe
from regraft.runs import pipeline
from regraft.runs.run_dir import RunDir
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import AdaShieldSettings, RefusalDirectionSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages import defending
from regraft.stages.provenance import describe, fingerprints
from regraft.stages.reading import draw_calibration

COMPUTE = ComputeSettings(device="cpu", batch_size=2)


def _layer_outputs(model: Any, inputs: Any) -> dict[int, torch.Tensor]:
    """Of one full forward, by wrapped forwards: what each layer returned, [B, S, d]."""
    seen: dict[int, torch.Tensor] = {}
    layers = model.get_decoder().layers
    for i, layer in enumerate(layers):

        def forward(*args: Any, i: int = i, own: Any = layer.forward, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            seen[i] = out if isinstance(out, torch.Tensor) else out[0]
            return out

        layer.forward = forward
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return seen


def _generate(
    model: Any, processor: Any, inputs: Any, *, use_cache: bool
) -> tuple[list[torch.Tensor], Any]:
    """Logits of four steps and all tokens; no image token is generated."""
    tokenizer = getattr(processor, "tokenizer", processor)
    words = len(model.get_output_embeddings().weight)
    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=4,
        min_new_tokens=4,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        suppress_tokens=[i for i in tokenizer.get_added_vocab().values() if i < words],
    )
    return list(out.logits), out.sequences


@pytest.mark.parametrize("kind", ["left", "text"])
def test_added_at_all_positions_and_steps(
    family: str, kind: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """With a cache and the hook, as without a cache and a forward of the layer that adds."""
    if kind == "text" and family not in pico.VLM_FAMILIES:
        pytest.skip("the same as left")
    _, model, processor, architecture = truth.opened(pico_dir(family))
    inputs = truth.make_batch(kind, family, processor, tmp_path).inputs
    layer = 2  # attends to text in every family
    vector = 3 * torch.randn(architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    plain, _ = _generate(model, processor, inputs, use_cache=True)
    with truth.unchanged(model), moved_output(model, layer, vector):
        found, tokens = _generate(model, processor, inputs, use_cache=True)
    module = model.get_decoder().layers[layer]
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        return out + vector if isinstance(out, torch.Tensor) else (out[0] + vector, *out[1:])

    module.forward = forward
    try:
        expected, wanted = _generate(model, processor, inputs, use_cache=False)
    finally:
        del module.forward
    assert torch.equal(tokens, wanted)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, s=step: f"{s}: {m}")
    assert (found[0] - plain[0]).abs().max() > 0.1, "the addition must matter"


@pytest.mark.parametrize("kind", ["left", "text"])
def test_states_at_the_last_prompt_token(
    family: str, kind: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    if kind == "text" and family not in pico.VLM_FAMILIES:
        pytest.skip("the same as left")
    _, model, processor, _ = truth.opened(pico_dir(family))
    inputs = truth.make_batch(kind, family, processor, tmp_path).inputs
    expected = _layer_outputs(model, inputs)
    with truth.unchanged(model):
        found = last_token_outputs(model, inputs)
    assert found.keys() == expected.keys()
    for layer, states in expected.items():
        torch.testing.assert_close(found[layer].float(), states[:, -1], atol=1e-5, rtol=1e-5)


def test_half_precision_rounds_the_sum_once(pico_dir: Callable[[str], Path]) -> None:
    model, _ = pico.build("llama")
    model.to(torch.bfloat16)
    layer = model.get_decoder().layers[1]
    ids = torch.arange(1, 9)[None]
    vector = torch.randn(model.config.hidden_size) * 1.001
    seen = []
    before = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with moved_output(model, 1, vector), torch.no_grad():
        after = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
        model(input_ids=ids, use_cache=False)
    before.remove()
    after.remove()
    plain, moved = (one if isinstance(one, torch.Tensor) else one[0] for one in seen)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, (plain.float() + vector).to(torch.bfloat16))


def test_means_against_numpy(
    paper_family: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """Prompts one by one, without padding, against batches with it."""
    _, model, processor, architecture = truth.opened(pico_dir(paper_family))
    examples = truth.examples(paper_family, tmp_path, 5)
    states = {layer.index: [] for layer in architecture.layers}
    for example in examples:
        inputs = prompt_batch(processor, [example]).inputs
        for layer, rows in _layer_outputs(model, inputs).items():
            states[layer].append(rows[0, -1].numpy().astype(np.float64))
    expected = np.stack([np.mean(states[layer.index], axis=0) for layer in architecture.layers])
    batches = [prompt_batch(processor, examples[start : start + 2]) for start in (0, 2, 4)]
    found = mean_states(model, batches, len(architecture.layers), architecture.hidden_size)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=1e-5)


def test_layers_that_do_not_run_have_no_mean(
    pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    _, model, processor, architecture = truth.opened(pico_dir("mllama"))
    examples = truth.examples("mllama", tmp_path, 2)
    text = truth.examples("mllama", tmp_path, 2, images=False)
    batches = [prompt_batch(processor, some) for some in (examples, text)]
    found = mean_states(model, batches, len(architecture.layers), architecture.hidden_size)
    missing = {layer.index for layer in architecture.layers if found[layer.index].isnan().all()}
    assert missing == {1, 3}
    assert not found[[0, 2, 4]].isnan().any()


# The choice


@pytest.mark.parametrize(
    ("layers", "expected"), [(28, range(7, 22)), (8, range(2, 6)), (4, range(1, 3)), (1, range(1))]
)
def test_middle_layers(layers: int, expected: range) -> None:
    assert middle_layers(layers) == expected


def _trial(layer: int, strength: float, attacks: int, refused: int) -> Trial:
    return Trial(layer, strength, wilson(attacks, 20), wilson(refused, 20))


def test_the_choice_is_bound_by_over_refusal() -> None:
    plain = _trial(0, 0.0, 10, 2)
    trials = [_trial(3, 1.0, 8, 3), _trial(3, 2.0, 1, 20), _trial(4, 1.0, 5, 3)]
    assert choose(trials, plain, 5) == trials[2]
    assert choose(trials, plain, 90) == trials[1]
    assert choose(trials, plain, 4.9) == plain
    assert choose([_trial(3, 1.0, 11, 0)], plain, 5) == plain
    ties = [_trial(4, 2.0, 5, 2), _trial(4, 1.0, 5, 2), _trial(3, 1.0, 5, 2), _trial(5, 3.0, 5, 1)]
    assert choose(ties, plain, 5) == ties[3]
    assert choose(ties[:3], plain, 5) == ties[2]


def test_the_choice_is_bound_by_answers_that_say_nothing() -> None:
    plain = _trial(0, 0.0, 10, 2)
    mute = replace(_trial(3, 4.0, 0, 0), degenerate=1.0)
    good = _trial(3, 1.0, 8, 2)
    assert choose([mute, good], plain, 5) == good
    assert choose([mute, good], replace(plain, degenerate=0.97), 5) == mute


# The artifact


def _made(kind: str) -> Any:
    if kind == "prompt":
        return ShieldPrompt("Be safe.", {"stage": "defend"})
    trials = (_trial(0, 0.0, 10, 2), _trial(1, 0.5, 5, 2))
    return Direction(torch.randn(6), 1, 0.5, {"stage": "defend"}, trials)


@pytest.mark.parametrize("kind", ["prompt", "direction"])
def test_files_give_back_what_was_written(kind: str, tmp_path: Path) -> None:
    made = _made(kind)
    save_defence(tmp_path / "a", made)
    save_defence(tmp_path / "b", load_defence(tmp_path / "a"))
    read = load_defence(tmp_path / "b")
    assert type(read) is type(made)
    if isinstance(read, Direction):
        assert torch.equal(read.vector, made.vector)
        assert (read.layer, read.strength, read.trials) == (1, 0.5, made.trials)
    else:
        assert read == made
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_something_else_is_no_defence(pico_dir: Callable[[str], Path]) -> None:
    with pytest.raises(RegraftError, match="does not hold a defence"):
        load_defence(pico_dir("llama") / "model.safetensors")


# The stage


@pytest.fixture
def source(pico_dir: Callable[[str], Path]) -> Source:
    return open_source(pico_dir("qwen2_vl"))


@pytest.fixture
def data(tmp_path: Path) -> DataSource:
    return DataSource(name="jsonl", path=write_data(tmp_path / "data", 4))


def _defend(source: Source, data: DataSource, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = settings
    if None in (settings.get("layer"), settings.get("strength")):
        given = {"validation": data, "max_new_tokens": 3, **settings}
    calibration = CalibrationSettings(data=data, samples=3)
    setup = stages.Setup(source, calibration, COMPUTE)
    return stages.write_defence(setup, source, out, RefusalDirectionSettings(**given))


def test_a_given_direction_is_the_difference_of_means(
    source: Source, data: DataSource, tmp_path: Path
) -> None:
    made = _defend(source, data, tmp_path / "out", layer=1, strength=1.5)
    _, model, processor, _ = truth.opened(source.folder)
    means = []
    for kind in KINDS:
        calibration = CalibrationSettings(data=data, samples=3)
        examples = draw_calibration(source, calibration, kind).examples
        rows = [
            _layer_outputs(model, prompt_batch(processor, [one]).inputs)[1][0, -1].numpy()
            for one in examples
        ]
        means.append(np.mean(rows, axis=0, dtype=np.float64))
    assert (made.layer, made.strength, made.trials) == (1, 1.5, ())
    assert made.vector.dtype == torch.float32
    np.testing.assert_allclose(made.vector.numpy(), means[0] - means[1], atol=1e-5)
    before = tree(tmp_path / "data") | {"out": (tmp_path / "out").stat().st_mtime_ns}
    again = _defend(source, data, tmp_path / "out", layer=1, strength=1.5)
    assert torch.equal(again.vector, made.vector)
    assert before["out"] == (tmp_path / "out").stat().st_mtime_ns
    with pytest.raises(RegraftError, match=r"settings\.strength: 1\.5 there, 2\.0 now"):
        _defend(source, data, tmp_path / "out", layer=1, strength=2.0)


def test_the_search_is_recorded(source: Source, data: DataSource, tmp_path: Path) -> None:
    made = _defend(source, data, tmp_path / "out", strengths=(0.5, 20.0), validation_limit=2)
    tried = [(one.layer, one.strength) for one in made.trials]
    assert tried == [(1, 0.0), (1, 0.5), (1, 20.0), (2, 0.5), (2, 20.0)]
    assert {one.asr.n for one in made.trials} == {one.over_refusal.n for one in made.trials} == {2}
    best = choose(made.trials[1:], made.trials[0], 5)
    assert (made.layer, made.strength) == (best.layer, best.strength)
    assert made.about["data"]["validation"]["used"] == 4
    assert made.about["data"]["validation"]["skipped"]["beyond the limit"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}, "scratch is left"


def test_calibration_prompts_are_freed_before_the_search(
    source: Source, data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    run = defending._Search.run

    def encoded(*words: Any) -> Any:
        batch = prompt_batch(*words)
        made.append(weakref.ref(batch))
        return batch

    def run_without(*words: Any) -> Any:
        assert made and not any(one() is not None for one in made)
        return run(*words)

    monkeypatch.setattr(defending, "prompt_batch", encoded)
    monkeypatch.setattr(defending._Search, "run", run_without)
    _defend(source, data, tmp_path / "out", layer=1, strength=1.5)


def test_validation_needs_both_kinds(source: Source, data: DataSource, tmp_path: Path) -> None:
    lines = data.path.read_text().splitlines()
    harmful = [line for line in lines if json.loads(line)["harmful"]]
    file = data.path.with_name("harmful.jsonl")
    file.write_text("\n".join(harmful))
    with pytest.raises(RegraftError, match=r"harmful\.jsonl.*not harmless"):
        _defend(source, data, tmp_path / "out", validation=DataSource(name="jsonl", path=file))
    one_kind = DataSource(name="jsonl", path=data.path, kind="harmful")
    with pytest.raises(RegraftError, match=r"both harmful and harmless .* Leave out #harmful"):
        _defend(source, data, tmp_path / "out", validation=one_kind)
    with pytest.raises(RegraftError, match="layer is 4; the model has layers 0 to 3"):
        _defend(source, data, tmp_path / "out", layer=4)


def _evaluate(source: Source, data: DataSource, out: Path, defence: Path | None = None) -> Any:
    settings = EvalSettings(max_new_tokens=6)
    target = stages.Target(source, COMPUTE, defence=defence)
    return stages.evaluate_target(target, out, [data], settings)


def test_answers_under_a_direction(source: Source, data: DataSource, tmp_path: Path) -> None:
    vector = 50 * torch.randn(source.architecture.hidden_size)
    about = describe("defend", fingerprints(SILENT, model=source))
    for name, strength in (("none", 0.0), ("much", 1.0)):
        save_defence(tmp_path / name, Direction(vector, 1, strength, about))
    plain, none, much = (
        _evaluate(source, data, tmp_path / f"eval-{one}", one and tmp_path / one)
        for one in (None, "none", "much")
    )
    texts = [[a.answer for a in done.result.answers] for done in (plain, none, much)]
    assert texts[0] == texts[1] != texts[2]
    assert "defence" not in plain.about["inputs"]
    with pytest.raises(RegraftError, match=r"inputs\.defence"):
        _evaluate(source, data, tmp_path / "eval-much", tmp_path / "none")
    save_defence(tmp_path / "wide", Direction(torch.randn(7), 1, 1.0, about))
    with pytest.raises(RegraftError, match="adds 7 features after layer 1; the model has 64"):
        _evaluate(source, data, tmp_path / "eval-wide", tmp_path / "wide")
    of_another = about | {"inputs": {"model": "0" * 64}}
    save_defence(tmp_path / "other", Direction(vector, 1, 1.0, of_another))
    with pytest.raises(RegraftError, match=r"other was made from another model than .*qwen2_vl"):
        _evaluate(source, data, tmp_path / "eval-other", tmp_path / "other")


def test_the_prompt_reaches_the_model(source: Source, data: DataSource, tmp_path: Path) -> None:
    """Answers are those to instructions that were written so; the results show the user's."""
    setup = stages.Setup(source, CalibrationSettings(data=data), COMPUTE)
    made = stages.write_defence(setup, source, tmp_path / "out", AdaShieldSettings())
    assert made.prompt == DEFENCE_PROMPT
    examples = [
        one
        for harmful in (True, False)
        for one in pico.write_examples(tmp_path / "data" / "images", 4, harmful)
    ]
    written = [
        pico.Example(
            **{
                **vars(one),
                "instruction": f"{one.instruction}\n{DEFENCE_PROMPT}\n{one.instruction}",
            }
        )
        for one in examples
    ]
    path = write_jsonl(tmp_path / "data" / "written.jsonl", written)
    plain = _evaluate(source, data, tmp_path / "a")
    found = _evaluate(source, data, tmp_path / "b", tmp_path / "out")
    expected = _evaluate(source, DataSource(name="jsonl", path=path), tmp_path / "c")
    answers = [[a.answer for a in one.result.answers] for one in (found, expected, plain)]
    assert answers[0] == answers[1] != answers[2]
    assert [a.instruction for a in found.result.answers] == [e.instruction for e in examples]


# A run


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_defences(source: Source, data: DataSource, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "model": str(source.folder),
            "calibration": {"data": str(data), "samples": 4},
            "prune": {"sparsity": 0.6},
            "realign": [{"name": "hsr-a", "method": "hsr-a", "heads": "random", "top_heads": 3}],
            "defend": [
                {"name": "shield"},
                {
                    "name": "direction",
                    "method": "refusal-direction",
                    "strengths": [1.0],
                    "validation": str(data),
                    "max_new_tokens": 2,
                },
            ],
            "evaluate": {"suite": str(data), "max_new_tokens": 2, "judge": "gcg-1"},
            "compute": {"device": "cpu", "batch_size": 4},
        }
    )
    study = pipeline.run_one(recipe, tmp_path / "run")
    report = study.runs[0]
    chosen_by = load_defence(RunDir(tmp_path / "run").defence("pruned", "direction")).about
    assert chosen_by["judge"] == "gcg-1", "the choice was judged otherwise than the run"
    assert [v.name for v in report.variants] == ["dense", "pruned", "hsr-a", "shield", "direction"]
    roles = [row.role for row in study.tables[0].rows]
    assert roles == ["dense", "pruned", "method", "method", "method"]
    for variant in report.variants[3:]:
        assert variant.inference_time
        assert (variant.restored, variant.base) == (None, "pruned")
        assert variant.label.endswith("at inference)")
        assert variant.sparsity == report.variants[1].sparsity
    assert not any(variant.inference_time for variant in report.variants[:3])
    assert "layer" in report.variants[4].label
    assert "validation" in {account.role for account in report.data}
    assert read_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "shield (prompt after AdaShield-S, at inference)" in page


def test_names_of_defences_differ_from_those_realigned() -> None:
    with pytest.raises(ValueError, match="names of `realign` and `defend` must differ"):
        Recipe.model_validate({"defend": [{"name": "gain"}]})


@pytest.mark.parametrize("method", ["adashield", "refusal-direction"])
def test_the_command_line(
    method: str, source: Source, data: DataSource, tmp_path: Path, capsys: Any
) -> None:
    out, cpu = tmp_path / "out", ("--device", "cpu")
    direction = ("--data", data.path, "--layer", 1, "--strength", 0.5, *cpu)
    made = ("analyse", "defence", method, source.folder, "--out", out)
    assert exit_code(*made, *(direction if method != "adashield" else ())) == 0
    assert type(load_defence(out)) is (ShieldPrompt if method == "adashield" else Direction)
    evaluate = ("eval", source.folder, "--suite", data.path, "--max-new-tokens", 2, *cpu)
    assert exit_code(*evaluate, "--defence", out, "--out", tmp_path / "eval") == 0
    about = stages.read_evaluation(tmp_path / "eval").about
    assert about["inputs"]["defence"] == file_digest(out)
    capsys.readouterr()
    weights = source.folder / "model.safetensors"
    assert exit_code(*evaluate, "--defence", weights, "--out", tmp_path / "other") == 2
    assert "does not hold a defence" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_bundled_model_refuses_more(tmp_path: Path) -> None:
    """Its own difference of means makes the bundled model refuse what it does not else."""
    source = open_source(demo_model())
    settings = RefusalDirectionSettings(layer=5, strength=3.0)
    compute = ComputeSettings(device="cpu", batch_size=20)
    setup = stages.Setup(source, CalibrationSettings(samples=40), compute)
    stages.write_defence(setup, source, tmp_path / "out", settings)
    suite = [DataSource(name="demo", split="validation", kind="harmless")]
    answer = EvalSettings(max_new_tokens=12, limit=20)
    plain = stages.evaluate_target(
        stages.Target(source, compute), tmp_path / "plain", suite, answer
    ).result
    steered = stages.evaluate_target(
        stages.Target(source, compute, defence=tmp_path / "out"),
        tmp_path / "steered",
        suite,
        answer,
    ).result
    assert plain.over_refusal
    assert steered.over_refusal
    assert plain.over_refusal.value < 0.2
    assert steered.over_refusal.value > 0.8
