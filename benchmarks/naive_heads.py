"""States with a head ablated by naive full forwards, and what heads cost by counting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regraft.data.collate import Batch
from regraft.models.architecture import (
    Architecture,
    LayerArchitecture,
    attention_of,
    decoder_layers,
    text_decoder,
)

Head = tuple[int, int]


@contextmanager
def scaled_head(model: nn.Module, layer: int, head: int, size: int, eps: float) -> Iterator[None]:
    """Scale one head's output by eps (its value, that is) during full forwards."""
    attention = attention_of(decoder_layers(model)[layer])

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., head * size : (head + 1) * size] *= eps
        return (z,)

    handle = attention.o_proj.register_forward_pre_hook(hook)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def naive(
    model: nn.Module,
    architecture: Architecture,
    prompts: Sequence[Batch],
    heads: Sequence[Head],
    eps: float,
) -> dict[Head, Tensor]:
    """Last-token final states, head -> `[samples, d]`, one full forward per head and batch."""
    seen: list[Tensor] = []
    hook = text_decoder(model).register_forward_hook(
        lambda _m, _a, out: seen.append(out.last_hidden_state)
    )
    states = {}
    try:
        for layer, head in heads:
            rows = []
            for batch in prompts:
                with scaled_head(model, layer, head, architecture.layers[layer].head_dim, eps):
                    model(**batch.inputs, use_cache=False, logits_to_keep=1)
                rows.append(seen.pop()[:, -1].float().cpu())
            states[layer, head] = torch.cat(rows)
    finally:
        hook.remove()
    return states


def multiplications(architecture: Architecture, length: int, window: int) -> dict[str, float]:
    """Multiplications of replay and of the estimate as shares of naive full forwards.

    For one prompt of `length` tokens, decoder layers only: projections, attention, MLP. A head of
    layer l costs o_proj and MLP of l and the layers after it; in the last layer queries, keys and
    values of all tokens, and the rest for one token. The estimate costs the same at `window`
    positions, which attend to all keys.
    """

    def size(layer: LayerArchitecture, *roles: str) -> int:
        return sum(li.shape[0] * li.shape[1] for li in layer.linears if li.role in roles)

    def scores(layer: LayerArchitecture, keys: float) -> float:
        return 2 * keys * layer.heads * layer.head_dim

    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers, last = architecture.layers, architecture.layers[-1]
    whole = [sum(li.shape[0] * li.shape[1] for li in layer.linears) for layer in layers]
    full = [length * (w + scores(la, length / 2)) for w, la in zip(whole, layers, strict=True)]
    rest = [w - size(la, *attention[:3]) for w, la in zip(whole, layers, strict=True)]
    last_run = length * size(last, *attention[:3]) + rest[-1] + scores(last, length)
    within = [window * (w + scores(la, length)) for w, la in zip(whole, layers, strict=True)]
    heads = sum(layer.heads for layer in layers)
    exact = estimate = 0.0
    for index, layer in enumerate(layers):
        after = sum(full[index + 1 : -1]) + last_run if layer is not last else 0
        positions = length if layer is not last else 1
        exact += layer.heads * (positions * rest[index] + after)
        estimate += layer.heads * (window * rest[index] + sum(within[index + 1 :]))
    total = heads * sum(full)
    return {"exact": exact / total, "estimate": estimate / total}
