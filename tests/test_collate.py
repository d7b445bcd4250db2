"""Examples become model inputs: right labels, left padding, nothing that depends on the batch."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin

import pico
import regraft.data.collate
from regraft.data.collate import (
    IGNORED,
    batches,
    check_system_prompts,
    prompt_batch,
    response_batch,
    response_span,
)
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.loading import cut
from regraft.settings.compute import ComputeSettings


def examples_for(family, folder, n=3, **kwargs):
    return pico.write_examples(folder, n, images=family in pico.VLM_FAMILIES, **kwargs)


def tokenizer_of(processor):
    return getattr(processor, "tokenizer", processor)


def assistant_mask(processor, examples):
    """The template's own {% generation %} mask, [B, S] bool."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *([{"type": "image", "image": Image.open(e.image)}] if e.image else []),
                    {"type": "text", "text": e.instruction},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": e.response}]},
        ]
        for e in examples
    ]
    text_only = tokenizer_of(processor) is processor
    padding = {"padding": True} if text_only else {"processor_kwargs": {"padding": True}}
    encoded = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        **padding,
    )
    return torch.as_tensor(encoded["assistant_masks"]).bool()


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs, use_cache=False).logits  # [B, S, V]


@pytest.mark.parametrize("harmful", [True, False])
def test_labels_are_the_assistant_mask(family, harmful, tmp_path):
    if family in pico.VLM_FAMILIES and not hasattr(
        ProcessorMixin, "_adjust_assistant_masks_indices"
    ):
        pytest.skip("this transformers misplaces assistant masks after image tokens")
    processor = pico.processor(family)
    examples = examples_for(family, tmp_path, harmful=harmful)
    batch = response_batch(processor, examples)
    mask = assistant_mask(processor, examples)
    positions = [labels.ne(IGNORED).nonzero().flatten().tolist() for labels in batch.labels]
    assert positions == [row.nonzero().flatten().tolist() for row in mask]
    assert batch.labels[mask].tolist() == batch.inputs["input_ids"][mask].tolist()
    assert batch.ids == tuple(e.id for e in examples)


def test_labels_read_as_the_response(family, tmp_path):
    processor = pico.processor(family)
    examples = examples_for(family, tmp_path)
    tokenizer = tokenizer_of(processor)
    for labels, example in zip(response_batch(processor, examples).labels, examples, strict=True):
        text = tokenizer.decode(labels[labels != IGNORED])
        assert text.strip() == example.response + tokenizer.eos_token


def test_padding_is_left_whatever_the_tokenizer_says(family, tmp_path):
    processor = pico.processor(family)
    examples = examples_for(family, tmp_path)
    expected = response_batch(processor, examples)
    tokenizer_of(processor).padding_side = "right"
    found = response_batch(processor, examples)
    mask = found.inputs["attention_mask"]
    assert (mask.diff(dim=1) >= 0).all(), "attention_mask must be 0...01...1"
    assert mask[:, -1].all() and not mask[:, 0].all()
    assert (found.labels[mask == 0] == IGNORED).all()
    assert torch.equal(found.labels, expected.labels)
    for name, tensor in expected.inputs.items():
        assert torch.equal(found.inputs[name], tensor), name
    assert tokenizer_of(processor).padding_side == "right", "the caller's tokenizer was changed"


def test_a_processor_that_pads_on_the_right_is_refused(tmp_path, monkeypatch):
    processor = pico.processor("qwen2_5_vl")
    template = processor.apply_chat_template

    def stubborn(*args, processor_kwargs, **kwargs):
        return template(
            *args, processor_kwargs=processor_kwargs | {"padding_side": "right"}, **kwargs
        )

    monkeypatch.setattr(processor, "apply_chat_template", stubborn)
    short, long = examples_for("qwen2_5_vl", tmp_path, 2)
    long = replace(long, instruction=long.instruction * 3)
    with pytest.raises(RegraftError, match="pads prompts on the right"):
        prompt_batch(processor, [short, long])
    assert prompt_batch(processor, [short]).inputs["attention_mask"].all()


def test_prompts_end_with_the_generation_prompt(family, tmp_path):
    processor = pico.processor(family)
    examples = examples_for(family, tmp_path)
    prompts, wholes = prompt_batch(processor, examples), response_batch(processor, examples)
    assert prompts.labels is None
    assert prompts.inputs["attention_mask"][:, -1].all()
    for b in range(len(examples)):
        prompt, whole = (
            batch.inputs["input_ids"][b][batch.inputs["attention_mask"][b].bool()].tolist()
            for batch in (prompts, wholes)
        )
        merged = len(prompt) - response_span(prompt, whole, None)[0]
        assert merged <= 1, f"the prompt differs from the whole by {merged} tokens"


