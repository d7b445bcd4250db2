"""Run any part of a text decoder again, exactly, from captured hidden states.

The vision tower and the embeddings run once a batch (`text_inputs`). From then on `replay` runs the
decoder's own forward, in which the layers before `start` are the identity and the first one after
gets the given hidden states. A loop over the layers would be wrong in some families: between its
layers Qwen3VLTextModel adds visual features (deepstack), MllamaTextModel skips cross-attention
where there is no image, Gemma3TextModel gives its layers two kinds of mask and rotary embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regraft.errors import RegraftError
from regraft.models.architecture import (
    cache_argument,
    decoder_layers,
    language_model,
    text_decoder,
)
from regraft.models.generation import encodes

WITHOUT_DATA = "Prune by magnitude and restore at random, which read no data."


def no_chain(what: str) -> RegraftError:
    """Make the error for decoders whose layers hand on what is not known."""
    return RegraftError(f"{what}, so that layers cannot be run one by one. {WITHOUT_DATA}")


@dataclass(frozen=True)
class TextInputs:
    """What the text decoder was called with for one batch of `batch` rows."""

    kwargs: Mapping[str, Any]
    batch: int


Shared = dict[str, tuple[Any, ...]]
"""What layers hand on beside the state: tensors, or None.

Keys and values that later layers read, too, by the kind of layer (Gemma 3n, Gemma 4). And where the
name is there already: what a layer puts out behind its state (`MORE`; the tokens that GLM-5-Next's
indexers choose), and inputs of layers that later ones read, too (`input_of`; Inkling 2).
"""
MORE = "more"
_INPUT = "input of layer "


def input_of(layer: int) -> str:
    """The name in `Shared` of what enters a layer."""
    return f"{_INPUT}{layer}"


def is_input(name: object) -> bool:
    """Whether a name is one of these. Kinds of layers are numbers in transformers below 5.20."""
    return str(name).startswith(_INPUT)


class Replay(Protocol):
    """Runs decoder layers `start` to `stop` on `[copies * B, T, d]`; see `replay`."""

    def __call__(self, *, start: int, hidden: Tensor, stop: int | None = None) -> Tensor: ...


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the block ends."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


class Stop(Exception):  # noqa: N818 - a signal, not an error
    """Carries a value out of a forward pass that need not go on."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def first_call(
    module: nn.Module, run: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `run` first calls `module` with: (args, kwargs). It goes no further than that."""

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
    """Run embeddings and vision tower once and keep what the text decoder would get.

    Raises:
        RegraftError: the decoder does not get the prompt, an encoder does.
    """
    if encodes(model):
        raise RegraftError(
            f"{type(model).__name__} reads prompts with an encoder and writes answers with a "
            f"decoder; regraft takes both through the decoder, as one sequence. {WITHOUT_DATA}"
        )
    decoder = text_decoder(model)
    args, kwargs = first_call(decoder, lambda: model(**inputs, use_cache=False))
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]  # without `self`
    kwargs |= dict(zip(names, args, strict=False))  # GIT gives its embeddings without a name
    # A cache left among the arguments would give later runs the keys and values of earlier ones,
    # without an error for a single row that is not padded.
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
        shared: What layers before `start` handed on beside the state; what those that run hand on
            is put in.

    Returns:
        `[copies * B, S, d]`: the input of layer `stop` (with whatever the family adds between
        layers), or the normed final state. A layer that the family skips for this batch (Mllama's
        cross-attention without images) passes its input on.
    """
    decoder, layers = text_decoder(model), decoder_layers(model)
    # states of other shapes, as Gemma 3n's four a token, are never stacked
    copies = 1 if hidden is None or hidden.ndim != 3 else len(hidden) // text.batch
    shared = {} if shared is None else shared
    if input_of(start) in shared:
        shared[input_of(start)] = (hidden,)
    entry = _Entry(hidden, stop, shared)
    hooks = (hook for i in range(start, len(layers)) for hook in entry.hooks(i, layers[i]))
    skipped = stand_ins(layers[:start], partial(_put_out, shared), shared.get(MORE, ()))
    try:
        with hooked(hooks), replaced_forwards(skipped), torch.set_grad_enabled(gradient):
            final: Tensor = decoder(
                **tile_kwargs(text.kwargs, copies, text.batch)
            ).last_hidden_state
            if entry.waiting is not None:  # the family skipped every layer from `start` on
                norm: Any = decoder.norm
                return entry.waiting if stop is not None else norm(entry.waiting)
            assert stop is None or stop >= len(layers), f"no layer from {stop} on was run"
            return final
    except Stop as stopped:
        reached: Tensor = stopped.value
        return reached


