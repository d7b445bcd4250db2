"""Run decoder layers on known keys and values.

In every family, attention calls its cache's `update` with its keys and values, after norms and
rotary embeddings and before GQA's repetition, and attends to what that returns. A stand-in for the
cache supplies the keys and values of positions that are not run; masks and rotary embeddings are
cut to the positions that are. The family's own layer code runs.

`record` keeps the intermediate results of a run. `last_token_replay` is exact: only the last
position of the last layer is needed, so its queries, output projection and MLP run for one token
per row. Mllama's cross-attention keys and values are computed once per batch and shared by all
copies. `window` makes estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.models.architecture import cache_argument, decoder_layers, has_cross, text_decoder
from regraft.models.replay import (
    Replay,
    Stop,
    TextInputs,
    hooked,
    replaced_forwards,
    replay,
    state_of,
)

# The dimension of query positions in a layer's arguments
_QUERY_DIMS = {
    "attention_mask": -2,
    "cross_attention_mask": -2,
    "full_text_row_masked_out_mask": -2,
    "moe_mm_token_type_ids": -1,
    "position_embeddings": -2,
    "position_ids": -1,
}


@dataclass(frozen=True)
class KeyValues:
    """Keys and values `[B, KV, T, D]` of one layer; can be passed to it as its cache."""

    layer: int
    keys: Tensor
    values: Tensor

    def update(
        self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of further positions, as a cache does."""
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    @property
    def layers(self) -> Mapping[int, KeyValues]:
        """Mllama's cross-attention reads `layers[index].keys` if it gets no vision states."""
        return {self.layer: self}

    def get_seq_length(self, *_args: Any) -> int:
        """Number of positions; called by Llama 4, and by Mllama in transformers below 5.20."""
        return self.keys.shape[2]


@dataclass(frozen=True)
class StandIn:
    """A stand-in for a cache of `length` positions, whose `update` is another function."""

    update: Callable[..., tuple[Tensor, Tensor]]
    length: int = 0

    def get_seq_length(self, *_args: Any) -> int:
        return self.length


@dataclass(frozen=True)
class Recorded:
    """The unablated run of one batch, by layer; layers that the family skips are missing.

    Attributes:
        entering: The layers' inputs, `[B, S, d]`.
        arguments: Their other arguments, without the cache.
        known: Their keys and values, of the layers that `record` was asked to keep.
        added: What the decoder adds to a layer's output (Qwen3VLTextModel's deepstack), if
            anything.
        final: The normed final state, `[B, S, d]`.
    """

    entering: Mapping[int, Tensor]
    arguments: Mapping[int, Mapping[str, Any]]
    known: Mapping[int, KeyValues]
    added: Mapping[int, Tensor]
    final: Tensor


