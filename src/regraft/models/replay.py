"""Run any part of a text decoder again, exactly, from captured hidden states.

The vision tower and the embeddings run once per batch (`text_inputs`). Then `replay` runs the
decoder's own forward, with the layers before `start` replaced by the identity and the given hidden
states as input of layer `start`. A loop over the layers would be wrong in some families:
Qwen3VLTextModel adds visual features between layers (deepstack), MllamaTextModel skips
cross-attention without an image, Gemma3TextModel has two kinds of mask and rotary embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regraft.errors import RegraftError
from regraft.models.architecture import cache_argument, decoder_layers, language_model, text_decoder
from regraft.models.generation import encodes
from regraft.models.placement import moved

WITHOUT_DATA = "Prune by magnitude and restore at random, which read no data."


def not_layerwise(what: str) -> RegraftError:
    """The error for decoders whose layers cannot be run one by one, because of `what`."""
    return RegraftError(f"{what}, so layers cannot be run one by one. {WITHOUT_DATA}")


@dataclass(frozen=True)
class TextInputs:
    """The text decoder's arguments for one batch of `batch` rows."""

    kwargs: Mapping[str, Any]
    batch: int


@dataclass
class Shared:
    """What layers pass to later ones besides the state. Its fields are replaced, never changed.

    Attributes:
        key_values: Those that later layers use as well, by kind of layer (Gemma 3n, Gemma 4).
        more: A layer's outputs after its state (the tokens that GLM-5-Next's indexers choose);
            before the first layer a None for each.
        inputs: Inputs of layers that later ones read again, by layer (Inkling 2).
    """

    key_values: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    more: tuple[Tensor | None, ...] = ()
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor | None]:
        """All of them, in the same order where one layer hands them on and the next receives."""
        return [*chain(*self.key_values.values()), *self.more, *self.inputs.values()]

    def to(self, device: torch.device) -> Shared:
        """All of them on `device`."""
        return Shared(**moved(vars(self), device))


class Replay(Protocol):
    """Runs decoder layers `start` to `stop` on `[copies * B, T, d]`; see `replay`."""

    def __call__(self, *, start: int, hidden: Tensor, stop: int | None = None) -> Tensor: ...


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks, and remove them when the block ends."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


class Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass early and carries a value out of it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def first_call(
    module: nn.Module, run: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the first call of `module` by `run`, which is stopped there."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stop((args, dict(kwargs)))

    try:
        with module.register_forward_pre_hook(stop, with_kwargs=True):
            run()
    except Stop as stopped:
        args, kwargs = stopped.value
        return args, kwargs
    raise AssertionError(f"{type(module).__name__} did not run")


@torch.no_grad()
def text_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> TextInputs:
    """Run embeddings and vision tower once and return the text decoder's arguments.

    Raises:
        RegraftError: an encoder reads the prompt, not the decoder.
    """
    if encodes(model):
        raise RegraftError(
            f"{type(model).__name__} reads prompts with an encoder and writes answers with a "
            f"decoder; regraft runs both through the decoder, as one sequence. {WITHOUT_DATA}"
        )
    decoder = text_decoder(model)
    args, kwargs = first_call(decoder, lambda: model(**inputs, use_cache=False))
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]  # without `self`
    kwargs |= dict(zip(names, args, strict=False))  # GIT passes its embeddings by position
    # With a cache, later runs would silently reuse the keys and values of earlier ones.
    return TextInputs(kwargs | {cache_argument(decoder): None}, len(inputs["input_ids"]))


def replay(
    model: nn.Module,
    text: TextInputs,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    stop: int | None = None,
    gradient: bool = False,
    shared: Shared | None = None,
) -> Tensor:
    """Run decoder layers `start` to `stop` (not included), or to the end and the final norm.

    Args:
        model: The model; left as it was.
        text: The batch's decoder inputs, B rows.
        start: First layer to run. Layers before it are skipped.
        hidden: Input of layer `start`, `[copies * B, S, d]`, the batch stacked in tile order,
            [b0..bB-1] * copies; None takes the embeddings (`start` 0).
        stop: Layer to stop before. None runs through the final norm.
        gradient: Record for autograd, if `hidden` requires it.
        shared: What layers before `start` passed on besides the state; updated with the keys and
            values of the layers that run and, unless it is empty, `more`.

    Returns:
        `[copies * B, S, d]`: the input of layer `stop` (including anything the family adds between
        layers), or the normed final state. A layer that the family skips for this batch (Mllama's
        cross-attention without images) passes its input on.
    """
    decoder, layers = text_decoder(model), decoder_layers(model)
    # states of other shapes, such as Gemma 3n's four per token, are never stacked
    copies = 1 if hidden is None or hidden.ndim != 3 else len(hidden) // text.batch
    shared = shared or Shared()
    entry = _Entry(hidden, stop, shared)
    hooks = (hook for i in range(start, len(layers)) for hook in entry.hooks(i, layers[i]))
    # the true output of a skipped layer if later layers read it, else any
    skipped = stand_ins(layers[:start], lambda i, x: shared.inputs.get(i + 1, x), shared.more)
    try:
        with hooked(hooks), replaced_forwards(skipped), torch.set_grad_enabled(gradient):
            final: Tensor = decoder(
                **tile_kwargs(text.kwargs, copies, text.batch)
            ).last_hidden_state
            if entry.pending is not None:  # the family skipped every layer from `start` on
                norm: Any = decoder.norm
                return entry.pending if stop is not None else norm(entry.pending)
            assert stop is None or stop >= len(layers), f"no layer from {stop} on was run"
            return final
    except Stop as stopped:
        reached: Tensor = stopped.value
        return reached


