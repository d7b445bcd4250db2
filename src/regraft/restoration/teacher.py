"""The dense model as a teacher: its predictions along answers, and losses against them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from regraft import distributed
from regraft.data.collate import response_batch
from regraft.data.example import Example
from regraft.disk.artifact import load_unfinished, save_unfinished
from regraft.loading import cut, load_layerwise
from regraft.models.layerwise import LayerwisePass
from regraft.models.placement import PlacedModel
from regraft.models.replay import logits_of
from regraft.progress import Advance, Progress
from regraft.pruning.gradients import Loss, predicting
from regraft.restoration.base import Context

TOKEN_WEIGHTS = (1.0, 1.0, 0.3, 0.3, 0.3, 0.3)  # weights of the first response tokens in the loss


@dataclass(frozen=True)
class DecisionLoss:
    """Divergence from the dense model at the start of an answer.

    Whether an answer refuses is decided in its first tokens. The loss is the sum of KL(dense ||
    model) of the next-token distributions, with weight 1 at the first two response tokens and 0.3
    at the next four. Later tokens do not count, so long and short answers weigh alike.

    Attributes:
        teacher: Example id -> the dense model's normed final states at the positions that predict
            response tokens, `[N, d]`.
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
    """Example id -> normed final states at the positions that predict response tokens, on CPU.

    `[N, d]` each. They determine the teacher's distribution if compression left the LM head alone,
    and take far less space than logits, `[N, vocabulary]`.
    """
    _run_all_layers([layerwise], advance)
    return {
        name: state[row, predicting(labels[row])].cpu().clone()
        for batch, state in zip(layerwise.batches, layerwise.states, strict=True)
        if (labels := batch.labels) is not None
        for row, name in enumerate(batch.ids)
    }


def losses_together(
    sides: Sequence[tuple[LayerwisePass, Loss]], advance: Advance = lambda _: None
) -> list[dict[str, float]]:
    """Example id -> loss of its response, for each of several passes through one model.

    The passes advance together, so that a streamed model loads each layer once.
    """
    _run_all_layers([layerwise for layerwise, _ in sides], advance)
    with sides[0][0].model.frame(), torch.no_grad():
        return [_losses_of_final_states(layerwise, loss) for layerwise, loss in sides]


def _losses_of_final_states(layerwise: LayerwisePass, loss: Loss) -> dict[str, float]:
    losses = {}
    for batch, state in zip(layerwise.batches, layerwise.states, strict=True):
        assert batch.labels is not None, "a batch of prompts has no responses"
        final, labels = state.to(layerwise.model.device), batch.labels.to(layerwise.model.device)
        for row, name in enumerate(batch.ids):
            losses[name] = float(loss(layerwise.model, final[row], labels[row], name))
    return losses


def _run_all_layers(passes: Sequence[LayerwisePass], advance: Advance) -> None:
    for layerwise in passes:
        layerwise.rewind()
    first = passes[0]
    for index in range(first.layers):
        with first.model.layer(index):
            for layerwise in passes:
                layerwise.run_layer(index, advance)


@dataclass
class Recorded:
    """A loss that records its value for every response of this process."""

    loss: Loss
    seen: list[float] = field(default_factory=list)

    def __call__(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        """The loss of one response."""
        value = self.loss(model, final, labels, name)
        self.seen.append(float(value.detach()))
        return value


def mean_of(values: Collection[float]) -> float:
    """Mean over the examples of all processes."""
    total, count = distributed.total(torch.tensor([sum(values), len(values)], dtype=torch.float64))
    return float(total / count)


Embedded = dict[str, list[LayerwisePass]]
"""Kind of prompts -> its parts, embedded and ready to enter a model's first layer."""


def with_teacher(
    context: Context, parts: Mapping[str, Sequence[Sequence[Example]]]
) -> tuple[PlacedModel, Embedded, dict[str, DecisionLoss]]:
    """Run the dense model as the teacher, then load the pruned one with all prompts embedded.

    The teacher's states are saved in the work folder, for a resumed run. Each model embeds the
    prompts itself, since compression may have changed embeddings or the vision tower. `parts` are
    examples with answers: kind of prompts -> parts that are run separately.

    Returns:
        (the pruned model, the embedded prompts, kind of prompts -> the loss of its answers)
    """
    compute, progress = context.compute, context.progress
    paths = {kind: context.work / f"teacher-{kind}.safetensors" for kind in parts}
    if not distributed.decided(lambda: all(path.exists() for path in paths.values())):
        dense, processor = load_layerwise(context.dense, compute, progress)
        _write_teacher(_embed(dense, processor, parts, context), paths, progress)
        dense.network.to("meta")  # frees its memory
    model, processor = load_layerwise(context.pruned, compute, progress, processor_of=context.dense)
    losses = {kind: DecisionLoss(load_unfinished(path)) for kind, path in paths.items()}
    return model, _embed(model, processor, parts, context), losses


def _embed(
    model: PlacedModel,
    processor: Any,
    parts: Mapping[str, Sequence[Sequence[Example]]],
    context: Context,
) -> Embedded:
    """This process's share of each part, embedded by the model."""
    embedded: Embedded = {kind: [] for kind in parts}
    total = sum(len(examples) for several in parts.values() for examples in several)
    with context.progress.task("Reading the prompts", total) as done:
        for kind, several in parts.items():
            for examples in several:
                chunks = distributed.share(cut(examples, context.compute))
                batches = (response_batch(processor, chunk) for chunk in chunks)
                embedded[kind].append(LayerwisePass(model, batches))
                done(len(examples))
    return embedded


def _write_teacher(embedded: Embedded, paths: Mapping[str, Path], progress: Progress) -> None:
    """Write the dense model's `final_states`, a file for each kind of prompts."""
    work = sum(one.work for several in embedded.values() for one in several)
    with progress.task("Running the dense model", work, "samples x layers") as done:
        for kind, path in paths.items():
            states: dict[str, Tensor] = {}
            for layerwise in embedded[kind]:
                states |= final_states(layerwise, done)
                layerwise.rewind()
            states = distributed.merged(states)
            if distributed.first():
                save_unfinished(path, states)
    distributed.barrier()
