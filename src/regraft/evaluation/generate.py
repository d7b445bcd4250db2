"""Greedy answers in batches, resumable after every batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.data.collate import batches, prompt_batch
from regraft.data.example import Example
from regraft.files import disk_errors, write_text
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

    Finished batches are appended to `partial` (JSON lines); after a kill the whole batches found
    there are kept, so that the answers do not depend on where it was interrupted.

    Args:
        model: In eval mode.
        processor: Its processor.
        examples: Prompts.
        partial: Scratch file of this very evaluation.
        max_new_tokens: Length of an answer, in tokens.
        batch_size: Prompts in one pass.
        progress: Called with the number of prompts just answered.

    Returns:
        One answer an example, special tokens and surrounding white space removed.
    """
    answers = _recall(partial, examples, batch_size)
    if progress is not None:
        progress(len(answers))
    write_text(partial, "".join(map(_line, examples, answers)))
    with disk_errors(partial), partial.open("a", encoding="utf-8") as lines:
        for chunk in batches(examples[len(answers) :], batch_size):
            texts = _answer(model, processor, chunk, max_new_tokens)
            lines.writelines(map(_line, chunk, texts))
            lines.flush()
            os.fsync(lines.fileno())
            answers += texts
            if progress is not None:
                progress(len(chunk))
    return answers


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


def _recall(partial: Path, examples: Sequence[Example], batch_size: int) -> list[str]:
    if not partial.exists():
        return []
    answers = []
    for line, example in zip(partial.read_bytes().split(b"\n"), examples, strict=False):
        try:
            row = json.loads(line)
        except ValueError:  # the line being written when the run was killed
            break
        if row["id"] != example.id:
            break
        answers.append(row["answer"])
    whole = (
        len(answers) if len(answers) == len(examples) else len(answers) // batch_size * batch_size
    )
    return answers[:whole]


def _line(example: Example, answer: str) -> str:
    return json.dumps({"id": example.id, "answer": answer}) + "\n"
