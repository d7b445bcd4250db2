"""Train the values of a few weights instead of restoring the dense ones, as a method."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import distributed
from regraft.data.collate import response_batch
from regraft.data.example import Example, Reading
from regraft.errors import RegraftError
from regraft.files import atomic_file
from regraft.loading import check_shares, each_of_share, load_for_walk
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.models.placement import PlacedModel
from regraft.pruning.gradients import require_gradients
from regraft.restoration.base import (
    Context,
    Counted,
    Method,
    MethodSettings,
    Needs,
    with_default_budget,
)
from regraft.restoration.methods.fine_tune.adam import TRAINED, Side, SparseAdam, train
from regraft.restoration.methods.random import drawn_by
from regraft.restoration.ranking import Ranking, by_linear
from regraft.restoration.teacher import DecisionLoss, write_teacher
from regraft.settings.compute import ComputeSettings

RANDOM = "random"  # positions that are drawn
MINIBATCH = 8  # prompts of each kind in an update
KINDS = ("safety", "utility")


class FineTuneSettings(Counted):
    """A baseline that trains values by Adam instead of restoring dense ones."""

    method: Literal["fine-tune"] = "fine-tune"
    positions: str = Field(
        RANDOM,
        description="Which weights are trained: those of a ranking of weights FILE (in a recipe "
        "also the name of a method before it), the first of it, or random pruned ones.",
    )
    learning_rate: float = Field(0.003, gt=0, description="Of Adam.")
    passes: int = Field(3, ge=1, description="Forward and backward passes over all prompts.")
    head_seed: int = Field(0, description="Of random positions.")

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("positions", RANDOM) != RANDOM:
            return given  # all of the ranking
        return with_default_budget(given)

    @model_validator(mode="after")
    def _check_seed(self) -> Self:
        if not self.drawn and self.first_set("head_seed"):
            raise ValueError("`head_seed` changes nothing where `positions` are given")
        return self

    @property
    def drawn(self) -> bool:
        """Whether a seed decides what is restored, so that repeats differ."""
        return self.positions == RANDOM


class FineTune(Method[FineTuneSettings]):
    """Trains the values of a few weights: the positions of another ranking, or random ones.

    Prompts and losses are gain's: the divergence from the dense model's answers. Every pass goes
    once forward and once backward over all prompts, with an update after `MINIBATCH` of each kind.
    """

    name: ClassVar[str] = "fine-tune"
    Settings: ClassVar[type[MethodSettings]] = FineTuneSettings

    def needs(self, settings: FineTuneSettings) -> Needs:
        """The dense model's own answers, and the ranking whose positions are trained."""
        return Needs(answers=True, positions=None if settings.drawn else settings.positions)

    def check(
        self,
        settings: FineTuneSettings,
        dense: Source,
        seed: int,
        compute: ComputeSettings,
        prompts: Mapping[str, Reading],
    ) -> None:
        """Check that the prompts make minibatches that all processes share.

        Raises:
            RegraftError: they are too few.
        """
        minibatches([one.examples for one in prompts.values()], compute)

    def rank(self, settings: FineTuneSettings, context: Context) -> Ranking:
        """The positions, with their trained values; `about` has the loss of each pass.

        Raises:
            RegraftError: training diverges.
        """
        chosen = _chosen(settings, context)
        context.work.mkdir(parents=True, exist_ok=True)
        values, losses = _Job(settings, context).run(chosen)
        linears = list(context.pruned.architecture.linears)
        trained = torch.zeros(len(chosen))
        for index, rows in by_linear(chosen):
            new = values[linears[index].key].float()
            if not torch.isfinite(new).all():
                raise RegraftError(
                    f"Training diverged at {linears[index].key}. Lower --learning-rate."
                )
            trained[rows] = new
        passes = [{"pass": i + 1, "loss": loss} for i, loss in enumerate(losses)]
        about = {"values": TRAINED, "passes": passes}
        return replace(chosen, values=trained, about=about)

    def label(self, settings: FineTuneSettings) -> str:
        """What tables call it."""
        where = "random positions" if settings.drawn else f"positions of {settings.positions}"
        return f"fine-tuned, {where}: trained values"


PLUGIN = FineTune()


