"""A model split over devices by accelerate gives the same numbers as a resident one."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import pico
import truth
from regraft.data.collate import prompt_batch, response_batch
from regraft.evaluation.generate import generate
from regraft.heads.score import score_heads
from regraft.heads.ships import HeadSettings
from regraft.models import load
from regraft.models.architecture import decoder_layers
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import load_model, load_placed
from regraft.models.placement import tensors_within
from regraft.patch.apply import patched
from regraft.patch.format import Patch, TensorPatch


def spread(model: nn.Module, folder: Path) -> nn.Module:
    """Offload every second decoder layer to disk, from where accelerate's hooks load it."""
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(model)
    layers = {id(layer): i for i, layer in enumerate(decoder_layers(model))}
    names = {name: layers[id(m)] for name, m in model.named_modules() if id(m) in layers}
    places = {name: "disk" if i % 2 else "cpu" for name, i in names.items()}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if not any(name.startswith(f"{layer}.") for layer in names):
            places[name] = "cpu"
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_heads_and_answers_of_a_spread_model(paper_family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(paper_family))
    model = spread(opened.model, tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in model.parameters())
    examples = truth.examples(paper_family, tmp_path, 3)
    prompts = [prompt_batch(opened.processor, examples)]
    one, other = (
        score_heads(each, opened.architecture, prompts, tmp_path / name, HeadSettings(r_max=2))
        for each, name in ((opened.model, "whole"), (model, "spread"))
    )
    torch.testing.assert_close(other.ships, one.ships, equal_nan=True)
    torch.testing.assert_close(other.kl, one.kl, equal_nan=True)
    texts = [
        generate(each, opened.processor, examples, tmp_path / name, max_new_tokens=4, batch_size=3)
        for each, name in ((opened.model, "a"), (model, "b"))
    ]
    assert texts[0] == texts[1]


