"""Answer the same prompts with one version of a model or with many.

Batches hold prompts of similar length, are divided among processes, and need not be repeated after
a kill. Images are decoded in threads while the model answers the previous batch. Prompts that
exceed the model's positions are found before it answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import nn

from regraft.data.collate import Batch, batches, decoded, prompt_batch
from regraft.data.example import Example
from regraft.data.images import length_class
from regraft.distributed import resumable_map
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer, location
from regraft.evaluation.judges import TextJudge
from regraft.evaluation.summary import is_compared
from regraft.models.generation import positions_of, takes_padding
from regraft.models.load import placed
from regraft.models.vision import VisionOutput, recorded, replayed, vision_state, without_pixels
from regraft.progress import Advance, expect

_ADVICE = "Leave such prompts out or shorten them, or lower --max-new-tokens."
MEMO_BYTES = 4 << 30
_IMAGE_TOKENS = 256  # assumed for an image in estimates of compute
Item = TypeVar("Item")
Made = TypeVar("Made")


def check_lengths(
    config: Any, processor: Any, examples: Sequence[Example], max_new_tokens: int
) -> None:
    """Raise where prompts and their answers exceed the model's positions, images not counted.

    Text has at most one token per byte: only prompts that could be too long are encoded.

    Raises:
        RegraftError: some are too long; it says how many, and names the longest.
    """
    positions = positions_of(config)
    if positions is None or not examples:
        return
    room = positions - max_new_tokens
    kinds = {bool(one.system): one for one in examples}  # a template may have a default prompt
    template = max(_tokens(processor, one) for one in kinds.values())  # no fewer than it adds
    doubtful = [one for one in examples if template + len(_text(one).encode()) > room]
    counts = {one.id: _tokens(processor, one) for one in doubtful}
    if long := {name: count for name, count in counts.items() if count > room}:
        name = max(long, key=long.__getitem__)
        raise RegraftError(
            f"{len(long)} of {len(examples)} prompts are too long for the model{location(config)},"
            f" which has {positions:,} positions for a prompt and an answer of up to "
            f"{max_new_tokens:,} tokens: the longest, {name!r}, has {long[name]:,} tokens. "
            f"{_ADVICE}"
        )


def check_batch(config: Any, batch: Batch, max_new_tokens: int) -> None:
    """Raise where a prompt of the batch, image included, and its answer exceed the positions."""
    positions = positions_of(config)
    if positions is None or "attention_mask" not in batch.inputs:
        return
    for name, count in zip(batch.ids, batch.inputs["attention_mask"].sum(1).tolist(), strict=True):
        if count + max_new_tokens > positions:
            raise RegraftError(
                f"The prompt {name!r} has {count:,} tokens with its image, and the model has "
                f"{positions:,} positions for a prompt and an answer of up to {max_new_tokens:,} "
                f"tokens. {_ADVICE}"
            )


def _tokens(processor: Any, example: Example) -> int:
    ids = prompt_batch(processor, [replace(example, image=None)]).inputs["input_ids"]
    return int(ids.shape[1])


def _text(example: Example) -> str:
    return example.system + example.instruction


@dataclass(frozen=True)
class _Chunk:
    """A batch of prompts: their indices, and the judge whose certain verdict ends an answer."""

    indices: tuple[int, ...]
    judge: TextJudge | None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class _Kept:
    """An encoded batch and, in place of its pixels, the vision part's output."""

    batch: Batch
    vision: VisionOutput | None

    @property
    def bytes(self) -> int:
        inputs = sum(one.untyped_storage().nbytes() for one in self.batch.inputs.values())
        return inputs + (0 if self.vision is None else self.vision.bytes)


