"""Many versions of a model answer the same prompts, as separately but cheaper."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

import pico
import truth
from disk import tree, write_data
from methods import method, restored
from regraft import stages
from regraft.data.collate import prompt_batch
from regraft.data.example import Example
from regraft.data.images import length_class
from regraft.data.readers.demo import demo_model
from regraft.data.sources import DataSource, read
from regraft.disk.files import write_json
from regraft.errors import RegraftError
from regraft.evaluation import generate as generating
from regraft.evaluation import greedy
from regraft.evaluation.generate import Answerer, answering_tokens, prefetch
from regraft.evaluation.keywords import REGRAFT_1, KeywordJudge
from regraft.models.architecture import decoder_layers
from regraft.models.load import open_source
from regraft.models.vision import VisionOutput, replayed, vision_state
from regraft.progress import Task
from regraft.pruning.base import prune_settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages import evaluation_cache, targets

COMPUTE = ComputeSettings(device="cpu", batch_size=2)
TOKENS = 6


@torch.no_grad()
def answered(model: Any, processor: Any, examples: Sequence[Example], size: int = 2) -> list[str]:
    """Answers with every batch encoded anew and run through the whole model."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts: list[str] = []
    for start in range(0, len(examples), size):
        inputs = prompt_batch(processor, examples[start : start + size]).inputs
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens = model.generate(**inputs, generation_config=config)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


@contextmanager
def changed(weight: Tensor, factor: float) -> Iterator[None]:
    before = weight.data.clone()
    weight.data.mul_(factor)
    try:
        yield
    finally:
        weight.data.copy_(before)


def decoder_weight(model: nn.Module) -> Tensor:
    weight = decoder_layers(model)[0].mlp.down_proj.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    return weight


def vision_part(model: Any) -> nn.Module:
    names = ("visual", "vision_tower", "vision_model")
    parts = (getattr(model.base_model, name, None) for name in names)
    return next(part for part in parts if isinstance(part, nn.Module))


def vision_weight(model: nn.Module) -> Tensor:
    return max(vision_part(model).parameters(), key=lambda one: one.numel())


def test_answers_are_those_of_whole_passes(family: str, tmp_path: Path) -> None:
    """Also from the cache, without the image files, and after changes."""
    model, processor = pico.build(family)
    examples = truth.examples(family, tmp_path, 3)
    answerer = Answerer(processor, examples, batch_size=2)
    weight = decoder_weight(model)
    plain = answered(model, processor, examples)
    with changed(weight, -4.0):
        other = answered(model, processor, examples)
    assert plain != other

    def answers() -> list[str]:
        return answerer.answers(model, max_new_tokens=TOKENS)

    assert answers() == plain
    for example in examples:
        if example.image:
            example.image.unlink()
    assert answers() == plain
    with changed(weight, -4.0):
        assert answers() == other
    assert answers() == plain


def test_logits_are_those_of_whole_passes(vlm_family: str, tmp_path: Path) -> None:
    """To the bit: answers of pico models might not show a small difference."""
    model, processor = pico.build(vlm_family)
    answerer = Answerer(processor, truth.examples(vlm_family, tmp_path, 3), batch_size=3)
    answerer.answers(model, max_new_tokens=1)
    places = answerer._chunks[0].indices
    batch = prompt_batch(processor, [answerer.examples[place] for place in places])
    kept = answerer._kept[answerer._chunks[0]]
    assert kept.vision is not None
    pixels = [one for name, one in kept.batch.inputs.items() if name.startswith("pixel")]
    assert pixels and not any(one.any() for one in pixels)
    assert kept.bytes < sum(one.nbytes for one in batch.inputs.values())
    with torch.no_grad():
        whole = model(**batch.inputs, use_cache=False).logits
        with replayed(model, kept.vision):
            again = model(**kept.batch.inputs, use_cache=False).logits
        inverted = {**batch.inputs, "pixel_values": -batch.inputs["pixel_values"]}
        blind = model(**inverted, use_cache=False).logits
    assert torch.equal(again, whole)
    assert not torch.equal(blind, whole)