def test_answers_where_no_weight_fits_a_device(pico_dir, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    opened = truth.opened(pico_dir("qwen2_vl"))
    offloaded = accelerate.cpu_offload(copy.deepcopy(opened.model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    examples = truth.examples("qwen2_vl", tmp_path, 3)
    one, other = (
        generate(each, opened.processor, examples, tmp_path / name, max_new_tokens=4, batch_size=3)
        for each, name in ((opened.model, "a"), (offloaded, "b"))
    )
    assert one == other


def test_streamed_model_of_a_real_folder(tmp_path):
    """Weights in the checkpoint's dtype stay memory-mapped; a layer runs only inside `layer`."""
    folder = pico.save("qwen2_5_vl", tmp_path / "model", torch.bfloat16)
    opened = truth.opened(folder)
    model = load_placed(opened.source, dtype="bfloat16", device="cpu", placement="streamed")
    assert model.streamed and model.dtype == torch.bfloat16
    batch = response_batch(opened.processor, truth.examples("qwen2_5_vl", tmp_path, 2))
    layer = decoder_layers(model.network)[1]
    home = layer.mlp.down_proj.weight.data_ptr()
    with model.layer(1):
        assert layer.mlp.down_proj.weight.data_ptr() != home
        layer.mlp.down_proj.weight.zero_()
    assert layer.mlp.down_proj.weight.data_ptr() == home
    assert layer.mlp.down_proj.weight.any()
    assert model.place(batch).inputs["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mllama", "llama", "qwen2_5_vl", "llava_next-mistral"])
def test_layers_need_no_embedding(family, pico_dir, tmp_path):
    """The embedding stays in host memory, where ids on the device cannot be looked up."""
    opened = truth.opened(pico_dir(family))
    model = load_placed(opened.source, dtype="float32", device="cpu", placement="streamed")
    batch = response_batch(opened.processor, truth.examples(family, tmp_path, 2))
    layerwise = LayerwisePass(model, [batch])
    wanted = opened.model(**batch.inputs, output_hidden_states=True).hidden_states[-1]

    def unwanted(*_):
        raise AssertionError("the embedding ran")

    model.network.get_input_embeddings().register_forward_pre_hook(unwanted)
    for layer in range(layerwise.layers):
        with model.layer(layer):
            layerwise.run_layer(layer, lambda _: None)
    mask = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(layerwise.states[0][mask], wanted[mask])


def test_spread_models_need_accelerate(pico_dir, monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda _: None)
    monkeypatch.setattr(load, "pick_device", lambda _: torch.device("meta"))
    source = truth.opened(pico_dir("llama")).source
    with pytest.raises(load.RegraftError, match=r"pip install 'regraft\[streamed\]'"):
        load_model(source, split=True)


def test_a_model_for_the_cpu_is_not_spread(pico_dir, monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda _: None)
    model = load_model(truth.opened(pico_dir("llama")).source, device="cpu", split=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_patch_is_never_lost_on_a_spread_model(pico_dir, tmp_path):
    """Weights on disk cannot be patched; an unpatched model would pass for the realigned one."""
    opened = truth.opened(pico_dir("llava_next-mistral"))
    linear = opened.architecture.layers[1].linear("q_proj")  # waits on disk
    weight = opened.source.checkpoint.read(linear.tensor)
    tensor = TensorPatch.of(weight, torch.tensor([3]), torch.tensor([1.0], dtype=weight.dtype))
    model = spread(opened.model, tmp_path / "offloaded")
    with (
        pytest.raises(load.RegraftError, match="offloaded to disk, where it cannot be patched"),
        patched(model, opened.architecture, Patch({linear.tensor: tensor}, {})),
    ):
        pass


def test_a_patch_reaches_weights_that_wait_in_host_memory(pico_dir, tmp_path):
    """It is on while the block runs, wherever accelerate copies weights, and off again after it."""
    accelerate = pytest.importorskip("accelerate")
    opened = truth.opened(pico_dir("llava_next-mistral"))
    linears = [opened.architecture.layers[i].linear("q_proj") for i in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for linear in linears:
        weight = opened.source.checkpoint.read(linear.tensor)
        at = torch.randperm(weight.numel(), generator=generator)[:20].sort().values
        tensors[linear.tensor] = TensorPatch.of(weight, at, torch.ones(20, dtype=weight.dtype))
    patch = Patch(tensors, {})
    model = accelerate.cpu_offload(copy.deepcopy(opened.model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    batch = prompt_batch(opened.processor, truth.examples("llava_next-mistral", tmp_path, 2))
    before = opened.model(**batch.inputs).logits
    whole = copy.deepcopy(opened.model)
    with patched(whole, opened.architecture, patch), patched(model, opened.architecture, patch):
        expected = whole(**batch.inputs).logits
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(model(**batch.inputs).logits, expected)
    torch.testing.assert_close(model(**batch.inputs).logits, before)


def resident_pass(opened: truth.Opened, batches) -> LayerwisePass:
    model = load_placed(opened.source, dtype="float32", device="cpu", placement="resident")
    return LayerwisePass(model, batches)


@pytest.mark.parametrize(("copies", "home"), [(6, "cuda"), (4, "cpu")])
def test_states_wait_in_host_memory_where_the_device_is_full(
    copies, home, pico_dir, tmp_path, monkeypatch
):
    """A backward pass needs five times the states; the device pretends to have less or more."""
    opened = truth.opened(pico_dir("llama"))
    batch = response_batch(opened.processor, truth.examples("llama", tmp_path, 2))
    layerwise = resident_pass(opened, [batch])
    size = sum(state.nbytes for state in layerwise.states)
    layerwise._home = torch.device("cuda")
    monkeypatch.setattr("regraft.models.layerwise.free_bytes", lambda _: copies * size)
    layerwise._make_room()
    assert layerwise._home.type == home


def test_tensors_are_found_in_classes_of_the_authors():
    class Named(dict):
        pass

    class Listed(list):
        pass

    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    value = Listed([Named(a=one, b=None, c=(two, 1)), OrderedDict(d=[three]), "text"])
    assert [len(tensor) for tensor in tensors_within(value)] == [1, 2, 3]


def test_a_walk_keeps_no_pixels(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_5_vl"))
    examples = truth.examples("qwen2_5_vl", tmp_path, 8)
    alive = []

    def encoded():
        for i in (0, 2, 4, 6):
            batch = response_batch(opened.processor, examples[i : i + 2])
            alive.append(weakref.ref(batch.inputs["pixel_values"]))
            held = sum(one() is not None for one in alive)
            assert held <= 2, "more than the batch that has run and the next"
            yield batch
            del batch

    layerwise = resident_pass(opened, encoded())
    assert len(layerwise.batches) == 4
    assert not any(name.startswith("pixel") for batch in layerwise.batches for name in batch.inputs)
    assert all(one() is None for one in alive)
