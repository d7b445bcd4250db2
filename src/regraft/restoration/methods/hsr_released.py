"""HSR as its authors released it, beside HSR as the paper defines it (`selection`).

Read from the code at github.com/TheShineyue/HSR (`prune_lvlm_wanda_recover_heads`), none of which
is copied. It departs from the paper in what it restores (docs/hsr-released.md): importance is
ranked over the whole matrix; q, k and v are cut by input columns; o_proj is restored in the whole
matrix as soon as its layer has one chosen head; p_max is 0.7 whatever p is. Its heads are ranked by
`heads.ships.first_feature_angles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from regraft.models.architecture import (
    HEAD_ROLES,
    Architecture,
    Block,
    LayerArchitecture,
    LinearArchitecture,
)
from regraft.models.load import Source
from regraft.pruning.masks import count_of, smallest
from regraft.restoration.base import Between, Context, Method, MethodSettings, Needs, Space
from regraft.restoration.methods.hsr import (
    ByImportance,
    by_importance,
    chosen_heads,
    heads_space,
    score_label,
)
from regraft.restoration.ranking import Ranking
from regraft.restoration.selection import Band, Head, Scorer, inside, rank_share

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


def released_regions(architecture: Architecture, heads: Iterable[Head]) -> dict[str, list[Block]]:
    """`LinearArchitecture.key` -> the regions of the chosen (layer, head), of attention alone."""
    found: dict[str, list[Block]] = {}
    for index, head in sorted(heads):
        layer = architecture.layers[index]
        for linear in layer.linears:
            block = released_block(layer, linear, head)
            if block is not None and block not in found.setdefault(linear.key, []):
                found[linear.key].append(block)
    return found


def released_scores(
    free: Tensor, safety: Scorer, utility: Scorer, blocks: Sequence[Block], band: Band
) -> Tensor:
    """What the release restores in one matrix; as `selection.hsr_scores`.

    Args:
        free: Where a value can be restored (`restorable`), `[out, in]` bool.
        safety: Importance I^s of some rows, `[rows, in]` float32.
        utility: The same for I^u.
        blocks: Of `released_regions`.
        band: q, p and p_max as shares of the matrix; its scope is not read.

    Returns:
        `[out, in]` float32: the rank of I^s in the matrix as a share in (0, 1], -inf where the
        release restores nothing.
    """
    chosen = _candidates(free, utility, blocks, band)
    score = safety(slice(None))
    chosen &= _largest(score, band.q)
    return rank_share(score, "matrix", ()).masked_fill_(~chosen, -torch.inf)


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


class HSRReleasedSettings(ByImportance):
    """What the authors' code restores (docs/hsr-released.md)."""

    method: Literal["hsr-released"] = "hsr-released"

    @model_validator(mode="before")
    @classmethod
    def _default_criterion(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("heads", "top") == "top":
            return {"criterion": "released", **given}
        return given

    def band(self, kept: float) -> Band | None:
        """The thresholds for a matrix of which pruning kept a share; None where empty."""
        p = kept if self.p is None else self.p
        return Band(self.open_q, p, P_MAX, "matrix") if p < P_MAX else None


class HSRReleased(Method[HSRReleasedSettings]):
    """See the module."""

    name: ClassVar[str] = "hsr-released"
    Settings: ClassVar[type[MethodSettings]] = HSRReleasedSettings

    def needs(self, settings: HSRReleasedSettings) -> Needs:
        """Scored heads, and statistics of both kinds of prompts."""
        return replace(settings.of_heads, statistics=settings.statistics)

    def rank(self, settings: HSRReleasedSettings, context: Context) -> Ranking:
        """By the share q at which the release would restore each weight."""
        heads = chosen_heads(context.dense, settings, context.heads)
        found = released_regions(context.dense.architecture, heads)

        def regions(linear: LinearArchitecture) -> Sequence[Block]:
            return found.get(linear.key, [])

        return context.rank_by(
            by_importance(context, regions, settings.band, settings.score, released_scores),
            heads,
        )

    def label(self, settings: HSRReleasedSettings) -> str:
        """What tables call it."""
        return f"HSR as released{score_label(settings.score)}, {settings.heads_label}"

    def space(self, settings: HSRReleasedSettings, dense: Source, kept: float) -> Space:
        """q, how many heads, and by what they are chosen."""
        found: Space = {} if settings.searchable else {"q": Between(0.01, 1.0, log=True)}
        return found | heads_space(settings, dense)


PLUGIN = HSRReleased()
