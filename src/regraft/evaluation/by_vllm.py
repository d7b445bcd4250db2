"""Answers by vLLM: the same prompts, token for token, and greedy as ours, on vLLM's own kernels.

vLLM comes with its own build of torch, so that it is an extra (`pip install 'regraft[vllm]'`) and
imported only here, when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from regraft.data.collate import batches, prompt_tokens
from regraft.data.example import Example
from regraft.data.images import open_image
from regraft.errors import RegraftError
from regraft.evaluation.pieces import in_pieces

_PIECE = 256  # prompts after which answers are on disk; vLLM makes its own batches of them


class Engine:
    """A checkpoint in vLLM, which takes the accelerators for itself until `close`.

    Args:
        folder: The checkpoint.
        processor: Its processor.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        tensor_parallel: How many accelerators share the model.
        max_length: Tokens of a prompt and its answer, images included; None for all that the model
            was made for, which may be more than the memory holds.
        sees: Whether prompts have images.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        RegraftError: vLLM is missing, or cannot run the model.
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
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise RegraftError(
                f"vLLM cannot run {folder}: {str(error).splitlines()[0]} Use --backend "
                "transformers, or where it wants memory, a smaller --max-length."
            ) from error
        self._sampling = vllm.SamplingParams
        self._processor = processor

    def answers(
        self,
        examples: Sequence[Example],
        max_new_tokens: int,
        partial: Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Answer every prompt greedily, in order, special tokens and outer white space removed.

        Args:
            examples: The prompts.
            max_new_tokens: Length of an answer, in tokens.
            partial: Scratch folder; finished pieces found there are kept.
            progress: Called with the number of prompts just answered.
        """
        pieces = list(batches(examples, _PIECE))

        def told(i: int) -> None:
            if progress is not None:
                progress(len(pieces[i]))

        def made(wanted: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
            greedy = self._sampling(temperature=0.0, max_tokens=max_new_tokens)
            for i in wanted:
                prompts = [self._prompt(example) for example in pieces[i]]
                outputs = self._engine.generate(prompts, greedy, use_tqdm=False)
                yield i, [output.outputs[0].text.strip() for output in outputs]
                told(i)

        found = in_pieces(len(pieces), made, partial, "vllm", told)
        return [text for texts in found for text in texts]

    def close(self) -> None:
        """Give the accelerators back."""
        engine = getattr(self._engine, "llm_engine", None)
        core = getattr(engine, "engine_core", None)
        del self._engine
        if core is not None:
            core.shutdown()

    def _prompt(self, example: Example) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": prompt_tokens(self._processor, example)}
        if example.image is not None:
            prompt["multi_modal_data"] = {"image": open_image(example.image)}
        return prompt


def _import() -> Any:
    try:
        import vllm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RegraftError(
            f"--backend vllm needs vLLM ({error}): pip install 'regraft[vllm]'."
        ) from error
    return vllm
