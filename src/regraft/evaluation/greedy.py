"""Answer one batch of prompts greedily."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.data.collate import tokenizer_of
from regraft.errors import RegraftError
from regraft.evaluation.judges import TextJudge
from regraft.models.generation import answer_start, greedily, is_plain, with_shared_prefix

# Characters at the end of decoded text that later tokens may still change: one whose bytes are
# incomplete, a space that a tokenizer's clean-up removes before punctuation or a contraction.
_UNSURE = 16
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # such tokens decode together, or each to U+FFFD


@torch.no_grad()
def answer(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    judge: TextJudge | None = None,
) -> list[str]:
    """Generate answers from the most likely token at every step.

    Sampling, repetition penalties and similar settings of the checkpoint's generation config are
    ignored, so that two models answer under the same rule.

    Args:
        model: In eval mode.
        inputs: Of B prompts, padded on the left, on the model's device.
        judge: End each answer once this judge's verdict on it is certain; ignored unless the model
            `is_plain`.

    Returns:
        B answers, without special tokens and surrounding white space.
    """
    tokenizer = tokenizer_of(processor)
    plain = is_plain(model)
    prompts = with_shared_prefix(model, inputs) if plain else dict(inputs)
    settled = None
    if judge is not None and plain:  # for others the answer's first token is not known yet
        settled = _Settled(tokenizer, judge, inputs["input_ids"].shape[1])
    ends, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    with greedily(model, max_new_tokens, ends, padding), checked_head(model):
        tokens = model.generate(  # type: ignore[operator]
            **prompts, stopping_criteria=None if settled is None else [settled]
        )
    start = answer_start(model, prompts["input_ids"], tokens)
    new = tokens[:, start:].tolist()  # [B, new tokens]
    if settled is not None:
        new = [row[: settled.ends.get(b)] for b, row in enumerate(new)]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def location(config: Any) -> str:
    """The model's folder, as transformers records it in a config, for messages; "" if unknown."""
    return f" of {folder}" if (folder := getattr(config, "name_or_path", "")) else ""


class _Settled:
    """A stopping criterion for `generate`: a row ends once the verdict on it is certain.

    `ends` maps each row that ended this way to its number of new tokens.
    """

    def __init__(self, tokenizer: Any, judge: TextJudge, start: int) -> None:
        self.ends: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._judge = judge
        self._start = start

    def __call__(self, input_ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        """Which rows are done, `[B]` bool, after the tokens `[B, S]` so far."""
        new = input_ids[:, self._start :].tolist()
        unfinished = [b for b in range(len(new)) if b not in self.ends]
        texts = self._tokenizer.batch_decode([new[b] for b in unfinished], skip_special_tokens=True)
        for b, text in zip(unfinished, texts, strict=True):
            if self._judge.settled(text[:-_UNSURE]) and not self._is_byte(new[b][-1]):
                self.ends[b] = len(new[b])
        done = [b in self.ends for b in range(len(new))]
        return torch.tensor(done, device=input_ids.device)

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None


@contextmanager
def checked_head(model: Any) -> Iterator[None]:
    """Give the output embedding contiguous inputs, and stop if they are not finite.

    If they were NaN, the first token of the vocabulary would be the most likely, and such answers
    would be judged like any others.

    After the prompt `generate` takes `hidden[:, -1:]`, whose rows are not adjacent in memory. If
    the weight is frozen, torch on a CPU then computes a batched product and copies the weight for
    every row (bfloat16, vocabulary of 152,000, 32 rows: 53 s and 8 GB). It does so for one row too,
    which `Tensor.contiguous` returns unchanged; hence the clone.

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
            raise RegraftError(
                f"The model{location(model.config)} computes NaN or infinity in place "
                "of an answer. Its numbers may be too large for --dtype float16: use bfloat16 or "
                "float32. Otherwise a number in its config.json is wrong, such as rms_norm_eps or "
                "rope_theta."
            )
        return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])

    with head.register_forward_pre_hook(compact):
        yield
