"""How answers are written and judged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from regraft.errors import RegraftError
from regraft.evaluation.judges import TextJudge, find_text_judge
from regraft.evaluation.keywords import (
    DEFAULT_JUDGE,
    DEFAULT_WINDOW,
    KEYWORD_JUDGES,
    KeywordJudge,
)
from regraft.settings.base import Settings


class EvalSettings(Settings):
    """Greedy answers, judged by the words and phrases of a refusal."""

    max_new_tokens: int = Field(
        64,
        ge=1,
        description="Length of an answer. 64 is enough for judges of how an answer begins; give "
        "256 or more where one shall read what it says (VLGuard's list, guards).",
    )
    judge: str = Field(
        DEFAULT_JUDGE.name,
        description=f"What tells refusals by their words: {', '.join(KEYWORD_JUDGES)}, or the "
        "judge of an installed package.",
    )
    keywords: tuple[str, ...] = Field(
        (),
        description="Instead of a judge by name: an answer refuses if one of these stands in its "
        "first characters, as whole words.",
    )
    window: int | None = Field(
        None,
        ge=1,
        description=f"How many first characters count for your own keywords ({DEFAULT_WINDOW}).",
    )
    limit: int | None = Field(
        None, ge=1, description="Use only the first of the prompts of each suite, of each kind."
    )
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What answers: the model in memory, or vLLM (an extra) on the checkpoint, in "
        "full and faster. Their answers are not the same to the last token.",
    )
    tensor_parallel: int = Field(1, ge=1, description="vllm: accelerators that share the model.")
    max_length: int | None = Field(
        None,
        ge=1,
        description="vllm: tokens of a prompt with its image and answer; all that the model was "
        "made for if not given, which may want more memory than there is.",
    )
    perplexity: bool = Field(
        False, description="Measure the perplexity of the references of harmless prompts too."
    )
    full_answers: bool = Field(
        True,
        description="Let every answer go on to its own end or to `max_new_tokens`. If not, one "
        "that is judged and not compared with a reference ends where the verdict is certain, which "
        "saves most of its tokens.",
    )

    @model_validator(mode="after")
    def _check_judge(self) -> EvalSettings:
        try:
            find_text_judge(self.judge)
        except RegraftError as error:
            raise ValueError(str(error)) from error
        if self.backend == "vllm" and self.perplexity:
            raise ValueError("perplexity is measured by the transformers backend only")
        if self.backend == "vllm" and not self.full_answers:
            raise ValueError("vllm always gives full answers: leave full_answers as it is")
        if self.backend != "vllm" and (self.tensor_parallel, self.max_length) != (1, None):
            raise ValueError("tensor_parallel and max_length are vllm's: add backend vllm")
        if self.window is not None and not self.keywords:
            raise ValueError("a window is for keywords of your own: add keywords")
        if self.keywords and not all(map(str.strip, self.keywords)):
            raise ValueError("keywords: a blank one stands in every answer")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without vLLM its settings are left out: they decide nothing then."""
        content: dict[str, Any] = whole(self)
        left_out = () if self.backend == "vllm" else ("backend", "tensor_parallel", "max_length")
        return {name: value for name, value in content.items() if name not in left_out}

    def unread(self) -> str | None:
        """What was set and changes nothing, in words."""
        if self.keywords and self.first_set("judge"):
            return f"`keywords` take the place of the judge {self.judge}"
        return None

    def in_memory(self) -> EvalSettings:
        """The same by the model in memory."""
        own = {"backend": "transformers", "tensor_parallel": 1, "max_length": None}
        return self.model_copy(update=own)

    def text_judge(self) -> TextJudge:
        """The judge that these settings ask for."""
        if not self.keywords:
            return find_text_judge(self.judge)
        return KeywordJudge(keywords=self.keywords, window=self.window or DEFAULT_WINDOW)
