"""The maths of restoration by gain against brute force and differences of whole-model losses."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

import truth
from regraft.data.collate import IGNORED, response_batch
from regraft.pruning.gradients import layer_gradients
from regraft.restoration.methods.gain.objective import (
    MOST_TRIES,
    Try,
    first_order_limit,
    gain,
    line_search,
    removal_cost,
    swaps_in_groups,
    swaps_in_rows,
    worth_of,
)
from regraft.restoration.ranking import KEPT
from regraft.restoration.teacher import DecisionLoss

INF = math.inf
STEP = 0.01  # norms compute in float32, whatever the model does

# Gain and cost


def half_gone(architecture, modules):
    """Set half of all prunable weights to 0 and return what they were."""
    generator, dense = torch.Generator().manual_seed(1), {}
    for li in architecture.linears:
        weight = modules[li.module].weight
        dense[li.key] = weight.detach().clone()
        weight.data[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    return dense


@torch.no_grad()
def loss_of(model, rows):
    """Mean over rows of a float64 model's loss."""
    total = 0.0
    for batch in rows:
        inputs = batch.to("cpu", torch.float64).inputs
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits, batch.labels[0, 1:], ignore_index=-100))
    return total / len(rows)


def slope(loss, weight, change):
    """Central difference of a loss along a change of a weight."""
    weight.data += STEP * change
    above = loss()
    weight.data -= 2 * STEP * change
    below = loss()
    weight.data += STEP * change
    return (above - below) / (2 * STEP)


def test_gain_is_the_slope_of_the_loss(pico_dir, tmp_path):
    """Central differences of the loss of the whole model in float64, one weight at a time."""
    opened = truth.opened(pico_dir("qwen2_vl"))
    model = copy.deepcopy(opened.model)
    modules = dict(model.named_modules())
    dense = half_gone(opened.architecture, modules)
    examples = truth.examples("qwen2_vl", tmp_path, 2)
    rows = [response_batch(opened.processor, [example]) for example in examples]
    layerwise = truth.layerwise(model, rows)
    layers = layer_gradients(
        layerwise, opened.architecture, tmp_path / "states", lambda _: True, lambda _: None
    )
    predicted = {
        key: gain(gradient, dense[key], modules[f"{li.module}"].weight.detach())
        for layer, part in layers
        for li in layer.linears
        for key, gradient in part.items()
        if li.key == key
    }
    loss = partial(loss_of, model.double(), rows)
    for layer, role in ((0, "q_proj"), (1, "down_proj"), (3, "k_proj")):
        li = opened.architecture.layers[layer].linear(role)
        weight, worth = modules[li.module].weight, predicted[li.key]
        back = torch.where(weight == 0, dense[li.key].double() - weight.detach(), 0)
        best = int(worth.masked_fill(weight.detach() != 0, -INF).argmax())
        one = torch.zeros_like(back)
        one.view(-1)[best] = back.view(-1)[best]
        for change, expected in ((one, worth.view(-1)[best]), (back, worth[back != 0].sum())):
            assert abs(float(expected)) > 1e-5
            assert -slope(loss, weight, change) == pytest.approx(
                float(expected), rel=5e-3, abs=1e-5
            )


def test_removal_cost_is_exact_for_a_quadratic_loss():
    draw = torch.Generator().manual_seed(0)
    weight, gradient, curvature = torch.randn(3, 4, 5, generator=draw)
    curvature.abs_()

    def loss(at):
        return (gradient * (at - weight) + curvature * (at - weight) ** 2 / 2).sum()

    cost = removal_cost(gradient, curvature, weight)
    assert cost.dtype == torch.float32
    for i in range(4):
        for j in range(5):
            without = weight.clone()
            without[i, j] = 0
            assert float(cost[i, j]) == pytest.approx(float(loss(without)), rel=1e-5, abs=1e-5)


numbers = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]) | st.floats(-4, 4, width=32)


@st.composite
def rows_of(draw, width):
    """Each weight pruned (a worth, no cost), kept (a cost) or neither; `[rows, width]` each."""
    count = draw(st.integers(1, 3))
    keys, cost = torch.full((count, width), -INF), torch.full((count, width), INF)
    for i in range(count):
        kinds = draw(st.lists(st.sampled_from("ppkkn"), min_size=width, max_size=width))
        for j, kind in enumerate(kinds):
            if kind != "n":
                (keys if kind == "p" else cost)[i, j] = draw(numbers)
    return keys, cost


def best_pairing(worth, prices, count):
    """The most that `count` returns, each for another removal, are worth; all pairings."""
    totals = (
        sum(w - p for w, p in zip(back, gone, strict=True))
        for back in itertools.permutations(worth, count)
        for gone in itertools.permutations(prices, count)
    )
    return max(totals, default=None)


