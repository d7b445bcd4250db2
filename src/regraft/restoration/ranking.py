"""Rankings: the order in which a method restores weights.

A method ranks the restorable weights, best first, and a budget takes the first k. Methods can then
be compared at the same number of restored weights, and a trade-off curve evaluates the model at
several lengths of one ranking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.disk.artifact import read_artifact, require_finite, write_artifact
from regraft.errors import RegraftError
from regraft.models.load import Source
from regraft.models.places import at
from regraft.patch.format import Patch, TensorPatch

FORMAT = "regraft-ranking-1"
KEPT = -1  # in `Ranking.removed`: no weight is pruned in exchange


@dataclass(frozen=True)
class Ranking:
    """k weights in the order in which they are restored.

    Attributes:
        linear: Index into `Architecture.linears`, `[k]` int64.
        position: Flat position in that matrix, `[k]` int64.
        removed: Flat position of the kept weight of the same matrix that is pruned in exchange,
            `[k]` int64; -1 if none.
        score: The method's score when it chose the weight, `[k]` float32.
        about: How the ranking was made.
        values: New values, `[k]` float32; None for the dense model's values.
    """

    linear: Tensor
    position: Tensor
    removed: Tensor
    score: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.linear)

    def at(self, order: Tensor) -> Ranking:
        """The entries at the indices `order`, `[n]` int64, in this order."""
        return Ranking(
            self.linear[order],
            self.position[order],
            self.removed[order],
            self.score[order],
            self.about,
            None if self.values is None else self.values[order],
        )

    def first(self, count: int) -> Ranking:
        """The first `count` weights."""
        return self.at(torch.arange(min(count, len(self))))


def joined(parts: Sequence[Ranking]) -> Ranking:
    """Concatenate rankings, keeping the `about` of the first."""
    linear, position, removed, score = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("linear", "position", "removed", "score")
    )
    return Ranking(linear, position, removed, score, parts[0].about)


def empty() -> Ranking:
    """A ranking of no weights."""
    none = torch.empty(0, dtype=torch.int64)
    return Ranking(none, none, none, torch.empty(0))


@dataclass
class Best:
    """Running top `count` of the candidates of all matrices, added one by one; None keeps all.

    Ties go to the earlier matrix and position, so that a ranking does not depend on the device.
    To save sorting, new candidates are merged only once there are `count` of them.
    """

    count: int | None
    _kept: Ranking = field(default_factory=empty)
    _new: list[Ranking] = field(default_factory=list)

    def ranked(self, heads: Sequence[tuple[int, int]] = ()) -> Ranking:
        """The best candidates so far, best first, with float32 scores.

        `heads` are the (layer, head) pairs to which they are limited, for the ranking's `about`.
        """
        self._merge()
        about = {"heads": [list(head) for head in heads]}
        return replace(self._kept, score=self._kept.score.float(), about=about)

    def add(self, index: int, scores: Tensor, removed: Tensor | None = None) -> None:
        """Add the candidates of the matrix `index`.

        `scores` `[out, in]` are better if higher, and -inf for weights that are no candidates;
        `removed` is the flat position pruned in exchange for each candidate, `[out, in]` int64.

        Raises:
            RegraftError: a score is NaN, which would sort above all others.
        """
        flat = scores.reshape(-1)
        if flat.isnan().any():
            raise RegraftError(
                f"A score of matrix {index} is NaN, as 0 / 0 is. A method gives a number to each "
                "candidate, and -inf to all other weights."
            )
        position = self._contenders(flat)
        if not len(position):
            return
        chosen = Ranking(
            torch.full((len(position),), index),
            position.cpu(),
            torch.full((len(position),), KEPT)
            if removed is None
            else removed.reshape(-1)[position].cpu(),
            flat[position].cpu(),
        )
        self._new.append(chosen)
        if self.count is not None and sum(map(len, self._new)) >= self.count:
            self._merge()

    def _contenders(self, flat: Tensor) -> Tensor:
        """Ascending positions, int64, of the scores `[n]` that may be among the best so far."""
        if self.count is None:
            return (flat > -torch.inf).nonzero().flatten()
        count = min(self.count, int((flat > -torch.inf).count_nonzero()))
        if not count:
            return torch.empty(0, dtype=torch.int64)
        least = flat.topk(count).values[-1]
        if len(self._kept) == self.count:  # a tie may still go to this matrix, if it comes earlier
            least = max(least, self._kept.score[-1].to(least))
        return (flat >= least).nonzero().flatten()

    def _merge(self) -> None:
        if not self._new:
            return
        pool = joined([self._kept, *self._new])
        by_place = pool.position.argsort(stable=True)
        by_place = by_place[pool.linear[by_place].argsort(stable=True)]
        by_score = pool.score[by_place].argsort(descending=True, stable=True)
        self._kept, self._new = pool.at(by_place[by_score[: self.count]]), []


def patch_of(
    ranking: Ranking, dense: Source, pruned: Source, about: Mapping[str, Any] | None = None
) -> Patch:
    """Make the patch that applies the whole ranking to a pruned checkpoint.

    Weights whose new value rounds to 0 in that checkpoint's dtype are left out.

    Raises:
        RegraftError: a new value overflows in the pruned checkpoint's dtype, or a weight of the
            ranking is not restorable because it has its dense value already.
    """
    pairs = list(zip(dense.architecture.linears, pruned.architecture.linears, strict=True))
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for index, rows in by_linear(ranking):
        linear, target = pairs[index]
        dtype = pruned.checkpoint.record(target.tensor).torch_dtype
        restored, removed = ranking.position[rows], ranking.removed[rows]
        if ranking.values is None:
            values = dense.weight(linear).reshape(-1)[restored].to(dtype)
        else:
            values = ranking.values[rows].to(dtype)
        if not torch.isfinite(values).all():
            raise RegraftError(
                f"{linear.key}: some new values do not fit into the pruned checkpoint's dtype "
                f"{dtype}. Give a dense checkpoint of that dtype."
            )
        nonzero = values != 0
        restored, removed, values = restored[nonzero], removed[nonzero], values[nonzero]
        removed = removed[removed != KEPT]
        positions = torch.cat([restored, removed])
        if target.stored is not None:
            positions = target.stored.flat(positions, target.shape)
        new = torch.cat([values, values.new_zeros(len(removed))])
        changes.setdefault(target.tensor, []).append((positions, new))
    tensors = {}
    for name, parts in changes.items():  # a tensor on disk may hold several matrices
        positions, order = torch.cat([positions for positions, _ in parts]).sort()
        values = torch.cat([values for _, values in parts])[order]
        before = pruned.checkpoint.read(name)
        unchanged = before.reshape(-1)[positions] == values
        if ranking.values is None and unchanged.any():  # trained values may end as they began
            raise RegraftError(
                f"{name}: {int(unchanged.sum())} of the ranking's weights already have the dense "
                "value, the first at position "
                f"{int(positions[unchanged][0])}. A method ranks restorable weights only, those "
                "that `Matrix.free` marks."
            )
        tensors[name] = TensorPatch.of(before, positions, values)
    return Patch(tensors, dict(about or {}))


def by_linear(ranking: Ranking) -> Iterator[tuple[int, Tensor]]:
    """(index of a linear, indices of its weights in the ranking), for each linear in it."""
    for index in ranking.linear.unique().tolist():
        yield index, (ranking.linear == index).nonzero().flatten()


class Edits:
    """Applies any prefix of a ranking to weights in memory, in place."""

    def __init__(self, ranking: Ranking, weights: Sequence[Tensor], dense: Source) -> None:
        """Save the current values at the ranking's positions and read the dense ones.

        `weights` are in the order of `Architecture.linears`, without the ranking applied.
        """
        linears = list(dense.architecture.linears)
        self._edits = [
            _Edit.of(ranking, rows, weights[index], dense.weight(linears[index]))
            for index, rows in by_linear(ranking)
        ]

    def put(self, count: int) -> None:
        """Restore the first `count` weights and no others."""
        for edit in self._edits:
            edit.put(count)


@dataclass(frozen=True)
class _Edit:
    """The part of a ranking that lies in one matrix.

    `place` are (rows, columns) in `weight` of all restored weights, then of all removed ones;
    `order` their indices in the ranking; `before` and `after` their values. `[n]` each.
    """

    weight: Tensor
    place: tuple[Tensor, Tensor]
    order: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, ranking: Ranking, order: Tensor, weight: Tensor, dense: Tensor) -> _Edit:
        restored, removed = ranking.position[order], ranking.removed[order]
        swapped = removed != KEPT
        removed = removed[swapped]
        place = at(torch.cat([restored, removed]), weight)
        order = torch.cat([order, order[swapped]]).to(weight.device)
        values = dense.reshape(-1)[restored]
        after = torch.cat([values, values.new_zeros(len(removed))]).to(weight)
        return cls(weight, place, order, weight[place], after)

    def put(self, count: int) -> None:
        self.weight[self.place] = torch.where(self.order < count, self.after, self.before)


def save_ranking(path: Path, ranking: Ranking) -> None:
    """Write a ranking to a safetensors file."""
    tensors = {
        "linear": ranking.linear.to(torch.int32),
        "position": ranking.position,
        "removed": ranking.removed,
        "score": ranking.score.float(),
    }
    if ranking.values is not None:
        tensors["values"] = ranking.values
    write_artifact(path, FORMAT, {"about": dict(ranking.about)}, tensors)


def load_ranking(path: Path) -> Ranking:
    """Read a ranking that `save_ranking` wrote.

    Raises:
        RegraftError: the file is missing, damaged or no ranking.
    """
    header, stored = read_artifact(path, FORMAT, "a ranking of weights")
    optional = {"values"} & stored.keys()
    for name in ("linear", "position", "removed", "score", *optional):
        if name not in stored:
            raise RegraftError(f"{path} is damaged: {name!r} is missing.")
        one, real = stored[name], name in ("score", "values")
        if one.ndim != 1 or len(one) != len(stored["linear"]) or one.is_floating_point() != real:
            raise RegraftError(
                f"{path}: the tensor {name} is {one.dtype} {list(one.shape)}; expected one number "
                f"per weight, {stored['linear'].numel()} as in linear. Make the ranking again."
            )
    require_finite(path, stored)
    linear, position, removed = (stored[name].long() for name in ("linear", "position", "removed"))
    if (linear < 0).any() or (position < 0).any() or (removed < KEPT).any():
        raise RegraftError(
            f"{path}: linear or position has a number below 0, or removed one below {KEPT}. Make "
            "the ranking again."
        )
    if len(((linear << 40) + position).unique()) < len(linear):  # no matrix has 2^40 weights
        raise RegraftError(f"{path}: linear and position name a weight twice. Make it again.")
    score, values = stored["score"], stored.get("values")
    return Ranking(linear, position, removed, score, header["about"], values)
