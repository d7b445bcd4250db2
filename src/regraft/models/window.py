"""Estimate a replay by running only some positions of each row, the window.

Positions outside the window keep the keys and values of the unablated run, so the effect of an
ablation propagates through the window only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.models.architecture import (
    attention_of,
    cache_argument,
    cross_attention_layers,
    decoder_layers,
    text_decoder,
)
from regraft.models.key_values import Recorded, StandIn, along_queries, fold, narrowed, unfold
from regraft.models.replay import Replay, first_call, state_of


@dataclass(frozen=True)
class _Call:
    """The unablated run's call of one layer, cut to T positions of each row."""

    index: int
    kwargs: Mapping[str, Any]  # the cache has the keys and values of all positions
    within: Tensor | None  # mask among the T positions [B, 1, T, T]; None for cross-attention
    added: Tensor | None  # [B, T, d], see `Recorded`


@dataclass(frozen=True)
class Window:
    """The unablated run at T positions of each row.

    `entering` holds each executed layer's input and `final` the normed final state, `[B, T, d]`.
    """

    entering: Mapping[int, Tensor]
    final: Tensor
    calls: tuple[_Call, ...]


def window_at(model: nn.Module, recorded: Recorded, positions: Tensor) -> Window:
    """Cut a recorded run to `positions`, `[B, T]` int64, ascending in each row.

    Raises:
        RegraftError: a layer has unsupported arguments (an attention backend other than sdpa and
            eager).
    """
    cross, layers = set(cross_attention_layers(model)), decoder_layers(model)
    calls = []
    for index, arguments in recorded.arguments.items():
        if narrowed(arguments) is None:
            raise RegraftError(
                "Screening heads needs the attention backend sdpa or eager; score all heads "
                "exactly instead (mode exact)."
            )
        kwargs = along_queries(arguments, partial(_pick_axes, positions=positions))
        kwargs[cache_argument(layers[index])] = recorded.known[index]
        within = None
        if index in cross:
            kwargs["cross_attention_states"] = None
        else:
            mask = arguments["attention_mask"]
            if mask is None:  # a causal one
                length = recorded.final.shape[1]
                mask = positions.new_ones(1, 1, length, length, dtype=torch.bool).tril()
            rows = _pick(mask, positions, -2)  # [B, 1, T, S]
            within = _pick(rows, positions, -1)
            columns = positions[:, None, None, :].expand(*rows.shape[:-1], -1)
            kwargs["attention_mask"] = rows.scatter(-1, columns, _blocked(rows))
        added = recorded.added.get(index)
        added = None if added is None else _pick(added, positions, -2)
        calls.append(_Call(index, kwargs, within, added))
    entering = {i: _pick(hidden, positions, -2) for i, hidden in recorded.entering.items()}
    return Window(entering, _pick(recorded.final, positions, -2), tuple(calls))


@torch.no_grad()
def most_attended(model: nn.Module, recorded: Recorded, size: int) -> Tensor:
    """The last position and those that it attends to most, over all layers and heads.

    Returns:
        `[B, size]` int64, ascending in each row; all positions if there are fewer.
    """
    rows, length = recorded.final.shape[:2]
    total = recorded.final.new_zeros(rows, length, dtype=torch.float32)
    cross = set(cross_attention_layers(model))
    layers = decoder_layers(model)
    for index, hidden in recorded.entering.items():
        kwargs = narrowed(recorded.arguments[index])
        if index in cross or kwargs is None:
            continue
        weights = _attention(layers[index], hidden[:, -1:], recorded.known[index].keys, kwargs)
        total += weights.view(rows, -1, length).sum(dim=1).to(total)
    total[:, -1] = torch.inf
    return total.topk(min(size, length), dim=1).indices.sort(dim=1).values


def _attention(layer: nn.Module, last: Tensor, keys: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """A layer's attention weights from its input `last` `[B, 1, d]` to `keys`, `[B, 1, H * S]`.

    With the identity in place of the values, a head's output is its attention weights, whatever the
    family's attention code.
    """
    length = keys.shape[2]  # of [B, KV, S, D]
    values = torch.eye(length, dtype=keys.dtype, device=keys.device)
    values = values.expand(*keys.shape[:2], -1, -1)
    # the last position is the query's own
    cache = StandIn(lambda *_args, **_kwargs: (keys, values), length - 1)
    o_proj: Any = attention_of(layer).o_proj
    run = partial(layer, last, **kwargs, **{cache_argument(layer): cache})
    (weights,), _ = first_call(o_proj, run)
    attention: Tensor = weights
    return attention


def _pick_axes(name: str, tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    """`_pick` in a layer's argument, axis by axis if it starts with those of multi-axis rotary.

    In transformers below 5.20 Qwen2-VL's layers get cos and sin as `[3, B, S, D]`.
    """
    if tensor.ndim != {"position_embeddings": 4, "position_ids": 3}.get(name):
        return _pick(tensor, positions, dim)
    return torch.stack([_pick(axis, positions, dim) for axis in tensor])


def _pick(tensor: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Select each row's own positions along `dim`; a tensor with one row is used for all."""
    rows = tensor.expand(len(positions), *tensor.shape[1:])
    picked = [row.index_select(dim, at) for row, at in zip(rows, positions, strict=True)]
    return torch.stack(picked)


def _blocked(mask: Tensor) -> Any:
    """The value in a mask that blocks attention."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def window_replay(model: nn.Module, window: Window) -> Replay:
    """A `replay` of the window's positions; all others keep the unablated keys and values.

    Copies are laid out along the positions, separated by a block-diagonal mask, so that the keys
    and values of the unablated run are not repeated.
    """
    layers, decoder = decoder_layers(model), text_decoder(model)

    @torch.no_grad()
    def run(*, start: int, hidden: Tensor, stop: int | None = None) -> Tensor:
        copies = len(hidden) // len(window.final)
        state = fold(hidden, copies)  # [B, copies * T, d]
        for call in window.calls:
            if call.index < start or (stop is not None and call.index >= stop):
                continue
            state = state_of(layers[call.index](state, **_side_by_side(call, copies)))
            if call.added is not None:
                state = state + _repeated(call.added, copies, -2)
        if stop is None:
            norm: Any = decoder.norm
            state = norm(state)
        return unfold(state, copies)

    return run


def _side_by_side(call: _Call, copies: int) -> dict[str, Any]:
    """A layer's arguments for `copies` windows laid out along the positions."""
    kwargs = along_queries(call.kwargs, lambda _, tensor, dim: _repeated(tensor, copies, dim))
    if call.within is not None:
        kwargs["attention_mask"] = _separating_mask(call, call.within, copies)
    return kwargs


def _separating_mask(call: _Call, within: Tensor, copies: int) -> Tensor:
    """The mask `[B, 1, copies * T, S + copies * T]`: the unablated keys, then those of the copies.

    A copy attends to the unablated keys outside the window, and to its own keys inside it.
    """
    size = within.shape[-1]
    blocks = within.new_full((*within.shape[:-2], copies, size, copies, size), _blocked(within))
    for i in range(copies):
        blocks[..., i, :, i, :] = within
    blocks = blocks.flatten(-4, -3).flatten(-2, -1)  # [B, 1, copies * T, copies * T]
    return torch.cat([_repeated(call.kwargs["attention_mask"], copies, -2), blocks], dim=-1)


def _repeated(tensor: Tensor, copies: int, dim: int) -> Tensor:
    return tensor if copies == 1 else torch.cat([tensor] * copies, dim=dim)
