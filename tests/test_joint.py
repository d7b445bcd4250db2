"""Weights chosen together, against the model of the losses written out and every subset of it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regraft.restoration.joint import DAMPING, Effects, joined, together

PROMPTS, CANDIDATES = 4, 6


def modelled(effects: Effects, chosen: list[int]) -> float:
    """The sum of losses with these candidates back, prompt by prompt."""
    total = 0.0
    for gains, loss, weight in zip(
        effects.gains.tolist(), effects.losses.tolist(), effects.weights.tolist(), strict=True
    ):
        s = sum(gains[j] for j in chosen)
        total += loss - s + s**2 / (4 * (loss + DAMPING * weight))
    return total


def drawn(seed: int) -> Effects:
    generator = torch.Generator().manual_seed(seed)

    def of(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return Effects(of(PROMPTS, CANDIDATES) - 0.3, 2 * of(PROMPTS), 0.5 + of(PROMPTS))


@given(st.integers(0, 10**6), st.integers(0, CANDIDATES + 1))
def test_each_one_is_the_best_there_is_next(seed: int, count: int) -> None:
    effects = drawn(seed)
    order, added = together(effects, count)
    chosen: list[int] = []
    for j, worth in zip(order.tolist(), added.tolist(), strict=True):
        now = modelled(effects, chosen)
        falls = {
            other: now - modelled(effects, [*chosen, other])
            for other in range(CANDIDATES)
            if other not in chosen
        }
        assert falls[j] == pytest.approx(worth, abs=1e-9)
        assert falls[j] == pytest.approx(max(falls.values()), abs=1e-9) and falls[j] > 0
        chosen.append(j)
    if len(chosen) < min(count, CANDIDATES):
        now = modelled(effects, chosen)
        rest = set(range(CANDIDATES)) - set(chosen)
        assert all(now <= modelled(effects, [*chosen, j]) + 1e-9 for j in rest)


def test_twins_come_back_once() -> None:
    """Both would bring the loss to 0, together they would overshoot; the third helps another."""
    gains = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 0.1]])
    effects = Effects(gains, torch.tensor([1.0, 1.0]), torch.ones(2))
    order, _ = together(effects, 3)
    assert sorted(order.tolist()) in ([0, 2], [1, 2])
    best = min(
        (modelled(effects, list(some)), some)
        for n in range(4)
        for some in combinations(range(3), n)
    )
    assert modelled(effects, order.tolist()) == pytest.approx(best[0])


def test_harm_done_before_weighs_more() -> None:
    """By itself the second gains more than the third; after the first, which hurts, less."""
    gains = torch.tensor([[1.0, 0.35, 0.3], [-0.3, -0.05, -0.01]])
    effects = Effects(gains, torch.tensor([2.0, 0.05]), torch.ones(2))
    by_itself = [together(Effects(gains[:, [j]], effects.losses, effects.weights), 1)[1]
                 for j in range(3)]  # fmt: skip
    assert by_itself[0] > by_itself[1] > by_itself[2] > 0
    assert together(effects, 2)[0].tolist() == [0, 2]


def test_nothing_comes_back_where_nothing_helps() -> None:
    effects = Effects(-torch.ones(2, 3), torch.ones(2), torch.ones(2))
    order, added = together(effects, 3)
    assert len(order) == len(added) == 0
    order, _ = together(Effects(torch.ones(2, 0), torch.ones(2), torch.ones(2)), 3)
    assert len(order) == 0


def test_many_are_taken_in_rounds() -> None:
    """Independent candidates, a prompt each: all help, the best first."""
    n = 1000
    worth = torch.linspace(0.1, 1.0, n)
    effects = Effects(torch.diag(worth), torch.full((n,), 10.0), torch.ones(n))
    order, added = together(effects, 600)
    assert order.tolist() == list(range(n - 1, n - 601, -1))
    assert (added[:-1] >= added[1:]).all()


def test_those_of_a_round_do_not_overshoot() -> None:
    """Many alike: as many as one by one would be taken, and what is said to be added is true."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand((24, 4), generator=generator, dtype=torch.float64) - 0.2
    mixed = kinds @ torch.rand((4, 3000), generator=generator, dtype=torch.float64)
    effects = Effects(
        mixed * 0.02,
        torch.rand(24, generator=generator, dtype=torch.float64),
        torch.ones(24, dtype=torch.float64),
    )
    order, added = together(effects, 1024)  # four a round
    nothing, chosen = modelled(effects, []), order.tolist()
    assert 0 < len(set(chosen)) == len(chosen) < 1024
    assert float(added.sum()) == pytest.approx(nothing - modelled(effects, chosen), rel=1e-6)
    half = chosen[: len(chosen) // 2]
    assert modelled(effects, chosen) < modelled(effects, half) < nothing


def test_a_kind_that_does_not_count() -> None:
    sides = [Effects(torch.tensor([[gain, 0.1]]), torch.ones(1), torch.ones(1)) for gain in (1, -9)]
    both = joined(sides, (1.0, 0.0), torch.arange(2), torch.device("cpu"))
    assert together(both, 2)[0].tolist()[0] == 0
    one = joined(sides, (1.0, 1.0), torch.tensor([1]), torch.device("cpu"))
    assert torch.equal(one.gains, torch.tensor([[0.1], [0.1]]))
    assert torch.equal(one.losses, torch.ones(2))
    assert torch.equal(sides[0].mean, torch.tensor([1.0, 0.1]))
