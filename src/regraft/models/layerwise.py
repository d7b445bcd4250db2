"""Take all calibration batches through the decoder, one layer at a time.

The vision tower and the embeddings run once. Hidden states wait in host memory where the model is
streamed, so that only the layer at work is on the device, or where the device has little room left.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED, Batch
from regraft.models.architecture import (
    cross_attention_layers,
    decoder_layers,
    embeds_for_each_layer,
    text_decoder,
)
from regraft.models.placement import PlacedModel, free_bytes, moved, tensors_within
from regraft.models.replay import (
    MORE,
    Shared,
    TextInputs,
    hooked,
    input_of,
    no_chain,
    replaced_forwards,
    replay,
    stand_ins,
    text_inputs,
)
from regraft.progress import Advance

_EMBEDDED = ("inputs_embeds", "input_ids", "hidden_states")  # the last one of GIT and BLIP
_COPIES = 4  # of the states that a backward pass has at a time, the embeddings aside


class LayerwisePass:
    """Batches on their way: `states[i]` `[B, S, d]` is what enters the layer reached by batch i.

    Attributes:
        model: Resident or streamed.
        shared: Of each batch, what else layers before handed on.
        batches: Without their pixels, which only the vision tower reads.
        states: On the device, or in host memory.
        tokens: Of all batches, padding too; of Gemma 3n four times as many, for its four streams.
    """

    def __init__(self, model: PlacedModel, batches: Iterable[Batch], *, again: bool = True) -> None:
        """Run vision tower and embeddings.

        Args:
            model: Resident or streamed.
            batches: On any device. Of a generator one at a time is in memory.
            again: Keep the embeddings for `rewind`, as many bytes as the states have.

        Raises:
            RegraftError: the model's layers cannot be run one by one.
        """
        self.model = model
        self.batches: list[Batch] = []
        self.layers = len(decoder_layers(model.network))
        self._cross = frozenset(cross_attention_layers(model.network))
        self._embeddings_kept = embeds_for_each_layer(text_decoder(model.network))
        self._handed_on: tuple[str, ...] = ()
        self._home = torch.device("cpu") if model.streamed else model.device
        self._texts: list[TextInputs] = []
        self._shapes: list[torch.Size] = []  # of the embeddings; states may have more dimensions
        self.states: list[Tensor] = []
        with model.frame():
            for batch in batches:
                text = text_inputs(model.network, model.place(batch).inputs)
                embedded = replay(model.network, text, stop=0)
                self._shapes.append(_embeddings_shape(text, embedded))
                if not self.states:
                    given = partial(self._filled, text.kwargs, embedded)
                    self._handed_on = _handed_on(model.network, given)
                    self._embeddings_kept |= input_of(0) in self._handed_on
                if input_of(0) in self._handed_on:
                    text = _embedded(model.network, text)
                kwargs = moved(self._without_embeddings(text.kwargs), self._home)
                self._texts.append(TextInputs(kwargs, text.batch))
                self.states.append(embedded.to(self._home))
                self.batches.append(_without_image(batch, self._shapes[-1][1]))
                self._make_room()
        self.tokens = sum(state.numel() // state.shape[-1] for state in self.states)
        self.shared: list[Shared] = self._nothing_shared()
        self._left: dict[int, Shared] = {}  # of the layer that ran last
        self._embedded = list(self.states) if again else None

    @property
    def samples(self) -> int:
        """How many there are in all batches."""
        return sum(len(batch.ids) for batch in self.batches)

    @property
    def work(self) -> int:
        """How much one pass is, as progress counts it: samples times layers."""
        return self.samples * self.layers

    def _make_room(self) -> None:
        """Let the states wait in host memory from now on, if the device has too little for more."""
        size = sum(state.nbytes for state in self.states)
        if self._home.type == "cuda" and (_COPIES + 1) * size > free_bytes(self._home):
            self._home = torch.device("cpu")
            self.states = [state.to(self._home) for state in self.states]
            self._texts = [
                TextInputs(moved(dict(text.kwargs), self._home), text.batch) for text in self._texts
            ]

    def _nothing_shared(self) -> list[Shared]:
        return [dict.fromkeys(self._handed_on, ()) for _ in self.states]

    def rewind(self) -> None:
        """Back to before the first layer, whatever became of the decoder's weights meanwhile."""
        assert self._embedded is not None, "made with again=False"
        self.states = list(self._embedded)
        self.shared = self._nothing_shared()

    def on(self, model: PlacedModel) -> LayerwisePass:
        """The same batches before the first layer of another model.

        Only the weights of its decoder layers may differ: vision tower and embeddings do not run
        again. A pruned model and its dense one are such a pair.
        """
        other = copy(self)
        other.model = model
        other.rewind()
        return other

    def run(
        self, layer: int, around: Callable[[Batch], AbstractContextManager[None]] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Run one layer on every batch, inside `model.layer`.

        `around` makes a context, from the batch on the device, in which the layer runs.

        Yields:
            Index of the batch and the layer's output `[B, S, d]`; after the last layer, normed.
        """
        for i, batch in enumerate(self.batches):
            shared = moved(self.shared[i], self.model.device)
            with nullcontext() if around is None else around(self.model.place(batch)):
                state = self.states[i].to(self.model.device)
                output = self.replay(i, layer, state, shared=shared)
            self._left[i] = shared
            yield i, output

    def replay(
        self,
        i: int,
        layer: int,
        hidden: Tensor,
        *,
        gradient: bool = False,
        shared: Shared | None = None,
    ) -> Tensor:
        """Run one layer on batch i, from the input `hidden` `[B, S, d]` on the device.

        `shared` on the device is as for `models.replay.replay`.
        """
        text = self._texts[i]
        kwargs = dict(text.kwargs)
        if layer not in self._cross and kwargs.get("cross_attention_states") is not None:
            # not read by this layer, but without any MllamaTextModel skips its cross-attention
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
        """The decoder's arguments without what states carry on from, where no layer reads that."""
        if self._embeddings_kept:
            return dict(kwargs)
        return {name: None if name in _EMBEDDED else one for name, one in kwargs.items()}

    def _with_embeddings(self, i: int, kwargs: dict[str, Any], value: Tensor) -> dict[str, Any]:
        """Batch i's arguments of the decoder, with embeddings that are all the same value.

        As they are where layers need them.
        """
        if self._embeddings_kept:
            return kwargs
        name = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
        return {**kwargs, name: value.expand(self._shapes[i])}

    def _filled(self, kwargs: Mapping[str, Any], like: Tensor, value: float) -> dict[str, Any]:
        return self._with_embeddings(0, self._without_embeddings(kwargs), like.new_full((), value))

    def advance(
        self,
        layer: int,
        advance: Advance,
        around: Callable[[Batch], AbstractContextManager[None]] | None = None,
    ) -> None:
        """`run` a layer and make its outputs the states.

        `advance` is called with the number of samples after each batch.
        """
        for i, output in self.run(layer, around):
            self.states[i] = output.to(self._home)
            self.shared[i] = moved(self._left.pop(i), self._home)
            advance(len(self.batches[i].ids))


@torch.no_grad()
def _embedded(model: nn.Module, text: TextInputs) -> TextInputs:
    """The same with embeddings in place of ids, so that these need not be embedded again."""
    ids = text.kwargs.get("input_ids")
    if ids is None:
        return text
    embeddings = model.get_input_embeddings()(ids)  # type: ignore[operator]
    return replace(text, kwargs={**text.kwargs, "input_ids": None, "inputs_embeds": embeddings})


def _embeddings_shape(text: TextInputs, states: Tensor) -> torch.Size:
    """`[B, S, d]` of what the decoder was called with, embeddings or ids; states may have more."""
    given = text.kwargs.get("inputs_embeds", text.kwargs.get("hidden_states"))
    if given is None:
        return torch.Size((*text.kwargs["input_ids"].shape, states.shape[-1]))
    return torch.Size(given.shape)


def _handed_on(model: nn.Module, given: Callable[[float], Mapping[str, Any]]) -> tuple[str, ...]:
    """What layers hand on beside the state, from each to the next: names in `Shared`.

    `given` makes the decoder's arguments, with embeddings of that value where no layer may need
    them. It runs on layers that put out NaN, so that what else a layer is given is NaN if it was
    made of these.
    """
    layers, nan = range(len(decoder_layers(model))), torch.nan
    outputs: tuple[tuple[None, ...], ...] = ((), (None,), (None, None))
    for more in outputs:
        try:
            found = _read_again(model, given(nan), layers, more)
            break
        except (IndexError, TypeError, ValueError) as error:  # such as of unpacking
            cause = error
    else:
        raise no_chain(f"What layers of {type(model).__name__} put out is not known") from cause
    read = [i for i in layers if found and _read_again(model, given(0 if i else nan), {i}, more)]
    return *((MORE,) if more else ()), *map(input_of, read)


def _read_again(
    model: nn.Module, kwargs: Mapping[str, Any], nans: Container[int], more: tuple[Any, ...]
) -> bool:
    """Whether NaN, as the state that enters some layers, comes elsewhere, too.

    To a layer in another way, or to the end: the last layer puts out 0.
    """
    kind, ran, layers, seen = type(model).__name__, set(), decoder_layers(model), False

    def check(index: int) -> Callable[..., None]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            if index in ran:
                raise no_chain(f"Layer {index} of {kind} runs more than once")
            ran.add(index)
            given = (args[1:] if index in nans else args, kwargs)
            seen = seen or any(bool(one.isnan().any()) for one in tensors_within(given))

        return enter

    def put_out(index: int, whole: Tensor) -> Tensor:
        return torch.full_like(whole, torch.nan if index + 1 in nans else 0)

    checks = (
        layer.register_forward_pre_hook(check(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    )
    with torch.no_grad(), hooked(checks), replaced_forwards(stand_ins(layers, put_out, more)):
        final: Tensor = text_decoder(model)(**kwargs).last_hidden_state
    return seen or bool(final.isnan().any())


def _without_image(batch: Batch, positions: int) -> Batch:
    """A batch whose pixels need not be moved again, with labels for all positions.

    GIT's image has some of its own, before the prompt.
    """
    kept = {name: one for name, one in batch.inputs.items() if not name.startswith("pixel")}
    labels = batch.labels
    if labels is not None:
        labels = F.pad(labels, (max(0, positions - labels.shape[1]), 0), value=IGNORED)
    return replace(batch, inputs=kept, labels=labels)
