"""Replay of some positions only, on keys and values that are known already.

An attention hands its keys and values to its cache's `update` and goes on with what it gets back,
after norms and rotary embeddings and before GQA's repetition, in every family. A stand-in for that
cache gives a layer the keys and values of the positions that are left out; masks and rotary
embeddings are cut to the positions that stay. What runs is the family's own layer.

- `last_token_replay` is exact: of the last layer only the last position is wanted, so that its
  queries, output projection and MLP run for one token a row. Mllama's cross-attention reads keys
  and values that are computed once a batch, whatever the number of copies.
- `window_replay` is an estimate: it runs some positions of each row, and all others keep the keys
  and values of the unablated run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.models.anatomy import attention_of, cache_argument, decoder_layers, text_decoder
from regraft.models.replay import TextInputs, replaced_forwards, replay

# Where a layer's arguments have the query positions
_QUERY_DIMS = {
    "attention_mask": -2,
    "cross_attention_mask": -2,
    "full_text_row_masked_out_mask": -2,
    "position_embeddings": -2,
    "position_ids": -1,
}


class Replay(Protocol):
    """Runs decoder layers `start` to `stop` on `[copies * B, T, d]`; see `replay`."""

    def __call__(
        self, *, start: int, hidden: Tensor, stop: int | None = None, copies: int = 1
    ) -> Tensor: ...


@dataclass(frozen=True)
class KeyValues:
    """Keys and values `[B, KV, T, D]` of one layer; stands in for a cache that holds them."""

    layer: int
    keys: Tensor
    values: Tensor

    def update(
        self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put those of further positions behind these, as attention asks of a cache."""
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    @property
    def layers(self) -> Mapping[int, KeyValues]:
        """Mllama's cross-attention reads `layers[index].keys` where there are no vision states."""
        return {self.layer: self}

    def get_seq_length(self, *_args: Any) -> int:
        """How many positions are known; asked by Mllama in transformers below 5.20."""
        return self.keys.shape[2]

    def before(self, positions: int) -> KeyValues:
        """Without the last `positions`."""
        return KeyValues(self.layer, self.keys[:, :, :-positions], self.values[:, :, :-positions])


