"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): prune a column, update those to its right.

    for each layer, first to last:
        H = 2/n X^T X + damp * mean(diag) * I           for the inputs X of each of its linears
        U = upper Cholesky factor of H^-1               (H^-1 = U^T U)
        for each block of columns:
            score = W_ij^2 / U_jj^2                     on the weights updated so far
            mask  = the lowest of the block             (N:M: of each group, when j reaches it)
            for each column j of the block:
                e      = mask_j * W_:,j / U_jj
                W_:,j: -= e U_j,j:                      columns of the block to the right compensate
            update the columns right of the block by all its errors at once
        run the pruned layer: its outputs are the next layer's inputs

The score is the output error of removing W_ij after the weights to its right have compensated. For
restoration it is computed on the dense weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture
from regraft.pruning.base import CalibratedSettings, InputPruner, LayerwiseSettings, Note
from regraft.pruning.inputs import Sums
from regraft.pruning.masks import Pattern, Patterns, Scope, count_of, smallest
from regraft.pruning.results import PrunedWeight

DAMP, BLOCK = 0.01, 128
_MOST_DAMP = 1.0


class SparseGPTSettings(LayerwiseSettings, CalibratedSettings):
    """Settings of SparseGPT."""

    method: Literal["sparsegpt"] = "sparsegpt"
    scope: Scope = Field(
        "matrix",
        description="Weights compete within each block of columns (matrix), or within each row of "
        "a block (row).",
    )
    damp: float = Field(
        DAMP,
        gt=0,
        le=1,
        description="Damping of H, as a share of the mean of its diagonal, so that H can be "
        "inverted; it grows tenfold where that fails.",
    )
    block: int = Field(
        BLOCK, ge=1, description="Columns per block, for which a mask is chosen at once."
    )


class SparseGPT(InputPruner):
    """W^2 over the diagonal of the inverse Hessian, and the update that compensates."""

    name, label, settings_type = "sparsegpt", "SparseGPT", SparseGPTSettings
    updates = True

    def accumulate(self, inputs: Tensor) -> Tensor:
        """X^T X, `[in, in]` float32."""
        x = inputs.float()
        return x.T @ x

    def statistics(
        self, linears: Iterable[LinearArchitecture], found: Sums, note: Note = lambda _: None
    ) -> Iterator[tuple[LinearArchitecture, Tensor]]:
        """1 / U_jj^2, `[in]` float32; factored once for linears with the same input."""
        for linear, factor in factors(linears, found, note=note):
            yield linear, factor.statistic

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """W_ij^2 / U_jj^2, `[out, in]` float32."""
        return weight.float().square().mul_(statistic)

    def prune(
        self,
        weights: Mapping[LinearArchitecture, Tensor],
        found: Sums,
        patterns: Patterns,
        settings: Any,
        note: Note = lambda _: None,
    ) -> Iterator[tuple[LinearArchitecture, PrunedWeight]]:
        """Updated weights of each linear, float32; see `sparsegpt_prune`."""
        for linear, factor in factors(weights, found, settings.damp, note):
            pattern = patterns[linear]
            updated = sparsegpt_prune(weights[linear], factor, pattern, settings.block)
            yield linear, PrunedWeight(weight=updated)


@dataclass(frozen=True)
class InverseFactor:
    """U, upper triangular `[in, in]` float32 with H^-1 = U^T U, and the damping it took.

    `dead` marks inputs that were always 0, `[in]` bool: removing their weights costs nothing.
    """

    upper: Tensor
    dead: Tensor
    damp: float

    @property
    def statistic(self) -> Tensor:
        """The score's factor 1 / U_jj^2, 0 for dead inputs. `[in]` float32."""
        return self.upper.diagonal().square().reciprocal().masked_fill(self.dead, 0)


