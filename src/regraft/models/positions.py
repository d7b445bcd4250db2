"""How many tokens a model has positions for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "llama3")


def positions_of(config: Any) -> int | None:
    """Tokens of a prompt and its answer together, None where no config sets a limit.

    That is `max_position_embeddings` of the text part, or more where rotary embeddings are scaled:
    some checkpoints state the length before scaling (Qwen2.5 with YaRN), others the one after it
    (Llama 3.1). Of the two the longer is taken, so that nothing is refused that the model can read.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    own = getattr(text, "original_max_position_embeddings", None)
    return max(stated, *(_scaled(one, own or stated) for one in _ropes(text)), 0)


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """How rotary embeddings are scaled; of some models for each type of layer."""
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
