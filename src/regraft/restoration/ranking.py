"""Every restoration method under one budget: an order in which weights are restored.

A method ranks the weights that could be restored, best first, and a budget takes the first k. So
methods are compared at the same number of restored weights, and a trade-off curve is the model at
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
KEPT = -1  # no kept weight makes room


@dataclass(frozen=True)
class Ranking:
    """Weights in the order in which they are restored, k of them.

    Attributes:
        linear: Which of `Architecture.linears`, `[k]` int64.
        position: Flat position in that weight, `[k]` int64.
        removed: Flat position of the kept weight of the same matrix that is pruned in exchange,
            `[k]` int64; -1 where none is.
        score: What the method ranked by, `[k]` float32, of the step in which the weight was taken.
        about: How it was made.
        values: What each weight becomes, `[k]` float32; None for the dense model's values.
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
        """The weights at these places of it, `[n]` int64, in this order."""
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
    """Concatenated, with the `about` of the first."""
    linear, position, removed, score = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("linear", "position", "removed", "score")
    )
    return Ranking(linear, position, removed, score, parts[0].about)


def empty() -> Ranking:
    """No weights."""
    none = torch.empty(0, dtype=torch.int64)
    return Ranking(none, none, none, torch.empty(0))


@dataclass
class Best:
    """The `count` best candidates of all matrices, which come one after the other; None for all.

    Ties go to the earlier matrix and position, so that a ranking does not depend on the device.
    Candidates are sorted in when there are as many new ones as are kept.
    """

    count: int | None
    _kept: Ranking = field(default_factory=empty)
    _new: list[Ranking] = field(default_factory=list)

    @property
    def ranking(self) -> Ranking:
        """The best of all that were added."""
        self._merge()
        return self._kept

    def ranked(self, heads: Sequence[tuple[int, int]] = ()) -> Ranking:
        """The same as methods give it: scores in float32, and the (layer, head) restored in."""
        found = self.ranking
        about = {"heads": [list(head) for head in heads]}
        return replace(found, score=found.score.float(), about=about)

    def add(self, index: int, scores: Tensor, removed: Tensor | None = None) -> None:
        """Add the candidates of one matrix.

        Args:
            index: Of the linear.
            scores: `[out, in]` floats, higher is better; -inf is no candidate.
            removed: For each candidate the position that is pruned in exchange, `[out, in]` int64.
        """
        flat = scores.reshape(-1)
        position = self._among_the_best(flat)
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

    def _among_the_best(self, flat: Tensor) -> Tensor:
        """Positions of the scores `[n]` that may be among the best so far, ascending, int64."""
        if self.count is None:
            return (flat > -torch.inf).nonzero().flatten()
        count = min(self.count, int((flat > -torch.inf).count_nonzero()))
        if not count:
            return torch.empty(0, dtype=torch.int64)
        least = flat.topk(count).values[-1]
        if len(self._kept) == self.count:  # a tie may still go to this matrix
            least = max(least, self._kept.score[-1].to(least))
        return (flat >= least).nonzero().flatten()

    def _merge(self) -> None:
        if not self._new:
            return
        found = joined([self._kept, *self._new])
        by_place = found.position.argsort(stable=True)
        by_place = by_place[found.linear[by_place].argsort(stable=True)]
        by_score = found.score[by_place].argsort(descending=True, stable=True)
        self._kept, self._new = found.at(by_place[by_score[: self.count]]), []


def patch_of(
    ranking: Ranking, dense: Source, pruned: Source, about: Mapping[str, Any] | None = None
) -> Patch:
    """The patch that takes the whole ranking to a pruned checkpoint.

    A weight whose new value is 0 in that checkpoint's dtype stays as it is.

    Raises:
        RegraftError: a new value does not fit into the pruned checkpoint's dtype.
    """
    pairs = list(zip(dense.architecture.linears, pruned.architecture.linears, strict=True))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for index, rows in by_linear(ranking):
        linear, other = pairs[index]
        dtype = pruned.checkpoint.record(other.tensor).torch_dtype
        back, gone = ranking.position[rows], ranking.removed[rows]
        if ranking.values is None:
            values = dense.weight(linear).reshape(-1)[back].to(dtype)
        else:
            values = ranking.values[rows].to(dtype)
        if not torch.isfinite(values).all():
            raise RegraftError(
                f"{linear.key}: some new values do not fit into the pruned checkpoint's dtype "
                f"{dtype}. Give a dense checkpoint of that dtype."
            )
        representable = values != 0
        back, gone, values = back[representable], gone[representable], values[representable]
        gone = gone[gone != KEPT]
        positions = torch.cat([back, gone])
        if other.stored is not None:
            positions = other.stored.flat(positions, other.shape)
        new = torch.cat([values, values.new_zeros(len(gone))])
        found.setdefault(other.tensor, []).append((positions, new))
    return Patch(
        {name: _tensor_patch(pruned.checkpoint.read(name), parts) for name, parts in found.items()},
        dict(about or {}),
    )