def inverse_factor(moments: Tensor, tokens: int, damp: float = DAMP) -> InverseFactor:
    """Factor the inverse of H = 2/n X^T X + damp * mean(diag) * I.

    If the damped matrix is not positive definite in float32, the damping grows tenfold, up to 1.
    `moments` is the sum of X^T X over n = `tokens` response tokens, `[in, in]` float32; it is
    overwritten.

    Raises:
        RegraftError: H cannot be factored even with damping 1 (inputs overflow).
    """
    hessian = moments.mul_(2 / tokens)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = mean  # their rows and columns are 0 elsewhere: any positive number will do
    added = 0.0
    while damp <= _MOST_DAMP:
        diagonal += (damp - added) * mean
        added = damp
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            # Once the columns left of j are final, the update of column j needs the inverse of
            # H_j:,j:. Its first row is U_jj U_j,j:, so one factorisation serves all columns.
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return InverseFactor(upper, dead, damp)
        damp *= 10
    raise RegraftError(
        "The second moments of a layer's inputs cannot be inverted: the inputs overflow or are not "
        "finite in this dtype. Use --dtype float32 or bfloat16."
    )


def factors(
    linears: Iterable[LinearArchitecture],
    found: Sums,
    damp: float = DAMP,
    note: Note = lambda _: None,
) -> Iterator[tuple[LinearArchitecture, InverseFactor]]:
    """The inverse factor for each linear, computed once for linears with the same input.

    `found` has their second moments and is consumed; `note` is called if the damping had to grow.

    Raises:
        RegraftError: a linear was not used, or its inputs overflow.
    """
    groups: dict[str, list[LinearArchitecture]] = {}
    for linear in linears:
        found.of(linear)  # raises if there are no usable moments
        groups.setdefault(found.source[linear.key], []).append(linear)
    for source, group in groups.items():
        tokens = found.tokens[source]
        factor = inverse_factor(found.sums.pop(source), tokens, damp)
        if factor.damp > damp:
            note(f"{source}: the damping had to grow from {damp} to {factor.damp}.")
        for linear in group:
            yield linear, factor


def sparsegpt_prune(
    weight: Tensor, factor: InverseFactor, pattern: Pattern, block: int = BLOCK
) -> Tensor:
    """Prune a matrix `[out, in]` of any float dtype, and update the weights that stay.

    The mask of a block of columns is chosen on the weights updated so far. With scope "matrix", the
    paper's, a share of the block is pruned, with "row" a share of each of its rows. N:M is decided
    group by group, with `block` rounded down to a multiple of M.

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
        # Columns right of the block are not read until it is done, so they are updated lazily: one
        # matrix product per block instead of one outer product per column.
        current[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return current


def _count(pattern: Pattern, part: Tensor, start: int, stop: int) -> int:
    """Number of weights to prune in columns [start, stop), per row or in all.

    Rounding is carried over to later blocks, so that the matrix has exactly its sparsity.
    """
    n = 1 if pattern.scope == "row" else len(part)
    return count_of(pattern.sparsity, n * stop) - count_of(pattern.sparsity, n * start)


def _prune_block(part: Tensor, upper: Tensor, pattern: Pattern, count: int) -> Tensor:
    """Prune `[out, block]` columns in place; return the errors `[out, block]` to compensate.

    `count` weights are pruned, per row or in all; with N:M the pattern decides instead.
    """
    group = pattern.n_m[1] if pattern.n_m else None
    scale = upper.diagonal().square()  # [block]
    mask = torch.zeros_like(part, dtype=torch.bool)
    if group is None:
        mask = smallest(part.square() / scale, count, pattern.scope)
    errors = torch.zeros_like(part)
    for j in range(part.shape[1]):
        if group and j % group == 0:  # chosen as late as possible, on updated weights
            columns = slice(j, j + group)
            mask[:, columns] = pattern.mask(part[:, columns].square() / scale[columns])
        pruned = part[:, j] * mask[:, j]  # [out]
        errors[:, j] = pruned / upper[j, j]
        part[:, j:].addr_(errors[:, j], upper[j, j:], alpha=-1)  # [out, block - j]
        part[:, j].masked_fill_(mask[:, j], 0)  # exactly 0, without the update's rounding error
    return errors


PLUGIN = SparseGPT()