def test_images_go_through_the_vision_part_once(vlm_family: str, tmp_path: Path) -> None:
    model, processor = pico.build(vlm_family)
    leaves = (nn.Linear, nn.Conv2d, nn.Conv3d)
    first = next(one for one in vision_part(model).modules() if isinstance(one, leaves))
    runs = 0

    def count(*_args: Any) -> None:
        nonlocal runs
        runs += 1

    first.register_forward_hook(count)
    answerer = Answerer(processor, truth.examples(vlm_family, tmp_path, 3), batch_size=2)
    for _ in range(3):
        answerer.answers(model, max_new_tokens=2)
    assert runs == 2


def test_another_vision_part_is_noticed(vlm_family: str, tmp_path: Path) -> None:
    """In the same model or another one: the cached vision output is not used."""
    model, processor = pico.build(vlm_family)
    examples = truth.examples(vlm_family, tmp_path, 3)
    answerer = Answerer(processor, examples, batch_size=2)
    first = answerer.answers(model, max_new_tokens=TOKENS)
    kept = answerer._kept[answerer._chunks[0]]
    other, _ = pico.build(vlm_family, seed=1)
    for name, parameter in model.named_parameters():
        if name.startswith(("model.language_model", "lm_head")):
            other.get_parameter(name).data.copy_(parameter)
    with torch.no_grad(), replayed(other, kept.vision):
        stale = other(**kept.batch.inputs, use_cache=False).logits
    with torch.no_grad():
        batch = prompt_batch(processor, examples[:2])
        assert not torch.equal(stale, other(**batch.inputs, use_cache=False).logits)
    assert answerer.answers(other, max_new_tokens=TOKENS) == answered(other, processor, examples)
    assert answerer.answers(model, max_new_tokens=TOKENS) == first

    before = vision_state(model)
    with changed(decoder_weight(model), 2.0):
        assert vision_state(model) == before
    with changed(vision_weight(model), 1.001):
        assert vision_state(model) != before
        changed_answers = answerer.answers(model, max_new_tokens=TOKENS)
        assert changed_answers == answered(model, processor, examples)
    assert vision_state(model) == before
    assert vision_state(model.to(torch.bfloat16)) != before


def test_prompts_without_images_and_mixed_batches(tmp_path: Path) -> None:
    model, processor = pico.build("qwen2_5_vl")
    examples = truth.examples("qwen2_5_vl", tmp_path, 5)
    examples = [replace(e, image=None) if i in (1, 4) else e for i, e in enumerate(examples)]
    answerer = Answerer(processor, examples, batch_size=2)
    plain = answered(model, processor, examples)
    for _ in range(2):
        assert answerer.answers(model, max_new_tokens=TOKENS) == plain
    kept = [answerer._kept[chunk] for chunk in answerer._chunks]
    assert [one.vision is None for one in kept] == [True, False, False]


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_memory_is_bounded(tmp_path: Path, batches: int) -> None:
    """What does not fit into the cache is computed again."""
    model, processor = pico.build("llava")
    examples = truth.examples("llava", tmp_path, 6)
    plain = answered(model, processor, examples)
    whole = Answerer(processor, examples, batch_size=2)
    whole.answers(model, max_new_tokens=TOKENS)
    bound = sum(whole._kept[chunk].bytes for chunk in whole._chunks[:batches])
    assert whole.kept_bytes > bound
    answerer = Answerer(processor, examples, batch_size=2, memo_bytes=bound)
    for _ in range(2):
        assert answerer.answers(model, max_new_tokens=TOKENS) == plain
        assert answerer.kept_bytes == bound and len(answerer._kept) == batches


def test_code_of_others_is_not_trusted_to_hand_over(tmp_path: Path) -> None:
    """A class that is not transformers' own runs whole, with its pixels."""
    model, processor = pico.build("llava")
    model.__class__ = type("Remote", (type(model),), {"__module__": "modeling_remote"})
    examples = truth.examples("llava", tmp_path, 2)
    answerer = Answerer(processor, examples, batch_size=2)
    plain = answered(model, processor, examples)
    for _ in range(2):
        assert answerer.answers(model, max_new_tokens=TOKENS) == plain
    (kept,) = answerer._kept.values()
    assert kept.vision is None
    assert kept.batch.inputs["pixel_values"].any()


