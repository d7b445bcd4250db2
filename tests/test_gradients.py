"""Gradients, losses and walks against autograd and whole forward passes of the whole model."""

from __future__ import annotations

import copy
import errno
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import truth
from regraft.data.collate import batches, response_batch
from regraft.errors import PassingError
from regraft.importance import gradients
from regraft.importance.gradients import (
    SampleGradients,
    layer_gradients,
    product,
    signed,
    signed_and_squared,
)
from regraft.importance.hard import (
    agreements,
    final_states,
    losses_together,
    response_losses,
    sampled,
)
from regraft.importance.losses import DecisionLoss, predicting, refusal_starts
from regraft.models.placement import PlacedModel
from regraft.models.walk import Walk

WEIGHTS = {"harmful-0-0": 0.25, "harmful-0-2": 3.0}
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


def collated(opened, family, folder, n=3, size=2):
    examples = truth.examples(family, folder, n)
    return examples, [response_batch(opened.processor, rows) for rows in batches(examples, size)]


def written_out(logits, labels, teacher, decision, tail):
    """The loss of one response, token by token, from logits `[S, V]` of a whole forward pass."""
    total, seen = torch.zeros(()), 0
    for t in range(len(labels) - 1):
        if labels[t + 1] == -100:
            continue
        own = logits[t].float().log_softmax(0)
        if teacher is None:
            cost = -own[labels[t + 1]]
        else:
            wanted = teacher[t].float().log_softmax(0)
            cost = (wanted.exp() * (wanted - own)).sum()
        total = total + (1.0 if seen < decision else tail) * cost
        seen += 1
    return total


def by_autograd(model, dense, processor, anatomy, examples, weights, decision, tail):
    """Mean over single rows of the weighted loss's dL/dW, and the losses by id."""
    modules = dict(model.named_modules())
    matrices = {li.key: modules[li.module].weight.requires_grad_() for li in anatomy.linears}
    losses, total = {}, 0
    for example in examples:
        batch = response_batch(processor, [example])
        logits = model(**batch.inputs, use_cache=False).logits[0]
        wanted = None
        if dense is not None:
            wanted = truth.full_forward(dense, batch.inputs).logits[0]
        loss = written_out(logits, batch.labels[0], wanted, decision, tail)
        loss = weights.get(example.id, 1.0) * loss
        losses[example.id] = float(loss.detach())
        total = total + loss
    gradients = torch.autograd.grad(total / len(examples), list(matrices.values()))
    for weight in matrices.values():
        weight.requires_grad_(False)
    return dict(zip(matrices, gradients, strict=True)), losses


