"""Answers by vLLM: the same prompts, token for token, and greedy as ours, on vLLM's own kernels.

vLLM comes with its own build of torch, so that it is an extra (`pip install 'regraft[vllm]'`) and
imported only here, when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from regraft.data.collate import batches, prompt_tokens
from regraft.data.example import Example
from regraft.data.images import open_image
from regraft.errors import PassingError, RegraftError
from regraft.evaluation.resumable_map import resumable_map
from regraft.progress import Advance

_PIECE = 256  # prompts after which answers are on disk; vLLM makes its own batches of them


class Engine:
    """A checkpoint in vLLM, which takes the accelerators for itself until `close`.

    Args:
        folder: The checkpoint.
        processor: Its processor.
        dtype: "float32", "bfloat16" or "float16"; "auto" leaves it to vLLM, which makes half of
            single precision.
        tensor_parallel: How many accelerators share the model.
        max_length: Tokens of a prompt and its answer, images included; None for all that the model
            was made for, which may be more than the memory holds.
        sees: Whether prompts have images.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        PassingError: vLLM cannot be imported or cannot run the model.
    """

    def __init__(
        self,
        folder: Path,
        processor: Any,
        *,
        dtype: str,
        tensor_parallel: int = 1,
        max_length: int | None = None,
        sees: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        vllm = _import()
        images = {"limit_mm_per_prompt": {"image": 1}} if sees else {}
        try:
            self._engine = vllm.LLM(
                model=str(folder),
                dtype=dtype,
                tensor_parallel_size=tensor_parallel,
                max_model_len=max_length,
                seed=0,
                trust_remote_code=trust_remote_code,
                **images,
            )
        except Exception as error:
            raise PassingError(
                f"vLLM cannot run {folder} ({_reason(error)}). Use --backend transformers, or "
                "where it wants memory, a smaller --max-length."
            ) from error
        self._sampling = vllm.SamplingParams
        self._processor = processor
        self._fits = f"--max-length {max_length}" if max_length else "what the model was made for"
        # those of newer versions are no ValueErrors
        own = getattr(getattr(vllm, "exceptions", None), "VLLMClientError", ValueError)
        self._refusals: tuple[type[Exception], ...] = (ValueError, own)

    def answers(
        self,
        examples: Sequence[Example],
        max_new_tokens: int,
        partial: Path | None = None,
        advance: Advance = lambda _: None,
    ) -> list[str]:
        """Answer every prompt greedily, in order, special tokens and outer white space removed.

        Args:
            examples: The prompts.
            max_new_tokens: Length of an answer, in tokens.
            partial: Scratch folder; finished pieces found there are kept.
            advance: Called with the number of prompts just answered.

        Raises:
            RegraftError: a prompt, or a prompt and its answer, are longer than vLLM takes.
        """

        def made(pieces: Sequence[Sequence[Example]]) -> Iterator[list[str]]:
            for piece in pieces:
                yield self._answer(piece, max_new_tokens)
                advance(len(piece))

        pieces = list(batches(examples, _PIECE))
        return list(chain(*resumable_map(pieces, made, partial, "vllm", advance)))

    def close(self) -> None:
        """Give the accelerators back."""
        engine = getattr(self._engine, "llm_engine", None)
        core = getattr(engine, "engine_core", None)
        del self._engine
        if core is not None:
            core.shutdown()

    def _answer(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        prompts = [self._prompt(example) for example in examples]
        try:
            answers = self._generate(prompts, max_new_tokens)
        except self._refusals as error:
            refused = [
                one.id
                for one, prompt in zip(examples, prompts, strict=True)
                if not self._takes(prompt)
            ]
            if not refused:
                raise
            raise RegraftError(
                f"vLLM refuses the prompt of {_listed(refused)} ({_reason(error)}). If it is "
                f"longer than {self._fits}, raise --max-length or leave it out."
            ) from error
        cut = [
            example.id
            for example, answer in zip(examples, answers, strict=True)
            if answer.finish_reason == "length" and len(answer.token_ids) < max_new_tokens
        ]
        if cut:
            raise RegraftError(
                f"vLLM cut the answer to {_listed(cut)} short: with its prompt it is longer than "
                f"{self._fits}. Raise --max-length, or lower --max-new-tokens."
            )
        return [answer.text.strip() for answer in answers]

    def _generate(self, prompts: Sequence[dict[str, Any]], max_new_tokens: int) -> list[Any]:
        greedy = self._sampling(temperature=0.0, max_tokens=max_new_tokens)
        outputs = self._engine.generate(prompts, greedy, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def _takes(self, prompt: dict[str, Any]) -> bool:
        try:
            self._generate([prompt], 1)
        except self._refusals:
            return False
        return True

    def _prompt(self, example: Example) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": prompt_tokens(self._processor, example)}
        if example.image is not None:
            prompt["multi_modal_data"] = {"image": open_image(example.image)}
        return prompt


def vllm_version() -> str:
    """The installed version of vLLM, which need not be imported for it.

    Raises:
        RegraftError: there is none.
    """
    try:
        return version("vllm")
    except PackageNotFoundError as error:
        raise RegraftError(
            "--backend vllm needs vLLM, which is not installed: pip install 'regraft[vllm]'."
        ) from error


def _import() -> Any:
    try:
        import vllm  # type: ignore[import-not-found,unused-ignore]
    except Exception as error:
        raise PassingError(
            f"vLLM cannot be imported ({_reason(error)}). Install it anew, pip install "
            "'regraft[vllm]', or use --backend transformers."
        ) from error
    return vllm


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or repr(error)


def _listed(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
