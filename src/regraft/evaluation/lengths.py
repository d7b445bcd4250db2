"""Prompts that a model has no positions for, found before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from regraft.data.collate import Batch, prompt_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.models.positions import positions_of


def check_lengths(
    config: Any, processor: Any, examples: Sequence[Example], max_new_tokens: int
) -> None:
    """Count the prompts that do not fit with their answers, without what images take.

    Text has no more tokens than bytes: only prompts that could be too long are encoded.

    Raises:
        RegraftError: how many are too long, and the longest.
    """
    positions = positions_of(config)
    if positions is None or not examples:
        return
    room = positions - max_new_tokens
    frame = _tokens(processor, examples[0])  # and more than what the chat template adds
    doubtful = [one for one in examples if frame + len(one.instruction.encode()) > room]
    counts = {one.id: _tokens(processor, one) for one in doubtful}
    if long := {name: count for name, count in counts.items() if count > room}:
        name = max(long, key=long.__getitem__)
        raise RegraftError(
            f"{len(long)} of {len(examples)} prompts are too long for the model{_of(config)}, "
            f"which has {positions:,} positions for a prompt and an answer of up to "
            f"{max_new_tokens:,} tokens: the longest, {name!r}, has {long[name]:,} tokens. "
            f"{_WHAT_TO_DO}"
        )


def check_batch(config: Any, batch: Batch, max_new_tokens: int) -> None:
    """Raise where a prompt of the batch, with its image, does not fit with its answer."""
    positions = positions_of(config)
    if positions is None or "attention_mask" not in batch.inputs:
        return
    for name, count in zip(batch.ids, batch.inputs["attention_mask"].sum(1).tolist(), strict=True):
        if count + max_new_tokens > positions:
            raise RegraftError(
                f"The prompt {name!r} has {count:,} tokens with its image, and the model has "
                f"{positions:,} positions for a prompt and an answer of up to {max_new_tokens:,} "
                f"tokens. {_WHAT_TO_DO}"
            )


_WHAT_TO_DO = "Leave such prompts out or shorten them, or lower --max-new-tokens."


def _of(config: Any) -> str:
    """Where it is, which transformers notes in what it reads."""
    return f" of {folder}" if (folder := getattr(config, "name_or_path", "")) else ""


def _tokens(processor: Any, example: Example) -> int:
    ids = prompt_batch(processor, [replace(example, image=None)]).inputs["input_ids"]
    return int(ids.shape[1])