def test_batch_equals_single_rows(family, tmp_path):
    model, processor = pico.build(family)
    examples = examples_for(family, tmp_path)
    batch = response_batch(processor, examples)
    together = logits(model, batch)
    for b, example in enumerate(examples):
        single = response_batch(processor, [example])
        length = single.labels.shape[1]
        assert torch.equal(batch.labels[b, -length:], single.labels[0])
        torch.testing.assert_close(
            together[b, -length:], logits(model, single)[0], atol=2e-5, rtol=1e-4
        )


def test_images_are_there_and_matter(vlm_family, tmp_path):
    model, processor = pico.build(vlm_family)
    (example,) = pico.write_examples(tmp_path, 1)
    batch = prompt_batch(processor, [example])
    assert batch.inputs["pixel_values"].is_floating_point()
    pico.image(99).save(tmp_path / "other.png")
    other = prompt_batch(processor, [replace(example, image=tmp_path / "other.png")])
    assert (logits(model, batch)[0, -1] - logits(model, other)[0, -1]).abs().max() >= 0.1


def test_mixed_batch_equals_single_rows_or_is_refused(vlm_family, tmp_path):
    model, processor = pico.build(vlm_family)
    examples = pico.write_examples(tmp_path, 3)
    examples[1] = replace(examples[1], image=None)
    try:
        batch = prompt_batch(processor, examples)
    except RegraftError as error:
        assert vlm_family == "mllama"
        assert "Keep examples with and without an image apart" in str(error)
        return
    together = logits(model, batch)
    for b, example in enumerate(examples):
        single = logits(model, prompt_batch(processor, [example]))[0]
        torch.testing.assert_close(
            together[b, -len(single) :], single, atol=2e-5, rtol=1e-4, msg=example.id
        )


def test_grey_and_transparent_images_become_rgb(tmp_path):
    processor = pico.processor("llava")
    (example,) = pico.write_examples(tmp_path, 1)
    for mode in ("L", "RGBA", "P", "1"):
        path = tmp_path / f"{mode}.png"
        pico.image(0).convert(mode).save(path)
        pixels = prompt_batch(processor, [replace(example, image=path)]).inputs["pixel_values"]
        assert pixels.shape == (1, 3, 28, 28), mode


