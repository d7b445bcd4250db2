"""What the dense model says to each example, and the examples on which another falls shortest."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import floor

import torch
from torch import Tensor

from regraft.importance.gradients import Progress
from regraft.importance.losses import DecisionLoss, Loss, predicting
from regraft.models.walk import Walk

_ROUNDING = 1e-9


def final_states(walk: Walk, progress: Progress) -> dict[str, Tensor]:
    """Normed final states that predict response tokens, by example id, `[N, d]` on CPU.

    They are a teacher's whole say (see `DecisionLoss`): the head that turns them into tokens is
    never pruned, and N x d floats are far fewer than N x vocabulary.
    """
    _to_the_end([walk], progress)
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
    return losses_together([(walk, loss)], progress)[0]


def losses_together(
    sides: Sequence[tuple[Walk, Loss]], progress: Progress = lambda _: None
) -> list[dict[str, float]]:
    """`response_losses` of several walks through one model, which is streamed once for all."""
    walks = [walk for walk, _ in sides]
    _to_the_end(walks, progress)
    with walks[0].model.frame(), torch.no_grad():
        return [_losses_at_the_end(walk, loss) for walk, loss in sides]


def _losses_at_the_end(walk: Walk, loss: Loss) -> dict[str, float]:
    losses = {}
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


def sampled(losses: Mapping[str, float], count: int, seed: int) -> dict[str, float]:
    """A sample of examples in which those that cost more are likelier.

    An example is drawn with a probability proportional to its loss and the mean of all, 1 at most:
    half the sample goes by loss, half is even. What it then counts makes up for it.

    Args:
        losses: Example id -> loss, 0 or more.
        count: How many; all examples where there are no more.
        seed: Of the draw.

    Returns:
        Example id -> weight, in the order of `losses`; a mean over the sample with these weights
        estimates the mean over all without bias.
    """
    total = len(losses)
    if total <= count:
        return dict.fromkeys(losses, 1.0)
    mean = sum(losses.values()) / total
    sizes = {name: loss + mean if mean else 1.0 for name, loss in losses.items()}
    likely: dict[str, float] = {}
    rest = dict(sizes)
    while rest:  # those certain to be drawn leave the others their share
        scale = (count - len(likely)) / sum(rest.values())
        certain = [name for name, size in rest.items() if size * scale >= 1]
        likely |= dict.fromkeys(certain, 1.0)
        rest = {name: size for name, size in rest.items() if size * scale < 1}
        if not certain:
            likely |= {name: size * scale for name, size in rest.items()}
            break
    draw = random.Random(seed)
    names = sorted(likely)
    draw.shuffle(names)
    start = draw.random()
    ends = list(accumulate(likely[name] for name in names))
    # one draw wherever the running sum passes start, start + 1, ...
    hits = [floor(end - start + _ROUNDING) for end in ends]
    drawn = {name for name, was, now in zip(names, [-1, *hits], hits, strict=False) if now > was}
    return {name: count / (total * likely[name]) for name in losses if name in drawn}


def _to_the_end(walks: Sequence[Walk], progress: Progress) -> None:
    for walk in walks:
        walk.rewind()
    for index in range(walks[0].layers):
        with walks[0].model.layer(index):
            for walk in walks:
                walk.advance(index, progress)
