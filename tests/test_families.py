"""Families of today: layers without attention heads, experts, shared or fused projections.

Each is pruned three ways, restored, patched on disk and reloaded; what is measured on the way is
compared with whole forward passes, whole-model autograd and loops over weights.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import pico
import pico_today
import regraft
import truth
from disk import write_jsonl
from regraft.data.collate import batches, response_batch
from regraft.models.ablation import head_outputs, replay_ablated
from regraft.models.architecture import head_block
from regraft.models.load import load_model, open_source
from regraft.models.places import of_tensor
from regraft.models.replay import replay, text_inputs
from regraft.patch.apply import patched
from regraft.patch.format import load_patch
from regraft.pruning.base import PRUNERS
from regraft.pruning.gradients import layer_gradients, signed
from regraft.pruning.statistics import gather
from test_pico import tokenized
from test_replay import assert_same, manually_ablated

# The processor of GLM-4.5V hands a tensor to NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
VLM = tuple(pico_today.VLM)
TODAY = VLM + tuple(pico_today.LLM)
WITH_HEADS = ("qwen3_5", "qwen3_vl_moe", "glm4v_moe", "llama4_text")
METHODS = ("wanda", "sparsegpt", "snip")


@pytest.fixture(params=TODAY)
def today(request):
    return request.param


def picture(family):
    return pico.image(0) if family in VLM else None


@torch.no_grad()
def logits(model, processor, image):
    inputs = tokenized(processor, image)
    own = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    return model(**own, use_cache=False).logits  # [1, S, V]


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
    held, after = fresh[0].state_dict(), reloaded.state_dict()
    assert held.keys() == after.keys()
    assert all(torch.equal(held[name], after[name]) for name in held)
    one = logits(reloaded, processor, picture(today))
    torch.testing.assert_close(one, logits(*fresh, picture(today)), atol=1e-4, rtol=1e-4)


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
                found, wanted = walk.states[0], expected.entering[layer.index]
                if found.ndim == 4:  # Gemma 3n's four streams
                    found, wanted = found.movedim(0, 2), wanted.movedim(0, 2)
                assert_same(found, wanted, real, f"{layer.index}")
                walk.advance(layer.index, lambda _: None)
        assert_same(walk.states[0], expected.final, real, "final")


# What linears and experts are fed


def of_experts(experts, linear, args):
    """(tokens, what they feed one expert's matrix) of a layer whose experts were called so."""
    gate_up = experts.gate_up_proj.data
    hidden, e = args[0], linear.expert
    if (
        len(args) == 1
    ):  # Llama 4: all tokens for each expert, scaled by scores of 0 where not routed
        rows = hidden.view(len(gate_up), -1, hidden.shape[-1])[e]
        tokens = rows.abs().sum(-1).nonzero().flatten()
        inputs = rows[tokens]
    else:
        tokens = (args[1] == e).any(-1).nonzero().flatten()
        inputs = hidden[tokens]
    if linear.parameter != "down_proj":
        return tokens, inputs
    wide = gate_up[e].T if gate_up.shape[1] == inputs.shape[1] else gate_up[e]  # [2 * inner, d]
    gate, up = (inputs @ wide.T).chunk(2, dim=-1)
    return tokens, experts.act_fn(gate) * up


def read_by(model, processor, architecture, example):
    """What each linear reads at response tokens, by a whole forward of one row: key -> [n, in]."""
    batch = response_batch(processor, [example])
    counted = batch.labels[0] != -100
    plain = [li.module for li in architecture.linears if li.expert is None]
    found, seen, modules = {}, {}, dict(model.named_modules())
    holders = {li.module for li in architecture.linears if li.expert is not None}
    hooks = [
        modules[name].register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args)
        )
        for name in holders
    ]
    inputs = truth.linear_inputs(model, batch, plain)
    for hook in hooks:
        hook.remove()
    for linear in architecture.linears:
        if linear.expert is None:
            read = inputs[linear.module].reshape(len(counted), -1)
            found[linear.key] = read[counted]
        else:
            tokens, read = of_experts(modules[linear.module], linear, seen[linear.module])
            found[linear.key] = read[counted[tokens]]
    return found


def test_statistics_are_sums_over_the_tokens_of_each_expert(today, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(today))
    examples = truth.examples(today, tmp_path, 5)
    cut = [response_batch(processor, rows) for rows in batches(examples, 3)]
    with truth.unchanged(model):
        found = gather(
            truth.walk(model, cut),
            architecture,
            PRUNERS.get("wanda"),
            tmp_path / "w",
            lambda _: None,
        )
    rows = [read_by(model, processor, architecture, one) for one in examples]
    for linear in architecture.linears:
        read = torch.cat([one[linear.key] for one in rows]).double()
        if len(read):
            wanted = read.square().sum(0)
            torch.testing.assert_close(
                found[linear.key].double(),
                wanted,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, k=linear.key: k + m,
            )
        else:
            assert linear.key not in found


@pytest.mark.parametrize("pruner", ["signed", "snip"])
def test_gradients_equal_autograd_on_the_whole_model(today, pruner, pico_dir, tmp_path):
    """The sum, and the mean over samples of its size (SNIP)."""
    _, model, processor, architecture = truth.opened(pico_dir(today))
    model = copy.deepcopy(model)
    model.set_experts_implementation("eager")
    examples = truth.examples(today, tmp_path, 3)
    modules = dict(model.named_modules())
    held = {
        f"{li.module}.{li.parameter}": getattr(modules[li.module], li.parameter)
        for li in architecture.linears
    }
    for parameter in held.values():
        parameter.requires_grad_()
    wanted = dict.fromkeys(held, 0)
    for example in examples:
        batch = response_batch(processor, [example])
        logits = model(**batch.inputs, use_cache=False).logits[0]
        positions = (batch.labels[0, 1:] != -100).nonzero().flatten()
        loss = F.cross_entropy(logits[positions].float(), batch.labels[0, positions + 1])
        parts = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
        for name, part in zip(held, parts, strict=True):
            part = torch.zeros_like(held[name]) if part is None else part
            wanted[name] = wanted[name] + (part.abs() if pruner == "snip" else part) / 3
    for parameter in held.values():
        parameter.requires_grad_(False)
    cut = [response_batch(processor, rows) for rows in batches(examples, 2)]
    add = PRUNERS.get("snip").accumulate if pruner == "snip" else signed
    found = {}
    for _, layer in layer_gradients(
        truth.walk(model, cut), architecture, tmp_path, lambda _: True, lambda _: None, add=add
    ):
        found |= layer
    for linear in architecture.linears:
        whole = wanted[f"{linear.module}.{linear.parameter}"]
        expected = of_tensor(whole, linear.held, linear.shape)
        scale = float(whole.abs().max())
        torch.testing.assert_close(
            found[linear.key],
            expected,
            rtol=1e-3,
            atol=1e-5 * scale + 1e-9,
            msg=lambda m, k=linear.key: k + m,
        )


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
@pytest.mark.parametrize("pruner", METHODS)
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