def stand_ins(
    layers: Iterable[nn.Module],
    output_of: Callable[[int, Tensor], Tensor],
    more: tuple[Any, ...] = (),
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards that replace layers and return `output_of(index, first)` and `more`.

    `first` is the input of the first layer. Most decoders take a layer's output as the state.
    Chameleon's takes its first item: a layer whose input therefore lacks a dimension returns a
    tuple.
    """
    first: Tensor | None = None

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            nonlocal first
            first = hidden if first is None else first
            state = output_of(index, first)
            return (state, *more) if more or hidden.ndim != first.ndim else state

        return forward

    return {layer: stand_in(i) for i, layer in enumerate(layers)}


def state_of(output: Any) -> Tensor:
    """The state `[B, S, d]` in a layer's output."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


class _Entry:
    """Feeds `hidden` to the first layer that runs, and stops the run before layer `stop`."""

    def __init__(self, hidden: Tensor | None, stop: int | None, shared: Shared) -> None:
        self.pending, self._stop, self._shared = hidden, stop, shared

    def hooks(self, index: int, layer: nn.Module) -> Iterator[RemovableHandle]:
        def enter(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            key_values = kwargs.get("shared_kv_states")  # the decoder's, into which layers write
            if key_values is not None:
                self._shared.key_values = {**self._shared.key_values, **key_values}
                key_values.update(self._shared.key_values)
            if self.pending is not None:
                args, self.pending = (self.pending, *args[1:]), None
            if self._stop is not None and index >= self._stop:
                raise Stop(args[0])
            return args, kwargs

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            more = output[1:]
            if not all(one is None or isinstance(one, Tensor) for one in more):
                kinds = ", ".join(type(one).__name__ for one in more)
                raise not_layerwise(f"Layers return {kinds} after their state, not a tensor")
            self._shared.more = more

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        if self._shared.more:
            yield layer.register_forward_hook(leave)


def logits_of(model: nn.Module, states: Tensor, *, gradient: bool = False) -> Tensor:
    """Logits of normed final states `[..., d]` -> `[..., vocabulary]`.

    Computed by the language model's own forward, with a decoder that returns `states`, because
    some families scale or cap logits (of Gemma 3 only the text-only class caps). With `gradient`
    autograd records them.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        """Has None for any field that a family adds, such as Gemma 4's shared keys and values."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    rows = states.reshape(-1, 1, states.shape[-1])  # [N, 1, d]
    output = Output(last_hidden_state=rows)
    with (
        torch.set_grad_enabled(gradient),
        replaced_forwards({text_decoder(model): lambda *_, **__: output}),
    ):
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        logits: Tensor = language_model(model)(input_ids=ids, use_cache=False).logits
    return logits.view(*states.shape[:-1], -1)


def tile_kwargs(kwargs: Mapping[str, Any], copies: int, batch: int) -> dict[str, Any]:
    """Stack every decoder argument `copies` times along its batch dimension, in tile order.

    The batch is not always dimension 0: the `position_ids` of Qwen2-VL to Qwen3-VL are
    `[3 or 4, B, S]` (multi-axis rotary), Qwen3-VL's `deepstack_visual_embeds` are lists of
    `[visual tokens, d]` in row order. MllamaTextModel's `cross_attention_states` have
    B * images * tiles rows, so only tiling, not interleaving, keeps rows and images together.
    """
    if copies == 1:
        return dict(kwargs)
    tiled: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
            tiled[name] = value.repeat(1, copies, 1)
        elif name == "deepstack_visual_embeds" and value is not None:
            tiled[name] = [embeds.repeat(copies, 1) for embeds in value]
        else:
            tiled[name] = _tile(value, copies, batch)
    return tiled


def tile_rows(tensor: Tensor, copies: int) -> Tensor:
    """`[B, ...]` -> `[copies * B, ...]` in tile order; without a copy where B is 1."""
    if len(tensor) == 1:
        return tensor.expand(copies, *tensor.shape[1:])
    return tensor.repeat(copies, *([1] * (tensor.ndim - 1)))


def _tile(value: Any, copies: int, batch: int) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0 or (len(value) == 1 and batch > 1):
            return value  # one row for all, such as rotary cos and sin, is broadcast
        if len(value) % batch:
            raise ValueError(f"cannot tile {tuple(value.shape)} for a batch of {batch}")
        return tile_rows(value, copies)
    if isinstance(value, tuple | list):
        return type(value)(_tile(item, copies, batch) for item in value)
    if isinstance(value, dict):
        return {key: _tile(item, copies, batch) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    raise TypeError(f"unexpected {type(value).__name__} among the decoder's arguments")


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules inside the block.

    An instance's own forward (set by accelerate's hooks) is restored afterwards.
    """
    before = {
        module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__
    }
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
            if module in before:
                module.__dict__["forward"] = before[module]
