"""What differs between the classes of transformers in how they write answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Types that count positions from the padding on, or attend to it: found by trying all those of
# transformers 5.24 (tests/types_table.py; of causal language models in the same way). Phi-4 looks
# at an image without padding causally, but not beside one with some.
_CHANGED_BY_PADDING = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "florence2"),
    *("git", "hy_v4", "kosmos-2", "kosmos-2.5", "marian", "mbart", "mvp", "paligemma", "pegasus"),
    *("phi4_multimodal", "plbart", "prophetnet", "roformer", "trocr", "whisper"),
)


def is_plain(model: nn.Module) -> bool:
    """Whether it writes answers behind the prompt by transformers' own `generate`.

    Not so models whose encoder reads the prompt, and those with a `generate` of their own, which
    may return the answer alone.
    """
    from transformers import GenerationMixin

    generate = getattr(type(model), "generate", None)
    return generate is GenerationMixin.generate and not encodes(model)


def takes_padding(model: nn.Module) -> bool:
    """Whether prompts of different lengths in one batch get the answers that each gets alone."""
    return getattr(model.config, "model_type", "") not in _CHANGED_BY_PADDING


def encodes(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt, and answers begin with the decoder's start token."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def answer_start(model: nn.Module, prompt: Tensor, tokens: Tensor) -> int:
    """The place in `tokens` `[B, T]`, as `generate` returned them, of the answers' first token.

    They are `prompt` `[B, S]` and answers; or start token and answers, where an encoder reads the
    prompt; or, of a `generate` of the model's own, perhaps answers alone (a prompt is longer than
    two tokens, and no answer repeats all of it).
    """
    length = prompt.shape[1]
    if encodes(model):
        return 1
    if is_plain(model):
        return length
    for start in (length, length - 1):  # BLIP puts its own token first and drops the last one
        if start and torch.equal(tokens[:, 1:start], prompt[:, 1:start]):
            return start
    return 0


@contextmanager
def greedily(
    model: nn.Module, max_new_tokens: int, ends: int | None, padding: int | None
) -> Iterator[None]:
    """`generate` takes the most likely token in the block, whatever the checkpoint says of it.

    Sampling, penalties and the like of the generation config are left out; what belongs to the
    model's form of input and output stays. So of a model inside, whose `generate` some call.

    Args:
        ends: Ends an answer, where the checkpoint does not say what does.
        padding: Behind answers that have ended; None for the first token that ends one.
    """
    parts: list[Any] = [one for one in model.modules() if _configured(one)]
    before = [one.generation_config for one in parts]
    for one, own in zip(parts, before, strict=True):
        one.generation_config = _greedy(own, max_new_tokens, ends, padding)
    try:
        yield
    finally:
        for one, own in zip(parts, before, strict=True):
            one.generation_config = own


def _configured(module: nn.Module) -> bool:
    return getattr(module, "generation_config", None) is not None


def _greedy(own: Any, max_new_tokens: int, ends: int | None, padding: int | None) -> Any:
    if padding is None and own.eos_token_id is not None:
        padding = own.eos_token_id if isinstance(own.eos_token_id, int) else own.eos_token_id[0]
    return type(own)(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=padding,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
    )
