"""How far an estimate of head scores agrees with exact ones, and replay with naive forwards."""

from __future__ import annotations

from pathlib import Path

import torch
from naive_heads import Head
from scipy.stats import spearmanr
from torch import Tensor

from regraft.heads.score import HeadScores
from regraft.heads.states import States


def agreement(estimate: HeadScores, exact: HeadScores, top: int) -> dict[str, float]:
    """Recall of the exact ranking's best heads, and rank correlation over all heads."""
    found = {}
    assert estimate.estimate is not None
    for name, one, other in zip(
        ("ships", "kl"), estimate.estimate, (exact.ships, exact.kl), strict=True
    ):
        scored = ~other.isnan()
        found[f"recall_{name}"] = recall(one, other, top)
        found[f"spearman_{name}"] = float(spearmanr(one[scored], other[scored]).statistic)
    return found


def recall(estimate: Tensor, exact: Tensor, k: int) -> float:
    """Share of the `k` best heads by `exact` that are among the `k` best by `estimate`.

    Both are `[layers, heads]`, NaN for heads without a score.
    """
    k = min(k, int((~exact.isnan()).sum()))
    first, second = (
        set(one.nan_to_num(-torch.inf).flatten().topk(k).indices.tolist())
        for one in (estimate, exact)
    )
    return len(first & second) / k


def largest_difference(truth: dict[Head, Tensor], folder: Path) -> float:
    """The largest difference of a final state by exact replay, in `folder`, from the naive one."""
    states = States(tuple(sorted(folder.iterdir())))
    layers = {index: states.layer(index) for index in {index for index, _ in truth}}
    return max(
        float((state - found["ablated"][head]).abs().max())
        for (index, head), state in truth.items()
        if (found := layers[index]) is not None
    )
