"""SparseGPT's importance (Frantar & Alistarh 2023, arXiv 2301.00774): w_ij^2 / U_jj^2.

With H the second moments of a layer's inputs and U the upper Cholesky factor of H^-1, that is what
removing w_ij costs once the weights to its right make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.importance.observe import InputSums
from regraft.models.anatomy import LinearAnatomy

DAMP = 0.01
_MOST_DAMP = 1.0


@dataclass(frozen=True)
class InverseFactor:
    """U, upper triangular `[in, in]` float32 with H^-1 = U^T U, and the damping it took.

    `dead` marks inputs that were always 0, `[in]` bool: their weights are free to go.
    """

    upper: Tensor
    dead: Tensor
    damp: float

    @property
    def statistic(self) -> Tensor:
        """What the score needs of U: 1 / U_jj^2, and 0 for dead inputs. `[in]` float32."""
        return self.upper.diagonal().square().reciprocal().masked_fill(self.dead, 0)


def second_moments(inputs: Tensor) -> Tensor:
    """X^T X of inputs `[tokens, in]` -> `[in, in]` float32; add over batches."""
    x = inputs.float()
    return x.T @ x


def inverse_factor(moments: Tensor, tokens: int, damp: float = DAMP) -> InverseFactor:
    """Factor the inverse of H = 2/n X^T X + damp * mean(diag) * I.

    Where the damped matrix is not positive definite in float32 the damping grows tenfold, up to 1;
    the damping that worked is returned, so that the caller can say so.

    Args:
        moments: Sum of X^T X over response tokens, `[in, in]` float32; overwritten.
        tokens: n.
        damp: First damping to try.

    Raises:
        RegraftError: H cannot be factored even with damping 1 (inputs overflow).
    """
    hessian = moments.mul_(2 / tokens)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = mean
    added = 0.0
    while damp <= _MOST_DAMP:
        diagonal += (damp - added) * mean
        added = damp
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return InverseFactor(upper, dead, damp)
        damp *= 10
    raise RegraftError(
        "The second moments of a layer's inputs cannot be inverted: the inputs overflow or are not "
        "finite in this dtype. Use --dtype float32 or bfloat16."
    )


def factors(
    linears: Iterable[LinearAnatomy],
    sums: InputSums,
    damp: float = DAMP,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[LinearAnatomy, InverseFactor]]:
    """The factor for each linear, made once for those that read the same input.

    Args:
        linears: Any.
        sums: Their second moments; used up.
        damp: First damping to try.
        note: Told of a damping that had to grow.

    Raises:
        RegraftError: a linear was not used, or its inputs overflow.
    """
    groups: dict[str, list[LinearAnatomy]] = {}
    for linear in linears:
        sums.of(linear)
        groups.setdefault(sums.source[linear.key], []).append(linear)
    for source, group in groups.items():
        tokens = sums.tokens[source]
        factor = inverse_factor(sums.sums.pop(source), tokens, damp)
        if factor.damp > damp:
            note(f"{source}: the damping had to grow from {damp} to {factor.damp}.")
        for linear in group:
            yield linear, factor


def sparsegpt_score(weight: Tensor, statistic: Tensor) -> Tensor:
    """Cost of removing each weight alone: `[out, in]` float32.

    Args:
        weight: `[out, in]`, any float dtype.
        statistic: `InverseFactor.statistic`, `[in]` float32.
    """
    return weight.float().square().mul_(statistic)
