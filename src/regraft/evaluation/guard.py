"""Judges that are models run here: asked in their own words, and answering greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from regraft.data.collate import Batch, batches
from regraft.data.images import open_image
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer
from regraft.evaluation.judges import Compute, Exchange, JudgeKind, Verdict
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import load_model, load_processor, open_answering, placed
from regraft.models.resolve import resolve
from regraft.progress import Advance

_MAX_NEW_TOKENS = 64  # "Safety: Controversial, Categories: ..., Refusal: No" is 20 to 35


@dataclass(frozen=True)
class GuardKind(JudgeKind):
    """Guards of one family: how they are asked, and how what they write is read.

    Args:
        name: What stands before the colon in NAME:MODEL, MODEL being a folder or a hub id.
        read: From what the model wrote to the verdict.
        prompt: What it is asked, where that is not its chat template; it then reads text only.
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
        source = open_answering(argument)  # no code that comes with it is run
        network = load_model(source, dtype=compute.dtype, device=compute.device)
        processor = load_processor(source)
        name = f"{self.name}:{Path(argument).name}"
        return Guard(self, name, network, processor, compute.batch_size)


@dataclass(frozen=True)
class Guard:
    """A judge in memory; `processor` is a tokenizer where it reads text only."""

    kind: GuardKind
    name: str
    model: nn.Module
    processor: Any
    batch_size: int

    def verdicts(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Verdict]:
        """One verdict an exchange, in order.

        Raises:
            RegraftError: there is an image and the judge reads text only, or no chat template.
        """
        self.check(exchanges)
        found: dict[int, Verdict] = {}
        for sees in (False, True):
            places = [i for i, one in enumerate(exchanges) if (one.image is not None) == sees]
            for chunk in batches(places, self.batch_size):
                inputs = self._encode([exchanges[i] for i in chunk])
                batch = placed(Batch(inputs, None, ()), self.model)
                texts = answer(self.model, self.processor, batch.inputs, _MAX_NEW_TOKENS)
                found |= zip(chunk, map(self.kind.read, texts), strict=True)
                advance(len(chunk))
        return [found[i] for i in range(len(exchanges))]

    def check(self, exchanges: Sequence[Exchange]) -> None:
        """See that the judge can be asked about these.

        Raises:
            RegraftError: there is an image, and it reads text only.
        """
        sees = self.kind.prompt is None and self.processor is not self._tokenizer
        if not sees and any(one.image is not None for one in exchanges):
            raise RegraftError(f"The judge {self.name} reads text only; judge without images.")

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _encode(self, exchanges: Sequence[Exchange]) -> dict[str, Any]:
        tokenizer = self._tokenizer
        if len(exchanges) > 1 and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        how = {"return_tensors": "pt", "padding": len(exchanges) > 1}
        if (prompt := self.kind.prompt) is not None:
            return dict(tokenizer([prompt(one) for one in exchanges], **how))
        sees = self.processor is not tokenizer
        in_parts = sees or self._in_parts()
        texts = [self._conversation(one, in_parts) for one in exchanges]
        if not sees:
            return dict(tokenizer(texts, add_special_tokens=False, **how))
        images = [[open_image(one.image)] for one in exchanges if one.image is not None]
        return dict(
            self.processor(text=texts, images=images or None, add_special_tokens=False, **how)
        )

    def _in_parts(self) -> bool:
        """Whether the template takes messages as lists of parts, rather than as texts.

        Raises:
            RegraftError: it writes neither down.
        """
        probe = Exchange("prompt-to-be-found", "answer-to-be-found", None)
        for in_parts in (False, True):
            text = self._conversation(probe, in_parts)
            if probe.prompt in text and probe.answer in text:
                return in_parts
        raise RegraftError(
            f"The chat template of the judge {self.name} writes down no prompt and answer, so that "
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
                f"The judge {self.name} has no chat template, in which it is asked. Put its "
                "chat_template.jinja into its folder."
            )
        text: str = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=self.kind.generation_prompt,
        )
        return text
