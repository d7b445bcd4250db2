"""Sparse fine-tuning: train the values of a few weights instead of restoring dense ones.

    choose k positions: those of another ranking, or random pruned ones
    for each pass, for each minibatch of harmful and harmless prompts
        g <- gradient at these positions of gain's loss, the KL from the dense model's answers
        Adam step on the values at these positions; all other weights stay as they are

Adam is Kingma & Ba 2015 (arXiv 1412.6980); SHiRA in PEFT (Bhardwaj et al. 2024, arXiv 2406.13175)
trains sparse adapters of this form. As a baseline it shows whether gain's positions help or the
dense values at them: number of weights, loss, prompts and passes can be the same.

Values are trained in float32 and written in the model's dtype. Only the chosen positions have
optimizer state: value, first and second moment.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from regraft import distributed
from regraft.data.example import KINDS, Example, Reading
from regraft.disk.artifact import load_unfinished, save_unfinished
from regraft.errors import RegraftError
from regraft.loading import check_shares
from regraft.models.architecture import Architecture
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.models.places import at
from regraft.patch.format import Patch
from regraft.progress import Advance
from regraft.pruning.gradients import BOTH_WAYS, Loss, layer_gradients
from regraft.restoration.base import Context, Counted, Method, Needs
from regraft.restoration.ranking import Ranking, by_linear
from regraft.restoration.selection import random_ranking
from regraft.restoration.teacher import Recorded, mean_of, with_teacher
from regraft.settings.compute import ComputeSettings

Side = tuple[LayerwisePass, Loss]
"""Prompts of one kind, embedded, and the loss of a response to them."""
TRAINED = "trained"  # `values` in the `about` of a patch with trained values
TRAINED_VALUES = (
    "the values are trained, not the dense model's. The result has weights of neither the pruned "
    "nor the dense model, so their licences and evaluations may not hold for it; reverting works "
    "as with any patch."
)
BETAS = (0.9, 0.999)
EPS = 1e-8
RANDOM = "random"  # `positions` that are drawn instead of taken from a ranking
MINIBATCH = 8  # prompts of each kind per update


def is_trained(patch: Patch) -> bool:
    """Whether a patch holds trained values instead of dense ones."""
    return patch.about.get("values") == TRAINED


@dataclass
class _MatrixState:
    """Optimizer state of one matrix: flat `position` of each weight; all but `weight` are `[k]`."""

    weight: Tensor
    position: Tensor
    value: Tensor
    mean: Tensor
    square: Tensor


class SparseAdam:
    """Adam on a few weights of each matrix; equals torch.optim.Adam without weight decay."""

    def __init__(
        self, weights: Mapping[str, Tensor], positions: Mapping[str, Tensor], rate: float
    ) -> None:
        """Start from the current values of the weights.

        `weights` maps `LinearArchitecture.key` to weights in memory, `[out, in]`, changed in place;
        `positions` maps the same keys to distinct flat positions to train, `[k]` int64.
        """
        self.rate, self.updates = rate, 0
        self._states = {}
        for key, position in positions.items():
            weight = weights[key]
            value = weight[at(position, weight)].float()
            mean, square = torch.zeros_like(value), torch.zeros_like(value)
            self._states[key] = _MatrixState(
                weight, position.to(weight.device), value, mean, square
            )

    @property
    def positions(self) -> dict[str, Tensor]:
        """Key -> flat positions on the weight's device, `[k]` int64."""
        return {key: one.position for key, one in self._states.items()}

    @property
    def values(self) -> dict[str, Tensor]:
        """Key -> the trained values as the model holds them, `[k]` in its dtype, on CPU."""
        return {
            key: one.weight[at(one.position, one.weight)].cpu() for key, one in self._states.items()
        }

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Take one Adam step. `gradients`: key -> `[k]` float32; a missing one counts as 0."""
        self.updates += 1
        for key, one in self._states.items():
            gradient = gradients.get(key)
            if gradient is None:
                gradient = torch.zeros_like(one.value)
            gradient = gradient.to(one.value)
            one.mean.lerp_(gradient, 1 - BETAS[0])
            one.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            root = (one.square / (1 - BETAS[1] ** self.updates)).sqrt_().add_(EPS)
            one.value -= self.rate / (1 - BETAS[0] ** self.updates) * one.mean / root
            self._write(one)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, for saving."""
        tensors = {
            f"{key}.{part}": getattr(one, part).cpu()
            for key, one in self._states.items()
            for part in ("value", "mean", "square")
        }
        return tensors | {"updates": torch.tensor(self.updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved `state` of the same positions and write its values into the weights."""
        self.updates = int(state["updates"])
        for key, one in self._states.items():
            for part in ("value", "mean", "square"):
                getattr(one, part).copy_(state[f"{key}.{part}"])
            self._write(one)

    @staticmethod
    def _write(one: _MatrixState) -> None:
        one.weight[at(one.position, one.weight)] = one.value.to(one.weight.dtype)


def loss_and_gradients(
    sides: Sequence[Side],
    architecture: Architecture,
    positions: Mapping[str, Tensor],
    scratch: Path,
    advance: Advance = lambda _: None,
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss summed over kinds of prompts, and its gradient at a few weights of each matrix.

    Takes one forward and one backward pass over all prompts, with one layer's gradients in memory
    at a time. `positions`: `LinearArchitecture.key` -> flat positions, `[k]` int64; `scratch` and
    `advance` are as for `layer_gradients`.

    Returns:
        The loss, and key -> gradient `[k]` float32; linears that no prompt used are missing.
    """
    total, chosen = 0.0, dict[str, Tensor]()
    for number, (layerwise, loss) in enumerate(sides):
        recorded = Recorded(loss)
        layerwise.rewind()
        layers = layer_gradients(
            layerwise,
            architecture,
            scratch / str(number),
            lambda linear: linear.key in positions,
            advance,
            loss=recorded,
        )
        for _, gradients in layers:
            for key, gradient in gradients.items():
                part = gradient.reshape(-1)[positions[key].to(gradient.device)]
                chosen[key] = chosen[key] + part if key in chosen else part
        total += mean_of(recorded.seen)
    return total, chosen


def train(
    optimizer: SparseAdam,
    batches: Sequence[Sequence[Side]],
    architecture: Architecture,
    scratch: Path,
    advance: Advance = lambda _: None,
) -> list[float]:
    """Train for one pass over the prompts, with an update after each batch.

    Each batch has prompts of every kind, embedded for the model whose weights the optimizer
    updates; the other arguments are those of `loss_and_gradients`.

    Returns:
        The loss of each batch before its update.
    """
    losses = []
    for sides in batches:
        loss, gradients = loss_and_gradients(
            sides, architecture, optimizer.positions, scratch, advance
        )
        optimizer.update(gradients)
        losses.append(loss)
    return losses


class FineTuneSettings(Counted):
    """A baseline that trains values by Adam instead of restoring dense ones."""

    method: Literal["fine-tune"] = "fine-tune"
    positions: str = Field(
        RANDOM,
        description="Which weights are trained: the first of a ranking FILE (in a recipe also the "
        "name of an earlier method), or random pruned ones.",
    )
    learning_rate: float = Field(0.003, gt=0, description="Learning rate of Adam.")
    passes: int = Field(3, ge=1, description="Forward and backward passes over all prompts.")
    draw_seed: int = Field(0, description="Seed of random positions.")

    @classmethod
    def has_default(cls, given: Mapping[str, Any]) -> bool:
        """Unless a ranking is given, which is trained whole."""
        return bool(given.get("positions", RANDOM) == RANDOM)

    @model_validator(mode="after")
    def _check_seed(self) -> Self:
        if not self.drawn and self.first_set("draw_seed"):
            raise ValueError("`draw_seed` has no effect when `positions` are given")
        return self

    @property
    def drawn(self) -> bool:
        return self.positions == RANDOM


class FineTune(Method[FineTuneSettings]):
    """Sparse fine-tuning; see the module."""

    name, settings_type = "fine-tune", FineTuneSettings
    algorithm: ClassVar[int] = 2

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
        """Check that every minibatch has prompts for each process."""
        minibatches([one.examples for one in prompts.values()], compute)

    def rank(self, settings: FineTuneSettings, context: Context) -> Ranking:
        """The chosen positions with their trained values; `about` has the loss of each pass."""
        chosen = context.positions
        if settings.drawn:
            chosen = random_ranking(context, settings.draw_seed)
        assert chosen is not None, "needs() requires it"
        if context.count is not None:
            chosen = chosen.first(context.count)
        context.work.mkdir(parents=True, exist_ok=True)
        values, losses = _train_all(settings, context, chosen)
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


def _train_all(
    settings: FineTuneSettings, context: Context, chosen: Ranking
) -> tuple[dict[str, Tensor], list[float]]:
    """(`LinearArchitecture.key` -> trained values in the order of `chosen`, mean loss by pass).

    Resumes after the last pass that a killed run finished.
    """
    answered, architecture = context.answered or {}, context.dense.architecture
    cut = minibatches([answered[kind].examples for kind in KINDS], context.compute)
    parts = dict(zip(KINDS, zip(*cut, strict=True), strict=True))
    model, embedded, loss_of = with_teacher(context, parts)
    sides = [[(layerwise, loss_of[kind]) for layerwise in embedded[kind]] for kind in KINDS]
    batches = list(zip(*sides, strict=True))  # a batch holds prompts of every kind
    modules, linears = dict(model.network.named_modules()), list(architecture.linears)
    positions = {linears[i].key: chosen.position[rows] for i, rows in by_linear(chosen)}
    weights = {li.key: li.weight(modules[li.module]) for li in linears if li.key in positions}
    optimizer = SparseAdam(weights, positions, settings.learning_rate)
    losses, path = list[float](), context.work / "so-far.safetensors"
    if distributed.decided(path.exists):
        state = load_unfinished(path)
        optimizer.load(state)
        losses = state["losses"].tolist()
    work = sum(one.work for several in embedded.values() for one in several)
    total = BOTH_WAYS * work * (settings.passes - len(losses))
    with context.progress.task("Fine-tuning", total, "samples x layers") as done:
        while len(losses) < settings.passes:
            shuffled = list(batches)
            random.Random(f"{context.seed} {len(losses)}").shuffle(shuffled)
            of_batches = train(optimizer, shuffled, architecture, context.work / "states", done)
            losses.append(sum(of_batches) / len(of_batches))
            if distributed.first():
                so_far = {"losses": torch.tensor(losses, dtype=torch.float64)}
                save_unfinished(path, optimizer.state() | so_far)
            distributed.barrier()
    return optimizer.values, losses


def minibatches(
    kinds: Sequence[Sequence[Example]], compute: ComputeSettings
) -> list[list[Sequence[Example]]]:
    """Split the examples of every kind into the same number of batches of nearly equal size.

    Returns:
        For each minibatch the examples of each kind, none of them empty.
    """
    most, fewest = max(map(len, kinds)), min(map(len, kinds))
    count = min(-(-most // MINIBATCH), fewest)
    cut = [[examples[i::count] for examples in kinds] for i in range(count)]
    for chunks in cut:
        for chunk in chunks:
            check_shares(chunk, compute)
    return cut
