"""One step of gain: gradients of the model as it is, candidates, and a search of how many help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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

_SWAPS_IN_A_ROW = 64  # of a step, at most: bounds what is kept of every row


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind, harmful or harmless, with their answers and the loss on them.

    Attributes:
        gradient: Those that gradients are taken of.
        held_out: Those that decide how many weights a step restores; none of `gradient`.
        loss: Of one answer.
    """

    gradient: LayerwisePass
    held_out: LayerwisePass
    loss: DecisionLoss


@dataclass(frozen=True)
class Problem:
    """The models and prompts of a restoration.

    Attributes:
        model: The model in memory, as pruned.
        dense: The checkpoint that values are taken from.
        pruned: The checkpoint of `model`.
        sides: Harmful prompts and harmless ones.
        scratch: A folder for layer inputs.
        swap: Prune a kept weight of the same row, or of the same N:M group where the matrix has
            them, for each that is restored.
        kind: Of the two checkpoints: which weights can be restored.
    """

    model: PlacedModel
    dense: Source
    pruned: Source
    sides: tuple[Prompts, Prompts]
    scratch: Path
    swap: bool = False
    kind: Kind = "pruned"

    @cached_property
    def written(self) -> tuple[torch.dtype, ...]:
        """In the order of `Architecture.linears`, what the patch's values are rounded to."""
        record = self.pruned.checkpoint.record
        linears = self.pruned.architecture.linears
        return tuple(record(linear.tensor).torch_dtype for linear in linears)

    def value(self, index: int, linear: LinearArchitecture) -> Tensor:
        """The dense weight of the `index`-th linear, `[out, in]`; for "changed" as a patch has it.

        Where a dtype alone differs, nothing was changed that could be restored.
        """
        value = self.dense.weight(linear)
        return value if self.kind == "pruned" else value.to(self.written[index])

    @cached_property
    def groups(self) -> dict[str, int]:
        """M of every weight that is pruned N:M, by `LinearArchitecture.key`."""
        pairs = zip(self.dense.architecture.linears, self.pruned.architecture.linears, strict=True)
        found = {a.key: grouping_of(self.pruned.weight(b)) for a, b in pairs}
        return {key: grouping.m for key, grouping in found.items() if grouping is not None}


def step(
    problem: Problem,
    room: Room,
    so_far: Ranking,
    held_out: Losses,
    advance: Advance,
    expected: int = 1,
) -> tuple[Ranking, StepRecord]:
    """Restore the weights that help most now; in the model too.

    Args:
        problem: The model, with `so_far` restored, and the prompts.
        room: How many weights at most, and why.
        so_far: What steps before restored.
        held_out: The held-out losses now.
        advance: Called with the number of samples that a layer has seen, as `layer_gradients` and
            `held_out_losses` do.
        expected: As many numbers of weights were announced to be tried; more are told of.

    Returns:
        (what it restored, best first, empty where nothing lowers the held-out loss; the figures)
    """
    found, losses = _candidates(problem, room.weights, so_far, advance)
    chosen = found.first(first_order_limit(found.score, losses.sum)) if len(found) else found
    weights = weights_of(problem.model.network, problem.dense.architecture)
    edits = Edits(chosen, weights, problem.dense)
    seen = {0: held_out}

    def value(count: int) -> float:
        if len(seen) > expected:
            expect(advance, sum(side.held_out.work for side in problem.sides))
        edits.put(count)
        seen[count] = held_out_losses(problem.sides, advance)
        return seen[count].sum

    taken, tries = line_search(value, held_out.sum, len(chosen))
    edits.put(taken)
    limit = limit_of(taken, len(chosen), len(found), room)
    figures = StepRecord(len(so_far) + taken, losses, seen[taken], len(found), tries, limit)
    return chosen.first(taken), figures


def held_out_losses(sides: Sequence[Prompts], advance: Advance = lambda _: None) -> Losses:
    """Of the model as it is."""
    found = losses_together([(side.held_out, side.loss) for side in sides], advance)
    return Losses(*(mean_of(one.values()) for one in found))


def _candidates(
    problem: Problem, room: int, so_far: Ranking, advance: Advance
) -> tuple[Ranking, Losses]:
    """(the best weights that could be restored, in order; losses on the gradient prompts)."""
    best = Best(room)
    architecture = problem.dense.architecture
    index = {linear.key: i for i, linear in enumerate(architecture.linears)}
    weights = weights_of(problem.model.network, architecture)
    losses = [Recorded(side.loss) for side in problem.sides]
    # Both kinds go back through the layers side by side, so that the gradients of no more than one
    # layer are in memory.
    passes = (_gradients(problem, i, loss, advance) for i, loss in enumerate(losses))
    for (layer, for_safety), (_, for_utility) in zip(*passes, strict=True):
        for linear in layer.linears:
            # `pop`, so that the memory of a matrix is free once it is looked at.
            gradients = for_safety.pop(linear.key, None), for_utility.pop(linear.key, None)
            if gradients[0] is None or gradients[1] is None:
                continue  # no prompt of one kind ran through it
            i = index[linear.key]
            current = weights[i].to(gradients[0].device).contiguous()
            dense = problem.value(i, linear).to(current)
            taken = so_far.at((so_far.linear == i).nonzero().flatten())
            best.add(i, *_worth(problem, linear, dense, current, taken, gradients))
    found = Losses(*(mean_of(loss.seen) for loss in losses))
    return replace(best.ranking, score=best.ranking.score.float()), found


def _worth(
    problem: Problem,
    linear: LinearArchitecture,
    dense: Tensor,
    current: Tensor,
    taken: Ranking,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """(what restoring each weight is worth, -inf where it does not help; what is removed for it).

    Args:
        problem: For swaps.
        linear: The matrix; `dense` and `current` are its weights, `[out, in]`.
        taken: What of it has been restored, and removed, before.
        gradients: Of both losses, `[out, in]` float32; with swaps `[2 * out, in]`, their
            squares stacked under them.
    """
    rows, device = linear.shape[0], current.device
    worth = worth_of(*(gain(gradient[:rows], dense, current) for gradient in gradients))
    free = restorable(dense, current, problem.kind)
    free.view(-1)[taken.position.to(device)] = False  # where rounding to a dtype left a difference
    # A weight that an earlier swap removed looks restorable. It stays removed, or steps could undo
    # each other for ever.
    free.view(-1)[taken.removed[taken.removed >= 0].to(device)] = False
    worth.masked_fill_(~free, -torch.inf)
    removed = None
    if problem.swap:
        cost = torch.zeros_like(worth)
        for gradient in gradients:
            cost += removal_cost(gradient[:rows], gradient[rows:], current).abs_()
        # Nor is a weight removed that an earlier step restored.
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