@settings(max_examples=60)
@given(rows_of(7), st.integers(1, 9))
def test_swaps_in_rows_are_the_best_pairings(case, most):
    """However many are taken of the best, no other pairing of as many is worth more."""
    keys, cost = case
    worth, removed = swaps_in_rows(keys, cost, most)
    assert worth.shape == removed.shape == keys.shape
    rows, columns = keys.shape
    for i in range(rows):
        back = [j for j in range(columns) if worth[i, j] > -INF]
        gone = [int(removed[i, j]) for j in back]
        assert all(removed[i, j] == KEPT for j in range(columns) if j not in back)
        assert all(i * columns <= at < (i + 1) * columns for at in gone)
        assert len(set(gone)) == len(gone), "a kept weight goes twice"
        prices = cost[i][cost[i] < INF].tolist()
        worths = keys[i][keys[i] > -INF].tolist()
        assert len(back) == min(most, len(prices), len(worths))
        for j, at in zip(back, gone, strict=True):
            assert keys[i, j] > -INF and cost.view(-1)[at] < INF
            assert worth[i, j] == keys[i, j] - cost.view(-1)[at]
        taken = sorted(worth[i][back].tolist(), reverse=True)
        for count in range(1, min(len(taken), 3) + 1):
            expected = best_pairing(worths, prices, count)
            assert sum(taken[:count]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("m", [4, 8])
@settings(max_examples=60)
@given(data=st.data())
def test_swaps_in_groups_are_the_best_single_ones(m, data):
    keys, cost = data.draw(rows_of(2 * m))
    worth, removed = swaps_in_groups(keys, cost, m)
    columns = keys.shape[1]
    for i in range(len(keys)):
        for start in range(0, columns, m):
            group = range(start, start + m)
            back = [j for j in group if worth[i, j] > -INF]
            pairs = [
                float(keys[i, j] - cost[i, k])
                for j in group
                for k in group
                if keys[i, j] > -INF and cost[i, k] < INF
            ]
            assert len(back) == bool(pairs)
            for j in back:
                row, k = divmod(int(removed[i, j]), columns)
                assert row == i and k in group
                assert worth[i, j] == keys[i, j] - cost[i, k] == max(pairs)
            assert all(removed[i, j] == KEPT for j in group if j not in back)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_candidates_cost_no_utility(gains):
    safety, utility = torch.tensor(gains).T
    found = worth_of(safety.clone(), utility.clone())
    wanted = [s + u if u >= 0 else -INF for s, u in gains]
    torch.testing.assert_close(found, torch.tensor(wanted))


# How many weights a step restores


@given(
    st.lists(st.integers(0, 64).map(lambda n: n / 8), min_size=1, max_size=9), st.integers(0, 99)
)
def test_first_order_ends_where_the_loss_would_be_half(worth, eighths):
    """No more weights than are predicted to take half of the loss, and at least one."""
    worth.sort(reverse=True)
    loss = eighths / 8
    fitting = [n for n in range(len(worth) + 1) if 2 * sum(worth[:n]) <= loss]
    assert first_order_limit(torch.tensor(worth), loss) == max(1, fitting[-1])


def test_first_order_adds_many_small_gains_exactly():
    """In float32 a sum of 2^24 stops growing by ones."""
    worth = torch.cat([torch.tensor([2.0**24]), torch.ones(1000)])
    assert first_order_limit(worth, 2 * (2.0**24 + 600)) == 601


@given(st.integers(0, 200), st.randoms(use_true_random=False))
def test_a_line_search_returns_the_best_of_its_tries(most, random):
    values = {n: random.choice([0.5, 0.7, 0.9, 1.0, 1.5]) for n in range(1, most + 1)}
    seen: list[int] = []

    def value(n):
        seen.append(n)
        return values[n]

    taken, tries = line_search(value, 1.0, most)
    assert tries == tuple(Try(n, values[n]) for n in seen)
    assert seen == [most >> i for i in range(len(seen))] and len(seen) <= MOST_TRIES
    helping = [n for n in seen if values[n] < 1]
    if not helping:
        assert taken == 0
        assert len(seen) == min(MOST_TRIES, most.bit_length()), "it gave up early"
        return
    assert values[taken] == min(values[n] for n in seen)
    assert taken == max(n for n in helping if values[n] == values[taken]), (
        "more weights than needed"
    )
    first = seen.index(helping[0])
    falling = [values[n] for n in seen[first:-1]]
    assert falling == sorted(set(falling), reverse=True), "it went on where fewer were worse"
    ended = len(seen) == min(MOST_TRIES, most.bit_length()) or values[seen[-1]] >= values[seen[-2]]
    assert ended, "fewer might have been better"


def test_too_long_a_step_is_cut():
    """A parabola: first order says go to 2, its minimum is at 1."""

    def parabola(n):
        return (n / 64 - 1) ** 2

    assert line_search(parabola, 1.0, 128)[0] == 64
    assert line_search(parabola, 1.0, 100)[0] == 50
    assert line_search(lambda n: 1.0 + n, 1.0, 128)[0] == 0


# The loss


@pytest.mark.parametrize("tokens", [1, 2, 6, 9])
def test_the_loss_is_the_divergence_of_the_first_tokens(tokens, pico_dir):
    """In float64 from the head's matrix: 1 at each of two tokens, 0.3 at each of four, 0 behind."""
    model = truth.opened(pico_dir("llama")).model
    head = model.get_output_embeddings().weight.detach().double()
    draw = torch.Generator().manual_seed(tokens)
    teacher = torch.randn(tokens, head.shape[1], generator=draw)
    start = 3  # prompt tokens, of which the last predicts the first of the response
    final = torch.randn(start + tokens, head.shape[1], generator=draw)
    labels = torch.full((start + tokens,), IGNORED)
    labels[start:] = torch.randint(len(head), (tokens,), generator=draw)
    wanted = 0.0
    for t, weight in zip(range(tokens), (1, 1, 0.3, 0.3, 0.3, 0.3), strict=False):
        p = (head @ teacher[t].double()).softmax(0)
        q = (head @ final[start - 1 + t].double()).softmax(0)
        wanted += weight * float((p * (p.log() - q.log())).sum())
    states = final.clone().requires_grad_()
    found = DecisionLoss({"one": teacher})(truth.resident(model), states, labels, "one")
    assert found.dtype == torch.float32 and found.shape == ()
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    (slope,) = torch.autograd.grad(found, states)
    read = (slope != 0).any(dim=1).nonzero().flatten().tolist()
    assert read == list(range(start - 1, start - 1 + min(tokens, 6)))
