"""How a model class generates answers, its context length, and sharing a batch's common prefix.

All prompts often begin alike, with a system prompt or a fixed instruction. The keys and values of
this prefix are computed for one row and copied to the others. Each row is laid out as prefix,
padding, rest: padding is masked and not counted in positions, so every token attends to the same
tokens as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.models.architecture import cache_argument

# Types that count padding in positions, or attend to it: found by trying all types of transformers
# 5.24 (tests/types_table.py; causal language models in the same way). Phi-4 attends causally within
# an image that has no padding, unless another image in the batch has some.
_CHANGED_BY_PADDING = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "blip", "deepseek_v4"),
    *("florence2", "git", "hy_v4", "kosmos-2", "kosmos-2.5", "marian", "mbart", "mvp"),
    *("paligemma", "pegasus", "phi4_multimodal", "plbart", "prophetnet", "roformer", "trocr"),
    "whisper",
)
_LEAST = 64  # tokens saved, from which on the separate pass over the prefix pays off
_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "llama3")


def is_plain(model: nn.Module) -> bool:
    """Whether transformers' own `generate` appends its answers to the prompt.

    False for models whose encoder reads the prompt, and for those with their own `generate`, which
    may return the answer alone.
    """
    from transformers import GenerationMixin

    generate = getattr(type(model), "generate", None)
    return generate is GenerationMixin.generate and not encodes(model)


def takes_padding(model: nn.Module) -> bool:
    """Whether a prompt's answer is the same alone and in a batch with padding."""
    return getattr(model.config, "model_type", "") not in _CHANGED_BY_PADDING


def encodes(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt, and answers begin with the decoder's start token."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def answer_start(model: nn.Module, prompt: Tensor, tokens: Tensor) -> int:
    """Index of the answers' first token in `tokens` `[B, T]`, as `generate` returned them.

    They hold the `prompt` `[B, S]` and answers; a start token and answers, if an encoder reads the
    prompt; or perhaps answers alone, if the model has its own `generate` (a prompt is longer than
    two tokens, and no answer repeats all of it).
    """
    length = prompt.shape[1]
    if encodes(model):
        return 1
    if is_plain(model):
        return length
    for start in (length, length - 1):  # BLIP replaces the first token and drops the last one
        if start and torch.equal(tokens[:, 1:start], prompt[:, 1:start]):
            return start
    return 0


@contextmanager
def greedily(
    model: nn.Module, max_new_tokens: int, ends: int | None, padding: int | None
) -> Iterator[None]:
    """Make `generate` greedy inside the block, whatever the checkpoint's generation config says.

    Sampling, penalties and the like are dropped; special tokens stay. This includes inner models,
    whose `generate` some classes call.

    Args:
        ends: The token that ends an answer, if the checkpoint names none.
        padding: The token after an ended answer; None for the first token that ends one.
    """
    modules: list[Any] = list(model.modules())
    parts = [one for one in modules if getattr(one, "generation_config", None) is not None]
    before = [one.generation_config for one in parts]
    for one, own in zip(parts, before, strict=True):
        one.generation_config = _greedy(own, max_new_tokens, ends, padding)
    try:
        yield
    finally:
        for one, own in zip(parts, before, strict=True):
            one.generation_config = own


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


@torch.no_grad()
def with_shared_prefix(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `generate` with the common prefix of the prompts in the cache.

    Applied only where it is exact: to a text-only model that takes position ids and whose layers
    all attend to every earlier token (no sliding window, no recurrence). Other inputs are returned
    unchanged. Answers are the same up to rounding. The B prompts are padded on the left to S
    tokens.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    plain = dict(inputs)
    if inputs.keys() != {"input_ids", "attention_mask"} or not _takes_positions(model):
        return plain
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = shared_length(ids, mask)
    if length * (len(ids) - 1) < _LEAST:
        return plain
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return plain  # a layer caches anything but all keys and values
    ids, mask = prefix_first(ids, mask, length)
    name = cache_argument(model)
    model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1, **{name: cache})
    cache.batch_repeat_interleave(len(ids))
    return {"input_ids": ids, "attention_mask": mask, name: cache}


def shared_length(ids: Tensor, mask: Tensor) -> int:
    """Length of the common prefix of all rows, leaving at least one token in each.

    `ids` are `[B, S]` int64; `mask` `[B, S]` is 1 at real tokens, 0 at the padding on the left.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)  # [S]
    start = ids.shape[1] - mask.sum(1)  # [B], the first real token
    longest = int(mask.sum(1).min()) - 1
    at = (start[:, None] + steps).clamp(max=ids.shape[1] - 1)
    aligned = ids.gather(1, at)[:, :longest]
    return int((aligned == aligned[:1]).all(0).int().cumprod(0).sum())


def prefix_first(ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Reorder rows of padding, prefix, rest to prefix, padding, rest; ids and mask, `[B, S]`."""
    steps = torch.arange(ids.shape[1], device=ids.device)  # [S]
    start = (ids.shape[1] - mask.sum(1))[:, None]  # [B, 1]
    padding = steps - length  # source index for positions after the prefix that become padding
    at = torch.where(steps < length, start + steps, torch.where(padding < start, padding, steps))
    return ids.gather(1, at), mask.gather(1, at)


def _takes_positions(model: nn.Module) -> bool:
    """Whether it is a text-only model of transformers' own classes that takes position ids."""
    if hasattr(model.config, "vision_config"):
        return False
    own = type(model).__module__.startswith("transformers.")
    return own and "position_ids" in inspect.signature(type(model).forward).parameters


def positions_of(config: Any) -> int | None:
    """The context length in tokens, prompt and answer together; None if no config limits it.

    It is `max_position_embeddings` of the text part, or longer where rotary embeddings are scaled:
    some checkpoints state the length before scaling (Qwen2.5 with YaRN), others after it (Llama
    3.1). The longer one counts, so that nothing the model can read is refused.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    own = getattr(text, "original_max_position_embeddings", None)
    return max(stated, *(_scaled(one, own or stated) for one in _ropes(text)), 0)


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary embeddings; some models have separate ones per layer type."""
    stated = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(stated, Mapping):
        return
    yield stated
    yield from (one for one in stated.values() if isinstance(one, Mapping))


def _scaled(rope: Mapping[str, Any], stated: int) -> int:
    factor = rope.get("factor")
    if (rope.get("rope_type") or rope.get("type")) not in _STRETCHED or factor is None:
        return 0
    return int(float(factor) * (rope.get("original_max_position_embeddings") or stated))
