"""Replay and ablation of decoder layers are exact, for every family, and leave the model alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import pico
import truth
from regraft.data.collate import prompt_batch
from regraft.heads.ships import head_outputs, replay_ablated
from regraft.models.architecture import attention_of, decoder_layers
from regraft.models.key_values import record
from regraft.models.replay import (
    replaced_forwards,
    replay,
    text_inputs,
    tile_kwargs,
    tile_rows,
)

KINDS = ("left", "right", "single", "text")
CASES = [
    (family, kind)
    for family in pico.FAMILIES
    for kind in KINDS
    if kind != "text" or family in pico.VLM_FAMILIES
]


def assert_same(found, expected, real, what):
    """Equal at real (not padded) positions: [B, S, d] against [B, S, d], real [B, S]."""
    torch.testing.assert_close(
        found[real], expected[real], atol=1e-5, rtol=1e-5, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_replay_equals_the_full_forward(family, kind, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch(kind, family, processor, tmp_path)
    real = batch.inputs["attention_mask"].bool()
    assert real.all() == (kind == "single"), "rows of different length are wanted"
    expected = truth.full_forward(model, batch.inputs)
    skipped = [li.index for li in architecture.layers if li.attention == "cross_attn"]
    executed = [
        li.index for li in architecture.layers if kind != "text" or li.attention != "cross_attn"
    ]
    with truth.unchanged(model):
        text = text_inputs(model, batch.inputs)
        assert text.batch == len(real)
        inputs = record(model, text)
        assert list(inputs.entering) == executed == list(expected.entering), (
            f"layers that ran; {skipped} attend to images"
        )
        assert_same(inputs.final, expected.final, real, "final state of record")
        assert_same(replay(model, text), expected.final, real, "replay from the embeddings")
        ends = [*range(1, len(architecture.layers)), None]
        for start in executed:
            hidden = expected.entering[start]
            assert_same(inputs.entering[start], hidden, real, f"input of layer {start}")
            for stop in ends:
                if stop is not None and stop <= start:
                    continue
                reached = next((i for i in executed if stop is not None and i >= stop), None)
                wanted = expected.final if reached is None else expected.entering[reached]
                found = replay(model, text, start=start, hidden=hidden, stop=stop)
                assert_same(found, wanted, real, f"layers {start} to {stop}")
        start = executed[-1]
        other = replay(model, text, start=start, hidden=expected.entering[start].flip(-1))
        assert (other - expected.final)[real].abs().max() > 0.1, "hidden states must matter"


def test_layer_by_layer_with_what_replay_itself_returned(family, pico_dir, tmp_path):
    """As the pruner does it, including layers that the family skips for this batch."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    for kind in ("left", "text"):
        batch = truth.make_batch(kind, family, processor, tmp_path / kind)
        text, state = text_inputs(model, batch.inputs), None
        for layer in architecture.layers:
            last = layer is architecture.layers[-1]
            state = replay(
                model,
                text,
                start=layer.index,
                hidden=state,
                stop=None if last else layer.index + 1,
            )
        expected = truth.full_forward(model, batch.inputs).final
        assert_same(state, expected, batch.inputs["attention_mask"].bool(), kind)


