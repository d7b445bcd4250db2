"""The teacher distribution: what the dense model predicts along answers, and losses against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from regraft import distributed
from regraft.data.collate import response_batch
from regraft.data.example import Example
from regraft.disk.artifact import load_unfinished
from regraft.disk.files import atomic_file
from regraft.loading import each_of_share, load_for_walk
from regraft.models.layerwise import LayerwisePass
from regraft.models.placement import PlacedModel
from regraft.models.replay import logits_of
from regraft.progress import Advance, Progress
from regraft.pruning.gradients import Loss, predicting, require_gradients
from regraft.restoration.base import Context

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


@dataclass
class Recorded:
    """A loss that remembers what it was of every response of this process."""

    loss: Loss
    seen: list[float] = field(default_factory=list)

    def __call__(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        """The loss of one response."""
        value = self.loss(model, final, labels, name)
        self.seen.append(float(value.detach()))
        return value


def mean_of(values: Collection[float]) -> float:
    """Over the examples of all processes."""
    total, count = distributed.total(torch.tensor([sum(values), len(values)], dtype=torch.float64))
    return float(total / count)


def samples_of(walk: LayerwisePass) -> int:
    """How much one pass is, as progress counts it: samples times layers."""
    return sum(len(batch.ids) for batch in walk.batches) * walk.layers


Walks = dict[str, list[LayerwisePass]]
"""Kind of prompts -> its parts on their way through a model."""


def taught(
    context: Context, parts: Mapping[str, Sequence[Sequence[Example]]]
) -> tuple[PlacedModel, Walks, dict[str, DecisionLoss]]:
    """Ask the dense model, and load the pruned one, with all prompts before its first layer.

    What the dense model says lies in the work folder, where a resumed run finds it.

    Args:
        context: Its models, answers, work folder and compute.
        parts: Kind of prompts -> examples with answers, in parts that are walked apart.

    Returns:
        (the pruned model, the walks through it, kind of prompts -> what an answer to one costs)
    """
    compute, progress = context.compute, context.progress
    paths = {kind: context.work / f"teacher-{kind}.safetensors" for kind in parts}
    asks = not distributed.decided(lambda: all(path.exists() for path in paths.values()))
    first = context.dense if asks else context.pruned
    model, processor = load_for_walk(first, compute, progress, processor_from=context.dense)
    require_gradients(model.dtype)
    walks: Walks = {kind: [] for kind in parts}
    total = sum(len(examples) for several in parts.values() for examples in several)
    with progress.task("Reading the prompts", total) as done:
        for kind, several in parts.items():
            for examples in several:
                batches = each_of_share(processor, response_batch, examples, compute)
                walks[kind].append(LayerwisePass(model, batches))
                done(len(examples))
    if asks:
        _write_teacher(walks, paths, progress)
        model.network.to("meta")  # one model in memory at a time; the walks still hold this one
        model, _ = load_for_walk(context.pruned, compute, progress, processor_from=context.dense)
        walks = {kind: [walk.on(model) for walk in several] for kind, several in walks.items()}
    return model, walks, {kind: DecisionLoss(load_unfinished(path)) for kind, path in paths.items()}


def _write_teacher(walks: Walks, paths: Mapping[str, Path], progress: Progress) -> None:
    """Write what the dense model predicts, a file for each kind; see `final_states`."""
    own = sum(samples_of(walk) for several in walks.values() for walk in several)
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
