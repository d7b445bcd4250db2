"""Which tensor of a checkpoint each parameter is loaded from, and where in it each element is.

On load, transformers renames tensors, stacks those of single experts, fuses gate and up projections
and transposes; for many families names on the hub differ from those in memory. Here its own rules
are applied without reading a weight, to descriptions of tensors instead of tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from regraft.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, from `start` on, and its place in `tensor` on disk.

    `view` is a view of an empty tensor (on the meta device) of that tensor's shape: PyTorch keeps
    count of its offset and strides.
    """

    start: tuple[int, ...]
    view: Tensor
    tensor: str


@dataclass(frozen=True)
class Tiling:
    """A tensor in memory as pieces of tensors on disk."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Layout = dict[str, Tiling | str]
"""Parameter in memory -> its tiling, or the conversion of transformers that is not supported."""


def read_layout(model: nn.Module, checkpoint: Checkpoint) -> Layout:
    """Locate every parameter of a model in a checkpoint, by transformers' own conversions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    found: Layout = {}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(checkpoint.tensors, key=dot_natural_key):  # as transformers stacks experts
        target, pattern = _renamed(name, renamings, converters, model, shapes)
        if pattern is None:
            found[target] = as_stored(checkpoint, name)
        else:
            collected[target][pattern].append(name)
    for target, by_source in collected.items():
        converter = by_pattern[next(iter(by_source))]
        tensors = {
            pattern: [as_stored(checkpoint, name) for name in names]
            for pattern, names in by_source.items()
        }
        found |= converted(converter, target, tensors, shapes)
    return found


