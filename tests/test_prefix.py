"""The common prefix of a batch's prompts is computed once; the answers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pico
import truth
from regraft.data.collate import prompt_batch
from regraft.data.example import Example
from regraft.evaluation.greedy import answer
from regraft.models.architecture import decoder_layers
from regraft.models.generation import prefix_first, shared_length, with_shared_prefix

FRAME = "Answer the question in the image as briefly as a careful person would do it, please: "
TOKENS = 5
FALL_BACK = ("mistral_sw",)  # of text-only families: a window counts places, padding among them


def framed(family: str) -> tuple[Any, Any, dict[str, Tensor]]:
    model, processor = pico.build(family)
    texts = ("why", "how do I cook a potato", "who was it that came?")
    examples = [Example(text, FRAME + text, False, "") for text in texts]
    return model, processor, dict(prompt_batch(processor, examples).inputs)


def generated(model: Any, inputs: dict[str, Any]) -> Any:
    how = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    return model.generate(**inputs, **how, max_new_tokens=TOKENS)


@pytest.mark.parametrize("family", pico.TEXT_FAMILIES)
def test_tokens_and_logits_are_the_same(family: str) -> None:
    model, _, inputs = framed(family)
    prepared = with_shared_prefix(model, inputs)
    start = inputs["input_ids"].shape[1]
    if family in FALL_BACK:
        assert prepared.keys() == inputs.keys()
        return
    assert prepared.keys() > inputs.keys()
    assert not prepared["attention_mask"].all()  # some rows are padded
    plain, shared = generated(model, inputs), generated(model, prepared)
    assert torch.equal(shared.sequences[:, start:], plain.sequences[:, start:])
    for mine, own in zip(shared.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-4, rtol=1e-4)


def test_other_models_are_left_alone(vlm_family: str, tmp_path: Path) -> None:
    """Also without images: they compute positions themselves."""
    model, processor, inputs = framed(vlm_family)
    assert with_shared_prefix(model, inputs).keys() == inputs.keys()
    seeing = prompt_batch(processor, truth.examples(vlm_family, tmp_path, 2)).inputs
    assert with_shared_prefix(model, seeing).keys() == seeing.keys()


def test_the_prefix_is_computed_once() -> None:
    """The decoder gets the prefix in one row, then only the rest of all rows."""
    model, processor, inputs = framed("llama")
    length = shared_length(inputs["input_ids"], inputs["attention_mask"])
    seen: list[tuple[int, ...]] = []
    decoder_layers(model)[0].register_forward_hook(
        lambda _module, args, _output: seen.append(tuple(args[0].shape[:2]))
    )
    answer(model, processor, inputs, 1)
    assert seen == [(1, length), (3, inputs["input_ids"].shape[1] - length)]


def test_a_short_prefix_is_not_worth_a_pass() -> None:
    model, _, inputs = framed("llama")
    two = {name: tensor[:2, -12:] for name, tensor in inputs.items()}
    assert with_shared_prefix(model, two).keys() == two.keys()


@given(
    prefix=st.lists(st.integers(1, 3), max_size=4),
    rests=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_layout_by_hand(prefix: list[int], rests: list[list[int]]) -> None:
    rows = [prefix + rest for rest in rests]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = (ids > 0).long()
    shortest = min(map(len, rows))
    expected = 0
    while expected < shortest - 1 and len({row[expected] for row in rows}) == 1:
        expected += 1
    length = shared_length(ids, mask)
    assert length == expected >= len(prefix) - (shortest == len(prefix))
    moved, moved_mask = prefix_first(ids, mask, length)
    for row, found, real in zip(rows, moved.tolist(), moved_mask.tolist(), strict=True):
        padding = [0] * (width - len(row))
        assert found == row[:length] + padding + row[length:]
        assert real == [int(token > 0) for token in found]
