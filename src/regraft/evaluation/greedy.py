"""One batch of prompts -> greedy answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.evaluation.judges import TextJudge
from regraft.models.generation import answer_start, greedily, is_plain, with_shared_prefix

# What later tokens may still change at the end of decoded text: a character whose bytes are not all
# there, a space that a tokenizer's clean-up removes before punctuation or a contraction.
_UNSURE = 16
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # such tokens decode together, or each to a replacement


@torch.no_grad()
def answer(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    judge: TextJudge | None = None,
) -> list[str]:
    """The most likely token, again and again.

    Sampling, repetition penalties and the like of the checkpoint's generation config are left out,
    so that two models answer under the same rule.

    Args:
        model: In eval mode.
        processor: Its processor.
        inputs: Of B prompts, padded on the left, on the model's device.
        max_new_tokens: Length of an answer, in tokens.
        judge: End each answer once this judge's verdict on it cannot change any more; only of
            models that `is_plain`.

    Returns:
        B answers, special tokens and surrounding white space removed.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    plain = is_plain(model)
    given = with_shared_prefix(model, inputs) if plain else dict(inputs)
    settled = None
    if judge is not None and plain:  # of others it is not known where in the tokens answers are
        settled = _Settled(tokenizer, judge, inputs["input_ids"].shape[1])
    ends, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    with greedily(model, max_new_tokens, ends, padding), checked_head(model):
        tokens = model.generate(  # type: ignore[operator]
            **given, stopping_criteria=None if settled is None else [settled]
        )
    start = answer_start(model, given["input_ids"], tokens)
    new = tokens[:, start:].tolist()  # [B, new tokens]
    if settled is not None:
        new = [row[: settled.ends.get(b)] for b, row in enumerate(new)]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


class _Settled:
    """A stopping criterion of `generate`: rows end where the verdict on them is certain.

    `ends` holds the number of new tokens of the rows that ended so.
    """

    def __init__(self, tokenizer: Any, judge: TextJudge, start: int) -> None:
        self.ends: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._judge = judge
        self._start = start

    def __call__(self, input_ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        """Which rows are done, `[B]` bool, after the tokens `[B, S]` so far."""
        new = input_ids[:, self._start :].tolist()
        going = [b for b in range(len(new)) if b not in self.ends]
        texts = self._tokenizer.batch_decode([new[b] for b in going], skip_special_tokens=True)
        for b, text in zip(going, texts, strict=True):
            if self._judge.settled(text[:-_UNSURE]) and not self._is_byte(new[b][-1]):
                self.ends[b] = len(new[b])
        done = [b in self.ends for b in range(len(new))]
        return torch.tensor(done, device=input_ids.device)

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None


@contextmanager
def checked_head(model: Any) -> Iterator[None]:
    """Hand the output embedding finite states, in tensors whose strides are those of their shape.

    Of NaN the most likely token is the first of all, and its answers would be counted as any. After
    the prompt `generate` takes `hidden[:, -1:]`, whose rows lie apart in memory. On a CPU
    torch makes a batched product of it if the weight is frozen, and copies the weight for every row
    (bfloat16, vocabulary of 152,000, 32 rows: 53 s and 8 GB). Of one row, too, which
    `Tensor.contiguous` leaves as it is.

    Raises:
        RegraftError: the states of a prompt's last token are NaN or infinite.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def compact(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not args:
            return args
        if not args[0][..., -1, :].isfinite().all():
            folder = getattr(model.config, "name_or_path", "")
            raise RegraftError(
                f"The model{f' of {folder}' if folder else ''} computes NaN or infinity in place "
                "of an answer. Its numbers may be too large for --dtype float16: take bfloat16 or "
                "float32. If not, a number in its config.json is wrong, such as rms_norm_eps or "
                "rope_theta."
            )
        return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])

    with head.register_forward_pre_hook(compact):
        yield
