"""The pico models are fit to test with: they see, they save, they repeat."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import pico

SIZE = (56, 56)


def chat(image, text="What is in the picture?"):
    pictures = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def tokenized(processor, image):
    own = getattr(processor, "chat_template", None)
    return processor.apply_chat_template(
        chat(image),
        chat_template=None if own else processor.tokenizer.chat_template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def picture(family):
    return pico.image(0, SIZE) if family in pico.VLM_FAMILIES else None


@torch.no_grad()
def logits(model, processor, image):
    return model(**tokenized(processor, image), use_cache=False).logits  # [1, S, V]


def test_image_reaches_the_last_logits(vlm_family):
    model, processor = pico.build(vlm_family)
    one, two = (logits(model, processor, pico.image(seed, SIZE))[0, -1] for seed in (0, 1))
    assert (one - two).abs().max() >= 0.1


def test_reload_is_identical(family, pico_dir):
    folder = pico_dir(family)
    auto = AutoModelForImageTextToText if family in pico.VLM_FAMILIES else AutoModelForCausalLM
    reloaded = auto.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    fresh = pico.build(family)
    for name, tensor in tokenized(fresh[1], picture(family)).items():
        other = tokenized(reloaded[1], picture(family))[name]
        assert torch.equal(tensor, other), f"{name} changed: {tensor} -> {other}"
    assert type(reloaded[0]) is type(fresh[0])
    assert torch.equal(logits(*fresh, picture(family)), logits(*reloaded, picture(family)))


def test_special_tokens_survive_decoding(vlm_family, pico_dir):
    processor = AutoProcessor.from_pretrained(pico_dir(vlm_family))
    ids = tokenized(processor, pico.image(0, SIZE))["input_ids"][0]
    assert "What is in the picture?" in processor.decode(ids, skip_special_tokens=True)
    assert not any(
        s in processor.decode(ids, skip_special_tokens=True) for s in ("<im", "<|", "<s")
    )


def test_seed_decides_the_weights():
    first, again, other = (pico.build("llava", seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(changed) > len(first) / 2


def test_shards_and_dtype(tmp_path):
    folder = pico.save("llava", tmp_path / "model", torch.bfloat16, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert AutoModelForImageTextToText.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("harmful", [True, False])
def test_examples_are_on_disk_and_differ(tmp_path, harmful):
    examples = pico.write_examples(tmp_path, 4, harmful=harmful)
    assert len({e.id for e in examples}) == 4
    assert len({e.image.read_bytes() for e in examples}) == 4
    assert {e.harmful for e in examples} == {harmful}
    assert all(e.image is None for e in pico.write_examples(tmp_path, 2, images=False))
