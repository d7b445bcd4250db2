"""Restore by gain in steps: gradients of the model as it is, the best weights back, and again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from regraft import ranks
from regraft.importance.gradients import (
    SampleGradients,
    layer_gradients,
    signed,
    signed_and_squared,
)
from regraft.importance.hard import response_losses
from regraft.importance.losses import DecisionLoss, Loss
from regraft.models.anatomy import Anatomy, LayerAnatomy, LinearAnatomy
from regraft.models.load import Source
from regraft.models.placement import PlacedModel
from regraft.models.walk import Walk
from regraft.restoration.gain import (
    Objective,
    backtrack,
    gain,
    removal_cost,
    swaps_in_groups,
    swaps_in_rows,
)
from regraft.restoration.groups import grouping_of
from regraft.restoration.matching import Effects, together
from regraft.restoration.ranking import KEPT, Best, Edits, Ranking, empty
from regraft.restoration.selection import restorable

Progress = Callable[[int], None]
_SWAPS_IN_A_ROW = 64
_CANDIDATES = 24  # for each weight that may come back in a step
_EFFECTS_BYTES = 2**31  # of what candidates do to each prompt of a process, at most


@dataclass(frozen=True)
class Problem:
    """What is restored in: the model as pruned, in memory, and both checkpoints.

    `open` says where in a weight values may come back, `[out, in]` bool, or None for nowhere.
    `swap` prunes a kept weight of the same row for each that comes back, or of the same group of M
    inputs in the linears whose `LinearAnatomy.key` is in `groups`.
    """

    model: PlacedModel
    dense: Source
    pruned: Source
    open: Callable[[LayerAnatomy, LinearAnatomy], Tensor | None]
    objective: Objective
    swap: bool = False
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """The weights that came back in a step, best first, and the model as it was before.

    `candidates` are those that promise most for the next step.
    `safety` and `utility` are losses; `drift` is how much likelier harmless answers began otherwise
    than they should, than those of the dense model (without a teacher: than never).
    """

    ranking: Ranking
    safety: float
    utility: float
    drift: float
    candidates: Ranking


def step(
    problem: Problem,
    safety: tuple[Walk, DecisionLoss],
    utility: tuple[Walk, DecisionLoss],
    count: int,
    so_far: Ranking,
    scratch: Path,
    progress: Progress,
    candidates: Ranking | None = None,
) -> Step:
    """The `count` weights whose return helps most now, and put them into the model.

    Mean gradients tell candidates, several times as many as can come back, and gradients of single
    samples which of them to take (see `matching`). One layer's gradients are in memory at a time
    (two with `swap`: the squares too). As many of the weights are taken as lower the objective most
    on the same samples, by forward passes.

    Args:
        problem: The model, with `so_far` in it.
        safety: D^s before the first layer, and its loss.
        utility: D^u, likewise.
        count: How many weights at most; fewer come back where fewer help, or where they are
            predicted to help more than first order can be trusted.
        so_far: What has come back before.
        scratch: A folder for layer inputs.
        progress: Called with the number of samples a layer has seen, forward and backward.
        candidates: Of the step before; without them a pass of its own looks for some.
    """
    sides = (
        _Side("safety", *safety, 1.0, scratch / "safety"),
        _Side("utility", *utility, problem.objective.utility_weight, scratch / "utility"),
    )
    if candidates is None:
        candidates = _look(problem, sides, count, so_far, empty(), progress).candidates
    candidates = candidates.at(_unused(candidates, so_far))
    seen = _look(problem, sides, count, so_far, candidates, progress)
    order, worth = together(seen.effects.to(problem.model.device), count)
    now = problem.objective.value(seen.safety, seen.utility)
    chosen = replace(candidates.at(order), score=worth)
    chosen = chosen.first(problem.objective.within_trust(worth, now))
    weights = weights_of(problem.model.network, problem.dense.anatomy)
    edits = Edits(chosen, weights, problem.dense)

    def value(tried: int) -> float:
        edits.put(tried)
        losses = (_mean(response_losses(side.walk, side.loss).values()) for side in sides)
        return problem.objective.value(*losses)

    taken = backtrack(value, now, len(chosen))
    edits.put(taken)
    return Step(chosen.first(taken), seen.safety, seen.utility, seen.drift, seen.candidates)


@dataclass(frozen=True)
class _Side:
    """Samples of one kind, of which `share` is the objective's."""

    kind: str
    walk: Walk
    loss: DecisionLoss
    share: float
    scratch: Path


