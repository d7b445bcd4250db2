"""Gradients, losses and layerwise passes against autograd and passes of the whole model."""

from __future__ import annotations

import copy
import errno

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import BaseModelOutputWithPast

import truth
from regraft.data.collate import batches, response_batch
from regraft.errors import PassingError, RegraftError
from regraft.models.layerwise import LayerwisePass
from regraft.models.placement import PlacedModel
from regraft.pruning import gradients
from regraft.pruning.gradients import (
    layer_gradients,
    mean_cross_entropy,
    product,
    signed,
    signed_and_squared,
)
from regraft.restoration.teacher import DecisionLoss, final_states, losses_together

SOME = ("qwen2_vl", "mllama", "gemma3", "llama")


def changed(model):
    """The same model with other weights in its decoder layers, as after pruning."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    for layer in other.get_decoder().layers:
        for name, weight in layer.named_parameters():
            if name.endswith("proj.weight"):
                weight.data[torch.rand(weight.shape, generator=generator) < 0.4] = 0
    return other


def response_losses(layerwise, loss):
    return losses_together([(layerwise, loss)])[0]


def collated(opened, family, folder, n=3, size=2):
    examples = truth.examples(family, folder, n)
    return examples, [response_batch(opened.processor, rows) for rows in batches(examples, size)]


def written_out(logits, labels, teacher):
    """The loss of one response, token by token, from logits `[S, V]` of a whole forward pass.

    With a teacher's logits the divergence from them at the first tokens, else the mean cross
    entropy.
    """
    costs = []
    for t in range(len(labels) - 1):
        if labels[t + 1] == -100:
            continue
        own = logits[t].float().log_softmax(0)
        if teacher is None:
            costs.append(-own[labels[t + 1]])
        else:
            wanted = teacher[t].float().log_softmax(0)
            costs.append((wanted.exp() * (wanted - own)).sum())
    if teacher is None:
        return sum(costs) / len(costs)
    return sum(w * cost for w, cost in zip((1, 1, 0.3, 0.3, 0.3, 0.3), costs, strict=False))


def by_autograd(model, dense, processor, architecture, examples):
    """Mean over single rows of the loss's dL/dW, and the losses by id."""
    modules = dict(model.named_modules())
    matrices = {li.key: modules[li.module].weight.requires_grad_() for li in architecture.linears}
    losses, total = {}, 0
    for example in examples:
        batch = response_batch(processor, [example])
        logits = model(**batch.inputs, use_cache=False).logits[0]
        wanted = None
        if dense is not None:
            wanted = truth.full_forward(dense, batch.inputs).logits[0]
        loss = written_out(logits, batch.labels[0], wanted)
        losses[example.id] = float(loss.detach())
        total = total + loss
    gradients = torch.autograd.grad(total / len(examples), list(matrices.values()))
    for weight in matrices.values():
        weight.requires_grad_(False)
    return dict(zip(matrices, gradients, strict=True)), losses


@pytest.mark.parametrize("teacher", [True, False], ids=["divergence", "cross-entropy"])
def test_gradients_equal_autograd_on_the_whole_model(family, teacher, pico_dir, tmp_path):
    """With a teacher, and squares below; without, the plain sum."""
    opened = truth.opened(pico_dir(family))
    dense, processor, architecture = opened.model, opened.processor, opened.architecture
    model = changed(dense)
    examples, cut = collated(opened, family, tmp_path)
    loss = (
        DecisionLoss(final_states(truth.layerwise(dense, cut))) if teacher else mean_cross_entropy
    )
    expected, losses = by_autograd(
        model, dense if teacher else None, processor, architecture, examples
    )
    layerwise = truth.layerwise(model, cut)
    found = response_losses(layerwise, loss)
    assert found == {name: pytest.approx(value, rel=1e-3) for name, value in losses.items()}
    layerwise.rewind()
    with truth.unchanged(model):
        parts = dict(
            item
            for _, layer in layer_gradients(
                layerwise,
                architecture,
                tmp_path / "states",
                lambda _: True,
                lambda _: None,
                add=signed_and_squared if teacher else signed,
                loss=loss,
            )
            for item in layer.items()
        )
    assert parts.keys() == expected.keys()
    assert not list((tmp_path / "states").iterdir()), "layer inputs are left behind"
    for key, wanted in expected.items():
        rows = len(wanted)
        assert len(parts[key]) == (2 * rows if teacher else rows)
        scale = float(wanted.abs().max())
        assert scale > 0
        torch.testing.assert_close(parts[key][:rows], wanted, rtol=1e-3, atol=5e-5 * scale)
        assert (parts[key][rows:] >= 0).all()


