"""Judges that are models on this machine: prompted in their own format, answering greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from regraft.data.collate import Batch, batches, is_text_only, tokenizer_of
from regraft.data.images import open_image
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer
from regraft.evaluation.judges import Compute, Exchange, JudgeKind, Verdict
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import load_model, load_processor, open_answering, placed
from regraft.models.resolve import resolve
from regraft.progress import Advance

_MAX_NEW_TOKENS = 64  # "Safety: Controversial, Categories: ..., Refusal: No" takes 20 to 35


@dataclass(frozen=True)
class GuardKind(JudgeKind):
    """A family of guard models: how they are prompted, and how their output is read.

    Args:
        name: The NAME in NAME:MODEL; MODEL is a folder or a hub id.
        read: Turns the model's output into a verdict.
        prompt: Makes the prompt in place of the chat template; the judge then reads text only.
        generation_prompt: Whether the chat template adds the start of an answer.
    """

    argument: ClassVar[str] = "MODEL"
    is_local_model: ClassVar[bool] = True
    name: str
    read: Callable[[str], Verdict]
    prompt: Callable[[Exchange], str] | None = None
    generation_prompt: bool = False

    def inputs(self, argument: str) -> dict[str, str]:
        return {"model": open_checkpoint(resolve(argument)).fingerprint}

    def load(self, argument: str, compute: Compute) -> Guard:
        source = open_answering(argument)  # does not run the checkpoint's code
        network = load_model(source, dtype=compute.dtype, device=compute.device)
        processor = load_processor(source)
        name = f"{self.name}:{Path(argument).name}"
        return Guard(self, name, network, processor, compute.batch_size)


@dataclass(frozen=True)
class Guard:
    """A judge in memory; `processor` is a tokenizer if it reads text only."""

    kind: GuardKind
    name: str
    model: nn.Module
    processor: Any
    batch_size: int

    def verdicts(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Verdict]:
        """One verdict per exchange, in order.

        Raises:
            RegraftError: there is an image and the judge reads text only, or no chat template.
        """
        self.check(exchanges)
        found: dict[int, Verdict] = {}
        for image in (False, True):
            indices = [i for i, one in enumerate(exchanges) if (one.image is not None) == image]
            for chunk in batches(indices, self.batch_size):
                inputs = self._encode([exchanges[i] for i in chunk])
                batch = placed(Batch(inputs, None, ()), self.model)
                texts = answer(self.model, self.processor, batch.inputs, _MAX_NEW_TOKENS)
                found |= zip(chunk, map(self.kind.read, texts), strict=True)
                advance(len(chunk))
        return [found[i] for i in range(len(exchanges))]

    def check(self, exchanges: Sequence[Exchange]) -> None:
        """Check that the judge can read these exchanges.

        Raises:
            RegraftError: there is an image, and it reads text only.
        """
        text_only = self.kind.prompt is not None or is_text_only(self.processor)
        if text_only and any(one.image is not None for one in exchanges):
            raise RegraftError(f"The judge {self.name} reads text only; judge without images.")

    def _encode(self, exchanges: Sequence[Exchange]) -> dict[str, Any]:
        tokenizer = tokenizer_of(self.processor)
        if len(exchanges) > 1 and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        options = {"return_tensors": "pt", "padding": len(exchanges) > 1}
        if (prompt := self.kind.prompt) is not None:
            return dict(tokenizer([prompt(one) for one in exchanges], **options))
        sees_images = not is_text_only(self.processor)
        in_parts = sees_images or self._in_parts()
        texts = [self._conversation(one, in_parts) for one in exchanges]
        if not sees_images:
            return dict(tokenizer(texts, add_special_tokens=False, **options))
        images = [[open_image(one.image)] for one in exchanges if one.image is not None]
        return dict(
            self.processor(text=texts, images=images or None, add_special_tokens=False, **options)
        )

    def _in_parts(self) -> bool:
        """Whether the template takes messages as lists of parts rather than as texts.

        Raises:
            RegraftError: the template shows neither.
        """
        probe = Exchange("prompt-to-be-found", "answer-to-be-found", None)
        for in_parts in (False, True):
            text = self._conversation(probe, in_parts)
            if probe.prompt in text and probe.answer in text:
                return in_parts
        raise RegraftError(
            f"The chat template of the judge {self.name} leaves out the prompt or the answer, so "
            "nothing would be judged. Put the model's own chat_template.jinja into its folder."
        )

    def _conversation(self, exchange: Exchange, in_parts: bool) -> str:
        def content(text: str, image: bool = False) -> Any:
            parts = [{"type": "image"}] if image else []
            return [*parts, {"type": "text", "text": text}] if in_parts else text

        messages = [
            {"role": "user", "content": content(exchange.prompt, exchange.image is not None)},
            {"role": "assistant", "content": content(exchange.answer)},
        ]
        if getattr(self.processor, "chat_template", None) is None:
            raise RegraftError(
                f"The judge {self.name} has no chat template, which its prompt needs. Put its "
                "chat_template.jinja into its folder."
            )
        text: str = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=self.kind.generation_prompt,
        )
        return text
