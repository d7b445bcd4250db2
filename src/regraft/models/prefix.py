"""The tokens that all prompts of a batch begin with, computed once.

A system prompt or a fixed instruction begins every prompt. Its keys and values are computed in one
row, and the others get copies. Each row is laid out as prefix, padding, rest: with the padding
masked and not counted in positions, every token attends to what it would attend to otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.models.architecture import cache_argument

_LEAST = 64  # tokens saved for which the pass over the prefix, in a batch of its own, pays off


@torch.no_grad()
def with_shared_prefix(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `generate` for the same prompts, with what they share computed.

    Only where that is exact: a text-only model whose positions are given to it and whose layers all
    attend to everything before (no sliding window, no recurrence). Everything else is returned as
    it is. Answers are the same up to rounding. The B prompts are padded on the left to S tokens,
    before and after.
    """
    plain = dict(inputs)
    if inputs.keys() != {"input_ids", "attention_mask"} or not _takes_positions(model):
        return plain
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = shared_length(ids, mask)
    if length * (len(ids) - 1) < _LEAST:
        return plain
    ids, mask = prefix_first(ids, mask, length)
    cache = _cache(model)
    if cache is None:
        return plain
    name = cache_argument(model)
    model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1, **{name: cache})
    cache.batch_repeat_interleave(len(ids))
    return {"input_ids": ids, "attention_mask": mask, name: cache}


def shared_length(ids: Tensor, mask: Tensor) -> int:
    """How many real tokens all rows begin with; each keeps one token at least.

    `ids` are `[B, S]` int64; `mask` `[B, S]` is 1 at real tokens, 0 at the padding on the left.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)  # [S]
    start = ids.shape[1] - mask.sum(1)  # [B], the first real token
    most = int(mask.sum(1).min()) - 1
    at = (start[:, None] + steps).clamp(max=ids.shape[1] - 1)
    aligned = ids.gather(1, at)[:, :most]
    return int((aligned == aligned[:1]).all(0).int().cumprod(0).sum())


def prefix_first(ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows of padding, prefix, rest -> prefix, padding, rest; ids and mask, `[B, S]` each."""
    steps = torch.arange(ids.shape[1], device=ids.device)  # [S]
    start = (ids.shape[1] - mask.sum(1))[:, None]  # [B, 1]
    padding = steps - length  # where a place behind the prefix finds its padding
    at = torch.where(steps < length, start + steps, torch.where(padding < start, padding, steps))
    return ids.gather(1, at), mask.gather(1, at)


def _takes_positions(model: nn.Module) -> bool:
    """Whether it is text-only, of transformers' own classes, and is given its positions."""
    if hasattr(model.config, "vision_config"):
        return False
    own = type(model).__module__.startswith("transformers.")
    return own and "position_ids" in inspect.signature(type(model).forward).parameters


def _cache(model: nn.Module) -> Any:
    """An empty cache, None where a layer's is not simply all keys and values."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None