@pytest.mark.parametrize("kind", ["left", "single"])
def test_copies_do_not_mix(family, kind, pico_dir, tmp_path):
    """Three copies of the batch with different hidden states give the same as each alone."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch(kind, family, processor, tmp_path)
    real = batch.inputs["attention_mask"].bool()
    text = text_inputs(model, batch.inputs)
    inputs = record(model, text)
    for layer in architecture.layers:
        start, hidden = layer.index, inputs.entering[layer.index]
        variants = [hidden * scale for scale in (1.0, 0.5, -1.0)]
        together = replay(model, text, start=start, hidden=torch.cat(variants))
        for found, variant in zip(together.chunk(3), variants, strict=True):
            alone = replay(model, text, start=start, hidden=variant)
            assert_same(found, alone, real, f"from layer {start}")


def test_model_is_clean_after_an_error(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("left", family, processor, tmp_path)
    text = text_inputs(model, batch.inputs)
    wrong = torch.zeros(3, 2, architecture.hidden_size + 1)
    with truth.unchanged(model):
        with pytest.raises(RuntimeError):
            replay(model, text, start=1, hidden=wrong)
        with pytest.raises(RuntimeError):
            head_outputs(model, partial(replay, model, text), 1, wrong, 16)


def test_a_forward_that_an_instance_had_comes_back():
    """Also after nested blocks, and after an error."""
    module, plain = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def hooked(value):
        return value

    module.forward = hooked
    with replaced_forwards({module: lambda _: "outer", plain: lambda _: "outer"}):
        with pytest.raises(KeyError), replaced_forwards({module: lambda _: "inner"}):
            assert module(0) == "inner"
            raise KeyError
        assert module(0) == plain(0) == "outer"
    assert module.__dict__["forward"] is hooked
    assert "forward" not in plain.__dict__


def test_tiles_keep_the_batch_together():
    rows = torch.tensor([[1], [2]])
    assert tile_rows(rows, 3).flatten().tolist() == [1, 2, 1, 2, 1, 2]
    tiled = tile_kwargs({"mask": {"full": rows}, "broadcast": rows[:1], "flag": True}, 2, 2)
    assert tiled["mask"]["full"].flatten().tolist() == [1, 2, 1, 2]
    assert tiled["broadcast"].tolist() == [[1]] and tiled["flag"] is True
    with pytest.raises(TypeError, match="unexpected object"):
        tile_kwargs({"cache": object()}, 2, 2)
    with pytest.raises(ValueError, match="cannot tile"):
        tile_kwargs({"odd": torch.zeros(3)}, 2, 2)


# Ablation


def manually_ablated(model, inputs, layer, head, head_dim, target, eps):
    """Final states of a full forward with one head edited by hand."""
    if target == "v":  # a value scaled by eps scales what the head adds to o_proj's output
        attention = attention_of(decoder_layers(model)[layer])
        with truth.edited(attention.o_proj.weight) as weight:
            weight[:, head * head_dim : (head + 1) * head_dim] *= eps
            return truth.full_forward(model, inputs).final
    with truth.ablated(model, layer, head, target, eps):
        return truth.full_forward(model, inputs).final


@pytest.mark.parametrize(
    ("target", "eps"),
    [("v", 0.3), ("all", 0.3), ("q", 1e-5), ("k", 0.3)],  # ("all", 1e-5): test_ships.py
)
def test_ablation_equals_a_manual_edit_of_each_head(family, target, eps, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("left", family, processor, tmp_path)
    real = batch.inputs["attention_mask"].bool()
    base = truth.full_forward(model, batch.inputs)
    run = partial(replay, model, text_inputs(model, batch.inputs))
    for layer in architecture.layers:
        hidden, size = base.entering[layer.index], layer.head_dim
        with truth.unchanged(model):
            outputs = head_outputs(model, run, layer.index, hidden, size, target=target, eps=eps)
            heads = [*range(1, layer.heads), 0]  # any order, any subset
            found = replay_ablated(model, run, layer.index, hidden, outputs, heads)
        assert found.shape == (layer.heads, *hidden.shape)
        for row, head in enumerate(heads):
            expected = manually_ablated(model, batch.inputs, layer.index, head, size, target, eps)
            where = f"layer {layer.index} head {head}"
            torch.testing.assert_close(
                found[row][real], expected[real], atol=5e-5, rtol=0, msg=lambda m, w=where: w + m
            )
            effect = (found[row] - base.final)[real].abs().max()
            assert effect > 1e-2, f"{where}: ablation changes the final state by {effect} only"
        for one in range(layer.heads):
            for two in range(one):
                gap = (found[one] - found[two])[real].abs().max()
                assert gap > 1e-2, f"layer {layer.index}: heads {one} and {two} differ by {gap}"


def test_value_ablation_at_zero_is_a_zero_head(family, pico_dir, tmp_path):
    """eps 0 on the value equals zeroing the head's columns of o_proj, layer by layer."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = truth.make_batch("single", family, processor, tmp_path)
    base = truth.full_forward(model, batch.inputs)
    run = partial(replay, model, text_inputs(model, batch.inputs))
    for layer in architecture.layers:
        hidden = base.entering[layer.index]
        outputs = head_outputs(model, run, layer.index, hidden, layer.head_dim, target="v", eps=0.0)
        assert not outputs.ablated.any()
        (found,) = replay_ablated(model, run, layer.index, hidden, outputs, [2])
        expected = manually_ablated(model, batch.inputs, layer.index, 2, layer.head_dim, "v", 0.0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hidden_states_pass_by_a_skipped_last_layer(tmp_path: Path) -> None:
    """A cross-attention layer at the end does not run on text: its input goes to the final norm."""
    parts = pico._parts("mllama")
    parts.config.text_config.cross_attention_layers = [1, 4]
    model = parts.model_class(parts.config).eval()
    examples = pico.write_examples(tmp_path, 2, images=False)
    text = text_inputs(model, prompt_batch(parts.processor, examples).inputs)
    whole = record(model, text)
    assert 4 not in whole.entering, "the last layer ran, so this test is about nothing"
    hidden = torch.randn_like(whole.final)
    normed = model.get_decoder().norm(hidden)
    assert torch.equal(replay(model, text, start=4, hidden=hidden), normed)
    assert torch.equal(replay(model, text, start=4, hidden=hidden, stop=5), hidden)
