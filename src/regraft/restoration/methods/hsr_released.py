"""HSR as in its authors' released code, which differs from the paper's definition (`hsr`).

Written after `prune_lvlm_wanda_recover_heads` of github.com/TheShineyue/HSR; no code is copied. It
restores other weights than the paper (docs/hsr-released.md): importance is ranked over the whole
matrix; q, k and v are cut by input columns instead of output rows; o_proj is restored everywhere as
soon as its layer has one chosen head; p_max is always 0.7. Heads are ranked by
`heads.ships.first_feature_angles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from regraft.heads.score import Criterion
from regraft.models.architecture import HEAD_ROLES, Block, LayerArchitecture, LinearArchitecture
from regraft.pruning.masks import count_of, smallest
from regraft.restoration.importance import (
    Band,
    ByImportance,
    ImportanceSettings,
    RankingScope,
    Scorer,
    rank_share,
)
from regraft.restoration.selection import inside

P_MAX = 0.7  # default of the released function; its script never passes `--max_p` on


def released_block(layer: LayerArchitecture, linear: LinearArchitecture, head: int) -> Block | None:
    """The region that the release restores for `head`; None for a linear outside attention.

    All of o_proj; all rows and input columns h*D:(h+1)*D of q_proj, k_proj and v_proj, with
    D = inputs / query heads.
    """
    rows, columns = linear.shape
    if linear.role == "o_proj":
        return Block(0, rows, 0, columns)
    if linear.role in HEAD_ROLES:
        size = columns // layer.heads
        return Block(0, rows, head * size, (head + 1) * size)
    return None


def released_scores(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Tensor:
    """Score of each weight that the release restores: `hsr_scores`, always with scope "matrix"."""
    chosen = free & inside(free.shape, blocks, free.device)
    importance = utility(slice(None))
    chosen &= _largest(importance, band.p_max) & ~_largest(importance, band.p)
    importance = safety(slice(None))
    chosen &= _largest(importance, band.q)
    return rank_share(importance, "matrix", ()).masked_fill_(~chosen, -torch.inf)


def _largest(score: Tensor, share: float) -> Tensor:
    """Mark the floor(share * n) largest of all n scores, the release's rounding."""
    n = score.numel()
    return smallest(score, n - count_of(share, n), "matrix").logical_not_()


class HSRReleasedSettings(ImportanceSettings):
    """HSR as in the authors' code (docs/hsr-released.md)."""

    method: Literal["hsr-released"] = "hsr-released"
    criterion: Criterion = Field("released", description="How heads are scored.")

    def bounds(self, kept: float) -> tuple[float, RankingScope]:
        return P_MAX, "matrix"


class HSRReleased(ByImportance):
    """See the module."""

    name, settings_type, title = "hsr-released", HSRReleasedSettings, "HSR as released"


PLUGIN = HSRReleased(released_scores, released_block)
