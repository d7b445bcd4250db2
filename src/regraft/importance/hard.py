"""What the dense model says to each example, and the examples on which another falls shortest."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.importance.gradients import Progress
from regraft.importance.losses import DecisionLoss, Loss, predicting
from regraft.models.walk import Walk


def final_states(walk: Walk, progress: Progress) -> dict[str, Tensor]:
    """Normed final states that predict response tokens, by example id, `[N, d]` on CPU.

    They are a teacher's whole say (see `DecisionLoss`): the head that turns them into tokens is
    never pruned, and N x d floats are far fewer than N x vocabulary.
    """
    _to_the_end(walk, progress)
    return {
        name: state[row, predicting(labels[row])].cpu().clone()
        for batch, state in zip(walk.batches, walk.states, strict=True)
        if (labels := batch.labels) is not None
        for row, name in enumerate(batch.ids)
    }


def response_losses(
    walk: Walk, loss: Loss, progress: Progress = lambda _: None
) -> dict[str, float]:
    """The loss of every example's response, by example id."""
    _to_the_end(walk, progress)
    losses = {}
    with walk.model.frame(), torch.no_grad():
        for batch, state in zip(walk.batches, walk.states, strict=True):
            assert batch.labels is not None, "a batch of prompts has no responses"
            final, labels = state.to(walk.model.device), batch.labels.to(walk.model.device)
            for row, name in enumerate(batch.ids):
                losses[name] = float(loss(walk.model, final[row], labels[row], name))
    return losses


def agreements(walk: Walk, loss: DecisionLoss) -> dict[str, bool]:
    """Whether the loss's teacher would begin each answer as its response does, by example id."""
    found = {}
    with walk.model.frame(), torch.no_grad():
        for batch in walk.batches:
            assert batch.labels is not None, "a batch of prompts has no responses"
            for row, name in enumerate(batch.ids):
                found[name] = loss.agrees(walk.model, batch.labels[row].to(walk.model.device), name)
    return found


def stratified(losses: Mapping[str, float], count: int, hard: float, seed: int) -> dict[str, float]:
    """A sample of examples that tells the mean gradient of all, with less noise than a plain draw.

    A share `hard` of the sample are the examples with the highest loss, each standing for itself;
    the others are drawn from the rest and stand for all of it.

    Args:
        losses: Example id -> loss.
        count: How many; all examples where there are no more.
        hard: Share of them, in [0, 1).
        seed: Of the draw.

    Returns:
        Example id -> weight, in the order of `losses`; a mean over the sample with these weights
        estimates the mean over all without bias.
    """
    total = len(losses)
    if total <= count:
        return dict.fromkeys(losses, 1.0)
    ranked = sorted(losses, key=lambda name: (-losses[name], name))
    first = round(hard * count)
    drawn = random.Random(seed).sample(ranked[first:], count - first)
    weights = dict.fromkeys(ranked[:first], count / total)
    weights |= dict.fromkeys(drawn, (total - first) / (count - first) * count / total)
    return {name: weights[name] for name in losses if name in weights}


def _to_the_end(walk: Walk, progress: Progress) -> None:
    walk.rewind()
    for index in range(walk.layers):
        with walk.model.layer(index):
            walk.advance(index, progress)
