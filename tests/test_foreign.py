"""Faults in a model's files that transformers reads are named, before long work starts."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
import pico_today
import regraft
from regraft.data.collate import prompt_batch
from regraft.data.example import Example
from regraft.disk.files import write_json
from regraft.errors import RegraftError
from regraft.evaluation.generate import Answerer
from regraft.loading import load, load_layerwise
from regraft.models import chat_template, foreign
from regraft.models.checkpoint_copy import write_edited
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import (
    load_model,
    load_placed,
    load_processor,
    open_answering,
    open_source,
)
from regraft.models.loaded import check_unloaded, refuse_tokens_without_embedding
from regraft.models.model_settings import disagreement
from regraft.progress import Progress
from regraft.settings.compute import ComputeSettings

FAMILY = "llama"


@pytest.fixture
def model(pico_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico_dir(FAMILY), tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, r"config.json: num_hidden_layers is 1000000"),
        (
            "config.json",
            {"num_hidden_layers": 1025},
            r"num_hidden_layers is 1025; expected 1,024 at",
        ),
        ("config.json", {"num_hidden_layers": -1}, r"layers is -1; expected 0 to 1,024"),
        ("config.json", {"model_type": "new"}, r'config.json: model_type is "new", which transf'),
        ("generation_config.json", {"max_new_tokens": -1}, r"its generation_config.json could not"),
        ("config.json", {"hidden_size": 10**12}, r"config.json: hidden_size is 1000000000000"),
        (
            "config.json",
            {"sub": {"intermediate_size": 2**24 + 1}},
            r"sub.intermediate_size is 1677",
        ),
        ("config.json", {"vocab_size": 1e300}, r"vocab_size is 1e\+300; expected 16,777,216 at"),
        (
            "config.json",
            {"num_experts": 2**14 + 1},
            r"num_experts is 16385; expected 16,384 at most",
        ),
        ("config.json", {"num_labels": 10**9}, r"config.json: num_labels is 1000000000"),
        ("config.json", {"sub": {"depths": [2, 10**9]}}, r"config.json: sub.depths is 1000000000"),
        ("config.json", {"kernel_size": [[3, 3], [3, 10**9]]}, r"kernel_size is 1000000000"),
        ("config.json", {"parts": [{"num_layers": 1025}]}, r"parts.num_layers is 1025"),
        (
            "config.json",
            {"rope_scaling": {"factor": "x"}},
            r'rope_scaling.factor is "x"; exp',
        ),
        (
            "config.json",
            {"rope_parameters": {"full": {"factor": 1e308}}},
            r"factor is 1e\+308",
        ),
        ("config.json", {"max_position_embeddings": []}, r"max_position_embeddings is \[\]"),
        ("generation_config.json", {"eos_token_id": {}}, r"generation_config.json: eos_token_id"),
        ("generation_config.json", {"pad_token_id": 2**40}, r"pad_token_id is 1099511627776"),
        ("tokenizer_config.json", {"model_max_length": []}, r"tokenizer_config.json: model_max_le"),
        (
            "tokenizer.json",
            {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
            r"tokenizer.json: its normalizer makes 1,000,001 characters of one",
        ),
        ("config.json", {"hidden_act": "nope"}, r"look at hidden_act of config.json"),
        (
            "config.json",
            {"vocab_size": 4_000_000},
            r"\.weight is \[.* in the file, config.json desc",
        ),
        ("config.json", {"num_hidden_layers": 1000}, r"model holds no weights for model.layers."),
    ],
)
def test_settings_that_no_model_has(
    model: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    change(model / file, **fields)
    began = time.process_time()
    for opened in (open_source, open_answering):
        with pytest.raises(RegraftError, match=message):
            opened(model)
    assert time.process_time() - began < 5


def test_a_pipe_among_the_files(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(RegraftError, match=r"tokenizer.json is a device, a pipe or a socket"):
        open_source(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", r"tokenizer.json: not valid JSON: .* Take the file of the base"),
        ("tokenizer.json", b"[" * 10**6, r"tokenizer.json: not valid JSON: maximum recursion"),
        ("tokenizer.json", b"[]", r"tokenizer.json: expected a JSON object, found \[\]"),
        (
            "tokenizer_config.json",
            b"\xef\xbb\xbf{}",
            r"r_config.json begins with a byte order mark",
        ),
        ("chat_template.jinja", b"\xef\xbb\xbfHi", r"template.jinja begins with a byte order mark"),
        ("chat_template.jinja", b"\xff", r"chat_template.jinja is not UTF-8 text"),
    ],
)
def test_files_that_are_not_what_they_are_called(
    model: Path, name: str, content: bytes, message: str
) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(RegraftError, match=message):
        open_answering(model)


def test_tokens_of_a_wrong_type_are_named_where_a_tokenizer_fails(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"extra_special_tokens": ["a", True]})
    message = r'extra_special_tokens is \["a", true\]; expected a list of tokens'
    with pytest.raises(RegraftError, match=message), foreign.of_processor(tmp_path):
        raise ValueError("unhashable")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages", "is not a valid template"),
        (
            "{% for a in range(9999) %}{% for b in range(900) %}{% endfor %}{% endfor %}",
            "has not re",
        ),
        ("{{ 'a' * ('900000000' | int) }}", "multiplies by more than 1,000,000"),
        (
            "{% set n %}900000000{% endset %}{{ 'a' * (n | int) }}",
            "multiplies by more than 1,000,000",
        ),
        *(
            (template, "multiplies by more than 1,000,000")
            for template in (
                "{{ '%0999999999d' % 1 }}",
                "{% set n = '%0999999999d' %}{{ n | format(1) }}",
                "{{ '{:>999999999}'.format(1) }}",
            )
        ),
        ("{% for x in ['%0999999999d'] %}{{ x % 1 }}{% endfor %}", "more than 1,000,000"),
        ("{% set x %}%09999999d{% endset %}{{ x % 1 }}", "more than 1,000,000"),
        ("{{ '{:>999999999}'['format'](1) }}", "more than 1,000,000"),
        ("{{ 'a' * 10**10 }}", "holds a power, or multiplies by more than 1,000,000"),
        ("{{ 'a' * 99999 * 99999 }}", "multiplies by more than 1,000,000"),
        (
            "{% generation %}{{ 'a'.ljust(9999999999) }}{% endgeneration %}",
            "by more than 1,000,000",
        ),
        ("{% for a in range(30000) %}x{% endfor %}", "makes 30,000 characters of one word"),
        (
            "{% for a in messages[0].content %}{% for b in range(400) %}{% endfor %}{% endfor %}",
            "has not",
        ),
        (
            "{% for a in messages[0].content %}{{ messages[0].content[:99] }}{% endfor %}",
            "makes 2,376,000 characters of a long prompt",
        ),
        (
            "{% if messages[0].role == 'system' %}{% for a in range(30000) %}x{% endfor %}"
            "{% endif %}{{ messages[-1].content }}",
            "makes 30,005 characters of a system prompt",
        ),
        ("Answer the question.", "leaves out the user.s message"),
        ("{{ messages[0].content[:3] }}", "leaves out the user.s message"),
    ],
)
def test_chat_templates(
    model: Path, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_PATIENCE", 0.05 if "has not" in message else 60.0)
    source = open_source(model)
    load_processor(source)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(RegraftError, match=message) as error:
        load_processor(source)
    assert str(model) in str(error.value)


def test_a_template_that_prints_the_date_is_told(model: Path) -> None:
    class Told(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    source, template = open_source(model), model / "chat_template.jinja"
    load(source, ComputeSettings(device="cpu"), Told())
    assert not notes
    template.write_text("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    load(source, ComputeSettings(device="cpu"), Told())
    load_layerwise(source, ComputeSettings(device="cpu"), Told())
    assert len(notes) == 2
    assert all(f"The chat template of {model} prints today's date" in one for one in notes)


def test_digits_in_the_text_of_a_template_are_no_numbers(model: Path) -> None:
    text = (
        "{% set date = '20250131' %}1234567890 {{ date }}"
        "{% for one in messages %}{% if (loop.index0 + 1) % 2 %} {{ one.content }}{% endif %}"
        "{% endfor %}"
    )
    (model / "chat_template.jinja").write_text(text)
    assert load_processor(open_source(model)).chat_template == text


def test_replacements_that_do_not_chain_are_few_characters(model: Path) -> None:
    """Each makes several characters of one, but they do not multiply."""
    kinds = {"…": "...", "½": "1/2", "™": "(TM)", "©": "(C)", "€": "EUR", "£": "GBP", "¼": "1/4"}
    steps = [
        {"type": "Replace", "pattern": {"String": one}, "content": by} for one, by in kinds.items()
    ]
    change(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    tokenizer = load_processor(open_source(model))
    assert tokenizer("…")["input_ids"] == tokenizer("...")["input_ids"]
    chain = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"} for _ in range(6)]
    change(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": chain})
    with pytest.raises(RegraftError, match=r"tokenizer.json: its normalizer makes .* of one"):
        open_source(model)


def test_a_tensor_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    """Molmo2's queries, keys and values are one tensor on disk."""
    folder = pico.save("molmo2", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(one for one in tensors if one.endswith("att_proj.weight"))
    for wrong in (tensors[name][:3], tensors[name].flatten(), tensors[name][None]):
        save_file(tensors | {name: wrong.contiguous()}, folder / "model.safetensors")
        with pytest.raises(RegraftError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
            open_source(folder)


def own_code(model: Path, body: str) -> None:
    """A llama whose class comes with the model, with code added to its __init__."""
    (model / "modeling_own.py").write_text(
        "import torch\nfrom transformers import LlamaForCausalLM\n\n\n"
        "class Own(LlamaForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        f"        {body}\n"
    )
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("bounds", torch.inf, True),
        ("bounds", torch.nan, False),
        ("model.norm.weight", torch.inf, False),
        ("none", torch.inf, True),
        ("none", torch.nan, False),
    ],
)
def test_bounds_may_be_infinite(
    name: str, value: float, taken: bool, model: Path, tmp_path: Path
) -> None:
    """Clipping bounds such as Gemma 4's, used by the model or not; parameters may not."""
    own_code(model, "self.register_buffer('bounds', torch.zeros(3))")
    tensors = {"bounds": torch.ones(3), **load_file(model / "model.safetensors")}
    tensors[name] = tensors.get(name, torch.ones(3)).clone()
    tensors[name][1] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    source = open_source(model, trust_remote_code=True)

    def copy() -> None:
        write_edited(source.checkpoint, tmp_path / "new", {}, unbounded=source.unbounded)

    loaded = [] if name == "none" else [lambda: load_model(source)]  # without a place is not loaded
    besides = [partial(check_unloaded, source.checkpoint, source.unbounded)]
    besides *= name != "model.norm.weight"
    for act in (copy, *loaded, *besides):
        if taken:
            act()
            continue
        with pytest.raises(RegraftError, match=f"the tensor {name} holds numbers that are NaN or"):
            act()
    assert (tmp_path / "new").exists() == taken


