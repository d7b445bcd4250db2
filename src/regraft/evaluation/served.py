"""Answers by a model behind a server: several requests at a time, resumable after every answer."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags

from regraft.data.collate import batches
from regraft.data.example import Example
from regraft.data.images import open_image, opened
from regraft.distributed import resumable_map
from regraft.errors import PassingError
from regraft.evaluation.chat_server import ChatServer, Reply, user_message
from regraft.evaluation.server_words import FILTERED
from regraft.progress import Advance, expect

Item = TypeVar("Item")
Made = TypeVar("Made")
_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png"}  # which every server reads


def served_answers(
    server: ChatServer,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    concurrency: int,
    partial: Path,
    advance: Advance,
) -> list[Reply]:
    """Ask for every answer, greedily where the model lets one, in full; white space removed.

    Args:
        server: Of the model.
        examples: The prompts.
        max_new_tokens: Length of an answer, in tokens.
        concurrency: Requests at a time.
        partial: Scratch folder of this very evaluation; an answer found there is not asked for.
        advance: Called with the number of prompts just answered.

    Returns:
        One reply an example, in order.

    Raises:
        PassingError: see `ChatServer.reply`; an answer was cut short. It names the prompt.
    """

    def answered(prompt: Sequence[Example]) -> dict[str, Any]:
        return asdict(_answer(server, prompt[0], max_new_tokens))

    def made(prompts: Sequence[Sequence[Example]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for done in as_they_come(answered, prompts, concurrency):
            yield done
            advance(1)

    found = resumable_map(
        list(batches(examples, 1)), made, partial, "served", lambda _: expect(advance, -1)
    )
    return [Reply(**one) for one in found]


def counts(replies: Sequence[Reply]) -> dict[str, int]:
    """How many are not what was asked for; nothing where all are.

    "filtered" ones were withheld or cut by the server's content filter; "unfinished" ones are
    empty, since the model thought until its tokens were spent; "sampled" ones are not greedy.
    """
    found = {
        "filtered": sum(one.ended == FILTERED for one in replies),
        "unfinished": sum(one.ended == "length" and not one.text for one in replies),
        "sampled": sum(not one.greedy for one in replies),
    }
    return {kind: count for kind, count in found.items() if count}


def explained(counted: Mapping[str, int]) -> list[str]:
    """What `counts` found, in a sentence each."""
    said = {
        "filtered": "withheld or cut by the server's content filter; empty ones count as "
        "degenerate, neither as refusals nor as successful attacks",
        "unfinished": "empty, since the model thought until its tokens were spent: give more by "
        "--max-new-tokens",
        "sampled": "not greedy, since the model takes no temperature: another evaluation may give "
        "others",
    }
    return [f"Answers {said[kind]}: {count:,}." for kind, count in counted.items() if kind in said]


def as_they_come(
    make: Callable[[Item], Made], items: Sequence[Item], workers: int
) -> Iterator[tuple[int, Made]]:
    """(Place, what `make` made of the item there) as they are done, `workers` at a time.

    Where something is raised, here or by whoever takes them, no further item is begun, and nobody
    waits for those at work: a server may not answer for long.

    Raises:
        Exception: the first that `make` raises.
    """
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Made | None, Exception | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (place := waiting.get()) is not None and not stopped.is_set():
            try:
                done.put((place, make(items[place]), None))
            except Exception as error:
                stopped.set()
                done.put((place, None, error))

    for place in range(len(items)):
        waiting.put(place)
    try:
        for _ in range(min(workers, len(items))):
            waiting.put(None)
            threading.Thread(target=work, daemon=True).start()
        for _ in items:
            place, made, error = done.get()
            if error is not None:
                raise error
            yield place, made  # type: ignore[misc]  # made, since nothing was raised
    finally:
        stopped.set()


def _answer(server: ChatServer, example: Example, max_new_tokens: int) -> Reply:
    try:
        image = portable(example.image) if example.image else None
        reply = server.reply([user_message(example.instruction, image)], max_new_tokens)
    except PassingError as error:
        raise PassingError(f"Prompt {example.id!r}: {error}") from None
    # some count the last token and some do not
    if reply.ended == "length" and reply.tokens is not None and reply.tokens + 1 < max_new_tokens:
        raise PassingError(
            f"The server cut the answer to {example.id!r} after {reply.tokens} of "
            f"{max_new_tokens} tokens: with its prompt it is longer than the server takes. Start "
            "the server with room for more (vLLM: --max-model-len, llama.cpp: --ctx-size, Ollama: "
            "OLLAMA_CONTEXT_LENGTH), or lower --max-new-tokens."
        )
    return Reply(reply.text.strip(), reply.ended, reply.greedy, reply.tokens)


def portable(path: Path) -> tuple[str, bytes]:
    """The kind and bytes of an image that any server decodes to the pixels of `open_image`.

    Those of the file itself where it is a plain JPEG or PNG; else a PNG of the pixels.

    Raises:
        RegraftError: see `open_image`.
    """
    pixels = open_image(path)
    with opened(path) as image:
        plain = (
            image.format in _FORMATS
            and image.mode == "RGB"
            and not image.has_transparency_data
            and getattr(image, "n_frames", 1) == 1
            and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        )
        kind = _FORMATS.get(image.format or "", "")
    if plain:
        return kind, path.read_bytes()
    written = io.BytesIO()
    pixels.save(written, "PNG")
    return "image/png", written.getvalue()
