"""Heads are where the architecture says, and weights are found on disk under every key layout."""

from __future__ import annotations

import functools
import inspect
import json
import shutil

import pytest
import torch
import transformers as T  # noqa: N812
from safetensors.torch import load_file, save_file

import pico
import truth
from regraft.errors import RegraftError
from regraft.models.architecture import (
    Block,
    attention_of,
    cache_argument,
    check_same_architecture,
    decoder_layers,
    head_block,
    text_decoder,
)
from regraft.models.checkpoint import SINGLE_FILE
from regraft.models.load import load_model, open_source

MHA = ("llava_next-vicuna",)
TIED = ("gemma3", "internvl")
_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
}


# What is read


def test_numbers_of_every_family(family, pico_dir):
    source, model, _, architecture = truth.opened(pico_dir(family))
    built, _ = pico.build(family)
    assert architecture.family == model.config.model_type
    assert source.has_vision == (family in pico.VLM_FAMILIES)
    assert architecture.hidden_size == 64
    assert architecture.tied == (family in TIED)
    assert architecture.vocabulary == built.get_output_embeddings().weight.shape[0]
    assert architecture.parameters == sum(p.numel() for p in built.parameters())
    assert [layer.index for layer in architecture.layers] == [
        *range(5 if family == "mllama" else 4)
    ]
    kv = 4 if family in MHA else 2
    assert {(li.heads, li.kv_heads, li.head_dim) for li in architecture.layers} == {(4, kv, 16)}
    cross = {li.index for li in architecture.layers if li.attention == "cross_attn"}
    assert cross == ({1, 3} if family == "mllama" else set())
    for layer in architecture.layers:
        assert [linear.role for linear in layer.linears] == [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ]
        reading = [linear.role for linear in layer.linears if linear.reads_vision]
        assert reading == (["k_proj", "v_proj"] if layer.index in cross else [])
    in_decoder = [
        name
        for name, module in model.get_decoder().layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert len({linear.key for linear in architecture.linears}) == len(in_decoder)
    assert architecture.prunable == sum(
        source.checkpoint.record(linear.tensor).shape[0]
        * source.checkpoint.record(linear.tensor).shape[1]
        for linear in architecture.linears
    )


def test_decoder_and_layers_take_the_cache_by_its_name(family):
    model, _ = pico.build(family)
    for module in (text_decoder(model), *decoder_layers(model)):
        assert cache_argument(module) in inspect.signature(type(module).forward).parameters


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_name_of_the_cache_is_read_behind_decorators_and_stand_ins(name):
    def forward(_self, hidden, **_):
        return hidden

    def named(_self, hidden, cache=None):
        return hidden, cache

    def renamed(_self, hidden, past_key_values=None):
        return hidden, past_key_values

    own = named if name == "cache" else renamed
    layer = type("Layer", (torch.nn.Module,), {"forward": functools.wraps(own)(forward)})()
    layer.forward = lambda *_, **__: None
    assert cache_argument(layer) == name


# Where heads lie


def o_proj_input(model, batch, layer):
    """What o_proj reads, cut into heads: [B, S, H, D]."""
    name = layer.linear("o_proj").module
    inputs = truth.linear_inputs(model, batch, [name])[name]
    return inputs.unflatten(-1, (layer.heads, layer.head_dim))


def perturb(weight, block, *, outside=False):
    """Add noise inside a block, or everywhere else."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[block.row_start : block.row_stop, block.col_start : block.col_stop] = True
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight += noise * (mask ^ outside)


@pytest.mark.parametrize("role", ["q_proj", "k_proj", "v_proj"])
def test_rows_of_a_head_feed_that_head_alone(family, role, pico_dir, tmp_path):
    """q: one query head; k and v: the query heads of one group. One layer of each kind."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("single", family, processor, tmp_path)
    modules = dict(model.named_modules())
    for layer in {li.attention: li for li in architecture.layers}.values():
        linear = layer.linear(role)
        weight = modules[linear.module].weight
        before = o_proj_input(model, batch, layer)
        share = 1 if role == "q_proj" else layer.heads // layer.kv_heads
        for head in range(layer.heads):
            block = head_block(layer, linear, head)
            with truth.edited(weight):
                perturb(weight, block)
                inside = (o_proj_input(model, batch, layer) - before).abs().amax(dim=(0, 1, 3))
            with truth.edited(weight):
                perturb(weight, block, outside=True)
                outside = (o_proj_input(model, batch, layer) - before).abs().amax(dim=(0, 1, 3))
            group = [other // share == head // share for other in range(layer.heads)]
            assert (inside > 1e-3).tolist() == group, f"{linear.key} head {head}: {inside}"
            assert (outside > 1e-3).tolist() == [not own for own in group], (
                f"outside {linear.key} head {head}: {outside}"
            )
            assert inside[~torch.tensor(group)].sum() == 0 == outside[torch.tensor(group)].sum()


def test_columns_of_a_head_read_that_head_alone(family, pico_dir, tmp_path):
    """Zeros in the block equal ablation: only this head's slice has no influence."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("single", family, processor, tmp_path)
    for layer in {li.attention: li for li in architecture.layers}.values():
        attention = attention_of(decoder_layers(model)[layer.index])
        linear = layer.linear("o_proj")
        for head in range(layer.heads):
            block = head_block(layer, linear, head)
            with truth.edited(attention.o_proj.weight) as weight:
                weight[block.row_start : block.row_stop, block.col_start : block.col_stop] = 0
                zeroed = truth.full_forward(model, batch.inputs).final
            with truth.ablated(model, layer.index, head, "v", 0.0):
                expected = truth.full_forward(model, batch.inputs).final
            torch.testing.assert_close(zeroed, expected, atol=2e-5, rtol=0)
            base = truth.full_forward(model, batch.inputs).final
            assert (zeroed - base).abs().max() > 1e-2


def test_blocks_are_the_papers():
    architecture = truth.layer_architecture(heads=8, kv_heads=2, head_dim=3, hidden=10)
    blocks = [head_block(architecture, linear, 5) for linear in architecture.linears]
    assert blocks == [Block(15, 18, 0, 10), *[Block(3, 6, 0, 10)] * 2, Block(0, 10, 15, 18), None]
    for head in (-1, 8):
        with pytest.raises(IndexError, match=f"heads 0 to 7, not {head}"):
            head_block(architecture, architecture.linears[0], head)


def test_blocks_of_all_heads_tile_the_weight(family, pico_dir):
    architecture = truth.opened(pico_dir(family)).architecture
    for layer in architecture.layers:
        for linear in layer.linears:
            blocks = {head_block(layer, linear, head) for head in range(layer.heads)}
            if linear.role not in ("q_proj", "k_proj", "v_proj", "o_proj"):
                assert blocks == {None}
                continue
            covered = torch.zeros(linear.shape, dtype=torch.int)
            for b in blocks:
                covered[b.row_start : b.row_stop, b.col_start : b.col_stop] += 1
            assert (covered == 1).all(), linear.key


# Names on disk


def in_memory_layout(source, model, target):
    """Write the checkpoint under the names that transformers uses in memory."""
    shutil.copytree(source.folder, target)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    if source.architecture.tied:
        del tensors["lm_head.weight"]
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    return target


def rewrite(folder, target, change):
    """Copy a checkpoint with its dictionary of tensors changed by `change`."""
    shutil.copytree(folder, target)
    tensors = load_file(target / SINGLE_FILE)
    save_file(change(tensors), target / SINGLE_FILE, metadata={"format": "pt"})
    return target


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


@pytest.mark.parametrize("layout", ["saved", "in memory"])
def test_names_on_disk_hold_the_weights_in_memory(family, layout, pico_dir, tmp_path):
    source, model, _, expected = truth.opened(pico_dir(family))
    folder = source.folder
    if layout == "in memory":
        folder = in_memory_layout(source, model, tmp_path / "model")
    opened = open_source(folder)
    loaded = load_model(opened)
    modules, built = dict(loaded.named_modules()), dict(pico.build(family)[0].named_modules())
    assert [linear.key for linear in opened.architecture.linears] == [
        li.key for li in expected.linears
    ]
    for linear in opened.architecture.linears:
        on_disk = opened.checkpoint.read(linear.tensor)
        assert tuple(on_disk.shape) == linear.shape
        assert torch.equal(on_disk, modules[linear.module].weight), linear
        assert torch.equal(on_disk, built[linear.module].weight), linear
    check_same_architecture(expected, opened.architecture, ("one", "other"))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llava", "language_model.model.", "model.language_model."),
        ("mllama", "language_model.model.", "model.language_model."),
        ("qwen2_5_vl", "model.layers.", "model.language_model.layers."),
        ("gemma3", "language_model.model.", "model.language_model."),
    ],
)
def test_both_published_layouts_are_known(family, old, new, pico_dir, tmp_path):
    """The saved file has the older names, the one with in-memory names the newer ones."""
    source, model, _, architecture = truth.opened(pico_dir(family))
    newer = open_source(in_memory_layout(source, model, tmp_path / "model")).architecture
    for one, other in zip(architecture.linears, newer.linears, strict=True):
        assert one.tensor.startswith(old) and other.tensor.startswith(new)
        assert one.tensor.removeprefix(old) == other.tensor.removeprefix(new)


def test_of_two_decoders_in_one_file_the_one_that_is_loaded(pico_dir, tmp_path):
    """Names and shapes fit both; the other decoder writes drafts (speculative decoding)."""

    def draft(tensors):
        copies = {f"draft.{name}": t.clone() for name, t in tensors.items() if "layers" in name}
        return tensors | copies

    source = open_source(rewrite(pico_dir("llama"), tmp_path / "model", draft))
    loaded = dict(load_model(source, device="cpu").named_parameters())
    for linear in source.architecture.linears:
        assert linear.tensor.startswith("model.layers.")
        assert torch.equal(source.weight(linear), loaded[f"{linear.module}.weight"])


def test_vision_tower_is_no_second_decoder(pico_dir):
    """A tower also has layers with q_proj, but of other shapes."""
    architecture = truth.opened(pico_dir("idefics3")).architecture
    assert all(li.tensor.startswith("model.text_model.layers.") for li in architecture.linears)


def test_config_of_another_size_is_told_with_both_shapes(pico_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pico_dir("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(
        RegraftError,
        match=r"layers.0.mlp.down_proj.weight is \[64, 96\] in the file, .* \[64, 128\]",
    ):
        open_source(folder)


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


UP = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("change", [without(f"{UP}.weight"), renamed(f"{UP}.w", f"{UP}.qw")])
def test_missing_or_quantised_weight_is_named(change, pico_dir, tmp_path):
    folder = rewrite(pico_dir("llama"), tmp_path / "model", change)
    with pytest.raises(RegraftError, match=rf"{UP}.weight of shape \[96, 64\], the file has none"):
        open_source(folder)


@pytest.mark.parametrize(("old", "new"), [("layers", "blocks"), ("model.", "module.model.")])
def test_file_without_layers_is_refused(old, new, pico_dir, tmp_path):
    """Or with layers under names that transformers would not load either."""
    folder = rewrite(pico_dir("llama"), tmp_path / "model", renamed(old, new))
    with pytest.raises(
        RegraftError, match=r"weight model.layers.0.self_attn.q_proj.weight of .* has none"
    ):
        open_source(folder)


# Models that are not for regraft


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def bert():
    return T.BertForMaskedLM(T.BertConfig(**_TINY))


def clip():
    tower = {**_TINY, "projection_dim": 16}
    config = T.CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 28})
    return T.CLIPModel(config)


def gpt2():
    return T.GPT2LMHeadModel(T.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60))


def phi3():
    return T.Phi3ForCausalLM(T.Phi3Config(**_TINY, pad_token_id=0))


def opt():
    settings = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "vocab_size": 60}
    return T.OPTForCausalLM(T.OPTConfig(**settings, num_attention_heads=2, word_embed_proj_dim=32))


def mixtral():
    return T.MixtralForCausalLM(
        T.MixtralConfig(**_TINY, num_local_experts=2, num_key_value_heads=2)
    )


def qwen3_moe():
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    settings["num_key_value_heads"] = 2
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**_TINY, **settings, head_dim=16))


def qwen3_next():
    settings = {
        "num_experts": 0,
        "head_dim": 16,
        "layer_types": ["full_attention", "full_attention"],
        "mlp_only_layers": [0, 1],
    }
    return T.Qwen3NextForCausalLM(T.Qwen3NextConfig(**_TINY, **settings, num_key_value_heads=2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bert, "BertLMHeadModel has no text decoder with its layers"),
        (clip, "is of type clip: neither a vision-language model nor a causal language model"),
        (gpt2, "decoder layers of GPT2LMHeadModel have no linears to prune"),
    ],
)
def test_unsuitable_model_is_refused_in_words(build, message, tmp_path):
    with pytest.raises(RegraftError, match=message):
        open_source(saved(build(), tmp_path / "model"))


@pytest.mark.parametrize(
    ("build", "heads", "why", "linears"),
    [
        (phi3, 0, "layers 0-1: Phi3Attention has no separate q_proj", 2 * 4),
        (opt, 0, "layer 0: OPTAttention has no separate o_proj", 6),
        (mixtral, 2, "", 2 * (4 + 2 * 3)),
        (qwen3_moe, 2, "", 2 * (4 + 4 * 3)),
        (qwen3_next, 2, "", 2 * 7),  # each query with its gate
    ],
)
def test_linears_are_found_whatever_heads_there_are(build, heads, why, linears, tmp_path):
    architecture = open_source(saved(build(), tmp_path / "model")).architecture
    assert {layer.heads for layer in architecture.layers} == {heads}
    assert architecture.headless == why
    assert len(list(architecture.linears)) == linears
    assert all("router" not in li.key and li.role != "gate" for li in architecture.linears)


# The same network?


def test_other_network_is_refused(pico_dir):
    one, other = (truth.opened(pico_dir(f)).architecture for f in ("llava", "llava_next-vicuna"))
    with pytest.raises(
        RegraftError,
        match=r"dense and pruned are different models: layers.0.self_attn.k_proj.weight is "
        r"\[32, 64\] in the first \(llava\) and \[64, 64\] in the second \(llava_next\)",
    ):
        check_same_architecture(one, other, ("dense", "pruned"))
    mllama = truth.opened(pico_dir("mllama")).architecture
    with pytest.raises(
        RegraftError, match=r"weight is \[64, 64\] in the first \(mllama\) and missing"
    ):
        check_same_architecture(mllama, one, ("dense", "pruned"))


def test_other_number_of_heads_is_refused(pico_dir, tmp_path):
    """Two wide heads have the shapes of four narrow ones."""
    folder = tmp_path / "model"
    shutil.copytree(pico_dir("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    one, other = (open_source(f).architecture for f in (pico_dir("qwen2"), folder))
    with pytest.raises(RegraftError, match="layer 0 has 4 and 2 heads"):
        check_same_architecture(one, other, ("dense", "pruned"))


def test_same_decoder_in_another_model_is_refused(pico_dir):
    """Llama inside LLaVA and on its own; see also test_pair.py."""
    one, other = (truth.opened(pico_dir(f)).architecture for f in ("llava", "llama"))
    message = r"_tower\.\S* is \[.*\] in the first \(llava\) and missing in the second \(llama\)"
    with pytest.raises(RegraftError, match=message):
        check_same_architecture(one, other, ("dense", "pruned"))