def _tensor_patch(pruned: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> TensorPatch:
    """For one tensor on disk, of the (positions, values) of all matrices in it."""
    positions, order = torch.cat([part[0] for part in parts]).sort()
    return TensorPatch.of(pruned, positions, torch.cat([part[1] for part in parts])[order])


def by_linear(ranking: Ranking) -> Iterator[tuple[int, Tensor]]:
    """(index of a linear, places of its weights in the ranking)."""
    for index in ranking.linear.unique().tolist():
        yield index, (ranking.linear == index).nonzero().flatten()


class Edits:
    """A ranking and weights in memory, into which any first part of it can be put."""

    def __init__(self, ranking: Ranking, weights: Sequence[Tensor], dense: Source) -> None:
        """Keep what the weights are at the ranking's positions, and what they become.

        Args:
            ranking: What may be restored.
            weights: In the order of `Architecture.linears`, as they are without it.
            dense: The dense checkpoint, of which each matrix is read once.
        """
        linears = list(dense.architecture.linears)
        self._edits = [
            _Edit.of(ranking, rows, weights[index], dense.weight(linears[index]))
            for index, rows in by_linear(ranking)
        ]

    def put(self, count: int) -> None:
        """Have the first `count` weights back, and no others; in place."""
        for edit in self._edits:
            edit.put(count)


@dataclass(frozen=True)
class _Edit:
    """Of one matrix: its weight, and rows of the ranking in order.

    `back` and `gone` are (rows, columns), `[n]` each, `new` what is restored, `old` and `kept` what
    was at both before; where nothing is removed, `gone` is that of `back`.
    """

    weight: Tensor
    rows: Tensor
    back: tuple[Tensor, Tensor]
    gone: tuple[Tensor, Tensor]
    new: Tensor
    old: Tensor
    kept: Tensor

    @classmethod
    def of(cls, ranking: Ranking, rows: Tensor, weight: Tensor, dense: Tensor) -> _Edit:
        back, gone = ranking.position[rows], ranking.removed[rows]
        gone = torch.where(gone == KEPT, back, gone)
        new = dense.reshape(-1)[back].to(weight.device, weight.dtype)
        there, away = at(back, weight), at(gone, weight)
        return cls(weight, rows, there, away, new, weight[there], weight[away])

    def put(self, count: int) -> None:
        self.weight[self.back] = self.old
        self.weight[self.gone] = self.kept
        n = int((self.rows < count).sum())
        self.weight[self.gone[0][:n], self.gone[1][:n]] = 0
        self.weight[self.back[0][:n], self.back[1][:n]] = self.new[:n]


def save_ranking(path: Path, ranking: Ranking) -> None:
    """Write a ranking to one safetensors file."""
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
    """Read what `save_ranking` wrote."""
    header, stored = read_artifact(path, FORMAT, "a ranking of weights")
    about = header["about"]
    values = stored.get("values")
    for name, whole in {"linear": True, "position": True, "removed": True, "score": False}.items():
        if name not in stored:
            raise RegraftError(f"{path} is damaged: {name!r} is missing.")
        one = stored[name]
        if one.ndim != 1 or len(one) != len(stored["linear"]) or one.is_floating_point() == whole:
            raise RegraftError(
                f"{path}: the tensor {name} is {one.dtype} {list(one.shape)}; expected one number "
                f"a weight, as linear has {stored['linear'].numel()}. Make the ranking again."
            )
    if values is not None and values.shape != stored["linear"].shape:
        raise RegraftError(f"{path}: the tensor values has not one number a weight.")
    require_finite(path, stored)
    linear, position, removed = (stored[name].long() for name in ("linear", "position", "removed"))
    least = ((linear, 0), (position, 0), (removed, KEPT))
    if any((one < low).any() for one, low in least):
        raise RegraftError(f"{path}: linear, position or removed hold numbers below 0.")
    if len(torch.stack([linear, position]).unique(dim=1)[0]) < len(linear):
        raise RegraftError(f"{path}: linear and position name a weight twice. Make it again.")
    return Ranking(linear, position, removed, stored["score"], about, values)
