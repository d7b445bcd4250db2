"""Train the values of a few weights instead of restoring the dense ones, as a method."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor

from regraft import distributed
from regraft.data.example import KINDS, Example, Reading
from regraft.disk.artifact import load_unfinished
from regraft.disk.files import atomic_file
from regraft.errors import RegraftError
from regraft.loading import check_shares
from regraft.models.load import Source
from regraft.pruning.gradients import BOTH_WAYS
from regraft.restoration.base import Context, Counted, Method, Needs, with_default_budget
from regraft.restoration.methods.fine_tune.adam import TRAINED, SparseAdam, train
from regraft.restoration.ranking import Ranking, by_linear
from regraft.restoration.selection import random_ranking
from regraft.restoration.teacher import with_teacher
from regraft.settings.compute import ComputeSettings

RANDOM = "random"  # positions that are drawn
MINIBATCH = 8  # prompts of each kind in an update


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
    draw_seed: int = Field(0, description="Seed of random positions.")

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("positions", RANDOM) != RANDOM:
            return given  # all of the ranking
        return with_default_budget(given)

    @model_validator(mode="after")
    def _check_seed(self) -> Self:
        if not self.drawn and self.first_set("draw_seed"):
            raise ValueError("`draw_seed` changes nothing where `positions` are given")
        return self

    @property
    def drawn(self) -> bool:
        return self.positions == RANDOM


class FineTune(Method[FineTuneSettings]):
    """Trains the values of a few weights: the positions of another ranking, or random ones.

    Prompts and losses are gain's: the divergence from the dense model's answers. Every pass goes
    once forward and once backward over all prompts, with an update after `MINIBATCH` of each kind.
    """

    name, settings_type = "fine-tune", FineTuneSettings

    def needs(self, settings: FineTuneSettings) -> Needs:
        """The dense model's own answers, and the ranking whose positions are trained."""
        positions = None if settings.drawn else settings.positions
        return Needs(answers=True, positions=positions, passes=BOTH_WAYS * settings.passes)

    def check(
        self,
        settings: FineTuneSettings,
        dense: Source,
        seed: int,
        compute: ComputeSettings,
        prompts: Mapping[str, Reading],
    ) -> None:
        """Check that the prompts make minibatches that all processes share."""
        minibatches([one.examples for one in prompts.values()], compute)

    def rank(self, settings: FineTuneSettings, context: Context) -> Ranking:
        """The positions, with their trained values; `about` has the loss of each pass."""
        chosen = _chosen(settings, context)
        context.work.mkdir(parents=True, exist_ok=True)
        values, losses = _trained(settings, context, chosen)
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
        where = "random positions" if settings.drawn else f"positions of {settings.positions}"
        return f"fine-tuned, {where}: trained values"


PLUGIN = FineTune()


def _chosen(settings: FineTuneSettings, context: Context) -> Ranking:
    """Where values are trained: among weights that could be restored."""
    if settings.drawn:
        return random_ranking(context, settings.draw_seed)
    if (ranking := context.positions) is None:
        raise RegraftError(f"There is no ranking {settings.positions} to train the weights of.")
    return ranking if context.count is None else ranking.first(context.count)


def _trained(
    settings: FineTuneSettings, context: Context, chosen: Ranking
) -> tuple[dict[str, Tensor], list[float]]:
    """(`LinearArchitecture.key` -> trained values by place in `chosen`, mean loss by pass).

    Goes on after the last pass that a killed run has finished.
    """
    answered, architecture = context.answered or {}, context.dense.architecture
    cut = minibatches([answered[kind].examples for kind in KINDS], context.compute)
    parts = dict(zip(KINDS, zip(*cut, strict=True), strict=True))
    model, embedded, costs = with_teacher(context, parts)
    sides = [[(layerwise, costs[kind]) for layerwise in embedded[kind]] for kind in KINDS]
    batches = list(zip(*sides, strict=True))  # each of both kinds
    modules, linears = dict(model.network.named_modules()), list(architecture.linears)
    positions = {linears[i].key: chosen.position[rows] for i, rows in by_linear(chosen)}
    weights = {li.key: li.weight(modules[li.module]) for li in linears if li.key in positions}
    optimizer = SparseAdam(weights, positions, settings.learning_rate)
    losses, path = list[float](), context.work / "so-far.safetensors"
    if distributed.decided(path.exists):
        state = load_unfinished(path)
        optimizer.load(state)
        losses = state["losses"].tolist()
    own = sum(one.work for several in embedded.values() for one in several)
    total = BOTH_WAYS * own * (settings.passes - len(losses))
    with context.progress.task("Fine-tuning", total, "samples x layers") as done:
        while len(losses) < settings.passes:
            shuffled = list(batches)
            random.Random(f"{context.seed} {len(losses)}").shuffle(shuffled)
            found = train(optimizer, shuffled, architecture, context.work / "states", done)
            losses.append(sum(found) / len(found))
            if distributed.first():
                so_far = {"losses": torch.tensor(losses, dtype=torch.float64)}
                with atomic_file(path) as temporary:
                    save_file(optimizer.state() | so_far, temporary)
            distributed.barrier()
    return optimizer.values, losses


def minibatches(
    kinds: Sequence[Sequence[Example]], compute: ComputeSettings
) -> list[list[Sequence[Example]]]:
    """Cut the examples of all kinds into the same number of batches, as even as can be.

    Returns:
        Of each minibatch the examples of each kind, none of them empty.
    """
    most, fewest = max(map(len, kinds)), min(map(len, kinds))
    count = min(-(-most // MINIBATCH), fewest)
    cut = [[examples[i::count] for examples in kinds] for i in range(count)]
    for chunks in cut:
        for chunk in chunks:
            check_shares(chunk, compute)
    return cut
