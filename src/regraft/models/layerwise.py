"""Run all calibration batches through the decoder, one layer at a time.

The vision tower and the embeddings run once. Hidden states are kept in host memory if the model is
streamed, so that the device holds only the running layer, or if the device is short of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED, Batch
from regraft.models.architecture import (
    LayerArchitecture,
    LinearArchitecture,
    cross_attention_layers,
    decoder_layers,
    embeds_for_each_layer,
    text_decoder,
)
from regraft.models.placement import PlacedModel, free_bytes, moved, tensors_within
from regraft.models.replay import (
    Shared,
    TextInputs,
    hooked,
    not_layerwise,
    replaced_forwards,
    replay,
    stand_ins,
    text_inputs,
)
from regraft.progress import Advance

_EMBEDDINGS = ("inputs_embeds", "input_ids", "hidden_states")  # the last one in GIT and BLIP
_COPIES = 4  # of the states in memory during a backward pass, without the embeddings


class LayerwisePass:
    """All batches between two layers: `states[i]` `[B, S, d]` is batch i's input to the next one.

    Attributes:
        model: Resident or streamed.
        shared: For each batch, what earlier layers passed on besides the state.
        batches: Without their pixels, which only the vision tower reads.
        states: On the device, or in host memory.
        tokens: In all batches, padding included; four times as many for Gemma 3n's four streams.
    """

    def __init__(self, model: PlacedModel, batches: Iterable[Batch], *, again: bool = True) -> None:
        """Run vision tower and embeddings.

        Args:
            batches: On any device. A generator is read one batch at a time.
            again: Keep the embeddings for `rewind`, which takes as much memory as the states.

        Raises:
            RegraftError: the model's layers cannot be run one by one.
        """
        self.model = model
        self.batches: list[Batch] = []
        self.layers = len(decoder_layers(model.network))
        self._cross = frozenset(cross_attention_layers(model.network))
        self._embeddings_kept = embeds_for_each_layer(text_decoder(model.network))
        self._more: tuple[None, ...] = ()
        self._read_again: list[int] = []
        self._home = torch.device("cpu") if model.streamed else model.device  # of idle states
        self._texts: list[TextInputs] = []
        self._shapes: list[torch.Size] = []  # of the embeddings; states may have more dimensions
        self.states: list[Tensor] = []
        with model.frame():
            for batch in batches:
                text = text_inputs(model.network, model.place(batch).inputs)
                embedded = replay(model.network, text, stop=0)
                self._shapes.append(_embeddings_shape(text, embedded))
                if not self.states:
                    filled = partial(self._filled, text.kwargs, embedded)
                    self._more, self._read_again = _passed_on(model.network, filled)
                    self._embeddings_kept |= 0 in self._read_again
                if 0 in self._read_again:
                    text = _embedded(model.network, text)
                kwargs = moved(self._without_embeddings(text.kwargs), self._home)
                self._texts.append(TextInputs(kwargs, text.batch))
                self.states.append(embedded.to(self._home))
                self.batches.append(_without_image(batch, self._shapes[-1][1]))
                self._make_room()
        self.tokens = sum(state.numel() // state.shape[-1] for state in self.states)
        self.shared: list[Shared] = self._nothing_shared()
        self._embedded = list(self.states) if again else None

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(len(batch.ids) for batch in self.batches)

    @property
    def work(self) -> int:
        """Progress units of one pass: samples times layers."""
        return self.samples * self.layers

    def linears(
        self, layer: LayerArchitecture, wanted: Callable[[LinearArchitecture], bool]
    ) -> dict[LinearArchitecture, nn.Module]:
        """The linears of a layer that are `wanted`, and the modules that own their weights."""
        network = self.model.network
        return {li: network.get_submodule(li.module) for li in layer.linears if wanted(li)}

    def _make_room(self) -> None:
        """Move the states to host memory for good if the device is short of memory."""
        size = sum(state.nbytes for state in self.states)
        if self._home.type == "cuda" and (_COPIES + 1) * size > free_bytes(self._home):
            self._home = torch.device("cpu")
            self.states = [state.to(self._home) for state in self.states]
            for i, text in enumerate(self._texts):
                self._texts[i] = replace(text, kwargs=moved(text.kwargs, self._home))

    def _nothing_shared(self) -> list[Shared]:
        return [Shared(more=self._more) for _ in self.states]

    def rewind(self) -> None:
        """Go back to before the first layer; the decoder's weights may have changed since."""
        assert self._embedded is not None, "made with again=False"
        self.states = list(self._embedded)
        self.shared = self._nothing_shared()

    def run_layer(
        self,
        layer: int,
        advance: Advance,
        around: Callable[[Batch], AbstractContextManager[None]] | None = None,
        *,
        keep: bool = True,
    ) -> None:
        """Run one layer on every batch and make its outputs the states; call it in `model.layer`.

        The last layer's outputs are normed.

        Args:
            advance: Called with the number of samples after each batch.
            around: Makes, from the batch on the device, the context in which the layer runs.
            keep: False drops the outputs, to run the layer again.
        """
        for i, batch in enumerate(self.batches):
            shared = self.shared[i].to(self.model.device)
            with nullcontext() if around is None else around(self.model.place(batch)):
                state = self.states[i].to(self.model.device)
                output = self.replay(i, layer, state, shared)
            if keep:
                self.states[i] = output.to(self._home)
                self.shared[i] = shared.to(self._home)
            advance(len(batch.ids))

    def replay(
        self, i: int, layer: int, hidden: Tensor, shared: Shared, *, gradient: bool = False
    ) -> Tensor:
        """Run one layer on batch i, from the input `hidden` `[B, S, d]` on the device.

        `shared`, on the device, has what earlier layers passed on; this layer's is added.
        """
        if layer in self._read_again:
            shared.inputs = {**shared.inputs, layer: hidden}
        text = self._texts[i]
        kwargs = dict(text.kwargs)
        if layer not in self._cross and kwargs.get("cross_attention_states") is not None:
            # not read by this layer, but if it is None MllamaTextModel skips cross-attention
            kwargs["cross_attention_states"] = kwargs["cross_attention_states"][:1]
        kwargs = moved(kwargs, self.model.device)
        kwargs = self._with_embeddings(i, kwargs, hidden.new_zeros(()))
        text = TextInputs(kwargs, text.batch)
        stop = layer + 1 if layer + 1 < self.layers else None
        return replay(
            self.model.network,
            text,
            start=layer,
            hidden=hidden,
            stop=stop,
            gradient=gradient,
            shared=shared,
        )

    def _without_embeddings(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The decoder's arguments without ids and embeddings, unless layers read these."""
        if self._embeddings_kept:
            return dict(kwargs)
        return {name: None if name in _EMBEDDINGS else one for name, one in kwargs.items()}

    def _with_embeddings(self, i: int, kwargs: dict[str, Any], value: Tensor) -> dict[str, Any]:
        """Batch i's decoder arguments, with constant embeddings unless layers read real ones."""
        if self._embeddings_kept:
            return kwargs
        name = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
        return {**kwargs, name: value.expand(self._shapes[i])}

    def _filled(self, kwargs: Mapping[str, Any], like: Tensor, value: float) -> dict[str, Any]:
        return self._with_embeddings(0, self._without_embeddings(kwargs), like.new_full((), value))


@torch.no_grad()
def _embedded(model: nn.Module, text: TextInputs) -> TextInputs:
    """Replace ids by their embeddings, so that they need not be embedded again."""
    ids = text.kwargs.get("input_ids")
    if ids is None:
        return text
    embeddings = model.get_input_embeddings()(ids)  # type: ignore[operator]
    return replace(text, kwargs={**text.kwargs, "input_ids": None, "inputs_embeds": embeddings})


def _embeddings_shape(text: TextInputs, states: Tensor) -> torch.Size:
    """`[B, S, d]` of the decoder's input, ids or embeddings; states may have more dimensions."""
    embeddings = text.kwargs.get("inputs_embeds", text.kwargs.get("hidden_states"))
    if embeddings is None:
        return torch.Size((*text.kwargs["input_ids"].shape, states.shape[-1]))
    return torch.Size(embeddings.shape)


def _passed_on(
    model: nn.Module, kwargs: Callable[[float], Mapping[str, Any]]
) -> tuple[tuple[None, ...], list[int]]:
    """Find out what layers pass on besides the state.

    The decoder runs with stand-ins for its layers that return NaN, so that whatever else is
    computed from a layer's input or output is NaN as well. `kwargs` makes the decoder's arguments,
    with embeddings that all have the given value, unless layers read the real ones.

    Returns:
        (`Shared.more` before the first layer, the layers whose inputs later ones read again).
    """
    layers, nan = range(len(decoder_layers(model))), torch.nan
    outputs: tuple[tuple[None, ...], ...] = ((), (None,), (None, None))
    for more in outputs:
        try:
            found = _reused(model, kwargs(nan), layers, more)
            break
        except (IndexError, TypeError, ValueError) as error:  # such as a failed unpacking
            cause = error
    else:
        raise not_layerwise(f"What layers of {type(model).__name__} return is unknown") from cause
    return more, [i for i in layers if found and _reused(model, kwargs(0 if i else nan), {i}, more)]


def _reused(
    model: nn.Module, kwargs: Mapping[str, Any], nans: Container[int], more: tuple[Any, ...]
) -> bool:
    """Whether anything but the layers in `nans` themselves reads their inputs, which are NaN.

    It is read if another argument of a layer is NaN, or the result of the decoder.
    """
    kind, ran, layers, seen = type(model).__name__, set(), decoder_layers(model), False

    def check(index: int) -> Callable[..., None]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            if index in ran:
                raise not_layerwise(f"Layer {index} of {kind} runs more than once")
            ran.add(index)
            others = (args[1:] if index in nans else args, kwargs)
            seen = seen or any(bool(one.isnan().any()) for one in tensors_within(others))

        return enter

    def output_of(index: int, first: Tensor) -> Tensor:
        return torch.full_like(first, torch.nan if index + 1 in nans else 0)

    checks = (
        layer.register_forward_pre_hook(check(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    )
    with torch.no_grad(), hooked(checks), replaced_forwards(stand_ins(layers, output_of, more)):
        final: Tensor = text_decoder(model)(**kwargs).last_hidden_state
    return seen or bool(final.isnan().any())


def _without_image(batch: Batch, positions: int) -> Batch:
    """Drop a batch's pixels and give it labels for all `positions`.

    GIT has positions for the image before the prompt.
    """
    kept = {name: one for name, one in batch.inputs.items() if not name.startswith("pixel")}
    labels = batch.labels
    if labels is not None:
        labels = F.pad(labels, (max(0, positions - labels.shape[1]), 0), value=IGNORED)
    return replace(batch, inputs=kept, labels=labels)
