"""HSR as its authors released it, beside HSR as the paper defines it (`hsr`).

Read from the code at github.com/TheShineyue/HSR (`prune_lvlm_wanda_recover_heads`), none of which
is copied. It departs from the paper in what it restores (docs/hsr-released.md): importance is
ranked over the whole matrix; q, k and v are cut by input columns; o_proj is restored in the whole
matrix as soon as its layer has one chosen head; p_max is 0.7 whatever p is. Its heads are ranked by
`heads.ships.first_feature_angles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

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

P_MAX = 0.7  # the default of the released function, to which `--max_p` is never passed


def released_block(layer: LayerArchitecture, linear: LinearArchitecture, head: int) -> Block | None:
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


def released_scores(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Tensor:
    """What the release restores in one matrix; as `hsr_scores`, always by the whole matrix."""
    chosen = free & inside(free.shape, blocks, free.device)
    importance = utility(slice(None))
    chosen &= _largest(importance, band.p_max) & ~_largest(importance, band.p)
    importance = safety(slice(None))
    chosen &= _largest(importance, band.q)
    return rank_share(importance, "matrix", ()).masked_fill_(~chosen, -torch.inf)


def _largest(score: Tensor, share: float) -> Tensor:
    """The floor(share * n) largest of all n scores of the matrix, as the release counts them."""
    n = score.numel()
    return smallest(score, n - count_of(share, n), "matrix").logical_not_()


class HSRReleasedSettings(ImportanceSettings):
    """What the authors' code restores (docs/hsr-released.md)."""

    method: Literal["hsr-released"] = "hsr-released"

    @model_validator(mode="before")
    @classmethod
    def _default_criterion(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("heads", "top") == "top":
            return {"criterion": "released", **given}
        return given

    def bounds(self, kept: float) -> tuple[float, RankingScope]:
        return P_MAX, "matrix"


class HSRReleased(ByImportance):
    """See the module."""

    name, settings_type, title = "hsr-released", HSRReleasedSettings, "HSR as released"


PLUGIN = HSRReleased(released_scores, released_block)
