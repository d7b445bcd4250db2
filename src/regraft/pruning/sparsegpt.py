"""SparseGPT's pruning (Frantar & Alistarh 2023): prune a column, let those to its right make up."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.importance.sparsegpt import InverseFactor
from regraft.pruning.masks import Pattern, count_of, smallest

BLOCK = 128


def sparsegpt_prune(
    weight: Tensor, factor: InverseFactor, pattern: Pattern, block: int = BLOCK
) -> Tensor:
    """Prune a matrix and update the weights that stay.

    The mask is chosen a block of columns at a time on the weights as updated so far: a share of
    each block ("matrix": over the block, the paper's; "row": of each of its rows), or N:M group
    by group.

    Args:
        weight: `[out, in]`, any float dtype; left as it was.
        factor: From the layer's inputs.
        pattern: What goes.
        block: Columns a block; rounded to a multiple of M for N:M.

    Returns:
        New weights `[out, in]` float32, with exact zeros where pruned.
    """
    current = weight.float().clone()
    current[:, factor.dead] = 0
    columns = weight.shape[1]
    group = pattern.n_m[1] if pattern.n_m else None
    if group:
        block = max(group, block // group * group)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        upper = factor.upper[start:stop, start:stop]
        part = current[:, start:stop].contiguous()  # [out, block]
        errors = _prune_block(part, upper, pattern, _count(pattern, part, start, stop))
        current[:, start:stop] = part
        current[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return current


def _count(pattern: Pattern, part: Tensor, start: int, stop: int) -> int:
    """How many weights of columns [start, stop) go, of each row or in all.

    What a block's share leaves over goes in a later one, so that the whole has its sparsity.
    """
    n = 1 if pattern.scope == "row" else len(part)
    return count_of(pattern.sparsity, n * stop) - count_of(pattern.sparsity, n * start)


def _prune_block(part: Tensor, upper: Tensor, pattern: Pattern, count: int) -> Tensor:
    """Prune `[out, block]` columns in place; returns the errors `[out, block]` to make up for.

    `count` is how many go of each row or in all; N:M decides group by group instead.
    """
    group = pattern.n_m[1] if pattern.n_m else None
    scale = upper.diagonal().square()  # [block]
    mask = torch.zeros_like(part, dtype=torch.bool)
    if group is None:
        mask = smallest(part.square() / scale, count, pattern.scope)
    errors = torch.zeros_like(part)
    for j in range(part.shape[1]):
        if group and j % group == 0:
            columns = slice(j, j + group)
            mask[:, columns] = pattern.mask(part[:, columns].square() / scale[columns])
        gone = part[:, j] * mask[:, j]  # [out]
        errors[:, j] = gone / upper[j, j]
        part[:, j:].addr_(errors[:, j], upper[j, j:], alpha=-1)  # [out, block - j]
        part[:, j].masked_fill_(mask[:, j], 0)
    return errors
