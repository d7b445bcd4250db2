"""Encode examples as model inputs, with the model's own processor and chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from regraft.data.example import Example
from regraft.data.images import open_image
from regraft.errors import RegraftError, is_fault

T = TypeVar("T")
IGNORED = -100  # torch's cross-entropy skips labels of this value
_MIXED = "Keep examples with and without an image apart, or use batch size 1."
_ONE_BY_ONE = "It encodes each of them alone: use batch size 1."
_WORD = "regraftsystemprompt"  # in no template


@dataclass(frozen=True)
class Batch:
    """Model inputs of B rows, padded on the left to S tokens.

    Args:
        inputs: The processor's output: `input_ids` and `attention_mask` [B, S] int64, and the
            family's image tensors.
        labels: [B, S] int64, the token at response positions and -100 elsewhere; None for a batch
            of prompts.
        ids: The ids of the B examples.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    ids: tuple[str, ...]

    @property
    def response(self) -> Tensor:
        """True at response tokens, [B, S] bool."""
        if self.labels is None:
            raise ValueError("a batch of prompts has no response tokens")
        return self.labels != IGNORED

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move to `device`, with floating inputs (pixels) cast to `dtype`."""
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.inputs.items()
        }
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, inputs=inputs, labels=labels)


def batches(examples: Sequence[T], size: int) -> Iterator[tuple[T, ...]]:
    """Cut `examples` into tuples of `size`, in order; the last may be shorter."""
    for start in range(0, len(examples), size):
        yield tuple(examples[start : start + size])


def decoded(examples: Sequence[Example]) -> dict[Path, Image.Image]:
    """Decode the images of the examples, by path."""
    return {one.image: open_image(one.image) for one in examples if one.image is not None}


def prompt_batch(
    processor: Any, examples: Sequence[Example], images: Mapping[Path, Image.Image] | None = None
) -> Batch:
    """Encode the prompts, ready for generation: each row ends with the generation prompt.

    `processor` is a transformers processor, or a tokenizer for text-only models. `images` is the
    result of `decoded`, if the caller has decoded them already.
    """
    prompts = [_conversation(processor, example, images) for example in examples]
    inputs = _encode(processor, examples, prompts, prompt=True)
    return Batch(inputs, None, tuple(example.id for example in examples))


def check_system_prompts(
    processor: Any, examples: Sequence[Example], *, answered: bool = False
) -> None:
    """Raise, before the model is needed, where the chat template does not show a system prompt.

    Some templates have none, some none beside an image or (checked if `answered`) before an answer:
    one prompt of each kind is rendered.
    """
    kinds = {one.image is None: one for one in reversed(examples) if one.system}
    for example in kinds.values():
        _conversation(processor, example, answered=answered)


def response_batch(processor: Any, examples: Sequence[Example]) -> Batch:
    """Encode prompts with their responses; label the response tokens.

    The response, what a model should generate, is found by `response_span` in the token ids.

    Raises:
        RegraftError: an example has no response, or none that the template shows, an image cannot
            be read, the processor has no chat template, or it refuses an example.
    """
    for example in examples:
        if not example.has_response:
            raise RegraftError(f"Example {example.id!r} has no response to learn from.")
    conversations = [_conversation(processor, example, answered=True) for example in examples]
    prompts = [conversation[:-1] for conversation in conversations]
    prompt_rows = _rows(_encode(processor, examples, prompts, prompt=True))
    inputs = _encode(processor, examples, conversations, prompt=False)
    labels = torch.full_like(inputs["input_ids"], IGNORED)  # [B, S]
    end_token = tokenizer_of(processor).eos_token_id
    for b, (prompt_ids, ids) in enumerate(zip(prompt_rows, _rows(inputs), strict=True)):
        start, end = response_span(prompt_ids, ids, end_token)
        if start == end:
            raise RegraftError(
                f"Example {examples[b].id!r} has no response token: the chat template leaves the "
                "assistant's message out. Check the checkpoint's chat template."
            )
        padding = labels.shape[1] - len(ids)
        labels[b, padding + start : padding + end] = torch.tensor(ids[start:end])
    return Batch(inputs, labels, tuple(example.id for example in examples))


def response_span(
    prompt: Sequence[int], whole: Sequence[int], end_token: int | None
) -> tuple[int, int]:
    """Find the response in `whole`, the tokens of prompt and response: [start, end).

    It starts after the longest common prefix with `prompt` (including the generation prompt), which
    is shorter than `prompt` if the last characters of the prompt merge with the first of the
    response. It ends with the last `end_token` after that (templates may append a line break), or
    at the end of `whole`.
    """
    pairs = enumerate(zip(prompt, whole, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    ends = (i + 1 for i in range(len(whole) - 1, start - 1, -1) if whole[i] == end_token)
    return start, next(ends, len(whole))


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; that of a text-only model is the processor itself."""
    return getattr(processor, "tokenizer", processor)