@contextmanager
def key_values(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, KeyValues]]:
    """Keep the keys and values that these layers compute while the block runs."""
    found: dict[int, KeyValues] = {}

    def record(index: int) -> Callable[..., Any]:
        class Recorder:
            def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
                found[index] = KeyValues(index, keys, values)
                return keys, values

        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {cache_argument(layer): Recorder()}

        return hook

    modules = decoder_layers(model)
    hooks = [modules[i].register_forward_pre_hook(record(i), with_kwargs=True) for i in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def cross_attention_layers(model: nn.Module) -> list[int]:
    """Layers whose keys and values come from vision states (Mllama)."""
    layers = enumerate(decoder_layers(model))
    return [i for i, layer in layers if attention_of(layer)[0] == "cross_attn"]


# Exact: the last token in the last layer


def last_token_replay(model: nn.Module, text: TextInputs, cross: Mapping[int, KeyValues]) -> Replay:
    """`replay` for the last position alone: what reaches the final norm is `[copies * B, 1, d]`.

    Exact for rows that end with a real token (left padding). A last layer whose arguments are not
    understood runs in full, and all positions come back.

    Args:
        model: The model; left as it was by every run.
        text: The batch's decoder inputs, B rows.
        cross: Keys and values of the cross-attention layers (Mllama), B rows; shared by copies.
    """
    if cross:  # only their presence is asked for, so that they need not be stacked
        states = text.kwargs["cross_attention_states"][:1]
        text = replace(text, kwargs={**text.kwargs, "cross_attention_states": states})
    layers = decoder_layers(model)

    def run(*, start: int, hidden: Tensor, stop: int | None = None, copies: int = 1) -> Tensor:
        forwards: dict[nn.Module, Callable[..., Any]] = {
            layers[i]: _on_known(layers[i], known, text.batch) for i, known in cross.items()
        }
        last = layers[-1]
        forwards[last] = _on_last(forwards.get(last, last.forward), last)
        with replaced_forwards(forwards):
            return replay(model, text, start=start, hidden=hidden, stop=stop, copies=copies)

    return run


def _on_last(forward: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
    """`forward` of a layer that returns the last position alone, `[N, 1, d]`."""
    attends_itself = attention_of(layer)[0] == "self_attn"
    cache = cache_argument(layer)

    def last(hidden: Tensor, **kwargs: Any) -> Any:
        narrow = narrowed(kwargs, 1)
        if narrow is None:
            return forward(hidden, **kwargs)
        if attends_itself and hidden.shape[1] > 1:
            own = _own_key_values(forward, hidden, {**kwargs, cache: _Finder()})
            narrow[cache] = own.before(1)
        return forward(hidden[:, -1:], **narrow)

    return last


class _Found(Exception):  # noqa: N818 - a signal, not an error
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _Finder:
    """Stands in for a cache and ends the forward pass as soon as it is given keys and values."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> None:
        raise _Found(KeyValues(layer, keys, values))


def _own_key_values(
    forward: Callable[..., Any], hidden: Tensor, kwargs: Mapping[str, Any]
) -> KeyValues:
    """Those of `hidden`, from a forward whose cache is a `_Finder`."""
    try:
        forward(hidden, **kwargs)
    except _Found as found:
        known: KeyValues = found.value
        return known
    raise RegraftError(
        "An attention of this model does not hand its keys to a cache; its heads cannot be "
        "scored with this version of transformers."
    )


def _on_known(layer: nn.Module, known: KeyValues, batch: int) -> Callable[..., Any]:
    """A cross-attention layer's forward on known keys and values of B rows, shared by all copies.

    Copies are laid out along the positions, `[copies * B, T, d]` -> `[B, copies * T, d]`, which
    cross-attention treats one by one; so nothing of the keys and values is repeated.
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


# Cutting and laying out a layer's arguments


def narrowed(kwargs: Mapping[str, Any], size: int) -> dict[str, Any] | None:
    """A layer's keyword arguments for the last `size` query positions.

    Masks keep all their keys. No mask stands for a causal one, for one query for none at all.

    Returns:
        The arguments, views where possible; None if one of them is not understood.
    """
    cut: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_embeddings" and isinstance(value, tuple):
            cut[name] = tuple(part[..., -size:, :] for part in value)
        elif not isinstance(value, Tensor) or name == "cross_attention_states":
            if not isinstance(value, Tensor | bool | int | float | str | None):
                return None
            cut[name] = value
        elif name not in _QUERY_DIMS or (name.endswith("mask") and value.ndim != 4):
            return None
        else:
            dim = _QUERY_DIMS[name]
            cut[name] = value.narrow(dim, value.shape[dim] - size, size)
    return cut


def fold(tensor: Tensor, copies: int, dim: int = -2) -> Tensor:
    """Lay copies out along `dim`: `[copies * B, .., T, ..]` -> `[B, .., copies * T, ..]`."""
    if copies == 1:
        return tensor
    rows: Tensor = tensor.unflatten(0, (copies, -1))
    return rows.movedim(0, dim - 1).flatten(dim - 1, dim)


def unfold(tensor: Tensor, copies: int, dim: int = -2) -> Tensor:
    """Undo `fold`: `[B, .., copies * T, ..]` -> `[copies * B, .., T, ..]`."""
    if copies == 1:
        return tensor
    rows: Tensor = tensor.unflatten(dim, (copies, -1))
    return rows.movedim(dim - 1, 0).flatten(0, 1)


# Estimate: some positions of each row


@dataclass(frozen=True)
class Recorded:
    """The unablated run of one batch: how each executed layer was called, and what came out.

    `entering` are the layers' inputs and `final` the normed final state, `[B, S, d]`; `added` is
    what the decoder adds to a layer's output, where it does.
    """

    entering: Mapping[int, Tensor]
    arguments: Mapping[int, Mapping[str, Any]]
    known: Mapping[int, KeyValues]
    added: Mapping[int, Tensor]
    final: Tensor


@dataclass(frozen=True)
class _Call:
    """How the unablated run calls a layer, cut to T positions of each row."""

    index: int
    kwargs: Mapping[str, Any]
    known: KeyValues  # of all positions
    within: Tensor | None  # mask among the T positions [B, 1, T, T]; None in cross-attention
    added: Tensor | None  # [B, T, d]


@dataclass(frozen=True)
class Window:
    """The unablated run at T positions of each row.

    `entering` holds each executed layer's input and `final` the normed final state, `[B, T, d]`.
    """

    entering: Mapping[int, Tensor]
    final: Tensor
    calls: tuple[_Call, ...]


@torch.no_grad()
def record(model: nn.Module, text: TextInputs) -> Recorded:
    """Run the whole decoder once and keep what a window of any positions needs."""
    decoder, layers = text_decoder(model), decoder_layers(model)
    entering: dict[int, Tensor] = {}
    arguments: dict[int, Mapping[str, Any]] = {}
    added: dict[int, Tensor] = {}
    left: list[tuple[int, Tensor]] = []  # the layer that ran last, and its output

    def enter(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if left and left[0][1] is not args[0]:
                added[left[0][0]] = args[0] - left[0][1]
            entering[index] = args[0]
            cache = cache_argument(layer)
            arguments[index] = {n: v for n, v in kwargs.items() if n != cache}

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            left[:] = [(index, output)]

        return hook

    hooks = [
        hook
        for i, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(enter(i), with_kwargs=True),
            layer.register_forward_hook(leave(i)),
        )
    ]
    try:
        with key_values(model, range(len(layers))) as known:
            final: Tensor = decoder(**text.kwargs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return Recorded(entering, arguments, known, added, final)


def window_at(model: nn.Module, recorded: Recorded, positions: Tensor) -> Window:
    """Cut a recorded run to `positions`, `[B, T]` int64, ascending in each row.

    Raises:
        RegraftError: a layer is called with arguments that are not understood (an attention
            backend other than sdpa and eager).
    """
    cross = set(cross_attention_layers(model))
    calls = []
    for index, arguments in recorded.arguments.items():
        if narrowed(arguments, 1) is None:
            raise RegraftError(
                "Screening heads needs the attention backend sdpa or eager; score all heads "
                "exactly instead (mode exact)."
            )
        kwargs = {name: _cut(name, value, positions) for name, value in arguments.items()}
        within = None
        if index not in cross:
            mask = arguments["attention_mask"]
            rows = _causal(recorded.final) if mask is None else mask
            rows = _pick(rows, positions, -2)  # [B, 1, T, S]
            within = _pick(rows, positions, -1)
            columns = positions[:, None, None, :].expand(*rows.shape[:-1], -1)
            kwargs["attention_mask"] = rows.scatter(-1, columns, _blocked(rows))
        added = recorded.added.get(index)
        added = None if added is None else _pick(added, positions, -2)
        calls.append(_Call(index, kwargs, recorded.known[index], within, added))
    entering = {i: _pick(hidden, positions, -2) for i, hidden in recorded.entering.items()}
    return Window(entering, _pick(recorded.final, positions, -2), tuple(calls))


@torch.no_grad()
def most_attended(model: nn.Module, recorded: Recorded, size: int) -> Tensor:
    """The last position and those that it attends to most, over all layers and heads.

    The last query reads the identity in place of the values, so that what a head puts out are its
    attention weights, whatever the family's attention is.

    Returns:
        `[B, size]` int64, ascending in each row; all positions where there are fewer.
    """
    rows, length = recorded.final.shape[:2]
    total = recorded.final.new_zeros(rows, length, dtype=torch.float32)
    cross = set(cross_attention_layers(model))
    layers = decoder_layers(model)
    for index, hidden in recorded.entering.items():
        kwargs = narrowed(recorded.arguments[index], 1)
        if index in cross or kwargs is None:
            continue
        keys = recorded.known[index].keys  # [B, KV, S, D]
        identity = torch.eye(length, dtype=keys.dtype, device=keys.device)
        known = _Fixed(keys, identity.expand(*keys.shape[:2], -1, -1))
        kwargs[cache_argument(layers[index])] = known
        weights = _o_proj_input_of(layers[index], hidden[:, -1:], kwargs)
        total += weights.view(rows, -1, length).sum(dim=1).to(total)
    total[:, -1] = torch.inf
    return total.topk(min(size, length), dim=1).indices.sort(dim=1).values


class _Fixed(NamedTuple):
    """Stands in for a cache that always answers with the same keys and values."""

    keys: Tensor
    values: Tensor

    def update(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def _o_proj_input_of(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer's attention puts out before o_proj, which then is not run."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Found(args[0])

    hook = attention_of(layer)[1].o_proj.register_forward_pre_hook(stop)  # type: ignore[union-attr]
    try:
        layer(hidden, **kwargs)
    except _Found as found:
        weights: Tensor = found.value
        return weights
    finally:
        hook.remove()
    raise AssertionError("o_proj was not run")


def _cut(name: str, value: Any, positions: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_pick_axes(part, positions, -2, 4) for part in value)
    if name == "position_ids" and isinstance(value, Tensor):
        return _pick_axes(value, positions, -1, 3)
    if name in _QUERY_DIMS and isinstance(value, Tensor):
        return _pick(value, positions, _QUERY_DIMS[name])
    return value


def _pick_axes(tensor: Tensor, positions: Tensor, dim: int, with_axes: int) -> Tensor:
    """`_pick`, but of each axis where multi-axis rotary embeddings come first: `[3, B, S, D]`.

    Qwen2-VL's layers get them so in transformers below 5.20.
    """
    if tensor.ndim < with_axes:
        return _pick(tensor, positions, dim)
    return torch.stack([_pick(axis, positions, dim) for axis in tensor])


def _pick(tensor: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Each row's own positions along `dim`; a tensor of one row serves all."""
    rows = tensor.expand(len(positions), *tensor.shape[1:])
    picked = [row.index_select(dim, at) for row, at in zip(rows, positions, strict=True)]
    return torch.stack(picked)


def _causal(final: Tensor) -> Tensor:
    length = final.shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=final.device).tril()


def _blocked(mask: Tensor) -> Any:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def window_replay(model: nn.Module, window: Window) -> Replay:
    """`replay` of the window's positions; all others keep the unablated keys and values.

    Copies are laid out along the positions, kept apart by a block-diagonal mask, so that the keys
    and values of the unablated run are not repeated.
    """
    layers, decoder = decoder_layers(model), text_decoder(model)
    caches = [cache_argument(layer) for layer in layers]
    cross = set(cross_attention_layers(model))

    @torch.no_grad()
    def run(*, start: int, hidden: Tensor, stop: int | None = None, copies: int = 1) -> Tensor:
        state = fold(hidden, copies)  # [B, copies * T, d]
        for call in window.calls:
            if call.index < start or (stop is not None and call.index >= stop):
                continue
            kwargs = _side_by_side(call, copies, call.index in cross)
            kwargs[caches[call.index]] = call.known
            state = layers[call.index](state, **kwargs)
            if call.added is not None:
                state = state + _repeated(call.added, copies, -2)
        if stop is None:
            norm: Any = decoder.norm
            state = norm(state)
        return unfold(state, copies)

    return run


def _side_by_side(call: _Call, copies: int, cross: bool) -> dict[str, Any]:
    """A layer's arguments for `copies` windows laid out along the positions."""
    kwargs: dict[str, Any] = {}
    for name, value in call.kwargs.items():
        if isinstance(value, tuple):
            kwargs[name] = tuple(_repeated(part, copies, -2) for part in value)
        elif name in _QUERY_DIMS and isinstance(value, Tensor):
            kwargs[name] = _repeated(value, copies, _QUERY_DIMS[name])
        else:
            kwargs[name] = value
    if cross:
        kwargs["cross_attention_states"] = None
    else:
        kwargs["attention_mask"] = _kept_apart(call, copies)
    return kwargs


def _kept_apart(call: _Call, copies: int) -> Tensor:
    """The mask `[B, 1, copies * T, S + copies * T]`: the unablated keys, then those of the copies.

    A copy sees the unablated keys of all positions but the T, and of these its own.
    """
    before, within = call.kwargs["attention_mask"], call.within
    assert within is not None
    size = within.shape[-1]
    apart = within.new_full((*within.shape[:-2], copies, size, copies, size), _blocked(within))
    for i in range(copies):
        apart[..., i, :, i, :] = within
    apart = apart.flatten(-4, -3).flatten(-2, -1)  # [B, 1, copies * T, copies * T]
    return torch.cat([_repeated(before, copies, -2), apart], dim=-1)


def _repeated(tensor: Tensor, copies: int, dim: int) -> Tensor:
    return tensor if copies == 1 else torch.cat([tensor] * copies, dim=dim)