@pytest.mark.parametrize("teacher", [True, False], ids=["distil", "given"])
def test_gradients_equal_autograd_on_the_whole_model(family, teacher, pico_dir, tmp_path):
    """With a teacher and example weights, and squares below; without, the plain sum."""
    opened = truth.opened(pico_dir(family))
    dense, processor, anatomy = opened.model, opened.processor, opened.anatomy
    model = changed(dense)
    examples, cut = collated(opened, family, tmp_path)
    weights = WEIGHTS if teacher else {}
    loss = DecisionLoss(decision=1, tail=0.3, weights=weights)
    if teacher:
        loss = replace(loss, teacher=final_states(truth.walk(dense, cut), lambda _: None))
    expected, losses = by_autograd(
        model, dense if teacher else None, processor, anatomy, examples, weights, 1, 0.3
    )
    walk = truth.walk(model, cut)
    found = response_losses(walk, loss)
    assert found == {name: pytest.approx(value, rel=1e-3) for name, value in losses.items()}
    walk.rewind()
    with truth.unchanged(model):
        parts = dict(
            item
            for _, layer in layer_gradients(
                walk,
                anatomy,
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


def test_gradients_of_single_samples_equal_autograd(family, pico_dir, tmp_path):
    """At random places of every weight, and nowhere in one."""
    opened = truth.opened(pico_dir(family))
    model = changed(opened.model)
    examples, cut = collated(opened, family, tmp_path)
    loss = DecisionLoss(decision=1, tail=0.3, weights=WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    places = {
        linear.key: torch.randint(math.prod(linear.shape), (7,), generator=generator)
        for linear in opened.anatomy.linears
    }
    nowhere = next(iter(places))
    places[nowhere] = places[nowhere][:0]
    walk = truth.walk(model, cut)
    samples = SampleGradients(walk, places)
    with truth.unchanged(model):
        layers = layer_gradients(
            walk,
            opened.anatomy,
            tmp_path / "states",
            lambda _: True,
            lambda _: None,
            loss=loss,
            samples=samples,
        )
        means = {key: one for _, layer in layers for key, one in layer.items()}
    found = samples.found
    for key, at in places.items():
        torch.testing.assert_close(found[key].mean(dim=0), means[key].flatten()[at])
    assert not list((tmp_path / "states").iterdir()), "layer inputs are left behind"
    assert found.keys() == places.keys() and found[nowhere].shape == (len(examples), 0)
    for row, example in enumerate(examples):
        expected, _ = by_autograd(
            model, None, opened.processor, opened.anatomy, [example], WEIGHTS, 1, 0.3
        )
        for key, at in places.items():
            wanted = expected[key].flatten()[at]
            scale = float(expected[key].abs().max())
            torch.testing.assert_close(found[key][row], wanted, rtol=1e-3, atol=5e-5 * scale)


def test_only_wanted_linears_are_taken(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("llama"))
    _, cut = collated(opened, "llama", tmp_path)
    layers = layer_gradients(
        truth.walk(opened.model, cut),
        opened.anatomy,
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
        truth.walk(opened.model, cut), opened.anatomy, scratch, lambda _: True, lambda _: None
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


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "llama"])
def test_streamed_equals_resident(family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    _, cut = collated(opened, family, tmp_path)
    teacher = final_states(truth.walk(opened.model, cut), lambda _: None)
    model = changed(opened.model)
    loss = DecisionLoss(teacher, weights=WEIGHTS)

    def gradients(streamed):
        walk = truth.walk(model, cut, streamed=streamed)
        losses = response_losses(walk, loss)
        walk.rewind()
        layers = layer_gradients(
            walk,
            opened.anatomy,
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
    one = truth.walk(changed(opened.model), cut, streamed=True)
    other = truth.walk(one.model.network, cut[:1], streamed=True)
    plain, weighted = DecisionLoss(), DecisionLoss(decision=1, weights=WEIGHTS)
    apart = [response_losses(one, plain), response_losses(other, weighted)]
    held, hold = [], PlacedModel.layer
    monkeypatch.setattr(
        PlacedModel, "layer", lambda self, index: held.append(index) or hold(self, index)
    )
    assert losses_together([(one, plain), (other.on(one.model), weighted)]) == apart
    assert held == list(range(one.layers))


# The teacher's say, and hard examples


@pytest.mark.parametrize("family", SOME)
def test_final_states_and_losses_are_those_of_a_full_forward(family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    examples, cut = collated(opened, family, tmp_path, 5)
    ticks = []
    walk = truth.walk(opened.model, cut)
    states = final_states(walk, ticks.append)
    losses = response_losses(walk, DecisionLoss(decision=2, tail=0.1))
    assert sum(ticks) == 5 * len(opened.anatomy.layers)
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
            assert losses[name] == pytest.approx(sum(cost[:2]) + 0.1 * sum(cost[2:]), rel=1e-3)


def test_a_model_has_no_divergence_from_itself(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_vl"))
    _, cut = collated(opened, "qwen2_vl", tmp_path, 4)
    walk = truth.walk(opened.model, cut)
    loss = DecisionLoss(final_states(walk, lambda _: None))
    own = response_losses(walk, loss)
    others = response_losses(walk.on(truth.walk(changed(opened.model), cut).model), loss)
    assert all(abs(value) < 1e-5 for value in own.values())
    assert all(value > 1e-2 for value in others.values())


def test_a_teacher_agrees_where_it_would_begin_as_the_response_does(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_vl"))
    _, cut = collated(opened, "qwen2_vl", tmp_path, 4)
    walk = truth.walk(opened.model, cut)
    loss = DecisionLoss(final_states(walk, lambda _: None))
    assert not any(agreements(walk, loss).values()), "the random model happens to agree"
    agreeing = set()
    for batch in cut:
        logits = truth.full_forward(opened.model, batch.inputs).logits
        for row in range(0, len(batch.ids), 2):  # the model's own first token, for every other one
            first = int((batch.labels[row] != -100).nonzero()[0])
            batch.labels[row, first] = logits[row, first - 1].argmax()
            agreeing.add(batch.ids[row])
    found = agreements(walk, loss)
    assert found.keys() == {name for batch in cut for name in batch.ids}
    assert {name for name, right in found.items() if right} == agreeing


POOL = {"a": 0.5, "b": 4.0, "c": 4.0, "d": 1.0, "e": 0.0, "f": 9.0, "g": 2.0}


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_a_sample_stands_for_the_pool(count):
    """Over many draws: as many as asked for, by chance as promised, and without bias."""
    values = {name: torch.randn((), dtype=torch.float64).exp().item() for name in POOL}
    mean = sum(POOL.values()) / len(POOL)
    times, means, draws = Counter(), [], 4000
    for seed in range(draws):
        draw = sampled(POOL, count, seed)
        assert len(draw) == count and list(draw) == [name for name in POOL if name in draw]
        times.update(list(draw))
        means.append(sum(weight * values[name] for name, weight in draw.items()) / count)
    likely = {name: times[name] / draws for name in POOL}
    for name, weight in draw.items():  # what it counts makes up for how likely it is
        assert weight == pytest.approx(count / (len(POOL) * likely[name]), rel=0.15)
    some = [name for name in POOL if likely[name] < 0.999]
    per_size = [likely[name] / (POOL[name] + mean) for name in some]
    assert max(per_size) < 1.15 * min(per_size), "not in proportion to loss and mean"
    assert count < 6 or len(some) < len(POOL), "none is certain"
    error = 4 * torch.tensor(means).std().item() / draws**0.5
    assert sum(means) / draws == pytest.approx(sum(values.values()) / len(values), abs=error)


def test_all_examples_where_there_are_few():
    for count in (len(POOL), len(POOL) + 1):
        assert sampled(POOL, count, 0) == dict.fromkeys(POOL, 1.0)
    assert sampled({}, 3, 0) == {}
    even = sampled(dict.fromkeys("abcd", 0.0), 2, 0)
    assert list(even.values()) == [1.0, 1.0]


# Walks


def watched(model):
    """Names of vision modules as they run."""
    ran = []
    for name, module in model.named_modules():
        if "vision" in name or "visual" in name:
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


def to_the_end(walk):
    for index in range(walk.layers):
        with walk.model.layer(index):
            walk.advance(index, lambda _: None)
    return walk.states


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "mllama", "llama"])
def test_a_walk_on_another_model(family, streamed, pico_dir, tmp_path):
    """The same states as a walk of its own, and the vision part does not run again."""
    opened = truth.opened(pico_dir(family))
    _, cut = collated(opened, family, tmp_path)
    dense, pruned = copy.deepcopy(opened.model), changed(opened.model)
    fresh = to_the_end(truth.walk(pruned, cut, streamed=streamed))
    ran, on_pruned = watched(dense), watched(pruned)
    walk = truth.walk(dense, cut, streamed=streamed)
    assert bool(ran) == opened.anatomy.has_vision, "the vision part is not seen"
    seen = len(ran)
    embedded = [state.clone() for state in walk.states]
    own = [state.clone() for state in to_the_end(walk)]
    other = walk.on(truth.walk(pruned, cut[:0], streamed=streamed).model)
    assert all(map(torch.equal, other.states, embedded))
    found = to_the_end(other)
    assert all(map(torch.equal, found, fresh))
    assert not any(map(torch.equal, found, own))
    assert all(map(torch.equal, walk.states, own)), "the first walk moved too"
    walk.rewind()
    assert all(map(torch.equal, walk.states, embedded))
    assert all(map(torch.equal, to_the_end(walk), own))
    assert isinstance(other, Walk)
    assert len(ran) == seen and not on_pruned


def test_what_begins_wrongly_is_a_refusals_start_or_any_other(pico_dir, tmp_path):
    """By hand from the logits of whole passes, of the model and of its teacher."""
    opened = truth.opened(pico_dir("llava"))
    examples, _ = collated(opened, "llava", tmp_path)
    model = changed(opened.model)
    for example in examples:
        batch = response_batch(opened.processor, [example])
        teacher = final_states(truth.walk(opened.model, [batch]), lambda _: None)
        own = final_states(truth.walk(model, [batch]), lambda _: None)[example.id]
        labels = batch.labels[0]
        positions = predicting(labels)
        with torch.no_grad():
            chances = [
                one(**batch.inputs, use_cache=False).logits[0, positions[0]].float().softmax(0)
                for one in (model, opened.model)
            ]
        states = torch.zeros(len(labels), own.shape[-1])
        states[positions] = own
        first = int(labels[positions[0] + 1])
        placed = truth.walk(model, [batch]).model
        for refusals in ((), (5, 9), (5, first)):
            found = DecisionLoss(teacher, refusals=refusals).misses(
                placed, states, labels, example.id
            )
            watched = [one for one in refusals if one != first]
            wanted = [
                float(chance[watched].sum()) if refusals else 1 - float(chance[first])
                for chance in chances
            ]
            assert [found.own, found.dense] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("refusals", "others", "starts"),
    [
        ([1, 1, 1, 2], [3, 3], (1, 2)),
        ([1] * 10, [1] + [3] * 9, (1,)),  # ten times as often
        ([1] * 9 + [4], [1] + [3] * 9, ()),  # 4 alone is too few of them
        ([1, 2], [1, 2], ()),
        ([7], [3], (7,)),
    ],
)
def test_tokens_that_tell_refusals(refusals, others, starts):
    assert refusal_starts(refusals, others) == starts