def test_finished_batches_are_kept(tmp_path: Path) -> None:
    model, processor = pico.build("llava")
    examples = truth.examples("llava", tmp_path, 3)
    answerer = Answerer(processor, examples, batch_size=2)
    seen: list[int] = []
    write_json(tmp_path / "work" / "answers_000000.json", ["was", "there"])
    texts = answerer.answers(
        model, max_new_tokens=TOKENS, partial=tmp_path / "work", advance=seen.append
    )
    first, second = (chunk.indices for chunk in answerer._chunks)
    assert [texts[place] for place in first] == ["was", "there"]
    assert texts[second[0]] == answered(model, processor, [examples[second[0]]])[0]
    works = [answering_tokens([examples[i] for i in places], TOKENS) for places in (first, second)]
    assert seen == works and sum(works) == answering_tokens(examples, TOKENS)


def test_what_an_answer_takes_goes_by_the_prompt_and_the_answer() -> None:
    short, long = (Example("a", "x" * n, True, "") for n in (40, 400))
    seen = replace(short, image=Path("a.png"))
    assert answering_tokens([short], 8) == 10 + 8
    assert answering_tokens([short, long], 8) == 10 + 100 + 2 * 8
    assert answering_tokens([seen], 8) > answering_tokens([long], 8)


def test_answers_that_were_there_are_not_told_as_done_just_now(tmp_path: Path) -> None:
    model, processor = pico.build("llava")
    examples = truth.examples("llava", tmp_path, 3)
    answerer = Answerer(processor, examples, batch_size=2)
    write_json(tmp_path / "work" / "answers_000000.json", ["was", "there"])
    done: list[int] = []
    fewer: list[int] = []
    answerer.answers(
        model,
        max_new_tokens=TOKENS,
        partial=tmp_path / "work",
        advance=Task(done.append, fewer.append),
    )
    first, second = ([examples[i] for i in chunk.indices] for chunk in answerer._chunks)
    assert fewer == [-answering_tokens(first, TOKENS)]
    assert done == [answering_tokens(second, TOKENS)]


def test_model_and_output_are_left_alone(vlm_family: str, tmp_path: Path) -> None:
    model, processor = pico.build(vlm_family)

    def state() -> list[tuple[set[str], int, int]]:
        return [
            (set(one.__dict__), len(one._forward_hooks), len(one._forward_pre_hooks))
            for one in model.modules()
        ]

    answered(model, processor, truth.examples(vlm_family, tmp_path, 2))
    before = state()  # with what transformers itself leaves at a model
    output = VisionOutput(None, torch.zeros(1), torch.device("cpu"))
    answerer = Answerer(processor, truth.examples(vlm_family, tmp_path, 2), batch_size=2)
    for _ in range(2):
        answerer.answers(model, max_new_tokens=1)
    with pytest.raises(ZeroDivisionError), replayed(model, output):
        raise ZeroDivisionError
    assert state() == before


# Early ends


LETTERS = "abnoct' \n.\u2019\u03a3\u03c3\u03c2\u0130\u00e9,\u0301"
WORDS = ("cannot", "can't", "no", "not a", "\u03b1\u03c3", "a\u03c3", "n.", "\u0130")


@given(
    start=st.text(LETTERS, max_size=14),
    rest=st.text(LETTERS, max_size=6),
    keywords=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(tuple),
    window=st.integers(1, 12),
)
@settings(max_examples=1500)
def test_a_settled_verdict_never_changes(
    start: str, rest: str, keywords: tuple[str, ...], window: int
) -> None:
    judge = KeywordJudge(keywords=keywords, window=window)
    if judge.settled(start):
        assert judge.refuses(start + rest) == judge.refuses(start)


@pytest.mark.parametrize(
    ("start", "settled"),
    [
        ("", False),
        ("I can", False),
        ("I cannot", False),  # "I cannots" would not refuse
        ("I cannot ", False),  # white space at the end may be an end
        ("I cannot.", True),
        ("Sure, cann", False),
        ("Sure, canno", True),  # a keyword would end behind the window
        ("   Sure,     can", False),
        ("Sure, here\u03a3", False),  # a final sigma if nothing follows, another one if not
        ("Sure, here\u03a3 ", True),
    ],
)
def test_settled(start: str, settled: bool) -> None:
    assert KeywordJudge(keywords=("cannot",), window=10).settled(start) is settled