@dataclass(frozen=True)
class _Looked:
    """What one pass found: losses, candidates, and what those that were asked for would do."""

    safety: float
    utility: float
    drift: float
    candidates: Ranking
    effects: Effects


def _look(
    problem: Problem,
    sides: Sequence[_Side],
    count: int,
    so_far: Ranking,
    asked: Ranking,
    progress: Progress,
) -> _Looked:
    """All samples once forward and backward through the model as it is."""
    best = Best(_most_candidates(count, sides))
    anatomy = problem.dense.anatomy
    index = {linear.key: i for i, linear in enumerate(anatomy.linears)}
    weights = weights_of(problem.model.network, anatomy)
    seen: list[list[_Seen]] = [[] for _ in sides]
    samples = [
        SampleGradients(side.walk, _places(asked, anatomy, swap=problem.swap)) for side in sides
    ]
    passes = (
        _gradients(problem, side, _recorded(side.loss, own), single, progress)
        for side, own, single in zip(sides, seen, samples, strict=True)
    )
    for (layer, for_safety), (_, for_utility) in zip(*passes, strict=True):
        for linear in layer.linears:
            where = problem.open(layer, linear)
            if where is None or linear.key not in for_safety.keys() & for_utility.keys():
                continue
            keys, removed = _candidates(
                problem,
                linear,
                weights[index[linear.key]],
                where,
                (for_safety[linear.key], for_utility[linear.key]),
                _taken(so_far, index[linear.key]),
            )
            best.add(index[linear.key], keys, removed)
    effects = [
        _effects(problem, asked, weights, side, own, single)
        for side, own, single in zip(sides, seen, samples, strict=True)
    ]
    safety, utility = (_mean([one.loss for one in own]) for own in seen)
    return _Looked(
        safety,
        utility,
        _mean([one.drift for one in seen[1]]),
        best.ranking,
        reduce(Effects.and_of, effects),
    )


