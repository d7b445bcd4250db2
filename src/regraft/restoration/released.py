"""HSR as its authors released it, beside HSR as the paper defines it (`selection`).

Read from the code at github.com/TheShineyue/HSR (`prune_lvlm_wanda_recover_heads`), none of which
is copied. It departs from the paper in what it restores (docs/hsr-released.md): importance is
ranked over the whole matrix; q, k and v are cut by input columns; o_proj is restored in the whole
matrix as soon as its layer has one chosen head; p_max is 0.7 whatever p is. Its heads are ranked by
`heads.ships.first_feature_angles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from regraft.models.anatomy import HEAD_ROLES, Anatomy, Block, LayerAnatomy, LinearAnatomy
from regraft.pruning.masks import count_of, smallest
from regraft.pruning.statistics import ImportanceStatistics
from regraft.restoration.realign import Rule
from regraft.restoration.selection import Band, Head, Scorer, inside, kept_share, rank_share

P_MAX = 0.7  # the default of the released function, to which `--max_p` is never passed


def released_block(layer: LayerAnatomy, linear: LinearAnatomy, head: int) -> Block | None:
    """What the release restores in one weight for `head`; None for a linear outside attention.

    Input columns h*D:(h+1)*D of q_proj, k_proj and v_proj, D = inputs / query heads, in all rows;
    all of o_proj.
    """
    rows, columns = linear.shape
    if linear.role == "o_proj":
        return Block(0, rows, 0, columns)
    if linear.role in HEAD_ROLES:
        size = columns // layer.heads
        return Block(0, rows, head * size, (head + 1) * size)
    return None


def released_regions(anatomy: Anatomy, heads: Iterable[Head]) -> dict[str, list[Block]]:
    """`LinearAnatomy.key` -> the regions of the chosen (layer, head), of attention alone."""
    found: dict[str, list[Block]] = {}
    for index, head in sorted(heads):
        layer = anatomy.layers[index]
        for linear in layer.linears:
            block = released_block(layer, linear, head)
            if block is not None and block not in found.setdefault(linear.key, []):
                found[linear.key].append(block)
    return found


def select_released(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Tensor:
    """The weights of one matrix that the release restores.

    Args:
        free: Where a value can be restored (`restorable`), `[out, in]` bool.
        safety: Importance I^s of some rows, `[rows, in]` float32.
        utility: The same for I^u.
        blocks: Of `released_regions`.
        band: q, p and p_max as shares of the matrix; its scope is not read.

    Returns:
        Flat positions in row-major order, ascending, `[count]` int64.
    """
    chosen = _candidates(free, utility, blocks, band)
    chosen &= _largest(safety(slice(None)), band.q)
    return chosen.reshape(-1).nonzero().flatten().cpu()


def released_keys(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Tensor:
    """The same with q left open, for a budget (see `selection.hsr_keys`).

    Returns:
        `[out, in]` float32: the rank of I^s in the matrix as a share in (0, 1], -inf where the
        release restores nothing.
    """
    chosen = _candidates(free, utility, blocks, band)
    return rank_share(safety(slice(None)), "matrix", ()).masked_fill_(~chosen, -torch.inf)


def released(
    regions: Mapping[str, Sequence[Block]],
    band: Callable[[float], Band | None],
    safety: ImportanceStatistics,
    utility: ImportanceStatistics,
) -> Rule:
    """The release's rule; `band` as in `realign.hsr`, `regions` of the chosen heads."""

    def rule(linear: LinearAnatomy, weight: Tensor, free: Tensor, _: Sequence[Block]) -> Tensor:
        thresholds = band(kept_share(weight, free))
        if thresholds is None:
            return torch.empty(0, dtype=torch.int64)
        scorers = safety.scorer(linear, weight), utility.scorer(linear, weight)
        return select_released(free, *scorers, regions[linear.key], thresholds)

    return rule


def _candidates(free: Tensor, utility: Scorer, blocks: Sequence[Block], band: Band) -> Tensor:
    """Pruned weights of the regions between the p and the p_max largest by I^u, `[out, in]`."""
    rows, columns = free.shape
    score = utility(slice(None))
    chosen = free & inside((rows, columns), blocks, free.device)
    chosen &= _largest(score, band.p_max)
    return chosen & ~_largest(score, band.p)


def _largest(score: Tensor, share: float) -> Tensor:
    """The floor(share * n) largest of all n scores of the matrix, as the release counts them."""
    n = score.numel()
    return smallest(score, n - count_of(share, n), "matrix").logical_not_()
