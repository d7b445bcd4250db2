"""Shortcuts of replay: last token in the last layer, shared vision keys, windows of positions."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pico
import truth
from regraft.errors import RegraftError
from regraft.heads.ships import head_outputs, replay_ablated
from regraft.models.architecture import attention_of, cross_attention_layers, decoder_layers
from regraft.models.key_values import fold, last_token_replay, narrowed, record, unfold
from regraft.models.replay import replay, text_inputs
from regraft.models.window import most_attended, window_at, window_replay

CASES = [
    (family, kind)
    for family in pico.FAMILIES
    for kind in ("left", "single", "text")
    if kind != "text" or family in pico.VLM_FAMILIES
]


def last_token(model, text):
    """A last-token replay as head scoring makes it."""
    recorded = record(model, text, cross_attention_layers(model))
    return last_token_replay(model, text, recorded.known)


def all_heads(model, run, layer, hidden, **how):
    outputs = head_outputs(model, run, layer.index, hidden, layer.head_dim, **how)
    return replay_ablated(model, run, layer.index, hidden, outputs, range(layer.heads))


@contextmanager
def rows_through(module):
    """The number of rows (all dimensions but the last) of each call of a module."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0][..., 0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def close(found, expected, what, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=lambda m: f"{what}: {m}")


# Last token


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_last_token_equals_the_full_forward(family, kind, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch(kind, family, processor, tmp_path)
    expected = truth.full_forward(model, batch.inputs)
    last = expected.final[:, -1:]
    with truth.unchanged(model):
        text = text_inputs(model, batch.inputs)
        run, whole = last_token(model, text), partial(replay, model, text)
        for start, hidden in expected.entering.items():
            layer = architecture.layers[start]
            found = run(start=start, hidden=hidden)
            assert found.shape == last.shape
            close(found, last, f"from layer {start}")
            variants = torch.cat([hidden, hidden.flip(-1)])
            found = run(start=start, hidden=variants)
            other = whole(start=start, hidden=hidden.flip(-1))[:, -1:]
            assert (other - last).abs().max() > 0.1
            close(found, torch.cat([last, other]), f"two copies from layer {start}")
            found = all_heads(model, run, layer, hidden, target="q")
            ablated = all_heads(model, whole, layer, hidden, target="q")
            assert found.shape[2] == 1 < ablated.shape[2]
            close(found, ablated[:, :, -1:], f"heads of layer {start}")


def test_last_layer_computes_one_position_a_row(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("left", family, processor, tmp_path)
    text = text_inputs(model, batch.inputs)
    inputs, run = record(model, text), last_token(model, text)
    last, before = architecture.layers[-1], architecture.layers[-2]
    down, o_proj = (
        dict(model.named_modules())[last.linear(role).module] for role in ("down_proj", "o_proj")
    )
    with rows_through(down) as mlp, rows_through(o_proj) as attention:
        all_heads(model, run, before, inputs.entering[before.index])
        all_heads(model, run, last, inputs.entering[last.index])
    copies = last.heads * text.batch
    # the layer before: its heads; the last one: twice its attention, then its heads
    assert mlp == attention == [copies, text.batch, text.batch, copies]


def test_last_layer_with_unknown_arguments_runs_in_full(pico_dir, tmp_path):
    _, model, processor, _ = truth.opened(pico_dir("llama"))
    batch = truth.make_batch("left", "llama", processor, tmp_path)
    text = text_inputs(model, batch.inputs)
    expected = truth.full_forward(model, batch.inputs)
    run = last_token(model, text)
    last = decoder_layers(model)[-1]
    odd = {"position_weights": torch.ones(3, 7)}
    hook = last.register_forward_pre_hook(lambda _m, a, k: (a, k | odd), with_kwargs=True)
    try:
        found = run(start=2, hidden=expected.entering[2])
    finally:
        hook.remove()
    close(found, expected.final, "all positions")


def test_narrowing_refuses_what_it_does_not_know():
    mask, cos = torch.zeros(1, 1, 5, 5), torch.zeros(1, 5, 4)
    known = {"attention_mask": mask, "position_embeddings": (cos, cos), "use_cache": False}
    cut = narrowed(known)
    assert cut["attention_mask"].shape == (1, 1, 1, 5)
    assert [part.shape for part in cut["position_embeddings"]] == [(1, 1, 4)] * 2
    assert narrowed(known | {"odd": torch.zeros(5)}) is None
    assert narrowed(known | {"attention_mask": torch.ones(1, 5)}) is None
    assert narrowed(known | {"block_mask": object()}) is None


# Vision keys and values of Mllama


def test_vision_keys_are_computed_once_a_batch(pico_dir, tmp_path):
    """Whatever the number of copies: k_proj sees the vision tokens of B rows once."""
    _, model, processor, architecture = truth.opened(pico_dir("mllama"))
    batch = truth.make_batch("left", "mllama", processor, tmp_path)
    text = text_inputs(model, batch.inputs)
    tokens = text.kwargs["cross_attention_states"][..., 0].numel()
    layers = cross_attention_layers(model)
    assert layers == [1, 3]
    attention = attention_of(decoder_layers(model)[3])
    with rows_through(attention.k_proj) as keys, rows_through(attention.v_proj) as values:
        inputs = record(model, text, layers)
        run = last_token_replay(model, text, inputs.known)
        for layer in architecture.layers:
            all_heads(model, run, layer, inputs.entering[layer.index])
    assert keys == values == [tokens]


# Windows


@contextmanager
def kept_elsewhere(model, base, positions):
    """Full forwards in which every layer's output is the unablated one outside `positions`."""
    rows = torch.arange(len(positions))[:, None]
    hooks = []
    for index, layer in enumerate(decoder_layers(model)):

        def restore(_module, _args, output, index=index):
            kept = base[index].clone()
            kept[rows, positions] = output[rows, positions]
            return kept

        if index in base:
            hooks.append(layer.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def zeroed(model, layer, head, head_dim):
    """Full forwards with one head's columns of o_proj's input at zero."""
    attention = attention_of(decoder_layers(model)[layer])

    def zero(_module, args):
        z = args[0].clone()
        z[..., head * head_dim : (head + 1) * head_dim] = 0
        return (z,)

    hook = attention.o_proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def layer_outputs(model, inputs):
    """Output of each executed layer in one full forward."""
    found = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: found.__setitem__(i, out))
        for i, layer in enumerate(decoder_layers(model))
    ]
    try:
        truth.full_forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def some_positions(rows, length, size):
    """Ascending positions that differ by row and include the last."""
    generator = torch.Generator().manual_seed(size)
    order = torch.rand(rows, length, generator=generator)
    order[:, -1] = 2
    return order.topk(min(size, length)).indices.sort().values


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_window_follows_an_ablation_through_its_positions(family, kind, size, pico_dir, tmp_path):
    """All heads of a layer side by side; a window of 1000 is the whole prompt."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch(kind, family, processor, tmp_path)
    mask = batch.inputs["attention_mask"].bool()
    positions = some_positions(*mask.shape, size)
    real = mask.gather(1, positions)
    index = positions[..., None].expand(-1, -1, architecture.hidden_size)
    base = truth.full_forward(model, batch.inputs)
    outputs = layer_outputs(model, batch.inputs)
    with truth.unchanged(model):
        window = window_at(model, record(model, text_inputs(model, batch.inputs)), positions)
        run = window_replay(model, window)
        assert list(window.entering) == list(base.entering)
        close(window.final[real], base.final.gather(1, index)[real], "final state")
        for layer in architecture.layers:
            if layer.index not in base.entering:
                continue
            hidden = window.entering[layer.index]
            close(hidden[real], base.entering[layer.index].gather(1, index)[real], "layer input")
            close(run(start=layer.index, hidden=hidden)[real], window.final[real], "unablated")
            found = all_heads(model, run, layer, hidden, target="v", eps=0.0)
            for head in range(layer.heads):
                with (
                    kept_elsewhere(model, outputs, positions),
                    zeroed(model, layer.index, head, layer.head_dim),
                ):
                    expected = truth.full_forward(model, batch.inputs).final.gather(1, index)
                where = f"layer {layer.index} head {head}"
                close(found[head][real], expected[real], where, atol=5e-5)
                assert (expected - window.final)[real].abs().max() > 1e-2, where


def test_most_attended_positions(family, pico_dir, tmp_path):
    """Against attention weights by definition: the last query's, summed over layers and heads."""
    _, model, processor, _ = truth.opened(pico_dir(family))
    batch = truth.make_batch("left", family, processor, tmp_path)
    decoder, weights = model.get_decoder(), []
    decoder.set_attn_implementation("eager")
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out: weights.append(out[1][:, :, -1]))
        for layer in decoder_layers(model)
        if hasattr(layer, "self_attn")
    ]
    try:
        truth.full_forward(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
        decoder.set_attn_implementation("sdpa")
    total = torch.cat(weights, dim=1).sum(dim=1)  # [B, S]
    with truth.unchanged(model):
        recorded = record(model, text_inputs(model, batch.inputs))
        found = most_attended(model, recorded, 4)
    expected = [{*row[:-1].topk(3).indices.tolist(), len(row) - 1} for row in total]
    assert [set(row.tolist()) for row in found] == expected
    assert (found.diff(dim=1) > 0).all()
    whole = most_attended(model, recorded, 1000)
    assert torch.equal(whole, torch.arange(total.shape[1]).expand(len(total), -1))


@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "gemma3", "mistral_sw", "mllama"])
def test_eager_attention(family, pico_dir, tmp_path):
    """Its masks are added to the logits, not boolean."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("left", family, processor, tmp_path)
    real = batch.inputs["attention_mask"].bool()
    decoder = model.get_decoder()
    decoder.set_attn_implementation("eager")
    try:
        text = text_inputs(model, batch.inputs)
        inputs = record(model, text)
        length = real.shape[1]
        everywhere = torch.arange(length).expand(text.batch, -1)
        inside = window_at(model, record(model, text), everywhere)
        last, window = last_token(model, text), window_replay(model, inside)
        whole = partial(replay, model, text)
        for layer in architecture.layers:
            hidden = inputs.entering[layer.index]
            expected = all_heads(model, whole, layer, hidden)
            close(all_heads(model, last, layer, hidden)[:, :, -1], expected[:, :, -1], "last token")
            found = all_heads(model, window, layer, hidden)
            close(found[:, real], expected[:, real], "window", atol=5e-5)
    finally:
        decoder.set_attn_implementation("sdpa")


def test_window_without_a_square_mask_is_refused(pico_dir, tmp_path):
    _, model, processor, _ = truth.opened(pico_dir("llama"))
    text = text_inputs(model, truth.make_batch("left", "llama", processor, tmp_path).inputs)
    recorded = record(model, text)
    flash = {"attention_mask": torch.ones(3, 9)}  # what flash attention is called with
    arguments = {0: {**recorded.arguments[0], **flash}}
    recorded = replace(recorded, arguments=arguments)
    with pytest.raises(RegraftError, match="needs the attention backend sdpa or eager"):
        window_at(model, recorded, torch.zeros(3, 1, dtype=torch.long))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_folding_keeps_rows_together(copies, rows, length):
    shape = (copies * rows, 2, length, 5)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    laid = fold(tensor, copies)
    assert laid.shape[0] == rows and laid.shape[-2] == copies * length
    for copy in range(copies):
        own = laid.narrow(-2, copy * length, length)
        assert torch.equal(own, tensor[copy * rows : (copy + 1) * rows])
    assert torch.equal(unfold(laid, copies), tensor)