def is_text_only(processor: Any) -> bool:
    """Whether a model with this processor reads no images."""
    return tokenizer_of(processor) is processor


def _conversation(
    processor: Any,
    example: Example,
    images: Mapping[Path, Image.Image] | None = None,
    *,
    answered: bool = False,
) -> list[dict[str, Any]]:
    """The messages of a prompt and, if `answered`, its response."""
    placeholder = getattr(processor, "image_token", None)
    if placeholder and placeholder in f"{example.system} {example.instruction} {example.response}":
        raise RegraftError(
            f"The text of example {example.id!r} contains the model's image placeholder "
            f"{placeholder}. Remove it: the chat template places the image."
        )
    image = None
    if example.image is not None and is_text_only(processor):
        raise RegraftError(
            f"Example {example.id!r} has an image, but the processor reads text only."
            f"{_origin(processor)} Use a vision-language model, whose processor_config.json names "
            "the processor_class, or examples without images."
        )
    if example.image is not None:
        image = open_image(example.image) if images is None else images[example.image]
    said = [message(processor, "user", example.instruction, image)]
    if answered:
        said.append(message(processor, "assistant", example.response or ""))
    return [_system_message(processor, example, said), *said] if example.system else said


def _system_message(processor: Any, example: Example, said: list[dict[str, Any]]) -> dict[str, Any]:
    """The system prompt before what is `said`, in the form that the chat template shows as it is.

    Most templates of vision-language models expect a list of parts; Llama 3.2's expects a string,
    and would show the list in Python's notation. A word in place of the prompt tells, since the
    rest of a conversation may repeat a prompt, and templates may act on words in it ("/no_think").

    Raises:
        RegraftError: the template refuses the prompt or leaves it out, as Mistral's does before an
            answer.
    """
    _require_ready(processor, 1)
    reason = "it leaves it out" + (" where an answer follows" if len(said) > 1 else "")
    for form in (message, _plain):
        try:
            text = processor.apply_chat_template(
                [form(processor, "system", _WORD), *said],
                chat_template=lent_template(processor),
                tokenize=False,
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
            continue
        if _WORD in text and str(_parts(_WORD)) not in text:
            return form(processor, "system", example.system)
    raise RegraftError(
        f"The chat template cannot show the system prompt of example {example.id!r}: {reason}."
        f"{_origin(processor)} Leave out the field 'system', and put its text at the beginning of "
        "the instruction if the model is deployed so."
    )


def message(processor: Any, role: str, text: str, image: Any = None) -> dict[str, Any]:
    """One message of a chat, in the form that the processor's chat template expects."""
    if is_text_only(processor):  # templates of text-only models concatenate strings
        return _plain(processor, role, text)
    images = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*images, *_parts(text)]}


