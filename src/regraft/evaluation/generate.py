"""Greedy answers in batches, shared out over processes, resumable after every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft import ranks
from regraft.data.collate import batches, prompt_batch
from regraft.data.example import Example
from regraft.files import read_json, write_json
from regraft.models.load import placed


def generate(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    partial: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer every prompt greedily, in order: the most likely token, nothing else.

    Sampling, repetition penalties and the like of the checkpoint's generation config are left out,
    so that two models answer under the same rule.

    Each finished batch is a file in `partial`; after a kill those found there are kept, whichever
    and however many processes wrote them.

    Args:
        model: In eval mode.
        processor: Its processor.
        examples: Prompts.
        partial: Scratch folder of this very evaluation, seen by all processes.
        max_new_tokens: Length of an answer, in tokens.
        batch_size: Prompts in one pass.
        progress: Called with the number of prompts just answered.

    Returns:
        One answer an example, special tokens and surrounding white space removed.
    """
    chunks = list(enumerate(batches(examples, batch_size)))
    for i, chunk in ranks.share(chunks):
        path = _path(partial, i)
        if not path.exists():
            write_json(path, _answer(model, processor, chunk, max_new_tokens))
        if progress is not None:
            progress(len(chunk))
    ranks.barrier()
    return [answer for i, _ in chunks for answer in read_json(_path(partial, i))]


def _path(partial: Path, batch: int) -> Path:
    return partial / f"answers_{batch:05d}.json"


@torch.no_grad()
def _answer(
    model: nn.Module, processor: Any, examples: Sequence[Example], max_new_tokens: int
) -> list[str]:
    inputs = placed(prompt_batch(processor, examples), model).inputs
    tokenizer = getattr(processor, "tokenizer", processor)
    with _plain_greedy(model, tokenizer, max_new_tokens):
        tokens = model.generate(**inputs)  # type: ignore[operator]
    new = tokens[:, inputs["input_ids"].shape[1] :]  # [B, new tokens]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@contextmanager
def _plain_greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = type(own)(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=own.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
