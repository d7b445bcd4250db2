"""Models that cannot be pruned can be evaluated; checks that protect an evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T  # noqa: N812
from safetensors.torch import load_file, save_file

import pico
import types_table
from disk import write_data
from regraft import stages
from regraft.cli import main
from regraft.cli.describing import describe
from regraft.data.collate import prompt_batch
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation import generate as generating
from regraft.evaluation.generate import Answerer, check_batch, check_lengths
from regraft.models import generation, load
from regraft.models.checkpoint import SINGLE_FILE
from regraft.models.generation import positions_of
from regraft.models.load import load_model, load_processor, open_answering, open_source
from regraft.models.loaded import enough_memory
from regraft.models.resolve import quiet
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 0,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "mlp_only_layers": [0, 1, 2, 3],
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.15}
NEVER_PRUNED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "experts": (T.MixtralForCausalLM, T.MixtralConfig, _EXPERTS),
    "recurrent layers": (T.Qwen3NextForCausalLM, T.Qwen3NextConfig, _LINEAR),
    "no linears": (T.GPT2LMHeadModel, T.GPT2Config, _GPT2),
}


def saved(kind: str, folder: Path) -> Path:
    """Save a model like a trained one, with pico's tokenizer."""
    model_class, config_class, settings = NEVER_PRUNED[kind]
    tokenizer = pico.processor("llama")
    known = pico.text_config(tokenizer, **settings)
    if kind == "no linears":
        known = settings | {name: one for name, one in known.items() if name.endswith("token_id")}
        known["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    with quiet():
        model_class(config_class(**known)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", NEVER_PRUNED)
def test_it_answers_as_it_does_alone(kind: str, tmp_path: Path) -> None:
    """Through the whole evaluation, in batches, against transformers' own greedy generation."""
    source = open_answering(saved(kind, tmp_path / "model"))
    data = write_data(tmp_path / "data", 4, images=False)
    target = stages.Target(source, ComputeSettings(device="cpu", batch_size=4))
    suites = [DataSource(name="jsonl", path=data)]
    settings = EvalSettings(max_new_tokens=8)
    done = stages.evaluate_target(target, tmp_path / "out", suites, settings)
    model, tokenizer = load_model(source, device="cpu"), load_processor(source)
    for found, example in zip(
        done.result.answers, target.reading(suites, None).examples, strict=True
    ):
        inputs = prompt_batch(tokenizer, [example]).inputs
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found.answer == text.strip()
    assert len({one.answer for one in done.result.answers}) > 1


@pytest.mark.parametrize("kind", NEVER_PRUNED)
def test_weights_that_are_missing_are_never_random(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "model")
    tensors = load_file(folder / SINGLE_FILE)
    lost = next(name for name in tensors if "1" in name and tensors[name].ndim > 1)
    del tensors[lost]
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(RegraftError, match=r"holds no weights for|could not be loaded"):
        load_model(open_answering(folder), device="cpu")


def test_weights_that_have_no_place_are_told(
    pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """A config cut to fewer layers would otherwise give a nonsense model."""
    folder = tmp_path / "model"
    shutil.copytree(pico_dir("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    told: list[str] = []
    load_model(open_answering(folder), device="cpu", note=told.append)
    (warning,) = told
    assert "holds 9 tensors" in warning and "model.layers.3." in warning
    told.clear()
    load_model(open_answering(pico_dir("llama")), device="cpu", note=told.append)
    assert told == []


def test_a_damaged_model_is_said_in_words(
    pico_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `eval`, which does not read the architecture before."""
    folder = tmp_path / "model"
    shutil.copytree(pico_dir("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    data = write_data(tmp_path / "data", 2, images=False)
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(folder), "--suite", f"jsonl:{data}", "--out", str(tmp_path / "out")])
    assert "is [64, 96] in the file, config.json describes [64, 128]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# How long a prompt may be


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}, 4096),
        (
            {
                "max_position_embeddings": 32768,  # Qwen2.5 with YaRN states the length before it
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,  # Llama 3.1 the length after it
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
            8192,
        ),
    ],
)
def test_positions_with_scaled_embeddings(settings: dict[str, Any], expected: int) -> None:
    if rope := settings.get("rope_parameters"):
        rope["rope_theta"] = 10000.0
    assert positions_of(T.LlamaConfig(**settings)) == expected
    text = T.LlamaConfig(**settings).to_dict()
    assert positions_of(T.LlavaConfig(text_config=text)) == expected


def test_a_recurrent_model_has_no_limit() -> None:
    assert positions_of(T.MambaConfig()) is None


def test_prompts_that_are_too_long_are_counted_before_work(
    pico_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"id": f"row-{i}", "instruction": "abcd " * words, "harmful": True}
        for i, words in enumerate((3, 2000, 5, 3000))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("loaded"))
    words = ["eval", str(pico_dir("llama")), "--suite", f"jsonl:{data}"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().err.split())
    assert f"2 of 4 prompts are too long for the model of {pico_dir('llama')}, which has" in said
    assert "the longest, 'row-3', has" in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data.jsonl"]


@pytest.mark.parametrize("room", [-1, 0])
def test_the_last_prompt_that_fits(tmp_path: Path, room: int) -> None:
    """Exact to the token: one that just fits is taken, one token more is not."""
    processor = pico.processor("llama")
    (example,) = pico.write_examples(tmp_path, 1, images=False)
    length = prompt_batch(processor, [example]).inputs["input_ids"].shape[1]
    config = T.LlamaConfig(max_position_embeddings=length + 5 + room)
    short = replace(example, id="short", instruction="no")
    batch = prompt_batch(processor, [short, example])
    if room < 0:
        with pytest.raises(RegraftError, match="1 of 2 prompts are too long"):
            check_lengths(config, processor, [short, example], 5)
        with pytest.raises(RegraftError, match=rf"The prompt '{example.id}' has {length} tokens"):
            check_batch(config, batch, 5)
    else:
        check_lengths(config, processor, [short, example], 5)
        check_batch(config, batch, 5)


def test_a_default_system_prompt_counts_where_only_others_have_their_own(tmp_path: Path) -> None:
    processor = pico.processor("llama")
    default = "{% if messages[0].role != 'system' %}" + "Be kind. " * 50 + "{% endif %}"
    processor.chat_template = default + processor.chat_template
    (own,) = pico.write_examples(tmp_path, 1, images=False)
    own, bare = replace(own, system="Be kind."), replace(own, id="bare", instruction="no")
    length = prompt_batch(processor, [bare]).inputs["input_ids"].shape[1]
    config = T.LlamaConfig(max_position_embeddings=length + 4)
    for examples in ([own, bare], [bare, own]):
        with pytest.raises(RegraftError, match=r"1 of 2 prompts are too long.*'bare'"):
            check_lengths(config, processor, examples, 5)


# Batches and memory


def test_types_that_padding_changes_get_prompts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = pico.build("llama")
    examples = pico.write_examples(tmp_path, 5, images=False)
    asked: list[int] = []
    own = generating.answer

    def counted(model: Any, processor: Any, inputs: Any, *rest: Any) -> list[str]:
        asked.append(len(inputs["input_ids"]))
        return own(model, processor, inputs, *rest)

    monkeypatch.setattr(generating, "answer", counted)
    together = Answerer(processor, examples, batch_size=3).answers(model, max_new_tokens=5)
    assert asked == [3, 2]
    monkeypatch.setattr(generation, "_CHANGED_BY_PADDING", ("llama",))
    assert Answerer(processor, examples, batch_size=3).answers(model, max_new_tokens=5) == together
    assert asked == [3, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("said", ["text", ("image", "video", "text")])
def test_a_model_with_a_vision_tower_takes_images(
    said: str | tuple[str, ...], pico_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if an older transformers declares only "text" for its class."""
    monkeypatch.setattr(T.Qwen3_5ForConditionalGeneration, "input_modalities", said)
    source = open_source(pico_dir("qwen3_5"))
    assert source.has_vision and hasattr(load_processor(source), "image_processor")
    assert not open_source(pico_dir("qwen3_next")).has_vision


def test_images_without_a_vision_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chameleon has a `vq_config`."""
    types_table.saved("chameleon", tmp_path)
    describe(str(tmp_path))
    shown = capsys.readouterr().out
    assert "vision       yes" in shown and " MiB in 1 file(s)" in shown


def test_memory_that_does_not_suffice_says_what_to_lower(tmp_path: Path) -> None:
    with (
        pytest.raises(RegraftError, match=r"not enough memory .* --dtype bfloat16 .*--batch-size"),
        enough_memory(tmp_path),
    ):
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), enough_memory(tmp_path):
        raise RuntimeError("another")


def test_memory_that_ends_half_way_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("regraft.api.open_target", lambda *_, **__: torch.empty(1 << 50))
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "demo", "--suite", "demo:test", "--out", str(tmp_path / "out")])
    assert "is out of memory. Lower --batch-size" in " ".join(capsys.readouterr().err.split())


def test_a_model_without_greedy_answers_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico.save("llama", tmp_path / "llama"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "pi0"}))
    with pytest.raises(RegraftError, match=r"of type pi0, whose .* gives no greedy answers"):
        open_answering(folder)


def test_what_needs_the_architecture_reads_it_at_once(tmp_path: Path) -> None:
    folder = saved("no linears", tmp_path / "model")
    source = open_answering(folder)
    assert source.readable_architecture is None
    with pytest.raises(RegraftError, match="have no linears to prune"):
        _ = source.architecture
    with pytest.raises(RegraftError, match="have no linears to prune"):
        open_source(folder)
