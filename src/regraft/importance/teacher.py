"""The teacher distribution: what the dense model predicts along answers, and losses against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regraft.importance.gradients import Progress
from regraft.importance.losses import Loss, predicting
from regraft.models.walk import Walk


def final_states(walk: Walk, progress: Progress = lambda _: None) -> dict[str, Tensor]:
    """Normed final states that predict response tokens, by example id, `[N, d]` on CPU.

    They hold the whole teacher distribution (see `DecisionLoss`): the head that turns them into
    logits is never pruned, and N x d floats are far fewer than N x vocabulary.
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


def _to_the_end(walks: Sequence[Walk], progress: Progress) -> None:
    for walk in walks:
        walk.rewind()
    for index in range(walks[0].layers):
        with walks[0].model.layer(index):
            for walk in walks:
                walk.advance(index, progress)