def _chosen(settings: FineTuneSettings, context: Context) -> Ranking:
    """Where values are trained: among weights that are 0 now, and were not in the dense model."""
    if settings.drawn:
        return context.rank_by(drawn_by(settings.head_seed, context.seed))
    if (ranking := context.positions) is None:
        raise RegraftError(f"There is no ranking {settings.positions} to train the weights of.")
    return ranking if context.count is None else ranking.first(context.count)


@dataclass(frozen=True)
class _Job:
    """Teacher, minibatches and passes; goes on after the last finished pass in `work`."""

    settings: FineTuneSettings
    context: Context

    def run(self, chosen: Ranking) -> tuple[dict[str, Tensor], list[float]]:
        """(`LinearArchitecture.key` -> trained values by place in `chosen`, mean loss by pass)."""
        model, batches = self._taught()
        work, seed = self.context.work, self.context.seed
        architecture, path = self.context.dense.architecture, work / "so-far.safetensors"
        modules, linears = dict(model.network.named_modules()), list(architecture.linears)
        positions = {linears[i].key: chosen.position[rows] for i, rows in by_linear(chosen)}
        weights = {li.key: modules[li.module].weight.data for li in linears if li.key in positions}
        optimizer = SparseAdam(weights, positions, self.settings.learning_rate)
        losses: list[float] = []
        if distributed.decided(path.exists):
            state = load_file(path)
            optimizer.load(state)
            losses = state["losses"].tolist()
        left = self.settings.passes - len(losses)
        own = sum(len(one.ids) for sides in batches for walk, _ in sides for one in walk.batches)
        total = 2 * own * len(architecture.layers) * left
        with self.context.progress.task("Fine-tuning", total, "samples x layers") as done:
            while len(losses) < self.settings.passes:
                order = list(range(len(batches)))
                random.Random(f"{seed} {len(losses)}").shuffle(order)
                shuffled = [batches[i] for i in order]
                found = train(optimizer, shuffled, architecture, work / "states", done)
                losses.append(sum(found) / len(found))
                if distributed.first():
                    state = optimizer.state() | {
                        "losses": torch.tensor(losses, dtype=torch.float64)
                    }
                    with atomic_file(path) as temporary:
                        save_file(state, temporary)
                distributed.barrier()
        return optimizer.values, losses

    def _taught(self) -> tuple[PlacedModel, list[list[Side]]]:
        """The pruned model, and minibatches before its first layer with what they cost."""
        one = self.context
        readings, compute, progress = one.answered or {}, one.compute, one.progress
        teachers = {kind: one.work / f"teacher-{kind}.safetensors" for kind in KINDS}
        asks = not distributed.decided(lambda: all(path.exists() for path in teachers.values()))
        source = one.dense if asks else one.pruned
        model, processor = load_for_walk(source, compute, progress, one.dense)
        require_gradients(model.dtype)
        walks = [
            {
                kind: LayerwisePass(model, each_of_share(processor, response_batch, chunk, compute))
                for kind, chunk in zip(KINDS, chunks, strict=True)
            }
            for chunks in minibatches([readings[kind].examples for kind in KINDS], compute)
        ]
        if asks:
            by_kind = {kind: [some[kind] for some in walks] for kind in KINDS}
            write_teacher(by_kind, teachers, progress)
            model.network.to("meta")  # one model in memory at a time
            model, _ = load_for_walk(one.pruned, compute, progress, one.dense)
            walks = [{kind: some[kind].on(model) for kind in KINDS} for some in walks]
        losses = {kind: DecisionLoss(load_file(path)) for kind, path in teachers.items()}
        return model, [[(some[kind], losses[kind]) for kind in KINDS] for some in walks]


def minibatches(
    kinds: Sequence[Sequence[Example]], compute: ComputeSettings
) -> list[list[Sequence[Example]]]:
    """Cut the examples of all kinds into the same number of batches, as even as can be.

    Args:
        kinds: The examples of each kind.
        compute: How many processes share a batch.

    Returns:
        Of each minibatch the examples of each kind, none of them empty.

    Raises:
        RegraftError: a batch is too small for all processes.
    """
    most, fewest = max(map(len, kinds)), min(map(len, kinds))
    count = min(-(-most // MINIBATCH), fewest)
    cut = [[examples[i::count] for examples in kinds] for i in range(count)]
    for chunks in cut:
        for chunk in chunks:
            check_shares(chunk, compute)
    return cut