def _renamed(
    name: str, renamings: Any, converters: Any, model: Any, shapes: dict[str, tuple[int, ...]]
) -> tuple[str, str | None]:
    """(name in memory, source pattern of the conversion to apply or None)."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    target, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
    if target not in shapes and name in shapes:
        target, pattern = rename_source_key(name, [], [], prefix, shapes)
    return target, pattern


def as_stored(checkpoint: Checkpoint, name: str) -> Tiling:
    """The tiling of a tensor on disk by itself."""
    shape = checkpoint.tensors[name].shape
    return Tiling(shape, (Piece((0,) * len(shape), torch.empty(shape, device="meta"), name),))


def converted(
    converter: Any, target: str, tensors: dict[str, list[Tiling]], shapes: dict[str, Any]
) -> Layout:
    """Apply a conversion; returns the layout of the parameters that it makes."""
    first, *_ = converter.target_patterns
    wanted = {
        name: shapes.get(target.replace(first, name, 1)) for name in converter.target_patterns
    }
    current = {name: tensors[name] for name in converter.source_patterns if name in tensors}
    for op in converter.operations:
        kind = type(op).__name__
        unknown = getattr(op, "num_shards_attribute", None) or getattr(op, "inverse", False)
        if "Dequantize" in kind and len(current) == 1:  # already floats: there are no scales
            current = dict(zip([first], current.values(), strict=True))
            continue
        if kind not in _OPERATIONS or unknown:
            return {target: f"transformers makes it by {kind}, which is not supported"}
        try:
            current = _OPERATIONS[kind](op, current, wanted)
        except (IndexError, RuntimeError, TypeError, ValueError):  # a tensor of a wrong shape
            why = f"its shape does not fit transformers' conversion {kind}"
            return dict.fromkeys((target.replace(first, name, 1) for name in wanted), why)
    return {target.replace(first, name, 1): one for name, (one,) in current.items()}


# transformers' operations: each maps tilings by pattern to new ones; `wanted` has the shapes of the
# parameters that the conversion makes.
Tensors = dict[str, list[Tiling]]
Shapes = dict[str, Any]


def _stacked(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    single = len(tensors) == 1
    return {
        next(iter(wanted)) if single else pattern: [
            _concatenate([_unsqueeze(part, op.dim) for part in parts], op.dim)
        ]
        for pattern, parts in tensors.items()
    }


def _unsqueeze(one: Tiling, dim: int) -> Tiling:
    """Insert a dimension of size 1."""

    def put(values: tuple[int, ...], new: int) -> tuple[int, ...]:
        return (*values[:dim], new, *values[dim:])

    pieces = (Piece(put(p.start, 0), p.view.unsqueeze(dim), p.tensor) for p in one.pieces)
    return Tiling(put(one.shape, 1), tuple(pieces))


def _stacked_by_kind(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    """Experts of two kinds in one list, as Ernie's: text experts, then vision experts."""
    found = {}
    for i, name in enumerate(wanted):
        stacks = []
        for parts in tensors.values():
            count = -(-len(parts) // len(wanted))
            own = [_unsqueeze(part, op.stack_dim) for part in parts[i * count : (i + 1) * count]]
            stacks.append(_concatenate(own, op.stack_dim))
        found[name] = [_concatenate(stacks, op.concat_dim)]
    return found


def _concatenated(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ordered = [one for parts in tensors.values() for one in parts]
    return {next(iter(wanted)): [_concatenate(ordered, op.dim)]}


def _concatenate(parts: Sequence[Tiling], dim: int) -> Tiling:
    sizes = [part.shape[dim] for part in parts]
    offsets = accumulate(sizes, initial=0)
    pieces = [
        replace(piece, start=_replaced(piece.start, dim, piece.start[dim] + offset))
        for part, offset in zip(parts, offsets, strict=False)
        for piece in part.pieces
    ]
    return Tiling(_replaced(parts[0].shape, dim, sum(sizes)), tuple(pieces))


def _replaced(values: tuple[int, ...], dim: int, new: int) -> tuple[int, ...]:
    return (*values[:dim], new, *values[dim + 1 :])


def _transposed(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ((pattern, (one, *_)),) = tensors.items()
    first = next(iter(wanted))
    fits = op.check_dims and one.shape == wanted[first]
    result = one if fits else transpose(one, op.dim0, op.dim1)
    return {first if len(wanted) == 1 else pattern: [result]}


def transpose(one: Tiling, dim: int = 0, other: int = 1) -> Tiling:
    """Swap two dimensions."""

    def swap(values: tuple[int, ...]) -> tuple[int, ...]:
        found = _replaced(values, dim, values[other])
        return _replaced(found, other, values[dim])

    pieces = (Piece(swap(p.start), p.view.transpose(dim, other), p.tensor) for p in one.pieces)
    return Tiling(swap(one.shape), tuple(pieces))


def select(one: Tiling, index: int) -> Tiling:
    """Keep one index of the first dimension, and drop the dimension."""
    pieces = (
        Piece(p.start[1:], p.view[index - p.start[0]], p.tensor)
        for p in one.pieces
        if p.start[0] <= index < p.start[0] + p.view.size(0)
    )
    return Tiling(one.shape[1:], tuple(pieces))


def _chunked(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ((_, (one, *_)),) = tensors.items()
    size = -(-one.shape[op.dim] // len(wanted))
    return {name: [_narrow(one, op.dim, i * size, size)] for i, name in enumerate(wanted)}


def _split(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ((_, (one, *_)),) = tensors.items()
    sizes = [shape[op.dim] for shape in wanted.values()]
    if sum(sizes) != one.shape[op.dim]:
        raise ValueError("the parts do not add up to the tensor")
    starts = accumulate(sizes, initial=0)
    return {
        name: [_narrow(one, op.dim, start, size)]
        for name, start, size in zip(wanted, starts, sizes, strict=False)
    }


def _deinterleaved(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    """Elements 0, 2, 4 ... along a dimension, followed by 1, 3, 5 ..."""
    ((_, (one, *_)),) = tensors.items()
    (piece,) = one.pieces
    halves = [
        Tiling(tuple(half.shape), (replace(piece, view=half),))
        for half in piece.view.unflatten(op.dim, (-1, 2)).unbind(op.dim + 1)
    ]
    return {next(iter(wanted)): [_concatenate(halves, op.dim)]}


def _narrow(one: Tiling, dim: int, start: int, size: int) -> Tiling:
    """Keep elements `start` to `start + size` along a dimension."""
    pieces = []
    for piece in one.pieces:
        low = max(start, piece.start[dim])
        high = min(start + size, piece.start[dim] + piece.view.shape[dim])
        if low >= high:
            continue
        view = piece.view.narrow(dim, low - piece.start[dim], high - low)
        pieces.append(Piece(_replaced(piece.start, dim, low - start), view, piece.tensor))
    return Tiling(_replaced(one.shape, dim, size), tuple(pieces))


_OPERATIONS: dict[str, Any] = {
    "MergeModulelist": _stacked,
    "ErnieFuseAndSplitTextVisionExperts": _stacked_by_kind,
    "Concatenate": _concatenated,
    "Transpose": _transposed,
    "Chunk": _chunked,
    "Split": _split,
    "Interleave": _deinterleaved,
}
