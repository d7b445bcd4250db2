"""SNIP as Wei et al. (2024, arXiv 2402.05162) take it: mean over samples of |W_ij * dL/dW_ij|.

L is the mean cross-entropy of a sample's response. Lee et al. (2019, arXiv 1810.02340), who named
it, take the absolute value of the sum over samples, so that samples which disagree cancel, and let
the weights of the whole network compete; here those of a row, a matrix or a head do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from regraft.importance.gradients import Progress, layer_gradients, product
from regraft.models.anatomy import Anatomy, LayerAnatomy, LinearAnatomy
from regraft.models.walk import Walk


def gradient_magnitudes(
    walk: Walk,
    anatomy: Anatomy,
    scratch: Path,
    wanted: Callable[[LinearAnatomy], bool],
    progress: Progress,
) -> Iterator[tuple[LayerAnatomy, dict[str, Tensor]]]:
    """Mean over samples of |dL/dW|, `[out, in]` float32; see `layer_gradients`."""
    return layer_gradients(walk, anatomy, scratch, wanted, progress, add=_magnitudes)


def _magnitudes(dy: Tensor, x: Tensor) -> Tensor:
    """The sum over samples of |dL/dW|."""
    first, *rest = (product(one, inputs).abs_() for one, inputs in zip(dy, x, strict=True))
    for magnitude in rest:
        first.add_(magnitude)
    return first