def _most_candidates(count: int, sides: Sequence[_Side]) -> int:
    """How many candidates a step looks for; fewer where memory for what they do is short."""
    prompts = sum(len(batch.ids) for side in sides for batch in side.walk.batches)
    of_each = -(-int(ranks.total(torch.tensor(prompts))) // ranks.world())
    return count * max(1, min(_CANDIDATES, _EFFECTS_BYTES // (4 * of_each * count)))


def _unused(candidates: Ranking, so_far: Ranking) -> Tensor:
    """Places of the candidates neither of whose two weights a step has touched, `[k]` int64."""

    def names(ranking: Ranking, column: Tensor) -> Tensor:
        return ranking.linear.long() << 40 | column.clamp_min(0)

    gone_before = so_far.at((so_far.removed != KEPT).nonzero().flatten())
    used = torch.cat([names(so_far, so_far.position), names(gone_before, gone_before.removed)])
    back, gone = (names(candidates, one) for one in (candidates.position, candidates.removed))
    taken = torch.isin(back, used) | (torch.isin(gone, used) & (candidates.removed != KEPT))
    return (~taken).nonzero().flatten()


def _by_linear(candidates: Ranking) -> Iterator[tuple[int, Tensor]]:
    """(index of a linear, places of its candidates)."""
    for index in candidates.linear.unique().tolist():
        yield index, (candidates.linear == index).nonzero().flatten()


def _places(asked: Ranking, anatomy: Anatomy, *, swap: bool) -> dict[str, Tensor]:
    """Flat positions by linear: of what comes back, with `swap` then of what goes for it."""
    linears = list(anatomy.linears)
    columns = (asked.position, asked.removed) if swap else (asked.position,)
    return {
        linears[index].key: torch.cat([column[at] for column in columns])
        for index, at in _by_linear(asked)
    }


def _effects(
    problem: Problem,
    asked: Ranking,
    weights: Sequence[Tensor],
    side: _Side,
    seen: Sequence[_Seen],
    single: SampleGradients,
) -> Effects:
    linears = list(problem.dense.anatomy.linears)
    gains = torch.zeros(len(seen), len(asked))
    for index, at in _by_linear(asked):
        dense = problem.dense.checkpoint.read(linears[index].tensor).reshape(-1)
        current = weights[index].reshape(-1)
        gradients = single.found[linears[index].key]  # [E, n], with `swap` [E, 2n]
        back, gone = asked.position[at], asked.removed[at]
        new = dense[back].to(current.dtype).float()
        falls = gradients[:, : len(at)] * (current[back.to(current.device)].cpu().float() - new)
        if problem.swap:
            falls += gradients[:, len(at) :] * current[gone.to(current.device)].cpu().float()
        gains[:, at] = falls
    share = side.share / int(ranks.total(torch.tensor(len(seen))))
    names = [name for batch in side.walk.batches for name in batch.ids]
    counted = torch.tensor([side.loss.weights.get(name, 1.0) for name in names])
    losses = torch.tensor([one.loss for one in seen])
    return Effects(gains.mul_(share), losses * share, counted * share)


@dataclass(frozen=True)
class _Seen:
    """What a pass saw of one example, weighted."""

    loss: float
    drift: float


def _recorded(loss: DecisionLoss, into: list[_Seen]) -> Loss:
    def recorded(model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        value = loss(model, final, labels, name)
        misses = loss.misses(model, final, labels, name)
        drift = misses.weight * (misses.own - (misses.dense or 0.0))
        into.append(_Seen(float(value.detach()), drift))
        return value

    return recorded


def _mean(values: Collection[float]) -> float:
    """Over the examples of all processes."""
    total, count = ranks.total(torch.tensor([sum(values), len(values)], dtype=torch.float64))
    return float(total / count)


def groups_of(dense: Source, pruned: Source) -> dict[str, int]:
    """M of every weight that is pruned N:M, by `LinearAnatomy.key`."""
    pairs = zip(dense.anatomy.linears, pruned.anatomy.linears, strict=True)
    found = {own.key: grouping_of(pruned.checkpoint.read(other.tensor)) for own, other in pairs}
    return {key: grouping.m for key, grouping in found.items() if grouping is not None}


def weights_of(network: nn.Module, anatomy: Anatomy) -> list[Tensor]:
    """Every prunable weight in memory, in the order of `Anatomy.linears`."""
    modules = dict(network.named_modules())
    weights = (modules[linear.module].weight for linear in anatomy.linears)
    return [weight.data for weight in weights if isinstance(weight, Tensor)]


def _gradients(
    problem: Problem, side: _Side, loss: Loss, samples: SampleGradients, progress: Progress
) -> Iterator[tuple[LayerAnatomy, Mapping[str, Tensor]]]:
    side.walk.rewind()
    anatomy = problem.dense.anatomy
    layers = {linear: layer for layer in anatomy.layers for linear in layer.linears}
    return layer_gradients(
        side.walk,
        anatomy,
        side.scratch,
        lambda linear: problem.open(layers[linear], linear) is not None,
        progress,
        add=signed_and_squared if problem.swap else signed,
        loss=loss,
        samples=samples,
    )


def _candidates(
    problem: Problem,
    linear: LinearAnatomy,
    weight: Tensor,
    where: Tensor,
    gradients: Sequence[Tensor],
    taken: Ranking,
) -> tuple[Tensor, Tensor | None]:
    """(what each return is worth, -inf where it does not help; what is removed for it)."""
    rows = linear.shape[0]
    device = gradients[0].device
    current = weight.to(device)
    dense = problem.dense.checkpoint.read(linear.tensor).to(device, current.dtype)
    gains = [gain(gradient[:rows], dense, current) for gradient in gradients]
    keys = problem.objective.keys(*gains)
    free = restorable(dense, current) & where.to(device)
    free.view(-1)[taken.removed[taken.removed >= 0].to(device)] = False
    keys.masked_fill_(~free, -torch.inf)
    if not problem.swap:
        return keys.masked_fill_(keys <= 0, -torch.inf), None
    moved = [removal_cost(g[:rows], g[rows:], current).abs_() for g in gradients]
    # whatever weighs more in the return, a removal should disturb neither
    cost = moved[0] + max(1.0, problem.objective.utility_weight) * moved[1]
    fixed = current == 0
    fixed.view(-1)[taken.position.to(device)] = True
    cost.masked_fill_(fixed | ~where.to(device), torch.inf)
    m = problem.groups.get(linear.key)
    if m is None:
        keys, removed = swaps_in_rows(keys, cost, _SWAPS_IN_A_ROW)
    else:
        keys, removed = swaps_in_groups(keys, cost, m)
    return keys.masked_fill_(keys <= 0, -torch.inf), removed


def _taken(ranking: Ranking, index: int) -> Ranking:
    own = ranking.linear == index
    return ranking.at(own.nonzero().flatten())