@cache
def _byte_level() -> Any:
    return pico.processor("llama")


@cache
def _byte_fallback() -> Any:
    """As in Llama 2: bytes without their own token decode together, or not at all."""
    words = [
        "<unk>",
        "</s>",
        "\u2581can",
        "not",
        "\u2581no",
        "t",
        ".",
        "\u2581",
        "\u4f60",
        "\u03a3",
    ]
    vocabulary = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )


def _byte_tokens(text: str) -> list[int]:
    return [10 + byte for byte in text.encode()]


@pytest.mark.parametrize("make", [_byte_level, _byte_fallback])
@given(data=st.data(), window=st.integers(1, 24))
@settings(max_examples=300)
def test_rows_end_where_the_verdict_is_certain(
    make: Callable[[], Any], data: st.DataObject, window: int
) -> None:
    """For any tokens, even invalid bytes: nothing that follows changes the verdict."""
    tokenizer = make()
    tokens = st.integers(2, len(tokenizer) - 1).map(lambda token: [token])
    if make is _byte_fallback:
        pieces = st.sampled_from(["\u4f60", "\u597d\n", "\U0001f600"]).map(_byte_tokens)
        tokens = st.one_of(st.integers(2, 9).map(lambda token: [token]), tokens, pieces)
    row = [one for part in data.draw(st.lists(tokens, max_size=60)) for one in part]
    keywords = ("not", "cannot", "can", "\u4f60", "\u03a3", "no \u4f60")
    judge = KeywordJudge(keywords=keywords, window=window)
    criterion = greedy._Settled(tokenizer, judge, 2)
    for length in range(1, len(row) + 1):
        ids = torch.tensor([[0, 0, *row[:length]]])
        if criterion(ids, None).all():
            break
    whole = tokenizer.decode(row, skip_special_tokens=True).strip()
    cut = tokenizer.decode(row[: criterion.ends.get(0)], skip_special_tokens=True).strip()
    assert judge.refuses(cut) == judge.refuses(whole)


def test_a_row_of_bytes_waits_for_its_end() -> None:
    """There are twenty characters, until a following byte makes all of them unreadable."""
    tokenizer, judge = _byte_fallback(), KeywordJudge(keywords=("can",), window=3)
    row = [2, *_byte_tokens("\u4f60" * 20)]  # "can" and a letter behind it: no keyword
    criterion = greedy._Settled(tokenizer, judge, 0)
    assert not criterion(torch.tensor([row]), None).any()
    broken = [*row, 10 + 0xE4, 3]
    assert judge.refuses(tokenizer.decode(broken)) and not judge.refuses(tokenizer.decode(row))
    assert criterion(torch.tensor([broken]), None).all()


def test_early_ends_give_the_same_verdicts() -> None:
    """With the bundled model, which refuses some; prompts with a reference are answered in full."""
    opened = truth.opened(demo_model())
    prompts = read(DataSource(name="demo", split="test")).examples
    harmful = [e for e in prompts if e.harmful][:6]
    harmless = [e for e in prompts if not e.harmful][:3]
    unknown = replace(harmless.pop(), response=None)
    examples = [harmless[0], *harmful, unknown, harmless[1]]

    def texts(judge: KeywordJudge | None) -> dict[str, str]:
        answerer = Answerer(opened.processor, examples, batch_size=3, judge=judge)
        first, again = (answerer.answers(opened.model, max_new_tokens=32) for _ in range(2))
        assert first == again
        return dict(zip([e.id for e in examples], first, strict=True))

    judge = REGRAFT_1
    whole, cut = texts(None), texts(judge)
    verdicts = {name: judge.refuses(text) for name, text in whole.items()}
    assert set(verdicts.values()) == {True, False}
    assert {name: judge.refuses(text) for name, text in cut.items()} == verdicts
    assert all(whole[name].startswith(text) for name, text in cut.items())
    shorter = {name for name in whole if len(cut[name]) < len(whole[name])}
    assert {True, False} == {verdicts[name] for name in shorter}
    assert shorter <= {e.id for e in (*harmful, unknown)}


# Sessions


