"""Which tensor of a checkpoint each parameter is loaded from, and where in it each element lies.

Transformers renames tensors on load, stacks those of single experts, fuses gate and up projections
and transposes; for many families the names on the hub are not those in memory. Here its own rules
are followed without reading a weight: what it does to a tensor is done to a description of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import nn

from regraft.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Piece:
    """A box of a parameter and where it comes from: `strides` and `first` of a tensor, elements."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: str
    first: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Laid:
    """A tensor as boxes of tensors on disk."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Layout = dict[str, Laid | str]
"""Parameter in memory -> where it comes from, or what transformers does that is not understood."""


def read_layout(model: nn.Module, checkpoint: Checkpoint) -> Layout:
    """Where every parameter of a model is in a checkpoint, by transformers' own conversions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    found: Layout = {}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in _in_natural_order(checkpoint.tensors):
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


def _in_natural_order(names: Any) -> list[str]:
    """Expert 10 behind expert 9, as transformers stacks them."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def _renamed(
    name: str, renamings: Any, converters: Any, model: Any, shapes: dict[str, tuple[int, ...]]
) -> tuple[str, str | None]:
    """(the name in memory, the pattern of a conversion that is to follow)."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    target, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
    if target not in shapes and name in shapes:
        target, pattern = rename_source_key(name, [], [], prefix, shapes)
    return target, pattern


def as_stored(checkpoint: Checkpoint, name: str) -> Laid:
    shape = checkpoint.tensors[name].shape
    strides = tuple(accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]
    return Laid(shape, (Piece((0,) * len(shape), shape, name, 0, strides[: len(shape)]),))


def converted(
    converter: Any, target: str, tensors: dict[str, list[Laid]], shapes: dict[str, Any]
) -> Layout:
    """What a conversion makes: parameters by their names."""
    first, *_ = converter.target_patterns
    wanted = {
        name: shapes.get(target.replace(first, name, 1)) for name in converter.target_patterns
    }
    current = {name: tensors[name] for name in converter.source_patterns if name in tensors}
    for op in converter.operations:
        kind = type(op).__name__
        unknown = getattr(op, "num_shards_attribute", None) or getattr(op, "inverse", False)
        if "Dequantize" in kind and len(current) == 1:  # stored as floats, without scales
            current = dict(zip([first], current.values(), strict=True))
            continue
        if kind not in _OPERATIONS or unknown:
            return {target: f"transformers makes it by {kind}"}
        try:
            current = _OPERATIONS[kind](op, current, wanted)
        except (IndexError, TypeError, ValueError):  # of a shape that is wrong, or has no place
            why = f"its shape cannot be compared with what transformers' {kind} makes"
            return dict.fromkeys((target.replace(first, name, 1) for name in wanted), why)
    return {target.replace(first, name, 1): one for name, (one,) in current.items()}


# What an operation makes of tensors by pattern; `wanted` are the shapes of what is to come of them.
Tensors = dict[str, list[Laid]]
Shapes = dict[str, Any]


