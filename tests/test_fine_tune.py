"""Sparse fine-tuning against torch.optim.Adam on the whole model, with all other weights masked."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

import truth
from regraft.data.collate import response_batch
from regraft.pruning.gradients import BOTH_WAYS, mean_cross_entropy
from regraft.restoration.methods.fine_tune import SparseAdam, loss_and_gradients, train


def chosen(architecture, of_each=5, seed=0):
    """A few positions of two linears in every layer, key -> `[k]`, unsorted."""
    generator = torch.Generator().manual_seed(seed)
    return {
        linear.key: torch.randperm(linear.shape[0] * linear.shape[1], generator=generator)[:of_each]
        for linear in architecture.linears
        if linear.role in ("v_proj", "down_proj")
    }


def in_memory(model, architecture):
    modules = dict(model.named_modules())
    return {linear.key: modules[linear.module].weight.data for linear in architecture.linears}


def batches_of(processor, family, folder, harmful, sizes=(2, 1)):
    rows = iter(truth.examples(family, folder / str(harmful), sum(sizes), harmful=harmful))
    return [[next(rows) for _ in range(size)] for size in sizes]


def by_torch(model, processor, architecture, positions, sequence, rate):
    """Adam on every weight of the model whole, gradients zeroed but at the positions; one row at a
    time, pixels to logits. Returns the losses."""
    modules = dict(model.named_modules())
    of = {linear.key: modules[linear.module].weight for linear in architecture.linears}
    weights = {key: of[key].requires_grad_() for key in positions}
    masks = {key: torch.zeros(weight.numel()) for key, weight in weights.items()}
    for key, at in positions.items():
        masks[key][at] = 1
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    losses = []
    for kinds in sequence:
        optimizer.zero_grad()
        total = torch.zeros(())
        for examples in kinds:
            for example in examples:
                batch = response_batch(processor, [example])
                logits = model(**batch.inputs, use_cache=False).logits
                labels = batch.labels[0, 1:]
                one = F.cross_entropy(logits[0, :-1].float(), labels, ignore_index=-100)
                total = total + one / len(examples)
        total.backward()
        for key, weight in weights.items():
            weight.grad *= masks[key].view_as(weight)
        optimizer.step()
        losses.append(float(total.detach()))
    return losses


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_training_equals_masked_adam_on_the_whole_model(family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    _, _, processor, architecture = opened
    model, whole = copy.deepcopy(opened.model), copy.deepcopy(opened.model)
    positions = chosen(architecture)
    harmful, harmless = (batches_of(processor, family, tmp_path, kind) for kind in (True, False))
    sequence = list(zip(harmful, harmless, strict=True))
    sides = [
        [
            (truth.layerwise(model, [response_batch(processor, rows)]), mean_cross_entropy)
            for rows in kinds
        ]
        for kinds in sequence
    ]
    optimizer = SparseAdam(in_memory(model, architecture), positions, 0.05)
    ticks = []
    found = [
        loss
        for _ in range(3)
        for loss in train(optimizer, sides, architecture, tmp_path / "s", ticks.append)
    ]
    expected = by_torch(whole, processor, architecture, positions, 3 * sequence, 0.05)
    assert found == pytest.approx(expected, rel=1e-4)
    assert sum(ticks) == 3 * BOTH_WAYS * 6 * len(architecture.layers), "both ways a pass"
    wanted, before = in_memory(whole, architecture), in_memory(opened.model, architecture)
    for key, weight in in_memory(model, architecture).items():
        moved = (weight != before[key]).flatten().nonzero().flatten()
        assert set(moved.tolist()) <= set(positions.get(key, torch.empty(0)).tolist()), key
        torch.testing.assert_close(weight, wanted[key], rtol=1e-3, atol=2e-4)
    values = optimizer.values
    assert values.keys() == positions.keys()
    assert all(
        torch.equal(one, in_memory(model, architecture)[key].view(-1)[positions[key]])
        for key, one in values.items()
    )


def test_the_loss_falls_and_nothing_else_moves(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_5_vl"))
    model, architecture = copy.deepcopy(opened.model), opened.architecture
    examples = truth.examples("qwen2_5_vl", tmp_path, 3)
    layerwise = truth.layerwise(model, [response_batch(opened.processor, examples)])
    sides = [[(layerwise, mean_cross_entropy)]]
    positions = chosen(architecture, of_each=40)
    optimizer = SparseAdam(in_memory(model, architecture), positions, 0.02)
    losses = [train(optimizer, sides, architecture, tmp_path / "s")[0] for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    state, untouched = model.state_dict(), opened.model.state_dict()
    trained = {li.module + ".weight" for li in architecture.linears if li.key in positions}
    assert all(
        torch.equal(state[name], one) for name, one in untouched.items() if name not in trained
    )


def test_gradients_of_kinds_add_up(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("llama"))
    model, architecture = opened.model, opened.architecture
    positions = chosen(architecture)
    sides = [
        (
            truth.layerwise(
                model,
                [
                    response_batch(
                        opened.processor, truth.examples("llama", tmp_path, n, harmful=n > 1)
                    )
                ],
            ),
            mean_cross_entropy,
        )
        for n in (1, 2)
    ]
    numbers = count()

    def at(some):
        return loss_and_gradients(some, architecture, positions, tmp_path / str(next(numbers)))

    with truth.unchanged(model):
        (both, together), *alone = at(sides), at(sides[:1]), at(sides[1:])
    assert both == pytest.approx(sum(loss for loss, _ in alone))
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone[0][1][key] + alone[1][1][key])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_updates_equal_torch_and_survive_a_restart(data, dtype):
    """Where a gradient is missing too; small updates add up although bfloat16 cannot hold them."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    rate = data.draw(st.sampled_from((1e-4, 0.01, 0.5)))
    steps, again = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 7))
    weight = torch.randn(3, 4, generator=generator).to(dtype)
    at = torch.randperm(12, generator=generator)[:5]
    before, reference = weight.clone(), torch.nn.Parameter(weight.flatten()[at].float())
    adam = torch.optim.Adam([reference], lr=rate)
    optimizer = SparseAdam({"a": weight}, {"a": at}, rate)
    for step in range(steps):
        gradient = torch.randn(5, generator=generator) * 10.0 ** data.draw(st.integers(-6, 2))
        missing = data.draw(st.booleans())
        reference.grad = torch.zeros(5) if missing else gradient
        adam.step()
        optimizer.update({} if missing else {"a": gradient})
        if step == again:  # killed, and begun anew from the pruned weights
            state = optimizer.state()
            weight = before.clone()
            optimizer = SparseAdam({"a": weight}, {"a": at}, rate)
            optimizer.load(state)
    expected = before.flatten()
    expected[at] = reference.detach().to(dtype)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-7}
    )
    torch.testing.assert_close(weight.flatten(), expected, **tolerance)
    torch.testing.assert_close(
        optimizer.state()["a.value"], reference.detach(), rtol=1e-5, atol=1e-7
    )
