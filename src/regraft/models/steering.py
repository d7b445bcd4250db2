"""The residual stream behind a decoder layer: read at the last prompt token, or moved everywhere.

Both are hooks on a layer's output, so that every family's own code runs in between. A layer that a
family skips for a batch (Mllama's cross-attention without images) is neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.models.anatomy import decoder_layers, text_decoder
from regraft.models.replay import last_positions, text_inputs


@torch.no_grad()
def last_token_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Run the model once and keep what each executed layer gives at each row's last token.

    Args:
        model: In eval mode; left as it was.
        inputs: Of a batch of B prompts, padded on either side.

    Returns:
        Layer -> `[B, d]` float64 on CPU.
    """
    text = text_inputs(model, inputs)
    ids = inputs["input_ids"]
    at = last_positions(inputs, ids.shape[1])
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states = _states(output)  # [B, S, d]
            where = at.to(states.device)
            rows = states[torch.arange(len(where), device=states.device), where]
            found[index] = rows.double().cpu()

        return hook

    hooks = [
        layer.register_forward_hook(keep(index))
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        text_decoder(model)(**text.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def moved_output(model: nn.Module, layer: int, vector: Tensor) -> Iterator[None]:
    """Add a vector to the output of one decoder layer, at all positions, while the block runs.

    It acts in every forward pass, so in `generate` on the prompt and on each new token, with a
    key/value cache or without. The sum is rounded once, to the model's dtype.

    Args:
        model: Left as it was.
        layer: Index of the decoder layer.
        vector: `[d]` float32.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = _states(output)
        moved = (states + vector.to(states.device)).to(states.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _states(output: Any) -> Tensor:
    """Hidden states of a layer's output, which some families return in a tuple."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states
