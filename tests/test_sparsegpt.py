"""SparseGPT against the paper's equations in dense float64, one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture
from regraft.pruning.inputs import Sums
from regraft.pruning.masks import Pattern, Scope
from regraft.pruning.pruners.sparsegpt import PLUGIN as SPARSEGPT
from regraft.pruning.pruners.sparsegpt import (
    factors,
    inverse_factor,
    sparsegpt_prune,
)


def problem(seed: int, out: int = 24, width: int = 48, tokens: int = 400) -> tuple[np.ndarray, ...]:
    """A weight matrix and correlated inputs, float64."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) / np.sqrt(width) + np.eye(width)
    return rng.normal(size=(out, width)), rng.normal(size=(tokens, width)) @ mixing


def damped_hessian(x: np.ndarray, damp: float = 0.01) -> np.ndarray:
    """H = 2/n X^T X + damp * mean(diag) I."""
    hessian = 2 / len(x) * x.T @ x
    return hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian))


def obs_sweep(w: np.ndarray, hessian: np.ndarray, choose: object, block: int) -> np.ndarray:
    """Column-wise optimal brain surgeon: invert the remaining Hessian anew for every column."""
    w, width = w.copy(), w.shape[1]
    mask = np.zeros(w.shape, bool)
    for j in range(width):
        if j % block == 0:
            cost = np.stack(
                [w[:, k] ** 2 / np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + block)],
                axis=1,
            )
            mask[:, j : j + block] = choose(cost)  # type: ignore[operator]
        inverse = np.linalg.inv(hessian[j:, j:])
        gone = np.where(mask[:, j], w[:, j], 0)
        w[:, j:] -= gone[:, None] / inverse[0, 0] * inverse[0]
        w[mask[:, j], j] = 0
    return w


def smallest_of_block(share: float) -> object:
    """Mark the smallest of a whole block, as many as keep the share of all blocks so far."""
    seen = 0

    def choose(cost: np.ndarray) -> np.ndarray:
        nonlocal seen
        count = int(share * (seen + cost.size)) - int(share * seen)
        seen += cost.size
        order = np.argsort(cost, axis=None, kind="stable")[:count]
        mask = np.zeros(cost.size, bool)
        mask[order] = True
        return mask.reshape(cost.shape)

    return choose


def smallest_of_row(count: int) -> object:
    """Mark the `count` smallest of each row of a block."""

    def choose(cost: np.ndarray) -> np.ndarray:
        mask = np.zeros(cost.shape, bool)
        np.put_along_axis(mask, np.argsort(cost, axis=1, kind="stable")[:, :count], True, axis=1)
        return mask

    return choose


@pytest.mark.parametrize(
    ("pattern", "choose", "block"),
    [
        (Pattern(0.5, "matrix"), smallest_of_block(0.5), 16),
        (Pattern(0.6, "matrix"), smallest_of_block(0.6), 12),
        (Pattern(0.25, "row"), smallest_of_row(4), 16),
        (Pattern.parse_n_m("2:4"), smallest_of_row(2), 4),
        (Pattern.parse_n_m("4:8"), smallest_of_row(4), 8),
    ],
)
def test_pruning_is_the_papers_sweep(pattern: Pattern, choose: object, block: int) -> None:
    w, x = problem(0)
    expected = obs_sweep(w, damped_hessian(x), choose, block)
    factor = inverse_factor(SPARSEGPT.accumulate(torch.tensor(x)), len(x))
    library_block = 18 if pattern.n_m else block  # rounded down to whole groups
    new = sparsegpt_prune(torch.tensor(w), factor, pattern, library_block)
    assert np.array_equal(new.numpy() == 0, expected == 0)
    assert np.abs(new.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_sparsity_holds_whatever_the_block(scope: Scope, block: int) -> None:
    """Shares that no block can have alone add up over blocks."""
    w, x = problem(4)
    factor = inverse_factor(SPARSEGPT.accumulate(torch.tensor(x)), len(x))
    new = sparsegpt_prune(torch.tensor(w), factor, Pattern(0.55, scope), block)
    expected = 24 * int(0.55 * 48) if scope == "row" else int(0.55 * 24 * 48)
    assert int((new == 0).sum()) == expected


def test_linears_of_one_input_need_not_be_neighbours() -> None:
    """Each gets the factor of its own input, although a factorisation uses up the moments."""
    _, x = problem(5)
    _, y = problem(6)
    linears = [LinearArchitecture(0, name, "", "", (4, 48)) for name in ("w1", "w2", "w3")]
    sums = Sums()
    for linear, inputs in zip(linears, (x, y), strict=False):
        sums.add(linear, SPARSEGPT.accumulate(torch.tensor(inputs)), len(inputs))
    sums.source[linears[2].key] = linears[0].key
    found = {linear.name: factor.statistic for linear, factor in factors(linears, sums)}
    assert torch.equal(found["w1"], found["w3"])
    assert not torch.allclose(found["w1"], found["w2"])


def test_score_is_the_cost_of_one_column_given_those_before() -> None:
    w, x = problem(1)
    hessian = damped_hessian(x)
    costs = [np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(w.shape[1])]
    factor = inverse_factor(SPARSEGPT.accumulate(torch.tensor(x)), len(x))
    score = SPARSEGPT.score(torch.tensor(w), factor.statistic)
    np.testing.assert_allclose(score.numpy(), w**2 / np.array(costs), rtol=1e-4)


def test_it_beats_zeroing_the_same_weights() -> None:
    w, x = problem(2)
    factor = inverse_factor(SPARSEGPT.accumulate(torch.tensor(x)), len(x))
    new = sparsegpt_prune(torch.tensor(w), factor, Pattern(0.5, "row"))
    zeroed = np.where(new.numpy() == 0, 0, w)

    def loss(v: np.ndarray) -> float:
        return float(((x @ (v - w).T) ** 2).sum())

    assert loss(new.double().numpy()) < 0.9 * loss(zeroed)


def test_dead_inputs_cost_nothing_and_leave_the_others_alone() -> None:
    w, x = problem(3)
    x[:, 5] = 0
    factor = inverse_factor(SPARSEGPT.accumulate(torch.tensor(x)), len(x))
    assert factor.dead.nonzero().flatten().tolist() == [5]
    new = sparsegpt_prune(torch.tensor(w), factor, Pattern(0.5, "row"))
    assert torch.isfinite(new).all()
    assert (new[:, 5] == 0).all(), "weights on an input that is always 0 are free to go"
    assert (SPARSEGPT.score(torch.tensor(w), factor.statistic)[:, 5] == 0).all()
    without = inverse_factor(SPARSEGPT.accumulate(torch.tensor(np.delete(x, 5, axis=1))), len(x))
    np.testing.assert_allclose(np.delete(factor.statistic.numpy(), 5), without.statistic, rtol=1e-4)


def test_damping_grows_until_the_hessian_has_a_factor() -> None:
    indefinite = np.array([[1.0, 1.05], [1.05, 1.0]])
    factor = inverse_factor(torch.tensor(indefinite, dtype=torch.float32), 2)
    assert factor.damp == pytest.approx(0.1)
    damped = indefinite + 0.1 * np.eye(2)
    costs = [np.linalg.inv(damped[j:, j:])[0, 0] for j in range(2)]
    np.testing.assert_allclose(factor.statistic, 1 / np.array(costs), rtol=1e-4)
    with pytest.raises(RegraftError, match="cannot be inverted"):
        inverse_factor(-torch.eye(4), 1)
