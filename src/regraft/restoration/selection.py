"""Selection by head and by seed: choosing heads, their regions in each weight, random rankings."""

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
_TIE = 2.0**-30  # less than two float32 shares near 1 can differ by, so only equal ones are drawn


class InHeads(MethodSettings):
    """Settings that choose the attention heads in which weights are restored."""

    heads: Literal["top", "random", "all"] = Field(
        "top", description="The best by their scores, random ones (a control) or all."
    )
    criterion: Criterion = Field(
        "ships", description="How heads are scored; released: as in HSR's code."
    )
    top_heads: int = Field(10, ge=1, description="Number of heads (h).")
    draw_seed: int = Field(0, description="Seed of random heads.")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if name := self.first_set(*_UNREAD[self.heads]):
            raise ValueError(f"`{name}` has no effect when `heads` is {self.heads}")
        return self

    @property
    def drawn(self) -> bool:
        return self.heads == "random"

    @property
    def of_heads(self) -> Needs:
        """Inputs required to choose the heads."""
        if self.heads == "all":
            return Needs(some_heads=1)
        top = HeadChoice(self.criterion, self.top_heads) if self.heads == "top" else None
        return Needs(heads=top, some_heads=self.top_heads)

    @property
    def heads_label(self) -> str:
        """Description of the choice in tables."""
        if self.heads == "top":
            return f"top {self.top_heads} by {self.criterion}"
        return f"{self.heads} heads"

    def chosen(self, architecture: Architecture, scores: HeadScores | None) -> list[Head]:
        """The chosen heads; `scores` are needed for the top ones only.

        Raises:
            RegraftError: more heads are asked for than the model has, or than were scored exactly.
        """
        if self.heads == "all":
            return all_heads(architecture)
        if self.heads == "random":
            return random_heads(architecture, self.top_heads, self.draw_seed)
        assert scores is not None, "of_heads requires them"
        return scores.best(self.criterion, self.top_heads)

    def heads_space(self, architecture: Architecture) -> Space:
        """Search space of the choice, for tuning."""
        if self.heads == "all":
            return {}
        most = min(32, len(all_heads(architecture)))
        space: Space = {"top_heads": Between(1, most, whole=True)}
        return space | ({"criterion": ("ships", "kl")} if self.heads == "top" else {})


def all_heads(architecture: Architecture) -> list[Head]:
    """Every (layer, head)."""
    return [(layer.index, head) for layer in architecture.layers for head in range(layer.heads)]


def random_heads(architecture: Architecture, count: int, seed: int) -> list[Head]:
    """`count` heads drawn without replacement, as a control."""
    heads = all_heads(architecture)
    if not 0 < count <= len(heads):
        raise RegraftError(f"top_heads is {count}; the model has 1 to {len(heads)} heads.")
    return sorted(random.Random(seed).sample(heads, count))


def regions_of(dense: Source, heads: Sequence[Head], of: BlockOfHead = head_block) -> Regions:
    """A function from a linear to the regions of `heads` in it; `of` gives the region of one."""
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
    """Regions of `heads` in one linear, each once: under GQA query heads share key/value heads."""
    blocks = (of(layer, linear, head) for head in sorted(heads))
    return list(dict.fromkeys(block for block in blocks if block is not None))


def whole(linear: LinearArchitecture) -> list[Block]:
    """One region that covers the whole weight."""
    rows, columns = linear.shape
    return [Block(0, rows, 0, columns)]


def inside(shape: Sequence[int], blocks: Sequence[Block], device: torch.device) -> Tensor:
    """Mask that is True inside any of `blocks`, `[out, in]` bool."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    for block in blocks:
        part_of(mask, block).fill_(True)
    return mask


def part_of(matrix: Tensor, block: Block) -> Tensor:
    """A view of one region."""
    return matrix[block.row_start : block.row_stop, block.col_start : block.col_stop]


def random_ranking(context: Context, draw_seed: int) -> Ranking:
    """All restorable weights in a random order, set by `draw_seed` and the calibration seed."""
    best, seed = Best(context.count), draw_seed + 1000 * context.seed
    for one in context.matrices():
        best.add(one.index, random_scores(one.free, seed, one.index))
    return best.ranked()


def random_scores(free: Tensor, seed: int, index: int) -> Tensor:
    """Random scores of the restorable weights of matrix `index`, else -inf. `[out, in]` float32."""
    scores = torch.rand(free.shape, generator=_generator(seed, index)).to(free.device)
    return scores.masked_fill_(~free, -torch.inf)


def ties_drawn(scores: Tensor, seed: int, index: int) -> Tensor:
    """Break ties among the scores of matrix `index` at random. `[out, in]` float64.

    A row has few distinct rank shares, and every row repeats them, so ties are many: without a draw
    a budget that ends among them would be spent in the first layers and rows only.
    """
    draw = torch.rand(scores.shape, generator=_generator(seed, index), dtype=torch.float64)
    return scores.double() - _TIE * draw.to(scores.device)


def _generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator, so that a draw depends on seed and matrix only, not on the device."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
