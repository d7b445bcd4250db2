"""One step of gain: gradients of the current model, candidates, and a search for their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from regraft.models.architecture import Architecture, LayerArchitecture, LinearArchitecture
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.models.placement import PlacedModel
from regraft.patch.groups import grouping_of
from regraft.patch.pair import Kind, restorable
from regraft.progress import Advance, expect
from regraft.pruning.gradients import Loss, layer_gradients, signed, signed_and_squared
from regraft.restoration.methods.gain.objective import (
    first_order_limit,
    gain,
    line_search,
    removal_cost,
    swaps_in_groups,
    swaps_in_rows,
    worth_of,
)
from regraft.restoration.methods.gain.path import Losses, Room, StepRecord, limit_of
from regraft.restoration.ranking import Best, Edits, Ranking
from regraft.restoration.teacher import DecisionLoss, Recorded, losses_together, mean_of

EXPECTED_TRIES = 2  # of a line search; each costs about a twelfth of a step's gradients
_SWAPS_IN_A_ROW = 64  # at most, per step: bounds the pairs of each row held in memory


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind, harmful or harmless, with their answers and the loss on them.

    Attributes:
        gradient: Prompts for gradients.
        held_out: Other prompts, on which the number of weights of a step is chosen.
        loss: Loss of one answer.
    """

    gradient: LayerwisePass
    held_out: LayerwisePass
    loss: DecisionLoss


@dataclass(frozen=True)
class Problem:
    """The models and prompts of a restoration.

    Attributes:
        model: The pruned model in memory, with what is restored so far.
        dense: The checkpoint that values are taken from.
        pruned: The checkpoint of `model`.
        sides: Harmful prompts and harmless ones.
        scratch: A folder for layer inputs.
        swap: For each restored weight, prune a kept one of the same row, or of the same N:M group
            if the matrix has a pattern.
        kind: Kind of the pair of checkpoints, which decides what is restorable.
    """

    model: PlacedModel
    dense: Source
    pruned: Source
    sides: tuple[Prompts, Prompts]
    scratch: Path
    swap: bool = False
    kind: Kind = "pruned"

    def dense_weight(self, linear: LinearArchitecture, pruned: LinearArchitecture) -> Tensor:
        """The dense weight of a linear, which is `pruned` in the other checkpoint. `[out, in]`.

        In a "changed" pair it is rounded to the patch's dtype: rounding alone is no change to undo.
        """
        weight = self.dense.weight(linear)
        if self.kind == "pruned":
            return weight
        return weight.to(self.pruned.checkpoint.record(pruned.tensor).torch_dtype)

    @cached_property
    def groups(self) -> dict[str, int]:
        """`LinearArchitecture.key` -> M, for every weight with an N:M pattern."""
        pairs = zip(self.dense.architecture.linears, self.pruned.architecture.linears, strict=True)
        groupings = {a.key: grouping_of(self.pruned.weight(b)) for a, b in pairs}
        return {key: grouping.m for key, grouping in groupings.items() if grouping is not None}


def step(
    problem: Problem, room: Room, so_far: Ranking, held_out: Losses, advance: Advance
) -> tuple[Ranking, StepRecord]:
    """Restore the weights that help most at the current model, in place.

    Args:
        problem: The model, with `so_far` restored, and the prompts.
        room: Maximum number of weights.
        so_far: The weights that earlier steps restored.
        held_out: The current held-out losses.
        advance: As for `layer_gradients`; more than `EXPECTED_TRIES` add to the work.

    Returns:
        (the restored weights, best first, none if nothing lowers the held-out loss; the record)
    """
    candidates, losses = _candidates(problem, room.weights, so_far, advance)
    chosen = candidates.first(first_order_limit(candidates.score, losses.sum))
    weights = weights_of(problem.model.network, problem.dense.architecture)
    edits = Edits(chosen, weights, problem.dense)
    measured = {0: held_out}

    def loss_with(count: int) -> float:
        if len(measured) > EXPECTED_TRIES:
            expect(advance, sum(side.held_out.work for side in problem.sides))
        edits.put(count)
        measured[count] = held_out_losses(problem.sides, advance)
        return measured[count].sum

    taken, tries = line_search(loss_with, held_out.sum, len(chosen))
    edits.put(taken)
    limit = limit_of(taken, len(chosen), len(candidates), room)
    restored = len(so_far) + taken
    record = StepRecord(restored, losses, measured[taken], len(candidates), tries, limit)
    return chosen.first(taken), record