@pytest.fixture
def models_on_disk(tmp_path: Path) -> dict[str, Any]:
    """A dense model, a pruned one, a patch and the pruned one with it; prompts of both kinds."""
    pico.save("qwen2_5_vl", tmp_path / "dense", torch.bfloat16)
    dense = open_source(tmp_path / "dense")
    write_data(tmp_path / "data", 3)
    data = DataSource(name="jsonl", path=tmp_path / "data" / "data.jsonl")
    calibration = CalibrationSettings(data=data, samples=3)
    prune = prune_settings(sparsity=0.6)
    pruned = stages.prune_checkpoint(
        stages.Setup(dense, calibration, COMPUTE), tmp_path / "pruned", prune
    )
    stages.write_statistics(stages.Setup(dense, calibration, COMPUTE), tmp_path / "statistics")
    settings = method(heads="all", q=0.9)
    patch = tmp_path / "patch"
    restored(dense, pruned, patch, settings, None, tmp_path / "statistics", COMPUTE)
    realigned = open_source(
        stages.patch_checkpoint("apply", pruned.folder, patch, tmp_path / "realigned")
    )
    return {"dense": dense, "pruned": pruned, "patch": patch, "realigned": realigned, "data": data}


def _evaluations(
    made: dict[str, Any], out: Path, cache: stages.EvaluationCache | None, **changes: Any
) -> None:
    settings = EvalSettings(max_new_tokens=TOKENS, **changes)
    for name, model, patch in (
        ("dense", "dense", None),
        ("pruned", "pruned", None),
        ("patched", "pruned", "patch"),
        ("pruned-again", "pruned", None),
        ("realigned", "realigned", None),
    ):
        target = stages.Target(
            made[model],
            COMPUTE,
            made[patch] if patch else None,
            processor_from=made["dense"],
            cache=cache or stages.EvaluationCache(0),
        )
        stages.evaluate_target(target, out / name, [made["data"]], settings)


JUDGED: dict[str, Any] = {"keywords": REGRAFT_1.keywords, "window": 8}