def test_only_wanted_linears_are_taken(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("llama"))
    _, cut = collated(opened, "llama", tmp_path)
    layers = layer_gradients(
        truth.layerwise(opened.model, cut),
        opened.architecture,
        tmp_path / "states",
        lambda linear: linear.role == "v_proj",
        lambda _: None,
    )
    found = [(layer.index, list(part)) for layer, part in layers]
    assert found == [(i, [f"layers.{i}.self_attn.v_proj"]) for i in (3, 2, 1, 0)]


def test_layer_inputs_go_where_the_disk_is_full(pico_dir, tmp_path, monkeypatch):
    """The next try makes them anew, and may need their room."""
    opened = truth.opened(pico_dir("llama"))
    cut = [response_batch(opened.processor, truth.examples("llama", tmp_path, 2))]
    scratch, real = tmp_path / "states", gradients.save_file

    def fills_up(tensors, path):
        if any(scratch.iterdir()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(gradients, "save_file", fills_up)
    layers = layer_gradients(
        truth.layerwise(opened.model, cut),
        opened.architecture,
        scratch,
        lambda _: True,
        lambda _: None,
    )
    with pytest.raises(PassingError, match="disk is full"):
        next(layers)
    assert not scratch.exists()


def test_squares_are_of_each_token():
    """A small linear: the gradient of every single token by autograd, then its square."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, 5, n, generator=generator) for n in (4, 3))
    weight = torch.randn(3, 4, generator=generator)
    y = (x @ weight.T).requires_grad_()
    ((y - target) ** 3).sum().backward()
    squares = torch.zeros_like(weight)
    for sample in range(2):
        for token in range(5):
            own = weight.clone().requires_grad_()
            ((own @ x[sample, token] - target[sample, token]) ** 3).sum().backward()
            squares += own.grad**2
    both = signed_and_squared(y.grad, x)
    assert both.shape == (6, 4)
    torch.testing.assert_close(both[:3], signed(y.grad, x))
    torch.testing.assert_close(both[3:], squares)
    whole = weight.clone().requires_grad_()
    ((x @ whole.T - target) ** 3).sum().backward()
    torch.testing.assert_close(both[:3], whole.grad)
    assert product(y.grad[0].bfloat16(), x[0].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "llama", "mistral_large4", "inkling2"])
def test_streamed_equals_resident(family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    _, cut = collated(opened, family, tmp_path)
    teacher = final_states(truth.layerwise(opened.model, cut), lambda _: None)
    model = changed(opened.model)
    loss = DecisionLoss(teacher)

    def gradients(streamed):
        layerwise = truth.layerwise(model, cut, streamed=streamed)
        losses = response_losses(layerwise, loss)
        layerwise.rewind()
        layers = layer_gradients(
            layerwise,
            opened.architecture,
            tmp_path / f"{streamed}",
            lambda _: True,
            lambda _: None,
            add=signed_and_squared,
            loss=loss,
        )
        return losses, {key: value for _, part in layers for key, value in part.items()}

    with truth.unchanged(model):
        (losses, one), (again, other) = gradients(False), gradients(True)
    assert losses == again
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_losses_together_stream_the_model_once(pico_dir, tmp_path, monkeypatch):
    opened = truth.opened(pico_dir("qwen2_vl"))
    _, cut = collated(opened, "qwen2_vl", tmp_path)
    assert len(cut) > 1
    teacher = final_states(truth.layerwise(opened.model, cut))
    one = truth.layerwise(changed(opened.model), cut, streamed=True)
    other = truth.layerwise(one.model.network, cut[:1], streamed=True)
    plain, against = mean_cross_entropy, DecisionLoss(teacher)
    apart = [response_losses(one, plain), response_losses(other, against)]
    held, hold = [], PlacedModel.layer
    monkeypatch.setattr(
        PlacedModel, "layer", lambda self, index: held.append(index) or hold(self, index)
    )
    assert losses_together([(one, plain), (other.on(one.model), against)]) == apart
    assert held == list(range(one.layers))


# The teacher distribution


@pytest.mark.parametrize("family", SOME)
def test_final_states_and_losses_are_those_of_a_full_forward(family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    examples, cut = collated(opened, family, tmp_path, 5)
    ticks = []
    layerwise = truth.layerwise(opened.model, cut)
    states = final_states(layerwise, ticks.append)
    losses = response_losses(layerwise, mean_cross_entropy)
    assert sum(ticks) == 5 * len(opened.architecture.layers)
    assert list(states) == list(losses) == [example.id for example in examples]
    for batch in cut:
        forward = truth.full_forward(opened.model, batch.inputs)
        for row, name in enumerate(batch.ids):
            response = (batch.labels[row] != -100).nonzero().flatten()
            assert len(response) == len(states[name]) > 1
            expected = forward.final[row, response - 1]
            torch.testing.assert_close(states[name], expected, rtol=1e-3, atol=1e-4)
            cost = [
                float(F.cross_entropy(forward.logits[row, t - 1].float(), batch.labels[row, t]))
                for t in response
            ]
            assert losses[name] == pytest.approx(sum(cost) / len(cost), rel=1e-3)


def test_a_model_has_no_divergence_from_itself(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_vl"))
    _, cut = collated(opened, "qwen2_vl", tmp_path, 4)
    layerwise = truth.layerwise(opened.model, cut)
    loss = DecisionLoss(final_states(layerwise, lambda _: None))
    own = response_losses(layerwise, loss)
    others = response_losses(layerwise.on(truth.layerwise(changed(opened.model), cut).model), loss)
    assert all(abs(value) < 1e-5 for value in own.values())
    assert all(value > 1e-2 for value in others.values())


# Layer by layer


def watched(model):
    """Names of vision modules as they run."""
    ran = []
    for name, module in model.named_modules():
        if "vision" in name or "visual" in name:
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


def to_the_end(layerwise):
    for index in range(layerwise.layers):
        with layerwise.model.layer(index):
            layerwise.run_layer(index, lambda _: None)
    return layerwise.states


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "mllama", "llama"])
def test_a_walk_on_another_model(family, streamed, pico_dir, tmp_path):
    """The same states as a pass of its own, and the vision part does not run again."""
    opened = truth.opened(pico_dir(family))
    _, cut = collated(opened, family, tmp_path)
    dense, pruned = copy.deepcopy(opened.model), changed(opened.model)
    fresh = to_the_end(truth.layerwise(pruned, cut, streamed=streamed))
    ran, on_pruned = watched(dense), watched(pruned)
    layerwise = truth.layerwise(dense, cut, streamed=streamed)
    assert bool(ran) == opened.source.has_vision, "the vision part is not seen"
    seen = len(ran)
    embedded = [state.clone() for state in layerwise.states]
    own = [state.clone() for state in to_the_end(layerwise)]
    other = layerwise.on(truth.layerwise(pruned, cut[:0], streamed=streamed).model)
    assert all(map(torch.equal, other.states, embedded))
    found = to_the_end(other)
    assert all(map(torch.equal, found, fresh))
    assert not any(map(torch.equal, found, own))
    assert all(map(torch.equal, layerwise.states, own)), "the first pass moved too"
    layerwise.rewind()
    assert all(map(torch.equal, layerwise.states, embedded))
    assert all(map(torch.equal, to_the_end(layerwise), own))
    assert isinstance(other, LayerwisePass)
    assert len(ran) == seen and not on_pruned


def putting_out(model, more):
    """A Llama whose layers return `more(state)` after their state, which the next one reads."""
    model = copy.deepcopy(model)
    decoder = model.get_decoder()
    for layer in decoder.layers:

        def forward(hidden, *args, own=layer.forward, given=None, **kwargs):
            state = own(hidden if given is None else hidden * (1 + given), *args, **kwargs)
            return state, more(state)

        layer.forward = forward

    def run(input_ids=None, inputs_embeds=None, attention_mask=None, **_):
        state = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = decoder.rotary_emb(state, torch.arange(state.shape[1])[None])
        given = None
        for layer in decoder.layers:
            state, given = layer(state, position_embeddings=rotary, given=given)
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(state))

    decoder.forward = run
    return model


def test_what_is_put_out_behind_the_state_needs_no_gradient(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("llama"))
    model = putting_out(
        opened.model, lambda state: (state.detach() > 0).float().mean(-1)[..., None]
    )
    _, made = collated(opened, "llama", tmp_path / "data", n=1)
    layerwise = LayerwisePass(truth.resident(model), made)
    found = {}
    for _, sums in layer_gradients(
        layerwise,
        opened.architecture,
        tmp_path / "work",
        lambda _: True,
        lambda _: None,
        add=signed,
    ):
        found |= sums
    batch = made[0]
    logits = model.requires_grad_(True)(**batch.inputs).logits
    F.cross_entropy(logits[0, :-1].float(), batch.labels[0, 1:]).backward()
    modules = dict(model.named_modules())
    assert len(found) == len(list(opened.architecture.linears))
    for linear in opened.architecture.linears:
        wanted = modules[linear.module].weight.grad
        torch.testing.assert_close(found[linear.key], wanted, atol=1e-6, rtol=1e-3)


def test_what_is_no_tensor_behind_the_state_is_refused(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("llama"))
    model = putting_out(opened.model, lambda state: [state])
    _, made = collated(opened, "llama", tmp_path / "data", n=1)
    layerwise = LayerwisePass(truth.resident(model), made)
    with pytest.raises(RegraftError, match="Layers return list after their state"):
        layerwise.run_layer(0, lambda _: None)
