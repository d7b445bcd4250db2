"""Answers to the same prompts, by one version of a model or by many.

In batches of prompts of like length, shared out over processes, resumable after every batch. Images
are decoded in threads while the model answers the batch before. Prompts for which a model has no
positions are found before it answers.
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
from regraft.evaluation.greedy import answer
from regraft.evaluation.judges import TextJudge
from regraft.evaluation.summary import is_compared
from regraft.models.generation import positions_of, takes_padding
from regraft.models.load import placed
from regraft.models.vision import VisionOutput, recorded, replayed, vision_state, without_pixels
from regraft.progress import Advance, expect

_WHAT_TO_DO = "Leave such prompts out or shorten them, or lower --max-new-tokens."
MEMO_BYTES = 4 << 30
_IMAGE_TOKENS = 256
Item = TypeVar("Item")
Made = TypeVar("Made")


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


def _check_tokens(config: Any, batch: Batch) -> None:
    """Raise where a token has no embedding; only of a batch that failed: some tokens need none."""
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", 2**63 - 1)
    ids = batch.inputs["input_ids"]
    for row, place in (ids >= rows).nonzero().tolist()[:1]:
        raise RegraftError(
            f"tokenizer.json makes the token {int(ids[row, place]):,} of the prompt "
            f"{batch.ids[row]!r}, and the model{_of(config)} has {rows:,} embeddings. Take the "
            "tokenizer of the base model."
        )


def _of(config: Any) -> str:
    """Where it is, which transformers notes in what it reads."""
    return f" of {folder}" if (folder := getattr(config, "name_or_path", "")) else ""


def _tokens(processor: Any, example: Example) -> int:
    ids = prompt_batch(processor, [replace(example, image=None)]).inputs["input_ids"]
    return int(ids.shape[1])


@dataclass(frozen=True)
class _Chunk:
    """A batch of prompts: their places among all, and the judge whose verdict ends an answer."""

    places: tuple[int, ...]
    judge: TextJudge | None

    def __len__(self) -> int:
        return len(self.places)


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
        """Answer every prompt greedily, in order: the most likely token, nothing else.

        Args:
            model: A version of it, in eval mode.
            max_new_tokens: Length of an answer.
            partial: Scratch folder of this very evaluation, seen by all processes. Each finished
                batch is a file in it; after a kill those found there are kept, whichever and
                however many processes wrote them.
            advance: Called with the `answering_tokens` of the prompts just answered.

        Returns:
            One answer an example, special tokens and surrounding white space removed.
        """
        state = vision_state(model) if self._memo_bytes else None
        if state is None or state != self._vision:
            self._kept, self.kept_bytes, self._vision = {}, 0, state

        def made(chunks: Sequence[_Chunk]) -> Iterator[tuple[int, list[str]]]:
            for place, (chunk, images) in enumerate(prefetch(self._images, chunks)):
                yield place, self._answer(model, chunk, max_new_tokens, images)
                advance(answering_tokens(self._examples(chunk), max_new_tokens))

        def kept(chunk: _Chunk) -> None:
            expect(advance, -answering_tokens(self._examples(chunk), max_new_tokens))

        found = resumable_map(self._chunks, made, partial, "answers", kept)
        answered = {
            place: text
            for chunk, texts in zip(self._chunks, found, strict=True)
            for place, text in zip(chunk.places, texts, strict=True)
        }
        return [answered[place] for place in range(len(self.examples))]

    def _images(self, chunk: _Chunk) -> dict[Path, Image.Image]:
        """Of a batch, unless what became of them is kept."""
        return {} if chunk in self._kept else decoded(self._examples(chunk))

    def _examples(self, chunk: _Chunk) -> list[Example]:
        return [self.examples[place] for place in chunk.places]

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
            try:
                return answer(model, self._processor, inputs, max_new_tokens, chunk.judge)
            except IndexError:
                _check_tokens(model.config, batch)
                raise

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
        """Keep a batch for later versions, without pixels where its images went in at once."""
        kept = _Kept(batch, None)
        if len(outputs) == 1:
            kept = _Kept(replace(batch, inputs=without_pixels(batch.inputs)), outputs[0])
        if self.kept_bytes + kept.bytes <= self._memo_bytes:
            self._kept[chunk] = kept
            self.kept_bytes += kept.bytes


def answering_tokens(examples: Sequence[Example], max_new_tokens: int) -> int:
    """What answering takes, in tokens: those of the prompts, about, and of whole answers.

    Text counts a token for four bytes, and an image for 256 tokens, so that nothing is encoded.
    """
    prompts = (
        len(one.instruction.encode()) // 4 + (_IMAGE_TOKENS if one.image else 0) for one in examples
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
    """All examples; with a judge first those that end by it, then the others.

    Of each kind those without image come first, then those with smaller images, and of like images
    those with shorter text: like stands beside like, so that little is padded.
    """
    places = range(len(examples))
    kinds: list[tuple[Sequence[int], TextJudge | None]] = [(places, None)]
    if judge is not None:
        whole = {place for place in places if is_compared(examples[place])}
        kinds = [([place for place in places if place not in whole], judge), (sorted(whole), None)]
    return [
        _Chunk(chunk, ender)
        for members, ender in kinds
        for image in (False, True)
        for chunk in batches(_by_length(examples, members, image), batch_size)
    ]


def _by_length(examples: Sequence[Example], members: Sequence[int], image: bool) -> list[int]:
    fit = [place for place in members if (examples[place].image is not None) == image]
    return sorted(fit, key=lambda place: length_class(examples[place]))


def prefetch(
    make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2
) -> Iterator[tuple[Item, Made]]:
    """Each item with what `make` made of it, in order; up to `depth` items are made ahead.

    Raises:
        Exception: what `make` raises, when its item's turn comes.
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
        finally:  # where something was raised, here or by whoever takes the items
            for _, future in waiting:
                future.cancel()