@torch.no_grad()
def record(model: nn.Module, text: TextInputs, keep: Container[int] | None = None) -> Recorded:
    """Run the whole decoder once; keep keys and values of the layers in `keep` (None: of all)."""
    decoder, layers = text_decoder(model), decoder_layers(model)
    entering: dict[int, Tensor] = {}
    arguments: dict[int, Mapping[str, Any]] = {}
    known: dict[int, KeyValues] = {}
    added: dict[int, Tensor] = {}
    last: tuple[int, Tensor] | None = None  # the layer that ran last, and its output

    def update(keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        known[layer] = KeyValues(layer, keys, values)
        return keys, values

    def enter(index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            if last is not None and last[1] is not args[0]:
                added[last[0]] = args[0] - last[1]
            cache = cache_argument(layer)
            entering[index] = args[0]
            arguments[index] = {name: one for name, one in kwargs.items() if name != cache}
            if args[1:]:  # Gemma 4's per-layer inputs, which `narrowed` does not support
                arguments[index] = {**arguments[index], "": args[1:]}
            if keep is None or index in keep:
                kwargs = kwargs | {cache: StandIn(update)}
            return args, kwargs

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal last
            last = index, state_of(output)

        return hook

    hooks = (
        hook
        for i, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(enter(i), with_kwargs=True),
            layer.register_forward_hook(leave(i)),
        )
    )
    with hooked(hooks):
        final: Tensor = decoder(**text.kwargs).last_hidden_state
    return Recorded(entering, arguments, known, added, final)


def last_token_replay(model: nn.Module, text: TextInputs, cross: Mapping[int, KeyValues]) -> Replay:
    """A `replay` that returns the final state of the last position only, `[copies * B, 1, d]`.

    Exact for rows that end with a real token (left padding). A last layer with unsupported
    arguments runs in full, and all positions are returned. `cross` has the keys and values of the
    cross-attention layers (Mllama), B rows, which copies share.
    """
    if cross:
        # MllamaTextModel skips its cross-attention layers without any cross_attention_states. Their
        # content is not read if keys and values are known: one row stands for all copies.
        states = text.kwargs["cross_attention_states"][:1]
        text = replace(text, kwargs={**text.kwargs, "cross_attention_states": states})
    layers = decoder_layers(model)

    def run(*, start: int, hidden: Tensor, stop: int | None = None) -> Tensor:
        forwards: dict[nn.Module, Callable[..., Any]] = {
            layers[i]: _on_known(layers[i], known, text.batch) for i, known in cross.items()
        }
        last = layers[-1]
        forwards[last] = _on_last(forwards.get(last, last.forward), last)
        with replaced_forwards(forwards):
            return replay(model, text, start=start, hidden=hidden, stop=stop)

    return run


def _on_last(forward: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
    """Wrap a layer's `forward` to return the last position only, `[N, 1, d]`."""
    attends_itself = hasattr(layer, "self_attn")
    if not attends_itself and not has_cross(layer):
        return forward  # a recurrence, without keys and values
    cache = cache_argument(layer)

    def last(hidden: Tensor, *more: Any, **kwargs: Any) -> Any:
        narrow = narrowed(kwargs)
        if narrow is None or more:
            return forward(hidden, *more, **kwargs)
        if attends_itself and hidden.shape[1] > 1:
            # Positions before the last are needed only as keys and values; `update` appends those
            # of the last one.
            narrow[cache] = _all_but_last(partial(forward, hidden, **kwargs), cache)
        return forward(hidden[:, -1:], **narrow)

    return last


def _all_but_last(forward: Callable[..., Any], cache: str) -> KeyValues:
    """A layer's keys and values of all positions but the last; `forward` ends when it has them."""

    def stop(keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        raise Stop(KeyValues(layer, keys[:, :, :-1], values[:, :, :-1]))

    try:
        forward(**{cache: StandIn(stop)})
    except Stop as stopped:
        known: KeyValues = stopped.value
        return known
    raise RegraftError(
        "An attention of this model does not pass its keys to a cache; its heads cannot be scored "
        "with this version of transformers."
    )


def _on_known(layer: nn.Module, known: KeyValues, batch: int) -> Callable[..., Any]:
    """A cross-attention layer's forward on known keys and values of B rows, shared by all copies.

    Copies are laid out along the positions, `[copies * B, T, d]` -> `[B, copies * T, d]`, which
    cross-attention treats independently, so that keys and values are not repeated.
    """
    forward, cache = layer.forward, cache_argument(layer)

    def shared(hidden: Tensor, **kwargs: Any) -> Tensor:
        copies = len(hidden) // batch
        for name in ("cross_attention_mask", "full_text_row_masked_out_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = fold(kwargs[name], copies)
        kwargs |= {"cross_attention_states": None, cache: known}
        return unfold(forward(fold(hidden, copies), **kwargs), copies)

    return shared


def narrowed(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """A layer's keyword arguments for the last query position.

    Masks keep all their keys. A missing mask means a causal one; a single query needs none.

    Returns:
        The arguments, views where possible; None if one of them is unsupported.
    """
    if not all(_supported(name, value) for name, value in kwargs.items()):
        return None
    return along_queries(kwargs, lambda _, tensor, dim: tensor.narrow(dim, -1, 1))


def _supported(name: str, value: Any) -> bool:
    if isinstance(value, tuple):
        return name == "position_embeddings"
    if isinstance(value, Tensor) and name != "cross_attention_states":
        return name in _QUERY_DIMS and (value.ndim == 4 or not name.endswith("mask"))
    return isinstance(value, Tensor | bool | int | float | str | None)


def along_queries(
    kwargs: Mapping[str, Any], change: Callable[[str, Tensor, int], Tensor]
) -> dict[str, Any]:
    """A layer's arguments, with `change(name, tensor, dim)` applied along query positions."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, tuple):  # the rotary cos and sin
            return tuple(change(name, part, _QUERY_DIMS[name]) for part in value)
        if name in _QUERY_DIMS and isinstance(value, Tensor):
            return change(name, value, _QUERY_DIMS[name])
        return value

    return {name: changed(name, value) for name, value in kwargs.items()}


def fold(tensor: Tensor, copies: int) -> Tensor:
    """Lay copies out along positions: `[copies * B, .., T, d]` -> `[B, .., copies * T, d]`."""
    rows: Tensor = tensor.unflatten(0, (copies, -1))
    return rows.movedim(0, -3).flatten(-3, -2)


def unfold(tensor: Tensor, copies: int) -> Tensor:
    """Undo `fold`: `[B, .., copies * T, d]` -> `[copies * B, .., T, d]`."""
    rows: Tensor = tensor.unflatten(-2, (copies, -1))
    return rows.movedim(-3, 0).flatten(0, 1)