@pytest.mark.parametrize("full", [True, False])
def test_a_session_changes_no_file(
    models_on_disk: dict[str, Any], tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also reads, encodes and loads only once what its evaluations share."""
    _evaluations(models_on_disk, tmp_path / "alone", None, full_answers=full, **JUDGED)
    done: dict[str, int] = {}

    def counted(module: ModuleType, name: str) -> None:
        own = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] = done.get(name, 0) + 1
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(targets, "zeros")
    for name in ("read_suites", "load", "Answerer"):
        counted(evaluation_cache, name)
    _evaluations(
        models_on_disk, tmp_path / "shared", stages.EvaluationCache(), full_answers=full, **JUDGED
    )
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")
    assert done == {"read_suites": 1, "zeros": 3, "load": 3, "Answerer": 1}
    answers = {
        name: stages.read_evaluation(tmp_path / "shared" / name).result.answers
        for name in ("dense", "pruned", "patched")
    }
    assert answers["dense"] != answers["pruned"] != answers["patched"]


def test_results_say_whether_answers_are_full(
    models_on_disk: dict[str, Any], tmp_path: Path
) -> None:
    target = stages.Target(models_on_disk["pruned"], COMPUTE)
    for full in (True, False):
        settings = EvalSettings(max_new_tokens=2, full_answers=full)
        done = stages.evaluate_target(
            target, tmp_path / str(full), [models_on_disk["data"]], settings
        )
        assert done.about["settings"]["full_answers"] is full


@pytest.mark.parametrize("full", [True, False])
def test_a_late_loop_is_seen_where_answers_are_full(
    models_on_disk: dict[str, Any], tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = "Sure. " + "Step one: mix the two things together in a bowl. " * 12
    monkeypatch.setattr(
        evaluation_cache.Answerer, "answers", lambda self, *_, **__: [loop] * len(self.examples)
    )
    data, settings = models_on_disk["data"], EvalSettings(full_answers=full)
    target = stages.Target(models_on_disk["dense"], COMPUTE)
    done = stages.evaluate_target(target, tmp_path / "out", [data], settings)
    assert done.result.asr is not None
    assert done.result.asr.value == (0 if full else 1)


def test_answers_of_another_evaluation_are_noticed(
    models_on_disk: dict[str, Any], tmp_path: Path
) -> None:
    """Different ones, fewer, or results without the digest of their answers."""
    out = tmp_path / "out"
    _evaluations(models_on_disk, out, None, **JUDGED)
    dense, pruned = (out / name / "answers.jsonl" for name in ("dense", "pruned"))
    own, results = dense.read_bytes(), out / "dense" / "results.json"
    assert own != pruned.read_bytes()
    cut = own[: own.rindex(b"\n", 0, -1) + 1]
    assert len(cut.splitlines()) == len(own.splitlines()) - 1
    message = r"dense/answers\.jsonl does not hold the answers that .* copied from another"
    for wrong in (pruned.read_bytes(), cut):
        dense.write_bytes(wrong)
        with pytest.raises(RegraftError, match=message):
            stages.read_evaluation(out / "dense")
    content = json.loads(results.read_text())
    dense.write_bytes(own)
    assert stages.read_evaluation(out / "dense").result.answers
    assert content.pop("answers")
    results.write_text(json.dumps(content))
    with pytest.raises(RegraftError, match="holds no evaluation of regraft"):
        stages.read_evaluation(out / "dense")


def test_a_session_sees_changed_images(models_on_disk: dict[str, Any], tmp_path: Path) -> None:
    """The same path with another image in it, between two evaluations."""
    cache = stages.EvaluationCache()
    model, data = models_on_disk["dense"], models_on_disk["data"]
    short = EvalSettings(max_new_tokens=TOKENS)

    def evaluate(name: str, cache: stages.EvaluationCache) -> Any:
        target = stages.Target(model, COMPUTE, cache=cache)
        stages.evaluate_target(target, tmp_path / name, [data], short)
        return tree(tmp_path / name)

    evaluate("before", cache)
    for i, path in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        pico.image(500 + i, (64, 48)).save(path)
    after = evaluate("after", cache)
    assert after == evaluate("alone", stages.EvaluationCache(0))
    texts = [
        [one.answer for one in stages.read_evaluation(tmp_path / name).result.answers]
        for name in ("before", "after")
    ]
    assert texts[0] != texts[1]


def test_like_prompts_share_a_batch(tmp_path: Path) -> None:
    """Grouped by having an image and by length; answers come in the prompts' order."""
    lengths = [9, 3, 7, 1, 5]
    examples = [
        Example(str(i), "x" * length, False, "c", tmp_path / "i.png" if i % 2 else None)
        for i, length in enumerate(lengths)
    ]
    chunks = generating._chunks(examples, 2, None)
    assert [chunk.indices for chunk in chunks] == [(4, 2), (0,), (3, 1)]


def test_images_are_decoded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batches' images are decoded before they are needed, each batch's once."""
    processor, model = pico.build("qwen2_vl")[::-1]
    examples = pico.write_examples(tmp_path, 6)
    events: list[str] = []
    own = generating.decoded

    def decoded(some: Any) -> Any:
        events.append(f"decoded {some[0].id}")
        return own(some)

    def answer(_model: Any, _processor: Any, inputs: Any, *_: Any) -> list[str]:
        deadline = time.monotonic() + 20
        while len(events) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        events.append("answered")
        return ["a"] * len(inputs["input_ids"])

    monkeypatch.setattr(generating, "decoded", decoded)
    monkeypatch.setattr(generating, "answer", answer)
    monkeypatch.setattr(generating, "placed", lambda batch, _: batch)
    answerer = generating.Answerer(processor, examples, batch_size=1, memo_bytes=0)
    assert answerer.answers(model, max_new_tokens=1) == ["a"] * 6  # type: ignore[arg-type]
    assert [one for one in events if one != "answered"] == [
        f"decoded {example.id}" for example in sorted(examples, key=length_class)
    ]
    assert events.index("answered") >= 2


def test_work_ahead_raises_in_its_turn_and_starts_no_more() -> None:
    started: list[int] = []

    def make(item: int) -> int:
        started.append(item)
        if item == 2:
            raise ValueError("two")
        return 10 * item

    taken = []
    with pytest.raises(ValueError, match="two"):
        for item, made in prefetch(make, range(100), depth=2):
            taken.append((item, made))
    assert taken == [(0, 0), (1, 10)]
    assert max(started) <= 4
