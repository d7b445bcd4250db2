"""Families of today: layers without attention heads, experts, shared or fused projections.

Each is pruned three ways, restored, patched on disk and reloaded; what is measured on the way is
compared with whole forward passes, whole-model autograd and loops over weights.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import pico
import pico_today
import regraft
import truth
from disk import write_jsonl
from regraft.data.collate import batches, response_batch
from regraft.errors import RegraftError
from regraft.models.ablation import head_outputs, replay_ablated
from regraft.models.architecture import head_block
from regraft.models.load import load_model, open_source
from regraft.models.replay import replay, text_inputs
from regraft.patch.apply import patched
from regraft.patch.format import load_patch
from test_pico import logits
from test_replay import assert_same, manually_ablated

VLM = tuple(pico_today.VLM)
TODAY = VLM + tuple(pico_today.LLM)
WITH_HEADS = ("qwen3_5", "qwen3_vl_moe")
PRUNERS = ("wanda", "sparsegpt", "snip")


@pytest.fixture(params=TODAY)
def today(request):
    return request.param


def picture(family):
    return pico.image(0) if family in VLM else None


# The models


@pytest.mark.parametrize("family", VLM)
def test_image_reaches_the_last_logits(family):
    model, processor = pico.build(family)
    one, two = (logits(model, processor, pico.image(seed))[0, -1] for seed in (0, 1))
    assert (one - two).abs().max() >= 0.05


def test_reload_is_identical(today, pico_dir):
    auto = AutoModelForImageTextToText if today in VLM else AutoModelForCausalLM
    reloaded = auto.from_pretrained(pico_dir(today)).eval()
    processor = AutoProcessor.from_pretrained(pico_dir(today))
    fresh = pico.build(today)
    one = logits(reloaded, processor, picture(today))
    assert torch.equal(one, logits(*fresh, picture(today)))


# Layer by layer


def test_every_part_of_the_decoder_runs_again(today, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(today))
    for kind in ("left", "right", "single") + (("text",) if today in VLM else ()):
        batch = truth.make_batch(kind, today, processor, tmp_path / kind)
        real = batch.inputs["attention_mask"].bool()
        expected = truth.full_forward(model, batch.inputs)
        walk = truth.walk(model, [batch])
        with truth.unchanged(model):
            for layer in architecture.layers:
                assert_same(walk.states[0], expected.entering[layer.index], real, f"{layer.index}")
                walk.advance(layer.index, lambda _: None)
        assert_same(walk.states[0], expected.final, real, "final")


# Heads


@pytest.mark.parametrize("family", WITH_HEADS)
@pytest.mark.parametrize(("target", "eps"), [("v", 0.3), ("all", 0.3), ("q", 1e-5), ("k", 0.3)])
def test_ablation_equals_a_manual_edit_of_each_head(family, target, eps, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("left", family, processor, tmp_path)
    real = batch.inputs["attention_mask"].bool()
    base = truth.full_forward(model, batch.inputs)
    run = partial(replay, model, text_inputs(model, batch.inputs))
    assert any(layer.heads for layer in architecture.layers)
    for layer in (one for one in architecture.layers if one.heads):
        hidden, size = base.entering[layer.index], layer.head_dim
        with truth.unchanged(model):
            outputs = head_outputs(model, run, layer.index, hidden, size, target=target, eps=eps)
            found = replay_ablated(model, run, layer.index, hidden, outputs, range(layer.heads))
        for head in range(layer.heads):
            wanted = manually_ablated(model, batch.inputs, layer.index, head, size, target, eps)
            torch.testing.assert_close(found[head][real], wanted[real], atol=5e-5, rtol=0)
            assert (found[head] - base.final)[real].abs().max() > 1e-3


@pytest.mark.parametrize("family", WITH_HEADS)
def test_query_rows_of_a_head_feed_that_head_alone(family, pico_dir, tmp_path):
    """Gated queries too: noise in a head's rows of q_proj changes its columns of o_proj's input."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("single", family, processor, tmp_path)
    layer = next(one for one in architecture.layers if one.heads)
    modules, o_proj = dict(model.named_modules()), layer.linear("o_proj")
    weight = modules[layer.linear("q_proj").module].weight

    def by_head():
        read = truth.linear_inputs(model, batch, [o_proj.module])[o_proj.module]
        return read.unflatten(-1, (layer.heads, layer.head_dim))

    before = by_head()
    for head in range(layer.heads):
        block = head_block(layer, layer.linear("q_proj"), head)
        with truth.edited(weight) as edited:
            edited[block.row_start : block.row_stop] += 0.5
            moved = (by_head() - before).abs().amax(dim=(0, 1, 3))
        assert [one > 1e-4 for one in moved.tolist()] == [i == head for i in range(layer.heads)]


def test_layers_without_heads_say_why(pico_dir):
    architecture = truth.opened(pico_dir("qwen3_5")).architecture
    assert [layer.heads for layer in architecture.layers] == [0, 4, 0, 4]
    assert architecture.headless == "layers 0, 2: linear_attn is no attention by heads"
    assert truth.opened(pico_dir("qwen3_vl")).architecture.headless == ""


# From prompts to a patched checkpoint


def prompts_of(family, folder):
    """Eight prompts with answers, half of them harmful."""
    examples = [
        *pico.write_examples(folder / "images", 4, True, family in VLM),
        *pico.write_examples(folder / "images", 4, False, family in VLM),
    ]
    write_jsonl(folder / "data.jsonl", examples)
    return f"jsonl:{folder / 'data.jsonl'}"


@pytest.mark.slow
@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruned_restored_applied_and_reloaded(today, pruner, tmp_path):
    dense = pico.save(today, tmp_path / "dense", torch.bfloat16, max_shard_size="300KB")
    data = prompts_of(today, tmp_path)
    common = {"data": data, "samples": 4, "device": "cpu", "batch_size": 2, "dtype": "float32"}
    out = tmp_path / "pruned"
    pruned = regraft.prune(dense, out, method=pruner, sparsity=0.5, **common)
    architecture = open_source(dense).architecture
    gone = sum(
        int((pruned.weight(linear) == 0).count_nonzero()) for linear in pruned.architecture.linears
    )
    assert gone == pytest.approx(architecture.prunable / 2, rel=0.02)
    patch = regraft.realign(dense, out, tmp_path / "patch", count=64, **common)
    assert 0 < patch.restored <= 64
    regraft.apply(out, tmp_path / "patch", tmp_path / "realigned")
    in_memory, on_disk = load_model(pruned), load_model(open_source(tmp_path / "realigned"))
    before = {name: one.clone() for name, one in in_memory.state_dict().items()}
    with patched(in_memory, pruned.architecture, load_patch(tmp_path / "patch")):
        held = {name: one.clone() for name, one in in_memory.state_dict().items()}
    after = on_disk.state_dict()
    assert all(torch.equal(held[name], after[name]) for name in after)
    changed = sum(int((after[name] != before[name]).count_nonzero()) for name in after)
    assert changed == patch.restored
    processor = AutoProcessor.from_pretrained(tmp_path / "realigned")
    example = pico.write_examples(tmp_path / "one", 1, True, today in VLM)
    batch = response_batch(processor, example)
    answer = on_disk.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > batch.inputs["input_ids"].shape[1]
