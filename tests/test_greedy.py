"""What a batch of prompts costs to answer, at unchanged answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pico
import truth
from regraft.data.collate import prompt_batch
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_gets_contiguous_states(family: str, rows: int, tmp_path: Path) -> None:
    """Transformers' own slice of the last position is not compact, so this can fail."""
    model, processor = pico.build(family)
    inputs = prompt_batch(processor, truth.examples(family, tmp_path, rows)).inputs
    head = model.get_output_embeddings()
    own, seen = head.forward, []

    def noted(states: Tensor, *args: Any) -> Any:
        seen.append(states.stride() == torch.empty(states.shape).stride())
        return own(states, *args)

    head.forward = noted
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not seen[0]
    seen.clear()
    answer(model, processor, inputs, 2)
    assert seen and all(seen)


def test_what_is_no_number_is_no_answer(tmp_path: Path) -> None:
    model, processor = pico.build("llama")
    inputs = prompt_batch(processor, truth.examples("llama", tmp_path, 3)).inputs
    model.model.layers[2].input_layernorm.variance_epsilon = float("nan")
    model.config.name_or_path = "folder"
    with pytest.raises(RegraftError, match="The model of folder computes NaN or infinity in place"):
        answer(model, processor, inputs, 2)
