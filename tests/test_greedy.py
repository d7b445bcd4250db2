"""What a batch of prompts costs to answer, at unchanged answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import pico
import truth
from regraft.data.collate import prompt_batch
from regraft.evaluation.greedy import answer


def test_the_head_gets_contiguous_states(family: str, tmp_path: Path) -> None:
    """Transformers' own slice of the last position is not contiguous, so this can fail."""
    model, processor = pico.build(family)
    inputs = prompt_batch(processor, truth.examples(family, tmp_path, 3)).inputs
    head = model.get_output_embeddings()
    own, seen = head.forward, []

    def noted(states: Tensor, *args: Any) -> Any:
        seen.append(states.is_contiguous())
        return own(states, *args)

    head.forward = noted
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert seen == [False, True]
    seen.clear()
    answer(model, processor, inputs, 2)
    assert seen == [True, True]
