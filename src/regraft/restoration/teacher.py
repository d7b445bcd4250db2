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
from regraft.loading import each_of_share, load_layerwise
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


def final_states(layerwise: LayerwisePass, advance: Advance = lambda _: None) -> dict[str, Tensor]:
    """Normed final states that predict response tokens, by example id, `[N, d]` on CPU.

    They hold the whole teacher distribution (see `DecisionLoss`): the head that turns them into
    logits is never pruned, and N x d floats are far fewer than N x vocabulary.
    """
    _to_the_end([layerwise], advance)
    return {
        name: state[row, predicting(labels[row])].cpu().clone()
        for batch, state in zip(layerwise.batches, layerwise.states, strict=True)
        if (labels := batch.labels) is not None
        for row, name in enumerate(batch.ids)
    }


def losses_together(
    sides: Sequence[tuple[LayerwisePass, Loss]], advance: Advance = lambda _: None
) -> list[dict[str, float]]:
    """The loss of every example's response, by example id.

    Of several passes through one model, which is streamed once for all.
    """
    _to_the_end([layerwise for layerwise, _ in sides], advance)
    with sides[0][0].model.frame(), torch.no_grad():
        return [_losses_at_the_end(layerwise, loss) for layerwise, loss in sides]


def _losses_at_the_end(layerwise: LayerwisePass, loss: Loss) -> dict[str, float]:
    losses = {}
    for batch, state in zip(layerwise.batches, layerwise.states, strict=True):
        assert batch.labels is not None, "a batch of prompts has no responses"
        final, labels = state.to(layerwise.model.device), batch.labels.to(layerwise.model.device)
        for row, name in enumerate(batch.ids):
            losses[name] = float(loss(layerwise.model, final[row], labels[row], name))
    return losses


def _to_the_end(together: Sequence[LayerwisePass], advance: Advance) -> None:
    for layerwise in together:
        layerwise.rewind()
    first = together[0]
    for index in range(first.layers):
        with first.model.layer(index):
            for layerwise in together:
                layerwise.advance(index, advance)


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


Embedded = dict[str, list[LayerwisePass]]
"""Kind of prompts -> its parts, embedded and before the first layer of a model."""


def with_teacher(
    context: Context, parts: Mapping[str, Sequence[Sequence[Example]]]
) -> tuple[PlacedModel, Embedded, dict[str, DecisionLoss]]:
    """Ask the dense model, and load the pruned one, with all prompts before its first layer.

    What the dense model says lies in the work folder, where a resumed run finds it. `parts` are
    examples with answers by kind of prompts, in parts that run apart.

    Returns:
        (the pruned model, the prompts before it, kind of prompts -> what an answer to one costs)
    """
    compute, progress = context.compute, context.progress
    paths = {kind: context.work / f"teacher-{kind}.safetensors" for kind in parts}
    asks = not distributed.decided(lambda: all(path.exists() for path in paths.values()))
    first = context.dense if asks else context.pruned
    model, processor = load_layerwise(first, compute, progress, processor_from=context.dense)
    require_gradients(model.dtype)
    embedded: Embedded = {kind: [] for kind in parts}
    total = sum(len(examples) for several in parts.values() for examples in several)
    with progress.task("Reading the prompts", total) as done:
        for kind, several in parts.items():
            for examples in several:
                batches = each_of_share(processor, response_batch, examples, compute)
                embedded[kind].append(LayerwisePass(model, batches))
                done(len(examples))
    if asks:
        _write_teacher(embedded, paths, progress)
        model.network.to("meta")  # one model in memory at a time; `embedded` still holds this one
        model, _ = load_layerwise(context.pruned, compute, progress, processor_from=context.dense)
        embedded = {
            kind: [layerwise.on(model) for layerwise in several]
            for kind, several in embedded.items()
        }
    return (
        model,
        embedded,
        {kind: DecisionLoss(load_unfinished(path)) for kind, path in paths.items()},
    )


def _write_teacher(embedded: Embedded, paths: Mapping[str, Path], progress: Progress) -> None:
    """Write what the dense model predicts, a file for each kind; see `final_states`."""
    own = sum(one.work for several in embedded.values() for one in several)
    with progress.task("Asking the dense model", own, "samples x layers") as done:
        for kind, path in paths.items():
            states: dict[str, Tensor] = {}
            for layerwise in embedded[kind]:
                states |= final_states(layerwise, done)
                layerwise.rewind()
            states = distributed.merged(states)
            if distributed.first():
                with atomic_file(path) as temporary:
                    save_file(states, temporary)
    distributed.barrier()
