"""Restore by gain in steps: gradients of the model as it is, the best weights back, and again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from regraft.importance.hard import losses_together
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
from regraft.restoration.joint import Effects, joined, together
from regraft.restoration.ranking import KEPT, Best, Edits, Ranking, by_linear, empty
from regraft.restoration.selection import restorable

Progress = Callable[[int], None]
_SWAPS_IN_A_ROW = 64
_CANDIDATES = 24  # for each weight that may come back in a step
_EFFECTS_BYTES = 2**31  # of what candidates do to each prompt, unless too few could be looked at


@dataclass(frozen=True)
class Problem:
    """What is restored in: the model as pruned, in memory, and both checkpoints.

    `open` says where in a weight values may come back: everywhere, nowhere, or at `[out, in]` bool.
    `swap` prunes a kept weight of the same row for each that comes back, or of the same group of M
    inputs in the linears whose `LinearAnatomy.key` is in `groups`.
    """

    model: PlacedModel
    dense: Source
    pruned: Source
    open: Callable[[LayerAnatomy, LinearAnatomy], Tensor | bool]
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
    objective: Objective,
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
    samples which of them to take (see `joint`). One layer's gradients of both kinds of samples are
    in memory at a time (with `swap` the squares too). How many of the weights are taken is seen by
    forward passes on the same samples (see `backtrack`).

    Args:
        problem: The model, with `so_far` in it.
        objective: What is to fall, and what the weights are held to.
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
        _Side("safety", *safety, scratch / "safety"),
        _Side("utility", *utility, scratch / "utility"),
    )
    over_all = _Pass(problem, objective, sides, count, so_far, progress)
    if candidates is None:
        candidates = over_all.look(empty()).candidates
    candidates = candidates.at(_unused(candidates, so_far))
    seen = over_all.look(candidates)
    worth_now = objective.keys(*(side.mean for side in seen.effects))
    allowed = (worth_now > -torch.inf).nonzero().flatten()
    candidates = candidates.at(allowed)
    device = torch.device("cpu") if problem.model.streamed else problem.model.device
    shares = (1.0, objective.utility_weight)
    effects = joined(seen.effects, shares, allowed, device)
    order, worth = together(effects, count)
    now = objective.value(seen.safety, seen.utility)
    chosen = replace(candidates.at(order), score=worth)
    chosen = chosen.first(objective.within_trust(worth, now))
    weights = weights_of(problem.model.network, problem.dense.anatomy)
    edits = Edits(chosen, weights, problem.dense)

    def value(tried: int) -> float:
        edits.put(tried)
        losses = losses_together([(side.walk, side.loss) for side in sides])
        return objective.value(*(_mean(found.values()) for found in losses))

    taken = backtrack(value, now, chosen.score)
    edits.put(taken)
    return Step(chosen.first(taken), seen.safety, seen.utility, seen.drift, seen.candidates)


@dataclass(frozen=True)
class _Side:
    """Samples of one kind."""

    kind: str
    walk: Walk
    loss: DecisionLoss
    scratch: Path


@dataclass(frozen=True)
class _Looked:
    """What one pass found: losses, candidates, and what those that were asked for would do.

    `effects` are by kind of sample, and not yet multiplied by a kind's share in the objective.
    """

    safety: float
    utility: float
    drift: float
    candidates: Ranking
    effects: tuple[Effects, ...]


@dataclass(frozen=True)
class _Pass:
    """All samples once forward and backward through the model as it is."""

    problem: Problem
    objective: Objective
    sides: Sequence[_Side]
    count: int
    so_far: Ranking
    progress: Progress

    def look(self, asked: Ranking) -> _Looked:
        """Look for candidates, and at what those `asked` for would do to each sample."""
        problem = self.problem
        best = Best(_most_candidates(self.count, self.sides))
        anatomy = problem.dense.anatomy
        index = {linear.key: i for i, linear in enumerate(anatomy.linears)}
        weights = weights_of(problem.model.network, anatomy)
        change = torch.zeros(len(asked)), torch.zeros(len(asked))
        seen: list[list[_Seen]] = [[] for _ in self.sides]
        samples = [
            SampleGradients(side.walk, _places(asked, anatomy, swap=problem.swap))
            for side in self.sides
        ]
        passes = (
            _gradients(problem, side, _recorded(side, own), single, self.progress)
            for side, own, single in zip(self.sides, seen, samples, strict=True)
        )
        for (layer, for_safety), (_, for_utility) in zip(*passes, strict=True):
            for linear in layer.linears:
                where, i = problem.open(layer, linear), index[linear.key]
                both = for_safety.pop(linear.key, None), for_utility.pop(linear.key, None)
                if where is False or both[0] is None or both[1] is None:
                    continue
                current = weights[i].to(both[0].device)
                dense = problem.dense.checkpoint.read(linear.tensor).to(current)
                _note_change(change, asked, i, dense, current)
                best.add(i, *self._candidates(i, linear, dense, current, where, both))
        effects = [
            _effects(asked, anatomy, change, side, own, single)
            for side, own, single in zip(self.sides, seen, samples, strict=True)
        ]
        safety, utility = (_mean([one.loss for one in own]) for own in seen)
        drift = _mean([one.drift for one in seen[1]])
        return _Looked(safety, utility, drift, best.ranking, tuple(effects))

    def _candidates(
        self,
        index: int,
        linear: LinearAnatomy,
        dense: Tensor,
        current: Tensor,
        where: Tensor | bool,
        gradients: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """(what each return is worth, -inf where it does not help; what is removed for it)."""
        rows, device = linear.shape[0], current.device
        taken = self.so_far.at((self.so_far.linear == index).nonzero().flatten())
        gains = [gain(gradient[:rows], dense, current) for gradient in gradients]
        keys = self.objective.keys(*gains)
        closed = None if isinstance(where, bool) else ~where.to(device)
        free = restorable(dense, current)
        free.view(-1)[taken.removed[taken.removed >= 0].to(device)] = False
        keys.masked_fill_(~free, -torch.inf)
        if closed is not None:
            keys.masked_fill_(closed, -torch.inf)
        if not self.problem.swap:
            return keys.masked_fill_(keys <= 0, -torch.inf), None
        moved = [removal_cost(g[:rows], g[rows:], current).abs_() for g in gradients]
        # whatever weighs more in the return, a removal should disturb neither
        cost = moved[0] + max(1.0, self.objective.utility_weight) * moved[1]
        fixed = current == 0
        fixed.view(-1)[taken.position.to(device)] = True
        cost.masked_fill_(fixed if closed is None else fixed | closed, torch.inf)
        m = self.problem.groups.get(linear.key)
        if m is None:
            keys, removed = swaps_in_rows(keys, cost, _SWAPS_IN_A_ROW)
        else:
            keys, removed = swaps_in_groups(keys, cost, m)
        return keys.masked_fill_(keys <= 0, -torch.inf), removed


def _most_candidates(count: int, sides: Sequence[_Side]) -> int:
    """How many candidates a step looks for; fewer where memory for what they do is short.

    `count` of them more than it takes, since this very step may take as many before they are used.
    """
    prompts = sum(len(batch.ids) for side in sides for batch in side.walk.batches)
    of_each = 4 * int(ranks.total(torch.tensor(prompts))) * count
    return count * (1 + max(1, min(_CANDIDATES, _EFFECTS_BYTES // of_each)))


def _unused(candidates: Ranking, so_far: Ranking) -> Tensor:
    """Places of the candidates neither of whose two weights a step has touched, `[k]` int64."""

    def names(ranking: Ranking, column: Tensor) -> Tensor:
        return ranking.linear.long() << 40 | column.clamp_min(0)

    gone_before = so_far.at((so_far.removed != KEPT).nonzero().flatten())
    used = torch.cat([names(so_far, so_far.position), names(gone_before, gone_before.removed)])
    back, gone = (names(candidates, one) for one in (candidates.position, candidates.removed))
    taken = torch.isin(back, used) | (torch.isin(gone, used) & (candidates.removed != KEPT))
    return (~taken).nonzero().flatten()


def _places(asked: Ranking, anatomy: Anatomy, *, swap: bool) -> dict[str, Tensor]:
    """Flat positions by linear: of what comes back, with `swap` then of what goes for it."""
    linears = list(anatomy.linears)
    columns = (asked.position, asked.removed) if swap else (asked.position,)
    return {
        linears[index].key: torch.cat([column[at] for column in columns])
        for index, at in by_linear(asked)
    }


def _note_change(
    change: tuple[Tensor, Tensor], asked: Ranking, index: int, dense: Tensor, current: Tensor
) -> None:
    """How far the weights of one linear fall with each swap: what comes back, and what goes."""
    at = (asked.linear == index).nonzero().flatten()
    if not len(at):
        return
    dense, current = dense.reshape(-1), current.reshape(-1)
    back, gone = (column[at].to(current.device) for column in (asked.position, asked.removed))
    change[0][at] = (current[back].float() - dense[back].float()).cpu()
    change[1][at] = current[gone.clamp_min(0)].float().cpu()


def _effects(
    asked: Ranking,
    anatomy: Anatomy,
    change: tuple[Tensor, Tensor],
    side: _Side,
    seen: Sequence[_Seen],
    single: SampleGradients,
) -> Effects:
    """Every sample's gain by each candidate, to first order; their sum is the mean gain."""
    linears = list(anatomy.linears)
    gains = torch.zeros(len(seen), len(asked))
    for index, at in by_linear(asked):
        gradients = single.found.pop(linears[index].key)  # [E, n], with `swap` [E, 2n]
        for column, fall in zip(gradients.split(len(at), dim=1), change, strict=False):
            gains[:, at] += column * fall[at]
    share = 1 / int(ranks.total(torch.tensor(len(seen))))
    names = [name for batch in side.walk.batches for name in batch.ids]
    counted = torch.tensor([side.loss.weights.get(name, 1.0) for name in names])
    losses = torch.tensor([one.loss for one in seen])
    return Effects(gains.mul_(share), losses * share, counted * share)


@dataclass(frozen=True)
class _Seen:
    """What a pass saw of one example, weighted."""

    loss: float
    drift: float


def _recorded(side: _Side, into: list[_Seen]) -> Loss:
    loss = side.loss

    def recorded(model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        value, drift = loss(model, final, labels, name), 0.0
        if side.kind == "utility":
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
) -> Iterator[tuple[LayerAnatomy, dict[str, Tensor]]]:
    side.walk.rewind()
    anatomy = problem.dense.anatomy
    layers = {linear: layer for layer in anatomy.layers for linear in layer.linears}
    return layer_gradients(
        side.walk,
        anatomy,
        side.scratch,
        lambda linear: problem.open(layers[linear], linear) is not False,
        progress,
        add=signed_and_squared if problem.swap else signed,
        loss=loss,
        samples=samples,
    )