def test_to_casts_only_floating_inputs(tmp_path):
    processor = pico.processor("mllama")
    batch = response_batch(processor, pico.write_examples(tmp_path, 2))
    moved = batch.to("cpu", torch.bfloat16)
    changed = {n for n in batch.inputs if moved.inputs[n].dtype != batch.inputs[n].dtype}
    assert changed == {"pixel_values"}
    assert moved.inputs["pixel_values"].dtype == torch.bfloat16
    assert moved.labels.dtype == torch.int64
    assert batch.to("cpu").inputs["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("response", [None, "", " \n"])
def test_missing_response_names_the_example(tmp_path, response):
    processor = pico.processor("llama")
    examples = pico.write_examples(tmp_path, 2, images=False)
    examples[1] = replace(examples[1], response=response)
    with pytest.raises(RegraftError, match="'harmful-0-1' has no response"):
        response_batch(processor, examples)


def test_template_that_drops_the_answer_is_refused(tmp_path):
    tokenizer = pico.processor("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RegraftError, match="'harmful-0-0' has no response token"):
        response_batch(tokenizer, pico.write_examples(tmp_path, 2, images=False))


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_missing_chat_template_is_told_with_the_fix(family, tmp_path):
    processor = pico.processor(family)
    processor.chat_template = None
    with pytest.raises(RegraftError, match=r"no chat template\. Put .*chat_template\.jinja"):
        prompt_batch(processor, examples_for(family, tmp_path))


def test_chat_template_of_the_tokenizer_serves_the_processor(tmp_path):
    processor = pico.processor("llava")
    examples = pico.write_examples(tmp_path, 2)
    expected = response_batch(processor, examples)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert torch.equal(response_batch(processor, examples).labels, expected.labels)


def test_templates_that_join_strings_work_for_tokenizers(tmp_path):
    """As of Qwen2 and Llama on the hub, which would print a list of content parts verbatim."""
    tokenizer = pico.processor("llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    examples = pico.write_examples(tmp_path, 1, images=False)
    ids = prompt_batch(tokenizer, examples).inputs["input_ids"][0]
    assert tokenizer.decode(ids) == f"user: {examples[0].instruction}"


def test_missing_padding_token_is_told_and_one_row_works(tmp_path):
    tokenizer = pico.processor("llama")
    examples = pico.write_examples(tmp_path, 2, images=False)
    tokenizer.pad_token = None
    with pytest.raises(RegraftError, match="no padding token"):
        response_batch(tokenizer, examples)
    assert response_batch(tokenizer, examples[:1]).labels.shape[0] == 1


def test_image_for_a_text_model_is_refused(tmp_path):
    tokenizer = pico.processor("llama")
    with pytest.raises(RegraftError, match="'harmful-0-0' has an image, but the processor reads"):
        prompt_batch(tokenizer, pico.write_examples(tmp_path, 1))


def test_image_placeholder_in_the_text_is_refused(vlm_family, tmp_path):
    processor = pico.processor(vlm_family)
    examples = pico.write_examples(tmp_path, 2)
    text = f"{processor.image_token}\nWhat is this?"
    examples[1] = replace(examples[1], instruction=text)
    with pytest.raises(RegraftError, match="'harmful-0-1' contains the model's image placeholder"):
        prompt_batch(processor, examples)


class Refusing:
    """A tokenizer that refuses conversations with `word`, or batches where `word` is None."""

    def __init__(self, tokenizer, word):
        self.tokenizer, self.word = tokenizer, word
        self.chat_template = tokenizer.chat_template

    def apply_chat_template(self, conversations, **_):
        if len(conversations) > 1 if self.word is None else self.word in str(conversations):
            raise ValueError("no")
        return {}


def test_processor_error_names_the_example(tmp_path):
    tokenizer = pico.processor("llama")
    examples = pico.write_examples(tmp_path, 3, images=False)
    examples[2] = replace(examples[2], instruction="a cursed question")
    with pytest.raises(RegraftError, match="cannot encode example 'harmful-0-2': ValueError: no"):
        prompt_batch(Refusing(tokenizer, "cursed"), examples)


def test_images_that_a_processor_does_not_batch_go_alone(tmp_path):
    """PerceptionLM's cuts images into tiles, here 2 and 3 with the whole image, and stacks them."""
    processor = pico.processor("perception_lm")
    processor.image_processor.max_num_tiles = 2
    examples = pico.write_examples(tmp_path, 2)
    assert [len(prompt_batch(processor, [one]).inputs["pixel_values"][0]) for one in examples] == [
        2,
        3,
    ]
    with pytest.raises(RegraftError, match=r"the batch of .* alone: use batch size 1\."):
        prompt_batch(processor, examples)


def test_processor_error_over_a_mixture_says_so(tmp_path):
    tokenizer = pico.processor("llama")
    examples = pico.write_examples(tmp_path, 2)
    examples[1] = replace(examples[1], image=None)
    with pytest.raises(RegraftError, match=r"the batch of 'harmful-0-0', .*Keep examples with and"):
        prompt_batch(Refusing(tokenizer, None), examples)


def test_unreadable_image_is_named(tmp_path):
    processor = pico.processor("llava")
    examples = pico.write_examples(tmp_path, 2)
    examples[1].image.write_bytes(b"not a picture")
    with pytest.raises(RegraftError, match=r"harmful-0-1\.png is not a readable image"):
        prompt_batch(processor, examples)


def test_batches_cut_in_order(tmp_path):
    examples = pico.write_examples(tmp_path, 5, images=False)
    cut = list(batches(examples, 2))
    assert [len(chunk) for chunk in cut] == [2, 2, 1]
    assert [e for chunk in cut for e in chunk] == examples


tokens = st.lists(st.integers(0, 3), max_size=12)


@given(tokens, tokens)
def test_span_starts_after_the_longest_common_prefix(prompt, whole):
    start, end = response_span(prompt, whole, None)
    assert prompt[:start] == whole[:start]
    assert start in (len(prompt), len(whole)) or prompt[start] != whole[start]
    assert end == len(whole)


@given(tokens, tokens)
def test_span_of_a_token_prefix_is_the_rest(prompt, response):
    assert response_span(prompt, prompt + response, None) == (
        len(prompt),
        len(prompt) + len(response),
    )


@given(tokens, tokens, tokens.filter(lambda ids: 3 not in ids))
def test_span_ends_with_the_last_end_token(prompt, response, after):
    """A template's line break after the end token is not the model's to generate."""
    whole = [*prompt, *response, 3, *after]
    start, end = response_span(prompt, whole, 3)
    assert (start, end) == (len(prompt), len(prompt) + len(response) + 1)


def test_end_token_in_the_prompt_does_not_count():
    assert response_span([1, 9, 2], [1, 9, 2, 5, 6], 9) == (3, 5)


def test_collate_imports_no_transformers():
    tree = ast.parse(Path(regraft.data.collate.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert not any(name.startswith("transformers") for name in imported), imported


def test_images_of_like_size_share_a_batch(tmp_path):
    """Of families that make tokens by area one large photo would pad a whole batch."""
    sizes = {"photo": (4000, 3000), "icon": (32, 32), "scan": (3900, 3100), "thumb": (33, 31)}
    examples = [Example("text", "?", False, "")]
    for name, size in sizes.items():
        path = tmp_path / f"{name}.png"
        Image.new("L", size).save(path)
        examples.append(Example(name, "?", False, "", image=path))
    (tmp_path / "broken.png").write_bytes(b"no image")
    examples.append(Example("broken", "?", False, "", image=tmp_path / "broken.png"))
    found = [[one.id for one in batch] for batch in cut(examples, ComputeSettings(batch_size=2))]
    assert found == [["text", "broken"], ["icon", "thumb"], ["photo", "scan"]]


SYSTEM = "Refuse what is dangerous.\nAnswer briefly."


def decoded_rows(processor, batch):
    return tokenizer_of(processor).batch_decode(batch.inputs["input_ids"])


def test_a_system_prompt_precedes_the_instruction(family, tmp_path):
    processor = pico.processor(family)
    plain = examples_for(family, tmp_path)
    examples = [replace(one, system=SYSTEM) for one in plain]
    for row, one in zip(
        decoded_rows(processor, prompt_batch(processor, examples)), plain, strict=True
    ):
        before, found, after = row.partition(SYSTEM)
        assert found and one.instruction in after and one.instruction not in before
    batch, bare = response_batch(processor, examples), response_batch(processor, plain)
    for ids, labels, bare_labels in zip(
        batch.inputs["input_ids"], batch.labels, bare.labels, strict=True
    ):
        assert torch.equal(labels[labels != IGNORED], bare_labels[bare_labels != IGNORED])
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def with_template(processor, template):
    processor.chat_template = template
    return processor


AS_TEXT = (  # as Llama 3.2 Vision's template has it
    "{% if messages[0].role == 'system' %}S: {{ messages[0].content | trim }}\n"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|image|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
FIRST_PART = AS_TEXT.replace("messages[0].content |", "messages[0].content[0].text |")
DROPPED = AS_TEXT.replace("S: {{ messages[0].content | trim }}\n", "")
UNANSWERED = AS_TEXT.replace("system' %}", "system' and messages[-1].role == 'user' %}").replace(
    "for m in messages", "for m in messages if m.role != 'system'"
)  # as Mistral's and Pixtral's
SWITCH = AS_TEXT.replace("trim", "replace('/no_think', '') | trim")  # as SmolLM3's
REFUSED = AS_TEXT.replace("S: ", "{{ raise_exception('System role not supported') }}")


@pytest.mark.parametrize("template", [AS_TEXT, FIRST_PART], ids=["string", "parts"])
@pytest.mark.parametrize("system", [SYSTEM, 'It\'s "quoted"', "plain"])
def test_a_system_prompt_has_the_form_that_the_template_shows(template, system, tmp_path):
    processor = with_template(pico.processor("mllama"), template)
    examples = [replace(one, system=system) for one in examples_for("mllama", tmp_path, n=1)]
    (row,) = decoded_rows(processor, prompt_batch(processor, examples))
    assert f"S: {system}\n" in row


@pytest.mark.parametrize(
    ("template", "reason"),
    [(DROPPED, "it leaves it out"), (REFUSED, "TemplateError: System role not supported")],
    ids=["dropped", "refused"],
)
def test_a_system_prompt_that_the_template_does_not_show_is_an_error(template, reason, tmp_path):
    processor = with_template(pico.processor("mllama"), template)
    examples = examples_for("mllama", tmp_path, n=1)
    check_system_prompts(processor, examples)
    asked = [replace(one, system=SYSTEM, instruction=f"What? {SYSTEM}") for one in examples]
    for check in (check_system_prompts, prompt_batch, response_batch):
        with pytest.raises(RegraftError, match=f"system prompt of example .*: {reason}"):
            check(processor, asked)


def test_a_system_prompt_may_hold_words_that_the_template_acts_on(tmp_path):
    processor = with_template(pico.processor("mllama"), SWITCH)
    examples = examples_for("mllama", tmp_path, n=1)
    asked = [replace(one, system="Be kind. /no_think") for one in examples]
    (row,) = decoded_rows(processor, prompt_batch(processor, asked))
    assert "S: Be kind.\n" in row


def test_a_system_prompt_is_also_shown_before_an_answer(tmp_path):
    """Otherwise the prompt would be counted as a part of the response."""
    processor = with_template(pico.processor("mllama"), UNANSWERED)
    examples = [replace(one, system=SYSTEM) for one in examples_for("mllama", tmp_path, n=1)]
    check_system_prompts(processor, examples)
    (row,) = decoded_rows(processor, prompt_batch(processor, examples))
    assert f"S: {SYSTEM}\n" in row
    reason = "it leaves it out where an answer follows"
    with pytest.raises(RegraftError, match=reason):
        response_batch(processor, examples)
    with pytest.raises(RegraftError, match=reason):
        check_system_prompts(processor, examples, answered=True)