def _plain(_processor: Any, role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _encode(
    processor: Any,
    examples: Sequence[Example],
    conversations: Sequence[list[dict[str, Any]]],
    *,
    prompt: bool,
) -> dict[str, Tensor]:
    _require_ready(processor, len(examples))
    mixed = len({example.image is None for example in examples}) == 2
    try:
        encoded = _apply_template(processor, conversations, prompt)
    except BaseException as error:
        if not is_fault(error) or isinstance(error, MemoryError):
            raise
        culprit = _culprit(processor, examples, conversations, prompt)
        image = f" (image {culprit.image})" if culprit and culprit.image else ""
        ids = ", ".join(repr(example.id) for example in examples)
        failed = f"example {culprit.id!r}{image}" if culprit else f"the batch of {ids}"
        hint = "" if culprit else f" {_MIXED if mixed else _ONE_BY_ONE}"
        encoder = "chat template" if type(error).__module__.startswith("jinja2") else "processor"
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise RegraftError(
            f"The {encoder} cannot encode {failed}: {type(error).__name__}: {reason}.{hint}"
            f"{_origin(processor)}"
        ) from error
    mask = encoded.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        raise RegraftError(
            "The processor pads prompts on the right although it is asked for the left, and the "
            f"last token of a prompt would be padding. Use batch size 1.{_origin(processor)}"
        )
    if mixed and "cross_attention_mask" in encoded:
        # Mllama skips its cross-attention layers only if no row of the batch has an image.
        raise RegraftError(
            "In one batch with a prompt that has an image, this model answers a prompt without one "
            f"differently. {_MIXED}"
        )
    return encoded


def _origin(processor: Any) -> str:
    """A sentence that names the files a processor was loaded from; "" if there are none."""
    folder = Path(getattr(tokenizer_of(processor), "name_or_path", "") or "no folder")
    kinds = ("*processor_config.json", "tokenizer*.json", "chat_template.*")
    files = sorted(path.name for kind in kinds for path in folder.glob(kind))
    return f" It was loaded from {', '.join(files)} in {folder}." if files else ""


def _apply_template(
    processor: Any, conversations: Sequence[list[dict[str, Any]]], prompt: bool
) -> dict[str, Tensor]:
    padding = {"padding_side": "left"}
    settings: dict[str, Any] = (
        {"padding": len(conversations) > 1, "tokenizer_kwargs": padding}
        if is_text_only(processor)
        else {"processor_kwargs": {"padding": len(conversations) > 1, **padding}}
    )
    encoded = processor.apply_chat_template(
        list(conversations),
        chat_template=lent_template(processor),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=prompt,
        **settings,
    )
    return dict(encoded)


def lent_template(processor: Any) -> Any:
    """The tokenizer's template where the processor has none of its own; otherwise None."""
    own = getattr(processor, "chat_template", None)
    return None if own else getattr(tokenizer_of(processor), "chat_template", None)


def _require_ready(processor: Any, rows: int) -> None:
    if not (getattr(processor, "chat_template", None) or lent_template(processor)):
        raise RegraftError(
            "The checkpoint has no chat template. Put the model's chat_template.jinja into the "
            "checkpoint's folder (instruction-tuned checkpoints come with one)."
        )
    if rows > 1 and tokenizer_of(processor).pad_token_id is None:
        raise RegraftError(
            "The tokenizer has no padding token, which batches need. Use batch size 1, or set "
            '"pad_token" in the checkpoint\'s tokenizer_config.json.'
        )


def _culprit(
    processor: Any,
    examples: Sequence[Example],
    conversations: Sequence[list[dict[str, Any]]],
    prompt: bool,
) -> Example | None:
    """Find the first example that the processor refuses on its own."""
    for example, conversation in zip(examples, conversations, strict=True):
        try:
            _apply_template(processor, [conversation], prompt)
        except BaseException as error:
            if is_fault(error):
                return example
            raise
    return None


def _rows(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Token ids of each row, without padding."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]