def held_out_losses(sides: Sequence[Prompts], advance: Advance = lambda _: None) -> Losses:
    """Mean losses of the current model on the held-out prompts."""
    losses = losses_together([(side.held_out, side.loss) for side in sides], advance)
    return Losses(*(mean_of(of_kind.values()) for of_kind in losses))


def _candidates(
    problem: Problem, room: int, so_far: Ranking, advance: Advance
) -> tuple[Ranking, Losses]:
    """(at most `room` candidates, best first; losses on the gradient prompts)."""
    best = Best(room)
    architecture = problem.dense.architecture
    pairs = zip(architecture.linears, problem.pruned.architecture.linears, strict=True)
    places = {linear.key: (i, pruned) for i, (linear, pruned) in enumerate(pairs)}
    weights = weights_of(problem.model.network, architecture)
    losses = [Recorded(side.loss) for side in problem.sides]
    # Both backward passes run side by side, so that only one layer's gradients are in memory.
    passes = (_gradients(problem, i, loss, advance) for i, loss in enumerate(losses))
    for (layer, for_safety), (_, for_utility) in zip(*passes, strict=True):
        for linear in layer.linears:
            # `pop` frees each gradient once it is used.
            gradients = for_safety.pop(linear.key, None), for_utility.pop(linear.key, None)
            if gradients[0] is None or gradients[1] is None:
                continue  # not used by the prompts of one kind
            i, pruned = places[linear.key]
            current = weights[i].to(gradients[0].device).contiguous()
            dense = problem.dense_weight(linear, pruned).to(current)
            taken = so_far.at((so_far.linear == i).nonzero().flatten())
            best.add(i, *_worth(problem, linear, dense, current, taken, gradients))
    means = Losses(*(mean_of(loss.seen) for loss in losses))
    return best.ranked(), means


def _worth(
    problem: Problem,
    linear: LinearArchitecture,
    dense: Tensor,
    current: Tensor,
    taken: Ranking,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """(worth of restoring each weight, -inf where it does not help; the weight removed for it).

    Args:
        problem: Whether to swap, the kind of pair and its N:M groups.
        linear: The matrix.
        dense: Its dense weights, `[out, in]`.
        current: Its weights in the model now, `[out, in]`.
        taken: Its weights that earlier steps restored and removed.
        gradients: Of both losses, `[out, in]` float32; with swaps `[2 * out, in]`, the diagonal of
            the Fisher matrix below the gradient.
    """
    rows, device = linear.shape[0], current.device
    worth = worth_of(*(gain(gradient[:rows], dense, current) for gradient in gradients))
    free = restorable(dense, current, problem.kind)
    # Restored weights may still differ from the dense ones, by rounding.
    free.view(-1)[taken.position.to(device)] = False
    # A weight that an earlier swap removed looks restorable. It stays removed, or steps could undo
    # each other forever.
    free.view(-1)[taken.removed[taken.removed >= 0].to(device)] = False
    worth.masked_fill_(~free, -torch.inf)
    removed = None
    if problem.swap:
        cost = torch.zeros_like(worth)
        for gradient in gradients:
            cost += removal_cost(gradient[:rows], gradient[rows:], current).abs_()
        # For the same reason weights that an earlier step restored are not removed.
        fixed = current == 0
        fixed.view(-1)[taken.position.to(device)] = True
        cost.masked_fill_(fixed, torch.inf)
        m = problem.groups.get(linear.key)
        if m is None:
            worth, removed = swaps_in_rows(worth, cost, _SWAPS_IN_A_ROW)
        else:
            worth, removed = swaps_in_groups(worth, cost, m)
    return worth.masked_fill_(worth <= 0, -torch.inf), removed


def _gradients(
    problem: Problem, side: int, loss: Loss, advance: Advance
) -> Iterator[tuple[LayerArchitecture, dict[str, Tensor]]]:
    layerwise = problem.sides[side].gradient
    layerwise.rewind()
    return layer_gradients(
        layerwise,
        problem.dense.architecture,
        problem.scratch / str(side),
        lambda _: True,
        advance,
        add=signed_and_squared if problem.swap else signed,
        loss=loss,
    )


def weights_of(network: nn.Module, architecture: Architecture) -> list[Tensor]:
    """Every prunable weight in memory, in the order of `Architecture.linears`."""
    modules = dict(network.named_modules())
    return [linear.weight(modules[linear.module]) for linear in architecture.linears]
