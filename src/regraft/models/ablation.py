"""Switch single attention heads (almost) off, batched over heads, exact for every family.

Ships (arXiv 2410.13708) scales a head's query, key or value by eps. What that does to the head's
output z_h, the D columns it owns in o_proj's input, is known without touching a weight:

- value: z_h -> eps * z_h (attention is linear in the value);
- query or key: the logits are scaled by eps, the same as scaling the softmax scale, so z_h comes
  from one more attention pass with `attention.scaling * eps` ("undifferentiated attention");
- all three: scale * eps^2, then eps * z_h.

Heads do not mix before o_proj, so that one pass serves all heads at once, and under GQA a query
head is ablated alone although it shares its key and value. The edit sits after q_norm and k_norm
where a family has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft.models.architecture import attention_of, decoder_layers
from regraft.models.key_values import fold
from regraft.models.replay import Replay, replaced_forwards, tile_rows

AblationTarget = Literal["q", "k", "v", "all"]
EPS = 1e-5


@dataclass(frozen=True)
class HeadOutputs:
    """o_proj's input `[B, S, H*D]` of one layer: as it is, and with every head ablated."""

    intact: Tensor
    ablated: Tensor
    head_dim: int


def head_outputs(
    model: nn.Module,
    run: Replay,
    layer: int,
    hidden: Tensor,
    head_dim: int,
    *,
    target: AblationTarget = "all",
    eps: float = EPS,
) -> HeadOutputs:
    """Run one layer's attention on its input `[B, S, d]` and ablate all its heads at once."""
    intact = _o_proj_input(model, run, layer, hidden)
    softmax_factor = {"q": eps, "k": eps, "v": 1.0, "all": eps * eps}[target]
    if softmax_factor == 1.0:
        return HeadOutputs(intact, intact * eps, head_dim)
    _, attention = attention_of(decoder_layers(model)[layer])
    with _scaled_logits(attention, softmax_factor):
        ablated = _o_proj_input(model, run, layer, hidden)
    return HeadOutputs(intact, ablated * eps if target == "all" else ablated, head_dim)


def replay_ablated(
    model: nn.Module,
    run: Replay,
    layer: int,
    hidden: Tensor,
    outputs: HeadOutputs,
    heads: Sequence[int],
) -> Tensor:
    """Run from `layer` to the end once for each of `heads` ablated, all in one batch.

    Args:
        run: Which way to run it: `replay` of the whole batch, or one of `key_values` or `window`.
        hidden: Input of the layer, `[B, S, d]`.
        outputs: From `head_outputs` on the same input.
        heads: Query heads, one a copy of the batch.

    Returns:
        Normed final states `[len(heads), B, T, d]`, at the positions that `run` returns.
    """
    _, attention = attention_of(decoder_layers(model)[layer])
    o_proj = attention.o_proj
    copies, size = len(heads), outputs.head_dim

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        z = tile_rows(outputs.intact[None], copies).flatten(0, 1).clone()  # [k*B, S, H*D]
        rows = z.view(copies, -1, *z.shape[1:])
        for row, head in enumerate(heads):
            columns = slice(head * size, (head + 1) * size)
            rows[row, ..., columns] = outputs.ablated[..., columns]
        if len(hidden_states) < len(z):  # copies lie along the positions
            z = fold(z, copies)
        return o_proj(z), None  # type: ignore[operator]

    known = hidden[:, -outputs.intact.shape[1] :]  # a run may have reached its last position only
    with replaced_forwards({attention: forward}):
        final = run(start=layer, hidden=tile_rows(known, copies))
    return final.view(copies, -1, *final.shape[1:])


@torch.no_grad()
def _o_proj_input(model: nn.Module, run: Replay, layer: int, hidden: Tensor) -> Tensor:
    o_proj: Any = attention_of(decoder_layers(model)[layer])[1].o_proj
    seen: list[Tensor] = []
    with o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0])):
        run(start=layer, hidden=hidden, stop=layer + 1)
    return seen[0]


@contextmanager
def _scaled_logits(attention: nn.Module, factor: float) -> Any:
    before: Any = attention.scaling
    attention.scaling = before * factor
    try:
        yield
    finally:
        attention.scaling = before
