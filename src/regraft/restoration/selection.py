"""In which heads weights are restored, which part of each belongs to them, what a seed draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from regraft.errors import RegraftError
from regraft.heads.score import Criterion, HeadScores
from regraft.models.architecture import (
    Architecture,
    Block,
    LayerArchitecture,
    LinearArchitecture,
    head_block,
)
from regraft.models.load import Source
from regraft.restoration.base import Between, Context, HeadChoice, MethodSettings, Needs, Space
from regraft.restoration.ranking import Best, Ranking

Head = tuple[int, int]
Regions = Callable[[LinearArchitecture], Sequence[Block]]
BlockOfHead = Callable[[LayerArchitecture, LinearArchitecture, int], Block | None]
_UNREAD = {
    "top": ("draw_seed",),
    "random": ("criterion",),
    "all": ("criterion", "top_heads", "draw_seed"),
}
_TIE = 2.0**-30  # shares a/n and b/m differ by 1/(nm) at least, rows have up to 2^15 inputs


class InHeads(MethodSettings):
    """In which heads weights are restored."""

    heads: Literal["top", "random", "all"] = Field(
        "top", description="The best by their scores, random ones (a control) or all."
    )
    criterion: Criterion = Field(
        "ships", description="What scores a head; released: as in HSR's code."
    )
    top_heads: int = Field(10, ge=1, description="How many heads (h).")
    draw_seed: int = Field(0, description="Another seed draws other random heads.")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if name := self.first_set(*_UNREAD[self.heads]):
            raise ValueError(f"`{name}` changes nothing where `heads` is {self.heads}")
        return self

    @property
    def drawn(self) -> bool:
        return self.heads == "random"

    @property
    def of_heads(self) -> Needs:
        """What choosing the heads needs."""
        if self.heads == "all":
            return Needs(some_heads=1)
        top = HeadChoice(self.criterion, self.top_heads) if self.heads == "top" else None
        return Needs(heads=top, some_heads=self.top_heads)

    @property
    def heads_label(self) -> str:
        """What tables call the choice."""
        if self.heads == "top":
            return f"top {self.top_heads} by {self.criterion}"
        return f"{self.heads} heads"

    def chosen(self, architecture: Architecture, scores: HeadScores | None) -> list[Head]:
        """The heads; `scores` are needed for the top ones.

        Raises:
            RegraftError: more heads are asked for than there are, or than were scored exactly.
        """
        if self.heads == "all":
            return all_heads(architecture)
        if self.heads == "random":
            return random_heads(architecture, self.top_heads, self.draw_seed)
        assert scores is not None, "of_heads says that they are needed"
        return scores.best(self.criterion, self.top_heads)

    def heads_space(self, architecture: Architecture) -> Space:
        """What tuning varies of the choice."""
        if self.heads == "all":
            return {}
        most = min(32, len(all_heads(architecture)))
        found: Space = {"top_heads": Between(1, most, whole=True)}
        return found | ({"criterion": ("ships", "kl")} if self.heads == "top" else {})


def all_heads(architecture: Architecture) -> list[Head]:
    """Every (layer, head)."""
    return [(layer.index, head) for layer in architecture.layers for head in range(layer.heads)]


def random_heads(architecture: Architecture, count: int, seed: int) -> list[Head]:
    """A control: `count` heads drawn without replacement."""
    heads = all_heads(architecture)
    if not 0 < count <= len(heads):
        raise RegraftError(f"top_heads is {count}; the model has 1 to {len(heads)} heads.")
    return sorted(random.Random(seed).sample(heads, count))


def regions_of(dense: Source, heads: Sequence[Head], of: BlockOfHead = head_block) -> Regions:
    """Where in each weight of attention the heads are; `of` says it of one head."""
    layers = {li.key: layer for layer in dense.architecture.layers for li in layer.linears}

    def regions(linear: LinearArchitecture) -> Sequence[Block]:
        layer = layers[linear.key]
        return blocks_of(layer, linear, [head for i, head in heads if i == layer.index], of)

    return regions


def blocks_of(
    layer: LayerArchitecture,
    linear: LinearArchitecture,
    heads: Sequence[int],
    of: BlockOfHead = head_block,
) -> list[Block]:
    """Regions of `heads` in one weight; query heads that share a key/value head give it once."""
    found = (of(layer, linear, head) for head in sorted(heads))
    return list(dict.fromkeys(block for block in found if block is not None))


def whole(linear: LinearArchitecture) -> list[Block]:
    """The region that is all of a weight."""
    rows, columns = linear.shape
    return [Block(0, rows, 0, columns)]


def inside(shape: Sequence[int], blocks: Sequence[Block], device: torch.device) -> Tensor:
    """True inside any of `blocks`, `[out, in]` bool."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    for block in blocks:
        part_of(mask, block).fill_(True)
    return mask


def part_of(matrix: Tensor, block: Block) -> Tensor:
    """A view of one region."""
    return matrix[block.row_start : block.row_stop, block.col_start : block.col_stop]


def random_ranking(context: Context, draw_seed: int) -> Ranking:
    """All weights that can be restored, in an order of each `draw_seed` and calibration seed."""
    best, seed = Best(context.count), draw_seed + 1000 * context.seed
    for one in context.matrices():
        best.add(one.index, random_scores(one.free, seed, one.index))
    return best.ranked()


def random_scores(free: Tensor, seed: int, index: int) -> Tensor:
    """A random order of all pruned weights of matrix `index`, `[out, in]` float32."""
    scores = torch.rand(free.shape, generator=_generator(seed, index)).to(free.device)
    return scores.masked_fill_(~free, -torch.inf)


def ties_drawn(scores: Tensor, seed: int, index: int) -> Tensor:
    """Scores among which equal ones have a random order, of matrix `index`. `[out, in]` float64.

    Shares of a row are few, and as many weights have one as there are rows: without a draw a budget
    that ends among them would go to the first layers and rows alone.
    """
    draw = torch.rand(scores.shape, generator=_generator(seed, index), dtype=torch.float64)
    return scores.double() - _TIE * draw.to(scores.device)


def _generator(seed: int, index: int) -> torch.Generator:
    """On the CPU, so that a draw depends on seed and matrix alone and not on the device."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
