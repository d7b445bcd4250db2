"""Answers to the same prompts, by one version of a model or by many.

In batches, shared out over processes, resumable after every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from regraft import ranks
from regraft.data.collate import Batch, batches, prompt_batch
from regraft.data.example import Example
from regraft.evaluation.greedy import answer
from regraft.evaluation.judge import KeywordJudge
from regraft.evaluation.summary import is_compared
from regraft.files import read_json, write_json
from regraft.models.load import placed
from regraft.models.vision import VisionOutput, recorded, replayed, vision_state, without_pixels

MEMO_BYTES = 4 << 30


@dataclass(frozen=True)
class _Chunk:
    """A batch of prompts: their places among all, and the judge whose verdict ends an answer."""

    places: tuple[int, ...]
    judge: KeywordJudge | None


@dataclass(frozen=True)
class _Kept:
    """An encoded batch, and what its images became; the batch has no pixels then."""

    batch: Batch
    vision: VisionOutput | None

    @property
    def bytes(self) -> int:
        held = sum(one.untyped_storage().nbytes() for one in self.batch.inputs.values())
        return held + (0 if self.vision is None else self.vision.bytes)


class Answerer:
    """Puts the same prompts to many versions of a model.

    The first version has them encoded and takes the images through its vision part. Both are kept
    in host memory, up to `memo_bytes`, and handed to later versions with the same vision part
    (pruned, patched or realigned ones, whose text decoder alone differs). What is not kept, for
    want of memory or because the vision part is another one, is made again. Answers are the same
    either way.

    Args:
        processor: Of all versions.
        examples: The prompts.
        batch_size: Prompts in one pass.
        judge: End an answer once this judge's verdict on it is certain, where nothing else is
            measured (harmful prompts and those without a reference). Prompts of that kind are then
            answered in batches of their own.
        memo_bytes: Host memory for what is kept.
    """

    def __init__(
        self,
        processor: Any,
        examples: Sequence[Example],
        *,
        batch_size: int,
        judge: KeywordJudge | None = None,
        memo_bytes: int = MEMO_BYTES,
    ) -> None:
        self.examples = tuple(examples)
        self.kept_bytes = 0
        self._processor = processor
        self._chunks = _chunks(self.examples, batch_size, judge)
        self._memo_bytes = memo_bytes
        self._kept: dict[int, _Kept] = {}
        self._vision: Any = None

    def answers(
        self,
        model: nn.Module,
        *,
        max_new_tokens: int,
        partial: Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Answer every prompt greedily, in order: the most likely token, nothing else.

        Args:
            model: A version of the model, in eval mode.
            max_new_tokens: Length of an answer, in tokens.
            partial: Scratch folder of this very evaluation, seen by all processes. Each finished
                batch is a file in it; after a kill those found there are kept, whichever and
                however many processes wrote them.
            progress: Called with the number of prompts just answered.

        Returns:
            One answer an example, special tokens and surrounding white space removed.
        """
        state = vision_state(model) if self._memo_bytes else None
        if state is None or state != self._vision:
            self._kept, self.kept_bytes, self._vision = {}, 0, state
        found: dict[int, list[str]] = {}
        for i, chunk in ranks.share(list(enumerate(self._chunks))):
            path = None if partial is None else partial / f"answers_{i:05d}.json"
            if path is None:
                found[i] = self._answer(model, i, max_new_tokens)
            elif not path.exists():
                write_json(path, self._answer(model, i, max_new_tokens))
            if progress is not None:
                progress(len(chunk.places))
        if partial is None:
            found = ranks.merged(found)
        else:
            ranks.barrier()
            names = {i: partial / f"answers_{i:05d}.json" for i in range(len(self._chunks))}
            found = {i: read_json(path) for i, path in names.items()}
        texts = {
            place: text
            for i, chunk in enumerate(self._chunks)
            for place, text in zip(chunk.places, found[i], strict=True)
        }
        return [texts[place] for place in range(len(self.examples))]

    def _answer(self, model: nn.Module, i: int, max_new_tokens: int) -> list[str]:
        judge = self._chunks[i].judge
        if i in self._kept:
            kept = self._kept[i]
            inputs = placed(kept.batch, model).inputs
            with replayed(model, kept.vision):
                return answer(model, self._processor, inputs, max_new_tokens, judge)
        examples = [self.examples[place] for place in self._chunks[i].places]
        batch = prompt_batch(self._processor, examples)
        inputs = placed(batch, model).inputs
        if self._vision is None:
            return answer(model, self._processor, inputs, max_new_tokens, judge)
        with recorded(model) as outputs:
            texts = answer(model, self._processor, inputs, max_new_tokens, judge)
        kept = _Kept(batch, None)
        if len(outputs) == 1:
            kept = _Kept(Batch(without_pixels(inputs), None, batch.ids), outputs[0])
        if self.kept_bytes + kept.bytes <= self._memo_bytes:
            self._kept[i] = kept
            self.kept_bytes += kept.bytes
        return texts


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
    """Answer prompts once; see `Answerer`."""
    answerer = Answerer(processor, examples, batch_size=batch_size, memo_bytes=0)
    return answerer.answers(
        model, max_new_tokens=max_new_tokens, partial=partial, progress=progress
    )


def _chunks(
    examples: Sequence[Example], batch_size: int, judge: KeywordJudge | None
) -> list[_Chunk]:
    """All examples in order; with a judge first those that end by it, then the others."""
    places = range(len(examples))
    kinds: list[tuple[Sequence[int], KeywordJudge | None]] = [(places, None)]
    if judge is not None:
        whole = [place for place in places if is_compared(examples[place])]
        kinds = [([place for place in places if place not in set(whole)], judge), (whole, None)]
    return [
        _Chunk(chunk, ender) for members, ender in kinds for chunk in batches(members, batch_size)
    ]
