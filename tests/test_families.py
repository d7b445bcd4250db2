"""Families of today: layers without attention heads, experts, shared or fused projections.

Each is pruned three ways, restored, patched on disk and reloaded; intermediate results are compared
with whole forward passes, whole-model autograd and loops over weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812
from transformers import AutoProcessor, core_model_loading
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

import pico
import pico_today
import regraft
import truth
from disk import shards, write_jsonl
from regraft.data.collate import Batch, batches, prompt_batch, response_batch
from regraft.defence import last_token_outputs
from regraft.errors import RegraftError
from regraft.evaluation.generate import Answerer
from regraft.evaluation.perplexity import response_nlls
from regraft.heads.score import score_heads
from regraft.heads.ships import HeadSettings, head_outputs, replay_ablated
from regraft.models import layout
from regraft.models.architecture import LinearArchitecture, cross_attention_layers, head_block
from regraft.models.checkpoint import SINGLE_FILE
from regraft.models.generation import takes_padding
from regraft.models.key_values import last_token_replay, record
from regraft.models.load import load_model, open_source, placed
from regraft.models.places import Place, of_tensor
from regraft.models.replay import replay, text_inputs
from regraft.patch.apply import patched
from regraft.patch.format import load_patch, save_patch
from regraft.patch.pair import survey
from regraft.pruning.base import PRUNERS, prune_settings
from regraft.pruning.gradients import layer_gradients, signed
from regraft.pruning.inputs import Sums
from regraft.pruning.masks import Pattern
from regraft.pruning.statistics import ImportanceStatistics, gather
from regraft.restoration.methods.gain import method
from regraft.restoration.ranking import KEPT, Ranking, joined, patch_of
from test_pico import tokenized
from test_replay import assert_same, manually_ablated

# The processor of GLM-4.5V hands a tensor to NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NEEDS_TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="its vision tower needs timm")
RUNS_ELSEWHERE = pytest.mark.skip("this version of transformers cannot run it, others can")
MARKS = dict.fromkeys(pico_today.TIMM, NEEDS_TIMM) | dict.fromkeys(
    pico_today.UNRUNNABLE, RUNS_ELSEWHERE
)


def marked(*names):
    return tuple(pytest.param(name, marks=MARKS.get(name, ())) for name in names)


VLM = marked(*pico_today.VLM)
TODAY = (*VLM, *pico_today.LLM)
WITH_HEADS = marked(
    *("qwen3_5", "qwen3_vl_moe", "glm4v_moe", "llama4_text", "qwen3_next"),
    *("gemma4-experts", "minicpmv4_6", "molmo2", "ernie4_5_vl_moe", "nemotron_h_omni"),
)
METHODS = ("wanda", "sparsegpt", "snip")
DEQUANTIZE = getattr(core_model_loading, "Inkling2LoopDequantizeExperts", None)


@pytest.fixture(params=TODAY)
def today(request):
    return request.param


def picture(family):
    return pico.image(0) if family in pico_today.VLM else None


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
    reloaded = load_model(open_source(pico_dir(today)))
    processor = AutoProcessor.from_pretrained(pico_dir(today))
    fresh = pico.build(today)
    assert type(processor) is type(fresh[1])
    held, after = fresh[0].state_dict(), reloaded.state_dict()
    assert held.keys() == after.keys()
    assert all(torch.equal(held[name], after[name]) for name in held)
    one = logits(reloaded, processor, picture(today))
    torch.testing.assert_close(one, logits(*fresh, picture(today)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", VLM)
def test_answers_in_batches_are_the_answers_alone(family, pico_dir, tmp_path):
    """Neither images of other sizes in the batch nor the cached vision output change an answer."""
    source, model, processor, _ = truth.opened(pico_dir(family))
    assert source.has_vision
    examples = pico.write_examples(tmp_path, 3)
    answerer = Answerer(processor, examples, batch_size=3)
    first, again = (answerer.answers(model, max_new_tokens=5) for _ in range(2))
    alone = []
    for example in examples:
        inputs = placed(prompt_batch(processor, [example]), model).inputs
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
        new = tokens[
            inputs["input_ids"].shape[1] - (family == "blip") :
        ]  # which drops the last one
        alone.append(processor.decode(new, skip_special_tokens=True).strip())
    assert first == again == alone
    assert len({*alone}) > 1


# Layer by layer


def test_every_part_of_the_decoder_runs_again(today, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(today))
    text = today in pico_today.VLM and today != "blip"  # which takes none without an image
    for kind in ("left", "right", "single") + (("text",) if text else ()):
        batch = placed(truth.make_batch(kind, today, processor, tmp_path / kind), model)
        real = batch.inputs["attention_mask"].bool()
        expected = truth.full_forward(model, batch.inputs)
        layerwise = truth.layerwise(model, [batch])
        with truth.unchanged(model):
            for layer in architecture.layers:
                found, wanted = layerwise.states[0], expected.entering[layer.index]
                if found.ndim == 4 and len(found) != len(real):  # Gemma 3n's four streams
                    found, wanted = found.movedim(0, 2), wanted.movedim(0, 2)
                more = found.shape[1] - real.shape[1]  # of GIT's image, before the prompt
                real = F.pad(real, (more, 0), value=True)
                assert_same(found, wanted, real, f"{layer.index}")
                layerwise.run_layer(layer.index, lambda _: None)
        assert_same(layerwise.states[0], expected.final, real, "final")


@torch.no_grad()
def test_an_image_before_the_prompt_moves_no_position(pico_dir, tmp_path):
    """GIT's image has no tokens: checks an answer's likelihood and states at the last token."""
    _, model, processor, _ = truth.opened(pico_dir("git"))
    (example,) = truth.examples("git", tmp_path, 1)
    batch = response_batch(processor, [example])
    logits = model(**batch.inputs, use_cache=False).logits[0, -batch.labels.shape[1] :]
    ((total, count),) = response_nlls(model, processor, [example], 1)
    loss = F.cross_entropy(logits[:-1], batch.labels[0, 1:])
    assert total / count == pytest.approx(float(loss), rel=1e-4)
    inputs = prompt_batch(processor, [example]).inputs
    found = last_token_outputs(model, inputs)
    for layer, states in truth.full_forward(model, inputs).entering.items():
        if layer:
            torch.testing.assert_close(found[layer - 1].float(), states[:, -1])


# What linears and experts are fed


def of_experts(experts, linear, args):
    """(tokens, their inputs to one expert's matrix) from a recorded call of a layer's experts."""
    gated = hasattr(experts, "gate_up_proj")
    gate_up = (experts.gate_up_proj if gated else experts.up_proj).data
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
    if hasattr(experts, "_apply_gate") and gated:
        return tokens, experts._apply_gate(inputs @ wide.T)
    if not gated:  # Nemotron-H
        return tokens, experts.act_fn(inputs @ wide.T)
    gate, up = (inputs @ wide.T).chunk(2, dim=-1)
    return tokens, experts.act_fn(gate) * up


def read_by(model, processor, architecture, example):
    """Input of each linear at response tokens, by a whole forward of one row: key -> [n, in]."""
    batch = placed(response_batch(processor, [example]), model)
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
            read = inputs[linear.module].flatten(0, -2)
            of_image = linear.name.startswith(("crossattention.self.k", "crossattention.self.v"))
            found[linear.key] = read if of_image else read[-len(counted) :][counted]
        else:
            tokens, read = of_experts(modules[linear.module], linear, seen[linear.module])
            which = counted
            if "moe_mm_token_type_ids" in batch.inputs:  # Ernie's are given tokens of one kind
                kinds = batch.inputs["moe_mm_token_type_ids"][0].tolist()
                sees = linear.name.startswith("mlp.vision_moe")
                given = [at for at, kind in enumerate(kinds) if (kind != 0) == sees]
                tokens = torch.tensor(given)[tokens]
                which = counted | sees  # a response attends to all vision tokens
            found[linear.key] = read[which[tokens]]
    return found


def test_statistics_are_sums_over_the_tokens_of_each_expert(today, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(today))
    examples = truth.examples(today, tmp_path, 5)
    size = 3 if takes_padding(model) else 1
    cut = [response_batch(processor, rows) for rows in batches(examples, size)]
    with truth.unchanged(model):
        found = gather(
            truth.layerwise(model, cut),
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
        batch = placed(response_batch(processor, [example]), model)
        logits = model(**batch.inputs, use_cache=False).logits[0, -batch.labels.shape[1] :]
        positions = (batch.labels[0, 1:] != -100).nonzero().flatten()
        loss = F.cross_entropy(logits[positions].float(), batch.labels[0, positions + 1])
        parts = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
        for name, part in zip(held, parts, strict=True):
            part = torch.zeros_like(held[name]) if part is None else part
            wanted[name] = wanted[name] + (part.abs() if pruner == "snip" else part) / 3
    for parameter in held.values():
        parameter.requires_grad_(False)
    size = 2 if takes_padding(model) else 1
    cut = [response_batch(processor, rows) for rows in batches(examples, size)]
    add = PRUNERS.get("snip").accumulate if pruner == "snip" else signed
    found = {}
    for _, layer in layer_gradients(
        truth.layerwise(model, cut), architecture, tmp_path, lambda _: True, lambda _: None, add=add
    ):
        found |= layer
    for linear in architecture.linears:
        whole = wanted[f"{linear.module}.{linear.parameter}"]
        if "indexer" in linear.name:  # which chooses tokens alone
            assert linear.key not in found and not whole.any()
            continue
        expected = of_tensor(whole, linear.held, linear.shape)
        scale = float(whole.abs().max())
        torch.testing.assert_close(
            found[linear.key],
            expected,
            rtol=1e-3,
            atol=5e-5 * scale + 1e-9,
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
            torch.testing.assert_close(found[head][real], wanted[real], atol=1e-4, rtol=0)
            assert (found[head] - base.final)[real].abs().max() > 1e-3


@pytest.mark.parametrize("family", WITH_HEADS)
def test_ablation_seen_at_the_last_token_alone(family, pico_dir, tmp_path):
    """Head scores use this if no prompt is padded on the right."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    text = text_inputs(model, truth.make_batch("left", family, processor, tmp_path).inputs)
    whole, known = partial(replay, model, text), record(model, text, cross_attention_layers(model))
    short = last_token_replay(model, text, known.known)
    for layer in (one for one in architecture.layers if one.heads):
        hidden, found = known.entering[layer.index], []
        for run in (whole, short):
            outputs = head_outputs(model, run, layer.index, hidden, layer.head_dim)
            heads = range(layer.heads)
            found.append(replay_ablated(model, run, layer.index, hidden, outputs, heads)[:, :, -1])
        torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ("qwen3_vl_moe", "glm4v_moe", "llama4_text", "molmo2"))