def test_nan_without_a_place_is_found_before_pruning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**load_file(model / "model.safetensors"), "extra": torch.full((3,), torch.nan)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    rows = [{"id": i, "instruction": "a b", "response": "c", "harmful": False} for i in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    began = "it began to prune"
    monkeypatch.setattr("regraft.stages.pruning._calibrated", lambda *_: pytest.fail(began))
    with pytest.raises(RegraftError, match="the tensor extra holds"):
        regraft.prune(model, tmp_path / "out", data=tmp_path / "data.jsonl", samples=2)
    assert not (tmp_path / "out").exists()


def test_layers_without_a_place_in_the_model_are_told_and_left(tmp_path: Path) -> None:
    """Also if one of their tensors would be split."""
    folder = pico.save("molmo2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    load_model(open_answering(folder), note=said.append)
    assert "does not use" in said[0]


def test_tokens_have_embeddings_in_two_tables_but_none_in_a_norm() -> None:
    class Embeddings(torch.nn.Embedding):
        def __init__(self) -> None:
            super().__init__(5, 4)
            self.more, self.norm = torch.nn.Embedding(2, 4), torch.nn.LayerNorm(4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids

    class Model(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            return embeddings

    embeddings = Embeddings()
    refuse_tokens_without_embedding(Model(), Path("folder"))
    embeddings(torch.tensor([0, 6]))
    with pytest.raises(RegraftError, match="the token 7, but the model of folder has 7 embeddings"):
        embeddings(torch.tensor([0, 7]))


def test_tokens_without_an_embedding_are_named(model: Path, tmp_path: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] |= dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 10**6)
    (model / "tokenizer.json").write_text(json.dumps(content))
    source, prompts = open_answering(model), pico.write_examples(tmp_path, 1, images=False)
    try:
        answerer = Answerer(load_processor(source), prompts, batch_size=1, judge=None)
    except RegraftError as error:  # as in 5.17
        assert pico_today.VERSION < (5, 24) and "out of vocabulary" in str(error)
        return
    message = r"the token 1,000,000, but the model of .* has 473 embeddings"
    with pytest.raises(RegraftError, match=message):
        answerer.answers(load_model(source), max_new_tokens=1)
    placed = load_placed(source, dtype="auto", device="cpu", placement="resident")
    with pytest.raises(RegraftError, match=message):
        LayerwisePass(placed, [prompt_batch(load_processor(source), prompts)])


def test_code_of_a_model_may_look_at_numbers_while_it_is_built(model: Path) -> None:
    """InternVL's does, but on the meta device there are no numbers."""
    own_code(model, "self.rates = [one.item() for one in torch.linspace(0, 0.1, 4)]")
    source = open_answering(model, trust_remote_code=True)
    assert len(load_model(source).rates) == 4


def test_the_template_of_a_tokenizer_that_its_processor_is_lent(tmp_path: Path) -> None:
    """Phi-4's processor loses its own when it is loaded."""
    folder = pico.save("phi4_multimodal", tmp_path / "model")
    source = open_source(folder)
    assert load_processor(source).chat_template is None
    (folder / "chat_template.jinja").write_text("{% for a in range(30000) %}x{% endfor %}")
    with pytest.raises(RegraftError, match="makes 30,000 characters of one word"):
        load_processor(source)


def test_a_panic_of_a_tokenizer_is_an_error(model: Path) -> None:
    """Its regular expressions fail with an error that is not an `Exception`."""
    pattern = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}}
    change(
        model / "tokenizer.json", pre_tokenizer=pattern | {"behavior": "Isolated", "invert": False}
    )
    processor = load_processor(open_source(model))
    with pytest.raises(RegraftError, match=r"cannot encode example 'a': Panic.*tokenizer\.json"):
        prompt_batch(processor, [Example("a", "x" * 40, True, "b")])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.int8),
        ("model.layers.1.mlp.up_proj.weight", torch.bool),
        ("model.norm.weight", torch.complex64),
    ],
)
def test_weights_that_are_no_floats_are_named(model: Path, name: str, dtype: torch.dtype) -> None:
    """transformers would load them if config.json states no quantisation."""
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for opened in (open_source, open_answering):
        with pytest.raises(RegraftError, match=rf"{name} is stored as .*: it is quantised"):
            opened(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("linear", ["0.self_attn.q_proj", "1.mlp.up_proj"])
def test_weights_that_are_no_numbers_are_named(model: Path, linear: str, value: float) -> None:
    name = f"model.layers.{linear}.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RegraftError, match=rf"the tensor {name} holds numbers that are NaN or inf"):
        load_model(open_source(model), device="cpu")


def test_too_little_memory_is_no_fault_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), foreign.foreign(tmp_path, "the model", ""):
        raise MemoryError
    with (
        pytest.raises(RuntimeError, match="DefaultCPUAllocator"),
        foreign.foreign(tmp_path, "the model", ""),
    ):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(KeyboardInterrupt), foreign.foreign(tmp_path, "the model", ""):
        raise KeyboardInterrupt
    with (
        pytest.raises(RegraftError, match="the model could not be loaded"),
        foreign.foreign(tmp_path, "the model", ""),
    ):
        torch.zeros(2).view(3)


def test_what_the_model_and_its_processor_say_differently(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"sizes": {"patch": 7, "size": 3}, "other": 1})
    assert not disagreement(tmp_path)
    write_json(tmp_path / "processor_config.json", {"own": {"patch": 14}, "size": 3, "other": "x"})
    expected = ", whose patch is 7 in config.json and 14 in processor_config.json"
    assert disagreement(tmp_path) == expected


def test_a_package_that_lacks_is_no_fault_of_a_file(tmp_path: Path) -> None:
    message = r"model: the processor needs a package that is not installed: No module named 'timm'$"
    with (
        pytest.raises(RegraftError, match=message),
        foreign.foreign(tmp_path / "model", "the processor", "Export the whole model again."),
    ):
        raise ImportError("No module named 'timm'")
