"""Get answers from a model behind a server: several requests at a time, resumable after each."""

from __future__ import annotations

import io
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from PIL import ExifTags

from regraft.data.example import Example
from regraft.data.images import open_image, opened
from regraft.disk.parsing import shown
from regraft.distributed import resumable_map
from regraft.errors import PassingError
from regraft.evaluation.chat_server import ChatServer, Reply, user_message
from regraft.evaluation.server_words import FILTERED
from regraft.progress import Advance, expect

Item = TypeVar("Item")
Made = TypeVar("Made")
_ENDED = "finish_reason "
# of OpenAI's servers and those like them, TGI and Anthropic; "" is none
_KNOWN = {"", "stop", "length", "eos", "eos_token", "stop_sequence", "end_turn", FILTERED}
_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png"}  # every server reads these


def served_answers(
    server: ChatServer,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    concurrency: int,
    partial: Path,
    advance: Advance,
) -> list[Reply]:
    """Request every answer in full, greedily unless the model refuses a temperature.

    Replies are in order, without surrounding white space. Answers found in the scratch folder
    `partial`, which is for this evaluation only, are not requested. `advance` is called with the
    number of prompts just answered.

    Raises:
        PassingError: see `ChatServer.reply`; or an answer was cut short. It names the prompt.
    """

    def answer(example: Example) -> dict[str, Any]:
        return asdict(_answer(server, example, max_new_tokens))

    def answer_all(missing: Sequence[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for done in as_they_come(answer, missing, concurrency):
            yield done
            advance(1)

    return resumable_map(
        examples, answer_all, partial, "served", Reply, lambda _: expect(advance, -1)
    )


def counts(replies: Sequence[Reply]) -> dict[str, int]:
    """Count the replies that are not complete greedy answers, by kind; {} if all are.

    "filtered" ones were withheld or cut by the server's content filter; "unfinished" ones are
    empty, since the model spent all its tokens on thinking; "sampled" ones are not greedy. Those
    with an unknown finish_reason are counted by "finish_reason " and its JSON.
    """
    by_kind = {
        "filtered": sum(one.ended == FILTERED for one in replies),
        "unfinished": sum(one.ended == "length" and not one.text for one in replies),
        "sampled": sum(not one.greedy for one in replies),
    }
    unknown = Counter(_ENDED + shown(one.ended) for one in replies if one.ended not in _KNOWN)
    return {kind: count for kind, count in (by_kind | unknown).items() if count}


def explained(counted: Mapping[str, int]) -> list[str]:
    """One sentence for each kind of reply that `counts` found."""
    text = {
        "filtered": "withheld or cut by the server's content filter; empty ones count as "
        "degenerate, neither as refusals nor as successful attacks",
        "unfinished": "empty, since the model spent all its tokens on thinking: raise "
        "--max-new-tokens",
        "sampled": "not greedy, since the model takes no temperature: another evaluation may get "
        "others",
    }
    text |= {
        kind: f"with the {kind}, which is not a known one: see whether they are whole"
        for kind in counted
        if kind.startswith(_ENDED)
    }
    return [f"Answers {text[kind]}: {count:,}." for kind, count in counted.items() if kind in text]


def as_they_come(
    make: Callable[[Item], Made], items: Sequence[Item], workers: int
) -> Iterator[tuple[int, Made]]:
    """Yield (index, make(item)) as items finish, in `workers` threads.

    Once `make` or the consumer raises, no further item is started, and those in progress are not
    waited for: a server may take long to answer.

    Raises:
        Exception: the first that `make` raises.
    """
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Made | None, Exception | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (i := waiting.get()) is not None and not stopped.is_set():
            try:
                done.put((i, make(items[i]), None))
            except Exception as error:
                stopped.set()
                done.put((i, None, error))

    for i in range(len(items)):
        waiting.put(i)
    try:
        for _ in range(min(workers, len(items))):
            waiting.put(None)
            threading.Thread(target=work, daemon=True).start()
        for _ in items:
            i, made, error = done.get()
            if error is not None:
                raise error
            yield i, made  # type: ignore[misc]  # not None: nothing was raised
    finally:
        stopped.set()


def _answer(server: ChatServer, example: Example, max_new_tokens: int) -> Reply:
    try:
        image = portable(example.image) if example.image else None
        system = [{"role": "system", "content": example.system}] if example.system else []
        messages = [*system, user_message(example.instruction, image)]
        reply = server.reply(messages, max_new_tokens)
    except PassingError as error:
        raise PassingError(f"Prompt {example.id!r}: {error}") from None
    # servers differ in whether they count the last token
    if reply.ended == "length" and reply.tokens is not None and reply.tokens + 1 < max_new_tokens:
        raise PassingError(
            f"The server cut the answer to {example.id!r} after {reply.tokens} of "
            f"{max_new_tokens} tokens: prompt and answer exceed its context. Start the server with "
            "a larger one (vLLM: --max-model-len, llama.cpp: --ctx-size, Ollama: "
            "OLLAMA_CONTEXT_LENGTH), or lower --max-new-tokens."
        )
    return Reply(reply.text.strip(), reply.ended, reply.greedy, reply.tokens)


def portable(path: Path) -> tuple[str, bytes]:
    """The media type and bytes of an image that any server decodes as `open_image` does.

    They are the file's own if it is a plain JPEG or PNG, otherwise a PNG of the pixels.

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
        media_type = _FORMATS.get(image.format or "", "")
    if plain:
        return media_type, path.read_bytes()
    png = io.BytesIO()
    pixels.save(png, "PNG")
    return "image/png", png.getvalue()