def test_screened_candidates_are_scored_exactly(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    examples = pico.write_examples(tmp_path, 2)
    if family not in pico_today.VLM:
        examples = [replace(one, image=None) for one in examples]
    prompts = [prompt_batch(processor, examples)]
    exact, screened = (
        score_heads(model, architecture, prompts, tmp_path / how.mode, how)
        for how in (HeadSettings(r_max=1), HeadSettings(r_max=1, mode="screened", candidates=2))
    )
    assert 2 <= screened.exact.sum() <= 4  # the best by either score
    for found, wanted in ((screened.ships, exact.ships), (screened.kl, exact.kl)):
        one = found[screened.exact], wanted[screened.exact]
        torch.testing.assert_close(*one, atol=1e-4, rtol=1e-3)


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


def test_what_is_never_pruned_is_named(pico_dir):
    named = {
        "qwen3_5": ["linear_attn.conv1d.weight"],
        "qwen3_vl_moe": ["mlp.gate.weight"],
        "llama4_text": ["feed_forward.router.weight"],
        "gemma4-experts": ["router.proj.weight"],
        "qwen3_vl": [],
    }
    for family, wanted in named.items():
        assert truth.opened(pico_dir(family)).architecture.left_dense == wanted


SHARED = (
    "layers 0-1: layers share keys and values with others; layers 2-3: {} has no separate k_proj"
)


@pytest.mark.parametrize(
    ("family", "heads", "why"),
    [
        ("qwen3_5", [0, 4, 0, 4], "layers 0, 2: linear_attn is not attention with heads"),
        ("minicpmv4_6", [0, 4, 0, 4], "layers 0, 2: linear_attn is not attention with heads"),
        (
            "gemma4-experts",
            [4, 0, 4, 0],
            "layers 1, 3: Gemma4TextAttention has no separate v_proj",
        ),
        ("gemma4", [0] * 4, SHARED.format("Gemma4TextAttention")),
        pytest.param("gemma3n", [0] * 4, SHARED.format("Gemma3nTextAttention"), marks=NEEDS_TIMM),
        (
            "phi4_multimodal",
            [0] * 4,
            "layers 0-3: Phi4MultimodalAttention has no separate q_proj",
        ),
        *((name, [4] * 4, "") for name in ("qwen3_vl", "molmo2")),
        *(pytest.param(name, [4] * 4, "", marks=NEEDS_TIMM) for name in pico_today.TIMM[1:]),
    ],
)
def test_layers_without_heads_say_why(family, heads, why, pico_dir):
    architecture = open_source(pico_dir(family)).architecture
    assert [layer.heads for layer in architecture.layers] == heads
    assert architecture.headless == why


# From prompts to a patched checkpoint


def prompts_of(family, folder):
    """Eight prompts with answers, half of them harmful."""
    examples = [
        *pico.write_examples(folder / "images", 4, True, family in pico_today.VLM),
        *pico.write_examples(folder / "images", 4, False, family in pico_today.VLM),
    ]
    write_jsonl(folder / "data.jsonl", examples)
    return f"jsonl:{folder / 'data.jsonl'}"


def zeros(source):
    """How many weights of each linear are 0."""
    return [int((source.weight(one) == 0).sum()) for one in source.architecture.linears]


@pytest.mark.slow
def test_pruned_restored_applied_and_reloaded(today, tmp_path, monkeypatch):
    """Pruned three ways; then restored after one of them, by swaps in every third family."""
    monkeypatch.setattr(method, "MOST_STEPS", 2)  # of gain: the second is of an edited model
    dense = pico.save(today, tmp_path / "dense", torch.bfloat16, max_shard_size="300KB")
    data = prompts_of(today, tmp_path)
    common = {"data": data, "samples": 4, "device": "cpu", "batch_size": 3, "dtype": "float32"}
    architecture = open_source(dense).architecture
    choosing = {"ignore": ["*.indexer.*"]} if "indexer" in str(architecture.layers) else {}
    for pruner in METHODS:
        own = common | (choosing if pruner == "snip" else {})  # which have no gradients
        pruned = regraft.prune(dense, tmp_path / pruner, method=pruner, sparsity=0.5, **own)
        linears = zip(architecture.linears, zeros(pruned), strict=True)
        gone = {li: n for li, n in linears if own is common or "indexer" not in li.name}
        # SparseGPT sets the weights of inputs that are always 0 to 0 besides
        wanted = sum(li.shape[0] * li.shape[1] for li in gone) / 2
        assert sum(gone.values()) == pytest.approx(wanted, rel=0.05)
    families = [*pico_today.VLM, *pico_today.LLM]
    out = tmp_path / METHODS[families.index(today) % len(METHODS)]
    pruned = open_source(out)
    swap = out.name == "wanda"
    patch = regraft.realign(dense, out, tmp_path / "patch", count=64, swap=swap, **common)
    assert 0 < patch.restored <= 64
    regraft.apply(out, tmp_path / "patch", tmp_path / "realigned")
    realigned = open_source(tmp_path / "realigned")
    assert (zeros(realigned) == zeros(pruned)) == swap
    in_memory, on_disk = load_model(pruned), load_model(realigned)
    before = {name: one.clone() for name, one in in_memory.state_dict().items()}
    with patched(in_memory, pruned.architecture, load_patch(tmp_path / "patch")):
        held = {name: one.clone() for name, one in in_memory.state_dict().items()}
    after = on_disk.state_dict()
    assert all(torch.equal(held[name], after[name]) for name in after)
    changed = sum(int((after[name] != before[name]).count_nonzero()) for name in after)
    assert changed == patch.restored * (2 if swap else 1)
    processor = AutoProcessor.from_pretrained(tmp_path / "realigned")
    example = pico.write_examples(tmp_path / "one", 1, True, today in pico_today.VLM)
    batch = placed(response_batch(processor, example), on_disk)
    answer = on_disk.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > batch.inputs["input_ids"].shape[1]


def drawn(source, count):
    """A ranking of `count` pruned weights of each matrix, at random."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for index, linear in enumerate(source.architecture.linears):
        zeros = (source.weight(linear) == 0).flatten().nonzero().flatten()
        position = zeros[torch.randperm(len(zeros), generator=generator)[:count]]
        none = torch.full_like(position, KEPT)
        parts.append(Ranking(torch.full_like(position, index), position, none, position.float()))
    return joined(parts)


@pytest.mark.parametrize(
    "family",
    ["llama4", "molmo2", "glm4v_moe", "qwen3_vl_moe", "ernie4_5_vl_moe", "nemotron_h_omni"],
)
def test_patched_on_disk_is_patched_in_memory(family, tmp_path):
    """Authors' own names, fused, stacked and transposed tensors: bit for bit, on and off."""
    pico.save(family, tmp_path / "dense", max_shard_size="100KB")
    assert_patched_alike(tmp_path)


def test_experts_that_loading_transposes(tmp_path):
    """Qwen3-VL-MoE's are `[E, in, out]` on the hub."""
    folder = pico.save("qwen3_vl_moe", tmp_path / "dense")
    tensors = load_file(folder / SINGLE_FILE)
    stored = {
        name: one.transpose(1, 2).contiguous() if ".experts." in name else one
        for name, one in tensors.items()
    }
    save_file(stored, folder / SINGLE_FILE, metadata={"format": "pt"})
    assert any(linear.stored is not None for linear in open_source(folder).architecture.linears)
    assert_patched_alike(tmp_path)
    assert survey(open_source(folder), open_source(tmp_path / "pruned")).same


def assert_patched_alike(tmp_path):
    dense = open_source(tmp_path / "dense")
    pruned = regraft.prune(tmp_path / "dense", tmp_path / "pruned", method="magnitude")
    ranking = drawn(pruned, 3)
    save_patch(tmp_path / "patch", patch_of(ranking, dense, pruned))
    regraft.apply(tmp_path / "pruned", tmp_path / "patch", tmp_path / "after")
    regraft.revert(tmp_path / "after", tmp_path / "patch", tmp_path / "back")
    assert shards(tmp_path / "back") == shards(tmp_path / "pruned")
    model, other = load_model(pruned), load_model(open_source(tmp_path / "after"))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with patched(model, pruned.architecture, load_patch(tmp_path / "patch")):
        held = {name: one.clone() for name, one in model.state_dict().items()}
    assert all(torch.equal(held[name], one) for name, one in other.state_dict().items())
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    restored = sum(int((held[name] != before[name]).count_nonzero()) for name in held)
    assert restored == len(ranking) == 3 * len(list(dense.architecture.linears))
    whole, moved = load_model(dense).state_dict(), {n: held[n] != before[n] for n in held}
    assert all(torch.equal(held[name][at], whole[name][at]) for name, at in moved.items())


def test_names_of_other_authors_are_followed(pico_dir):
    """Molmo2: q, k and v are rows of one tensor, as transformers splits them."""
    source = open_source(pico_dir("molmo2"))
    first = {li.role: li for li in source.architecture.layers[0].linears}
    tensor = "model.transformer.blocks.0.self_attn.att_proj.weight"
    whole = source.checkpoint.read(tensor)
    assert {first[role].tensor for role in ("q_proj", "k_proj", "v_proj")} == {tensor}
    rows = [source.weight(first[role]) for role in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat(rows), whole)


def test_names_in_memory_are_those_on_disk_too(pico_dir, tmp_path):
    """Molmo2 as transformers holds it, with separate weights for q, k and v."""
    model, processor = pico.build("molmo2")
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    processor.save_pretrained(tmp_path / "dense")
    source, other = open_source(tmp_path / "dense"), open_source(pico_dir("molmo2"))
    linears = [*source.architecture.linears]
    assert all(linear.stored is None for linear in linears)
    assert any(linear.stored is not None for linear in other.architecture.linears)
    for one, same in zip(linears, other.architecture.linears, strict=True):
        assert one.key == same.key
        assert torch.equal(source.weight(one), other.weight(same))
    assert_patched_alike(tmp_path)
    assert survey(other, open_source(tmp_path / "pruned")).same


def test_a_linear_stored_as_several_tensors_is_several_weights(pico_dir, tmp_path):
    """Gradients and statistics of its parts equal parts of those of the whole."""
    opened = truth.opened(pico_dir("llama"))
    cut = [response_batch(opened.processor, truth.examples("llama", tmp_path, 3))]
    layers = []
    for layer in opened.architecture.layers:
        up = layer.linear("up_proj")
        rows, columns = up.shape
        parts = [
            replace(
                up, name=f"{up.name}.{i}", shape=(n, columns), held=Place(at * columns, columns, 1)
            )
            for i, (at, n) in enumerate([(0, 30), (30, rows - 30)])
        ]
        others = [li for li in layer.linears if li is not up]
        layers.append(replace(layer, linears=(*others, *parts)))
    several = replace(opened.architecture, layers=tuple(layers))
    found = []
    for i, one in enumerate((opened.architecture, several)):
        layerwise = truth.layerwise(opened.model, cut)
        pairs = layer_gradients(layerwise, one, tmp_path / f"{i}", lambda _: True, lambda _: None)
        squares = gather(
            truth.layerwise(opened.model, cut),
            one,
            PRUNERS.get("wanda"),
            tmp_path / f"w{i}",
            lambda _: None,
        )
        found.append(({key: value for _, layer in pairs for key, value in layer.items()}, squares))
    (whole, squares), (parted, same) = found
    for layer in opened.architecture.layers:
        key = layer.linear("up_proj").key
        assert torch.equal(torch.cat([parted[f"{key}.0"], parted[f"{key}.1"]]), whole[key])
        assert torch.equal(same[f"{key}.0"], squares[key]) and torch.equal(
            same[f"{key}.1"], squares[key]
        )


@pytest.mark.parametrize("shape", [(2, 4), (8,), (2, 1, 4)])
def test_inputs_count_at_response_tokens_however_they_are_laid_out(shape):
    """Latent attention gives some linears `[B, 1, S, in]`."""
    linear = LinearArchitecture(0, "k_proj", "m", "t", (3, 2))
    labels = torch.tensor([[-100, 1, -100, 1], [-100, -100, -100, 1]])
    inputs, module = torch.randn(2, 4, 2), torch.nn.Linear(2, 3)
    sums = Sums()
    with sums.observing({linear: module}, lambda read, _: read.sum(0))(
        Batch({}, labels, ("a", "b"))
    ):
        module(inputs.view(*shape, 2))
    wanted = inputs[0, 1] + inputs[0, 3] + inputs[1, 3]
    torch.testing.assert_close(sums.of(linear), wanted)
    assert sums.tokens == {linear.key: 3}


def test_inputs_that_are_no_tokens_are_refused():
    """As in a decoder that attends to an encoder's states."""
    linear = LinearArchitecture(0, "encoder_attn.k_proj", "m", "t", (3, 2))
    module, batch = torch.nn.Linear(2, 3), Batch({}, torch.ones(1, 4).long(), ("a",))
    observing = Sums().observing({linear: module}, lambda inputs, _: inputs.sum(0))
    with observing(batch):
        module(torch.ones(1, 4, 2))
    why = r"\[1, 5, 2\], which are not the 4 tokens"
    with pytest.raises(RegraftError, match=why), observing(batch):
        module(torch.ones(1, 5, 2))


# Experts without calibration tokens


def test_experts_without_tokens_are_pruned_by_magnitude_and_counted(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen3_vl_moe"))
    (example,) = truth.examples("qwen3_vl_moe", tmp_path, 1)
    example = replace(example, response="No")
    batch = response_batch(opened.processor, [example])
    notes = []
    model = copy.deepcopy(opened.model)
    how = {"settings": prune_settings(order="one-shot"), "note": notes.append}
    results = truth.prune(opened, model, [batch], Pattern(0.5), tmp_path / "masks", **how)
    read = read_by(opened.model, opened.processor, opened.architecture, example)
    unseen = [li for li in opened.architecture.linears if not len(read[li.key])]
    assert unseen and all(li.expert is not None for li in unseen)
    for layer in opened.architecture.layers:
        masks = results.load(layer)
        count = len({li.expert for li in unseen if li.layer == layer.index})
        told = [note for note in notes if note.startswith(f"Layer {layer.index}: ")]
        assert [f"{count} of 4 experts saw no calibration token" in note for note in told] == (
            [True] if count else []
        )
        for linear in layer.linears:
            score = opened.source.weight(linear).abs()
            if linear not in unseen:
                score = score * read[linear.key].square().sum(0).sqrt()
            assert torch.equal(masks[linear.key].mask, Pattern(0.5).mask(score))


def test_experts_without_tokens_are_not_ranked(pico_dir):
    """Their importance is unknown, and equal scores would be ranked by position."""
    linears = list(open_source(pico_dir("qwen3_vl_moe")).architecture.linears)
    expert = next(li for li in linears if li.expert is not None)
    attention = next(li for li in linears if li.expert is None)
    known = ImportanceStatistics("wanda", {expert.key: torch.ones(expert.shape[1])}, 1)
    assert known.reached(expert) and known.reached(attention)  # whose absence is an error
    assert not ImportanceStatistics("wanda", {}, 1).reached(expert)
    assert ImportanceStatistics("magnitude", {}, 1).reached(expert)  # which reads no data


# What needs heads


@pytest.mark.parametrize(
    ("family", "scored"),
    [
        ("qwen3_5", [False, True] * 2),
        pytest.param("minicpmv4_6", [False, True] * 2, marks=MARKS.get("minicpmv4_6", ())),
        ("gemma4-experts", [True, False] * 2),
        ("molmo2", [True] * 4),
    ],
)
def test_heads_are_scored_where_there_are_some(family, scored, pico_dir, tmp_path):
    dense = pico_dir(family)
    how = {"data": prompts_of(family, tmp_path), "samples": 3, "device": "cpu", "r_max": 2}
    scores = regraft.score_heads(dense, tmp_path / "heads", **how)
    assert scores.ships.isfinite().all(dim=1).tolist() == scored
    assert scores.ships.isnan().all(dim=1).tolist() == [not one for one in scored]
    skipped = open_source(dense).architecture.headless
    assert scores.about.get("skipped", "") == skipped
    if skipped:
        with pytest.raises(RegraftError, match=rf"cannot be screened .*{skipped}"):
            regraft.score_heads(dense, tmp_path / "screened", mode="screened", **how)


def test_methods_that_need_heads_are_refused_where_none_are_told_apart(tmp_path):
    dense = pico.save("lfm2_vl", tmp_path / "dense")
    data = prompts_of("lfm2_vl", tmp_path)
    why = r"no attention heads that can be told apart .*Lfm2Attention has no separate o_proj"
    with pytest.raises(RegraftError, match=why):
        regraft.score_heads(dense, tmp_path / "heads", data=data, device="cpu")
    regraft.prune(dense, tmp_path / "pruned", method="magnitude")
    for heads in ("top", "all"):
        with pytest.raises(RegraftError, match=why):
            regraft.realign(
                dense, tmp_path / "pruned", tmp_path / "patch", method="hsr", heads=heads, data=data
            )


# Places and layouts


@given(st.data())
def test_positions_in_a_matrix_and_in_its_tensor(data):
    experts, rows, columns = (data.draw(st.integers(1, 5)) for _ in range(3))
    tensor = torch.arange(experts * rows * columns).view(experts, rows, columns)
    expert = data.draw(st.integers(0, experts - 1))
    flipped = data.draw(st.booleans())
    first = expert * rows * columns
    place = Place(first, 1, columns) if flipped else Place(first, columns, 1)
    shape = (columns, rows) if flipped else (rows, columns)
    matrix = place.view(tensor, shape)
    assert torch.equal(matrix, tensor[expert].T if flipped else tensor[expert])
    inside = torch.arange(rows * columns)
    flat = place.flat(inside, shape)
    assert torch.equal(tensor.flatten()[flat], matrix.flatten())
    found, back = place.inside(torch.arange(tensor.numel()), shape)
    assert torch.equal(found, torch.isin(torch.arange(tensor.numel()), flat))
    assert torch.equal(matrix.flatten()[back], tensor.flatten()[found])


@pytest.mark.parametrize(
    ("sources", "targets", "operations", "shapes"),
    [
        (["a", "b"], ["ab"], [MergeModulelist(0), Concatenate(1)], {"ab": (3, 8, 6)}),
        (["a"], ["b"], [Transpose(1, 2, check_dims=True)], {"b": (2, 6, 4)}),
        (["a"], ["b"], [Interleave(1)], {"b": (2, 4, 6)}),
        (["a"], ["b", "c"], [Interleave(1), Chunk(1)], {"b": (2, 2, 6), "c": (2, 2, 6)}),
        (["a"], ["b", "c"], [Chunk(0)], {"b": (1, 4, 6), "c": (1, 4, 6)}),
        (["a"], ["b"], [Transpose(0, 2)], {"b": (6, 4, 2)}),
        (
            ["a", "b"],
            ["c", "d"],
            [ErnieFuseAndSplitTextVisionExperts(0, 1)],
            {"c": (2, 8, 6), "d": (1, 8, 6)},
        ),
        pytest.param(
            ["a"],
            ["b"],
            [DEQUANTIZE and DEQUANTIZE(), Interleave(1)],
            {"b": (2, 4, 6)},
            marks=pytest.mark.skipif(DEQUANTIZE is None, reason="newer than this transformers"),
        ),
    ],
)
def test_conversions_are_followed(sources, targets, operations, shapes):
    """Tensors read through the layout equal those that transformers' conversion makes."""
    stacked = isinstance(operations[0], MergeModulelist | ErnieFuseAndSplitTextVisionExperts)
    shape, count = ((4, 6), 3) if stacked else ((2, 4, 6), 1)
    stored = {f"{name}{i}": torch.randn(shape) for name in sources for i in range(count)}
    converter = WeightConverter(sources, targets, operations)
    parts = {name: [f"{name}{i}" for i in range(count)] for name in sources}
    current = {name: [stored[one] for one in names] for name, names in parts.items()}
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(shapes[name]))
    for operation in operations:
        current = operation.convert(
            current,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            model=model,
            config=None,
            full_layer_name=targets[0],
        )
    records = {name: SimpleNamespace(shape=tuple(one.shape)) for name, one in stored.items()}
    there = SimpleNamespace(tensors=records)
    laid = {name: [layout.as_stored(there, one) for one in names] for name, names in parts.items()}
    found = layout.converted(converter, targets[0], laid, shapes)
    assert found.keys() == current.keys() == set(targets)
    for name, one in found.items():
        read = torch.empty(one.shape)
        for piece in one.pieces:
            view = piece.view
            box = tuple(slice(a, a + n) for a, n in zip(piece.start, view.shape, strict=True))
            flat = stored[piece.tensor].flatten()
            read[box] = flat.as_strided(view.shape, view.stride(), view.storage_offset())
        assert torch.equal(read, current[name])
