"""vLLM as a backend: what it is handed, and that its answers come back in order.

In its place stands an engine with its interface, on transformers: it tokenizes nothing, puts images
into prompts itself, and answers greedily. With vLLM installed the real one is asked too.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
import truth
from disk import write_data
from regraft import stages
from regraft.checks import read_suites
from regraft.data.collate import prompt_batch, prompt_tokens
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation import by_vllm
from regraft.evaluation.generate import Answerer
from regraft.models.load import load_model, load_processor, open_source
from regraft.recipe import ComputeSettings, EvalSettings

TOKENS = 6


class StandIn:
    """`vllm.LLM` as far as we use it."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings, self.asked, self.stopped = settings, 0, False
        source = open_source(Path(model))
        self.model = load_model(source, dtype=settings["dtype"], device="cpu")
        self.processor = load_processor(source)
        core = SimpleNamespace(shutdown=lambda: setattr(self, "stopped", True))
        self.llm_engine = SimpleNamespace(engine_core=core)
        StandIn.made.append(self)

    def generate(self, prompts: Sequence[dict[str, Any]], how: Any, use_tqdm: bool) -> list[Any]:
        assert how.temperature == 0.0 and not use_tqdm
        self.asked += len(prompts)
        return [SimpleNamespace(outputs=[self._one(prompt, how)]) for prompt in prompts]

    def _one(self, prompt: dict[str, Any], how: Any) -> Any:
        text = self.processor.tokenizer.decode(prompt["prompt_token_ids"])
        image = prompt.get("multi_modal_data", {}).get("image")
        images = {} if image is None else {"images": [image]}
        inputs = self.processor(
            text=[text], return_tensors="pt", add_special_tokens=False, **images
        )
        ids = self.model.generate(**inputs, max_new_tokens=how.max_tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return SimpleNamespace(text=self.processor.tokenizer.decode(new, skip_special_tokens=True))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    module = SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    StandIn.made = []
    return StandIn.made


@pytest.mark.parametrize("family", [*pico.PAPER_FAMILIES, "llava"])
def test_tokens_are_those_of_a_batch_before_its_image_is_put_in(
    family: str, tmp_path: Path
) -> None:
    _, processor = pico.build(family)
    for example in truth.examples(family, tmp_path, 2):
        whole = prompt_batch(processor, [example]).inputs["input_ids"][0].tolist()
        placeholder = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        pairs = zip([None, *whole], whole, strict=False)
        one_each = [now for before, now in pairs if not now == before == placeholder]
        assert (len(one_each) < len(whole)) == (family != "mllama")
        assert prompt_tokens(processor, example) == one_each


@pytest.mark.parametrize("family", pico.TEXT_FAMILIES)
def test_tokens_of_models_that_read_text_only(family: str, tmp_path: Path) -> None:
    _, tokenizer = pico.build(family)
    for example in truth.examples(family, tmp_path, 2, images=False):
        whole = prompt_batch(tokenizer, [example]).inputs["input_ids"][0].tolist()
        assert prompt_tokens(tokenizer, example) == whole


def test_an_evaluation_by_vllm(
    vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_vllm, "_PIECE", 3)
    pico.save("llava", tmp_path / "model", torch.float32)
    suites = [DataSource(name="jsonl", path=write_data(tmp_path / "data", 8))]
    source = open_source(tmp_path / "model")
    settings = EvalSettings(max_new_tokens=TOKENS, backend="vllm", max_length=512)
    compute = ComputeSettings(device="cpu", dtype="float32")

    def evaluated(name: str, one: EvalSettings) -> stages.Evaluation:
        return stages.evaluate(source, tmp_path / name, suites, one, compute)

    ours = evaluated("ours", settings.in_memory())
    theirs = evaluated("theirs", settings)
    (engine,) = vllm
    assert engine.stopped and engine.asked == len(ours.result.answers)
    assert engine.settings["max_model_len"] == 512
    assert engine.settings["limit_mm_per_prompt"] == {"image": 1}
    assert [a.answer for a in theirs.result.answers] == [a.answer for a in ours.result.answers]
    assert len({a.answer for a in theirs.result.answers}) > 1
    assert theirs.about["settings"]["backend"] == "vllm"
    assert "backend" not in ours.about["settings"]
    evaluated("theirs", settings)
    assert len(vllm) == 1, "a finished evaluation was repeated"


def test_pieces_of_a_stopped_evaluation_are_kept(
    vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_vllm, "_PIECE", 2)
    folder = pico.save("llava", tmp_path / "model", torch.float32)
    examples = truth.examples("llava", tmp_path, 6)
    processor = load_processor(open_source(folder))

    def answers(stop_after: int) -> list[str]:
        seen: list[int] = []

        def progress(count: int) -> None:
            seen.append(count)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        engine = by_vllm.Engine(folder, processor, dtype="float32")
        return engine.answers(examples, TOKENS, tmp_path / "work", progress)

    with pytest.raises(KeyboardInterrupt):
        answers(2)
    assert vllm[0].asked == 4
    found = answers(99)
    assert vllm[1].asked == 2
    model = load_model(open_source(folder), dtype="float32", device="cpu")
    plain = Answerer(processor, examples, batch_size=1).answers(model, max_new_tokens=TOKENS)
    assert found == plain


def test_what_vllm_cannot_do_is_said_before(vllm: list[StandIn], tmp_path: Path) -> None:
    for wrong, message in (
        ({"perplexity": True}, "perplexity is measured by the transformers"),
        ({"full_answers": False}, "always gives full answers"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalSettings(backend="vllm", **wrong)
    with pytest.raises(ValueError, match="add backend vllm"):
        EvalSettings(max_length=9)
    assert not vllm


def test_a_missing_vllm_is_told_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RegraftError, match=r"pip install 'regraft\[vllm\]'"):
        by_vllm.Engine(tmp_path, None, dtype="auto")


def test_a_model_that_vllm_refuses(vllm: list[StandIn], tmp_path: Path) -> None:
    def refuses(**_: Any) -> None:
        raise ValueError("No room for the KV cache.\nMore.")

    sys.modules["vllm"].LLM = refuses  # type: ignore[attr-defined]
    with pytest.raises(RegraftError, match=r"No room for the KV cache\. Use --backend"):
        by_vllm.Engine(tmp_path, None, dtype="auto")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself_answers_as_we_do(shared: Path, tmp_path: Path) -> None:
    """On the trained model; numerics differ, so that a few answers may."""
    source = open_source(_classic(shared / "models" / "reader-llava-12m", tmp_path / "reader"))
    processor = load_processor(source)
    suite = DataSource(name="safebench", path=shared / "data" / "figstep")
    examples = read_suites(source, [suite], 64).examples
    engine = by_vllm.Engine(source.folder, processor, dtype="float32", max_length=1024)
    theirs = engine.answers(examples, 24)
    engine.close()
    model = load_model(source, dtype="float32", device="cpu")
    ours = Answerer(processor, examples, batch_size=8).answers(model, max_new_tokens=24)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.9 * len(ours), f"{same} of {len(ours)} answers are the same"


def _classic(folder: Path, copy: Path) -> Path:
    """The checkpoint with the tensor names of the hub's LLaVA models, the only ones vLLM knows."""
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        names = {
            name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in tensors
        }
        save_file({names[name]: one for name, one in tensors.items()}, file, {"format": "pt"})
    return copy