def _stacked(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    single = len(tensors) == 1
    return {
        next(iter(wanted)) if single else pattern: [
            _joined([_deeper(part, op.dim) for part in parts], op.dim)
        ]
        for pattern, parts in tensors.items()
    }


def _deeper(one: Laid, dim: int) -> Laid:
    """With another dimension of size 1."""

    def put(values: tuple[int, ...], new: int) -> tuple[int, ...]:
        return (*values[:dim], new, *values[dim:])

    pieces = (
        replace(p, start=put(p.start, 0), shape=put(p.shape, 1), strides=put(p.strides, 0))
        for p in one.pieces
    )
    return Laid(put(one.shape, 1), tuple(pieces))


def _stacked_by_kind(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    """Experts listed behind one another, Ernie's text experts and then its vision experts."""
    found = {}
    for i, name in enumerate(wanted):
        stacks = []
        for parts in tensors.values():
            count = -(-len(parts) // len(wanted))
            own = parts[i * count : (i + 1) * count]
            stacks.append(_joined([_deeper(part, op.stack_dim) for part in own], op.stack_dim))
        found[name] = [_joined(stacks, op.concat_dim)]
    return found


def _concatenated(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ordered = [one for parts in tensors.values() for one in parts]
    return {next(iter(wanted)): [_joined(ordered, op.dim)]}


def _joined(parts: Sequence[Laid], dim: int) -> Laid:
    sizes = [part.shape[dim] for part in parts]
    offsets = accumulate(sizes, initial=0)
    pieces = [
        replace(piece, start=_moved(piece.start, dim, offset))
        for part, offset in zip(parts, offsets, strict=False)
        for piece in part.pieces
    ]
    return Laid(_replaced(parts[0].shape, dim, sum(sizes)), tuple(pieces))


def _moved(start: tuple[int, ...], dim: int, by: int) -> tuple[int, ...]:
    return _replaced(start, dim, start[dim] + by)


def _replaced(values: tuple[int, ...], dim: int, new: int) -> tuple[int, ...]:
    return (*values[:dim], new, *values[dim + 1 :])


def _transposed(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ((pattern, (one, *_)),) = tensors.items()
    first = next(iter(wanted))
    as_it_is = op.check_dims and one.shape == wanted[first]
    made = one if as_it_is else swapped(one, op.dim0, op.dim1)
    return {first if len(wanted) == 1 else pattern: [made]}


def swapped(one: Laid, dim: int = 0, other: int = 1) -> Laid:
    """Transposed."""

    def swap(values: tuple[int, ...]) -> tuple[int, ...]:
        found = _replaced(values, dim, values[other])
        return _replaced(found, other, values[dim])

    pieces = (
        replace(p, start=swap(p.start), shape=swap(p.shape), strides=swap(p.strides))
        for p in one.pieces
    )
    return Laid(swap(one.shape), tuple(pieces))


def flat_first(one: Laid) -> Laid:
    """Without the first dimension, which has size 1."""
    pieces = (
        replace(p, start=p.start[1:], shape=p.shape[1:], strides=p.strides[1:]) for p in one.pieces
    )
    return Laid(one.shape[1:], tuple(pieces))


def _chunked(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ((_, (one, *_)),) = tensors.items()
    size = -(-one.shape[op.dim] // len(wanted))
    return {name: [cut(one, op.dim, i * size, size)] for i, name in enumerate(wanted)}


def _split(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    ((_, (one, *_)),) = tensors.items()
    sizes = [shape[op.dim] for shape in wanted.values()]
    if sum(sizes) != one.shape[op.dim]:
        raise ValueError("its parts are not the whole")
    starts = accumulate(sizes, initial=0)
    return {
        name: [cut(one, op.dim, start, size)]
        for name, start, size in zip(wanted, starts, sizes, strict=False)
    }


def _deinterleaved(op: Any, tensors: Tensors, wanted: Shapes) -> Tensors:
    """Elements 0, 2, 4 ... along a dimension, and then 1, 3, 5 ..."""
    ((_, (one, *_)),) = tensors.items()
    (piece,), half = one.pieces, one.shape[op.dim] // 2
    stride = piece.strides[op.dim]
    strides = _replaced(piece.strides, op.dim, 2 * stride)
    shape = _replaced(piece.shape, op.dim, half)
    pieces = (
        Piece(_moved(piece.start, op.dim, i * half), shape, piece.tensor, first, strides)
        for i, first in enumerate((piece.first, piece.first + stride))
    )
    return {next(iter(wanted)): [Laid(one.shape, tuple(pieces))]}


def cut(one: Laid, dim: int, start: int, size: int) -> Laid:
    """Elements `start` to `start + size` along a dimension."""
    pieces = []
    for piece in one.pieces:
        low = max(start, piece.start[dim])
        high = min(start + size, piece.start[dim] + piece.shape[dim])
        if low >= high:
            continue
        skipped = low - piece.start[dim]
        pieces.append(
            replace(
                piece,
                start=_moved(piece.start, dim, skipped - start),
                shape=_replaced(piece.shape, dim, high - low),
                first=piece.first + skipped * piece.strides[dim],
            )
        )
    return Laid(_replaced(one.shape, dim, size), tuple(pieces))


_OPERATIONS: dict[str, Any] = {
    "MergeModulelist": _stacked,
    "ErnieFuseAndSplitTextVisionExperts": _stacked_by_kind,
    "Concatenate": _concatenated,
    "Transpose": _transposed,
    "Chunk": _chunked,
    "Split": _split,
    "Interleave": _deinterleaved,
}
