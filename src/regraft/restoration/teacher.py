"""The teacher distribution: what the dense model predicts along answers, and losses against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from regraft import distributed
from regraft.files import atomic_file
from regraft.models.layerwise import LayerwisePass
from regraft.models.placement import PlacedModel
from regraft.models.replay import logits_of
from regraft.progress import Advance, Progress
from regraft.pruning.gradients import Loss, predicting

TOKEN_WEIGHTS = (1.0, 1.0, 0.3, 0.3, 0.3, 0.3)  # of the first response tokens


@dataclass(frozen=True)
class DecisionLoss:
    """How far the start of an answer is from the dense model's, token by token.

    Whether an answer refuses is decided at its start. The divergence KL(dense || model) of the
    next-token distribution counts 1 at each of the first two tokens and 0.3 at each of the next
    four; what follows does not count, so that long and short answers weigh alike.

    Attributes:
        teacher: Example id -> the dense model's normed final states `[N, d]` where they predict
            response tokens.
    """

    teacher: Mapping[str, Tensor]

    def __call__(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        """The loss of one response, in nats, float32."""
        positions = predicting(labels)[: len(TOKEN_WEIGHTS)]
        states = self.teacher[name][: len(positions)].to(final.device, model.dtype)
        wanted = logits_of(model.network, states).float().log_softmax(dim=-1)  # [N, V]
        own = logits_of(model.network, final[positions], gradient=True).float().log_softmax(dim=-1)
        cost = F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=-1)  # [N]
        return (cost.new_tensor(TOKEN_WEIGHTS[: len(positions)]) * cost).sum()


def final_states(walk: LayerwisePass, advance: Advance = lambda _: None) -> dict[str, Tensor]:
    """Normed final states that predict response tokens, by example id, `[N, d]` on CPU.

    They hold the whole teacher distribution (see `DecisionLoss`): the head that turns them into
    logits is never pruned, and N x d floats are far fewer than N x vocabulary.
    """
    _to_the_end([walk], advance)
    return {
        name: state[row, predicting(labels[row])].cpu().clone()
        for batch, state in zip(walk.batches, walk.states, strict=True)
        if (labels := batch.labels) is not None
        for row, name in enumerate(batch.ids)
    }


def response_losses(
    walk: LayerwisePass, loss: Loss, advance: Advance = lambda _: None
) -> dict[str, float]:
    """The loss of every example's response, by example id."""
    return losses_together([(walk, loss)], advance)[0]


def losses_together(
    sides: Sequence[tuple[LayerwisePass, Loss]], advance: Advance = lambda _: None
) -> list[dict[str, float]]:
    """`response_losses` of several walks through one model, which is streamed once for all."""
    walks = [walk for walk, _ in sides]
    _to_the_end(walks, advance)
    with walks[0].model.frame(), torch.no_grad():
        return [_losses_at_the_end(walk, loss) for walk, loss in sides]


def _losses_at_the_end(walk: LayerwisePass, loss: Loss) -> dict[str, float]:
    losses = {}
    for batch, state in zip(walk.batches, walk.states, strict=True):
        assert batch.labels is not None, "a batch of prompts has no responses"
        final, labels = state.to(walk.model.device), batch.labels.to(walk.model.device)
        for row, name in enumerate(batch.ids):
            losses[name] = float(loss(walk.model, final[row], labels[row], name))
    return losses


def _to_the_end(walks: Sequence[LayerwisePass], advance: Advance) -> None:
    for walk in walks:
        walk.rewind()
    for index in range(walks[0].layers):
        with walks[0].model.layer(index):
            for walk in walks:
                walk.advance(index, advance)


def write_teacher(
    walks: Mapping[str, Sequence[LayerwisePass]], paths: Mapping[str, Path], progress: Progress
) -> None:
    """Write the teacher distribution of the dense model; see `final_states`.

    Args:
        walks: Kind of prompts -> walks through the dense model; rewound when it ends.
        paths: Kind of prompts -> the file for all its walks.
        progress: Progress.
    """
    own = sum(
        len(b.ids) * walk.layers for part in walks.values() for walk in part for b in walk.batches
    )
    with progress.task("Asking the dense model", own, "samples x layers") as done:
        for kind, path in paths.items():
            states: dict[str, Tensor] = {}
            for walk in walks[kind]:
                states |= final_states(walk, done)
                walk.rewind()
            states = distributed.merged(states)
            if distributed.first():
                with atomic_file(path) as temporary:
                    save_file(states, temporary)
    distributed.barrier()