def _put_out(shared: Shared, index: int, whole: Tensor) -> Tensor:
    """What a layer that is skipped put out, if that is read again; else what entered the first."""
    return next(iter(shared.get(input_of(index + 1), ())), whole)


def stand_ins(
    layers: Iterable[nn.Module],
    put_out: Callable[[int, Tensor], Tensor],
    more: tuple[Any, ...] = (),
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards for layers, of what enters the first of them: `put_out(index, it)` and `more`.

    Most decoders take a layer's output for the state. Chameleon's takes its first item: from the
    second layer on that is seen by a state without a dimension, and then it is given a tuple.
    """
    whole: Tensor | None = None

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            nonlocal whole
            whole = hidden if whole is None else whole
            state = put_out(index, whole)
            return (state, *more) if more or hidden.ndim != whole.ndim else state

        return forward

    return {layer: stand_in(i) for i, layer in enumerate(layers)}


def state_of(output: Any) -> Tensor:
    """The state `[B, S, d]` in what a layer puts out."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


class _Entry:
    """Puts `hidden` into the first layer that runs, and ends the run before layer `stop`."""

    def __init__(self, hidden: Tensor | None, stop: int | None, shared: Shared) -> None:
        self.waiting, self._stop, self._shared = hidden, stop, shared

    def hooks(self, index: int, layer: nn.Module) -> Iterator[RemovableHandle]:
        def enter(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            left = kwargs.get("shared_kv_states")
            if left is not None:
                self._shared |= left
            if self.waiting is not None:
                args, self.waiting = (self.waiting, *args[1:]), None
                if left is not None:
                    kinds = (n for n in self._shared if n != MORE and not is_input(n))
                    left.update({name: self._shared[name] for name in kinds})
            if self._stop is not None and index >= self._stop:
                raise Stop(args[0])
            return args, kwargs

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            more = output[1:]
            if not all(one is None or isinstance(one, Tensor) for one in more):
                kinds = ", ".join(type(one).__name__ for one in more)
                raise no_chain(f"Layers put out {kinds} behind their state, and no tensor")
            self._shared[MORE] = more

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        if MORE in self._shared:
            yield layer.register_forward_hook(leave)


def logits_of(model: nn.Module, states: Tensor, *, gradient: bool = False) -> Tensor:
    """Logits of normed final states `[..., d]` -> `[..., vocabulary]`.

    The language model's own forward makes them, around a decoder that returns `states`: whether a
    family scales or caps its logits is its own code again (of Gemma 3 only the text-only class
    caps). With `gradient` autograd records them.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        """With nothing in what families add to it, such as Gemma 4's shared keys and values."""

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


def last_positions(inputs: Mapping[str, Any], length: int) -> Tensor:
    """Index of each row's last real token, `[B]` int64, whichever side is padded."""
    mask = inputs.get("attention_mask")
    if mask is None:
        rows = len(inputs["input_ids"])
        return torch.full((rows,), length - 1, device=inputs["input_ids"].device)
    padding: Tensor = mask.flip(1).int().argmax(dim=1)
    return length - 1 - padding


def tile_kwargs(kwargs: Mapping[str, Any], copies: int, batch: int) -> dict[str, Any]:
    """Stack every decoder keyword `copies` times along its batch dimension, in tile order.

    The batch is not always dimension 0: the `position_ids` of Qwen2-VL to Qwen3-VL are
    `[3 or 4, B, S]` (multi-axis rotary), Qwen3-VL's `deepstack_visual_embeds` lists of
    `[visual tokens, d]` in row order. MllamaTextModel's `cross_attention_states` have
    B * images * tiles rows, so that only tiling, not interleaving, keeps rows and images together.
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
            return value  # one row for all, such as rotary cos and sin: left to broadcasting
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
    """Give modules another forward for the length of the block.

    A forward that an instance already has (accelerate's hooks put one there) is restored.
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