class Answerer:
    """Answers the same prompts with many versions of a model.

    Encoded batches and outputs of the vision part are kept in host memory, up to `memo_bytes`, for
    later versions with the same vision part (pruned, patched or realigned ones, which differ in the
    text decoder only). What does not fit, or comes from another vision part, is computed again.
    Answers are the same either way.

    Args:
        judge: End an answer once this judge's verdict on it is certain, if nothing else is measured
            (harmful prompts and those without a reference). These prompts then form batches of
            their own.
        memo_bytes: Limit on the memory for batches and outputs.
    """

    def __init__(
        self,
        processor: Any,
        examples: Sequence[Example],
        *,
        batch_size: int,
        judge: TextJudge | None = None,
        memo_bytes: int = MEMO_BYTES,
    ) -> None:
        self.examples = tuple(examples)
        self.kept_bytes = 0
        self._processor = processor
        self._chunks = _chunks(self.examples, batch_size, judge)
        self._memo_bytes = memo_bytes
        self._kept: dict[_Chunk, _Kept] = {}
        self._vision: Any = None

    def answers(
        self,
        model: nn.Module,
        *,
        max_new_tokens: int,
        partial: Path | None = None,
        advance: Advance = lambda _: None,
    ) -> list[str]:
        """Answer every prompt greedily, see `greedy.answer`.

        Args:
            model: A version of the model, in eval mode.
            partial: Scratch folder of this evaluation only, shared by all processes. Each finished
                batch is a file in it; after a kill finished batches are read from it, no matter how
                many processes wrote them.
            advance: Called with the `answering_tokens` of the prompts just answered.

        Returns:
            One answer per example, in order, without special tokens and surrounding white space.
        """
        state = vision_state(model) if self._memo_bytes else None
        if state is None or state != self._vision:
            self._kept, self.kept_bytes, self._vision = {}, 0, state

        def answer_chunks(chunks: Sequence[_Chunk]) -> Iterator[tuple[int, list[str]]]:
            for i, (chunk, images) in enumerate(prefetch(self._images, chunks)):
                yield i, self._answer(model, chunk, max_new_tokens, images)
                advance(answering_tokens(self._examples(chunk), max_new_tokens))

        def skip(chunk: _Chunk) -> None:
            expect(advance, -answering_tokens(self._examples(chunk), max_new_tokens))

        answered = resumable_map(self._chunks, answer_chunks, partial, "answers", list[str], skip)
        by_index = {
            i: text
            for chunk, texts in zip(self._chunks, answered, strict=True)
            for i, text in zip(chunk.indices, texts, strict=True)
        }
        return [by_index[i] for i in range(len(self.examples))]

    def _images(self, chunk: _Chunk) -> dict[Path, Image.Image]:
        """Decode a batch's images, unless the vision part's output for them is kept."""
        return {} if chunk in self._kept else decoded(self._examples(chunk))

    def _examples(self, chunk: _Chunk) -> list[Example]:
        return [self.examples[i] for i in chunk.indices]

    def _answer(
        self,
        model: nn.Module,
        chunk: _Chunk,
        max_new_tokens: int,
        images: Mapping[Path, Image.Image],
    ) -> list[str]:
        def answers(batch: Batch) -> list[str]:
            check_batch(model.config, batch, max_new_tokens)
            inputs = placed(batch, model).inputs
            return answer(model, self._processor, inputs, max_new_tokens, chunk.judge)

        if (kept := self._kept.get(chunk)) is not None:
            with replayed(model, kept.vision):
                return answers(kept.batch)
        if not takes_padding(model):
            alone = (prompt_batch(self._processor, [e], images) for e in self._examples(chunk))
            return [text for batch in alone for text in answers(batch)]
        batch = prompt_batch(self._processor, self._examples(chunk), images)
        if self._vision is None:
            return answers(batch)
        with recorded(model) as outputs:
            texts = answers(batch)
        self._keep(chunk, batch, outputs)
        return texts

    def _keep(self, chunk: _Chunk, batch: Batch, outputs: Sequence[VisionOutput]) -> None:
        """Keep a batch for later versions; without its pixels if one vision call took them all."""
        kept = _Kept(batch, None)
        if len(outputs) == 1:
            kept = _Kept(replace(batch, inputs=without_pixels(batch.inputs)), outputs[0])
        if self.kept_bytes + kept.bytes <= self._memo_bytes:
            self._kept[chunk] = kept
            self.kept_bytes += kept.bytes


def answering_tokens(examples: Sequence[Example], max_new_tokens: int) -> int:
    """Estimate the tokens that answering processes: the prompts and answers of full length.

    Nothing is encoded for it: four bytes of text count as a token, an image as 256.
    """
    prompts = (
        len(_text(one).encode()) // 4 + (_IMAGE_TOKENS if one.image else 0) for one in examples
    )
    return sum(prompts) + max_new_tokens * len(examples)


def generate(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    partial: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = lambda _: None,
) -> list[str]:
    """Answer prompts once; see `Answerer`."""
    answerer = Answerer(processor, examples, batch_size=batch_size, memo_bytes=0)
    return answerer.answers(model, max_new_tokens=max_new_tokens, partial=partial, advance=advance)


def _chunks(examples: Sequence[Example], batch_size: int, judge: TextJudge | None) -> list[_Chunk]:
    """Batches of all examples; with a judge, first of those whose answers it may end.

    Within a kind, prompts without an image come first, then those with smaller images, and among
    similar images those with shorter text, to keep padding short.
    """
    indices = range(len(examples))
    kinds: list[tuple[Sequence[int], TextJudge | None]] = [(indices, None)]
    if judge is not None:
        compared = {i for i in indices if is_compared(examples[i])}
        kinds = [([i for i in indices if i not in compared], judge), (sorted(compared), None)]
    return [
        _Chunk(chunk, ender)
        for members, ender in kinds
        for image in (False, True)
        for chunk in batches(_by_length(examples, members, image), batch_size)
    ]


def _by_length(examples: Sequence[Example], members: Sequence[int], image: bool) -> list[int]:
    selected = [i for i in members if (examples[i].image is not None) == image]
    return sorted(selected, key=lambda i: length_class(examples[i]))


def prefetch(
    make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2
) -> Iterator[tuple[Item, Made]]:
    """Yield (item, make(item)) in order, with up to `depth` items computed ahead in threads.

    Raises:
        Exception: whatever `make` raises, when its item's turn comes.
    """
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    with ThreadPoolExecutor(depth) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(make, item)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:  # also if `make` or the consumer raised
            pool.shutdown(cancel_futures=True)
