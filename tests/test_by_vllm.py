"""vLLM as a backend: what it is handed, and that its answers come back in order.

In its place stands an engine with its interface, on transformers: it tokenizes nothing, puts images
into prompts itself, and answers greedily. With vLLM installed the real one is asked too.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
import truth
from disk import rewrite, write_data
from regraft import distributed, pipeline, stages
from regraft.data.collate import prompt_batch, prompt_tokens
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.defence.artifact import Direction, ShieldPrompt, save_defence
from regraft.errors import PassingError, RegraftError
from regraft.evaluation import vllm as by_vllm
from regraft.evaluation.generate import Answerer
from regraft.models.load import Source, load_model, load_processor, open_source
from regraft.progress import Silent
from regraft.reading import read_suites
from regraft.recipe import Recipe
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages import targets

TOKENS = 6
BY_VLLM = EvalSettings(max_new_tokens=TOKENS, backend="vllm")


class StandIn:
    """`vllm.LLM` as far as we use it."""

    made: ClassVar[list[StandIn]] = []
    refusal: ClassVar[type[Exception]] = ValueError

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
        encoded = [self._encoded(prompt) for prompt in prompts]
        for inputs in encoded:
            if (length := inputs["input_ids"].shape[1]) > self._most():
                raise self.refusal(f"The decoder prompt (length {length})\nis too long.")
        self.asked += len(prompts)
        return [SimpleNamespace(outputs=[self._one(inputs, how)]) for inputs in encoded]

    def _most(self) -> int:
        return self.settings["max_model_len"] or 4096

    def _encoded(self, prompt: dict[str, Any]) -> Any:
        text = self.processor.tokenizer.decode(prompt["prompt_token_ids"])
        image = prompt.get("multi_modal_data", {}).get("image")
        images = {} if image is None else {"images": [image]}
        return self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)

    def _one(self, inputs: Any, how: Any) -> Any:
        length = inputs["input_ids"].shape[1]
        most = min(how.max_tokens, self._most() - length)
        ids = self.model.generate(**inputs, max_new_tokens=max(most, 1), do_sample=False)
        new = ids[0, length:].tolist()[:most]
        ended = self.processor.tokenizer.eos_token_id in new
        return SimpleNamespace(
            text=self.processor.tokenizer.decode(new, skip_special_tokens=True),
            token_ids=new,
            finish_reason="stop" if ended else "length",
        )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    module = SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(by_vllm, "version", lambda _: "0.33.0")
    StandIn.made = []
    return StandIn.made


@pytest.fixture
def llava(pico_dir: Callable[[str], Path]) -> Source:
    return open_source(pico_dir("llava"))


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
    cache = stages.EvaluationCache()
    compute = ComputeSettings(dtype="float32")
    target = stages.Target(source, compute, cache=cache)

    def evaluated(name: str, one: EvalSettings) -> stages.Evaluation:
        return stages.evaluate(target, tmp_path / name, suites, one)

    ours = evaluated("ours", settings.in_memory())
    network = weakref.ref(cache.load(source, compute, Silent())[0])

    def built(**given: Any) -> StandIn:
        assert network() is None, "our own model is still in memory"
        return StandIn(**given)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", built)
    theirs = evaluated("theirs", settings)
    (engine,) = vllm
    assert engine.stopped and engine.asked == len(ours.result.answers)
    assert engine.settings["max_model_len"] == 512
    assert engine.settings["limit_mm_per_prompt"] == {"image": 1}
    assert [a.answer for a in theirs.result.answers] == [a.answer for a in ours.result.answers]
    assert len({a.answer for a in theirs.result.answers}) > 1
    assert theirs.about["settings"]["backend"] == "vllm"
    assert "backend" not in ours.about["settings"]
    assert theirs.about["versions"] == {**ours.about["versions"], "vllm": "0.33.0"}
    assert "vllm" not in ours.about["versions"]
    evaluated("theirs", settings)
    assert len(vllm) == 1, "a finished evaluation was repeated"
    monkeypatch.setattr(by_vllm, "version", lambda _: "0.34.0")
    with pytest.raises(RegraftError, match=r"versions\.vllm: \"0.33.0\" there, \"0.34.0\" now"):
        evaluated("theirs", settings)


def test_pieces_of_a_stopped_evaluation_are_kept(
    vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_vllm, "_PIECE", 2)
    folder = pico.save("llava", tmp_path / "model", torch.float32)
    examples = truth.examples("llava", tmp_path, 6)
    processor = load_processor(open_source(folder))

    def answers(stop_after: int) -> list[str]:
        seen: list[int] = []

        def advance(count: int) -> None:
            seen.append(count)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        engine = by_vllm.Engine(folder, processor, dtype="float32")
        return engine.answers(examples, TOKENS, tmp_path / "work", advance)

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


def _missing(_: str) -> str:
    raise PackageNotFoundError


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, None),
        ({"device": "cuda"}, None),
        ({"device": "cpu"}, r"not --device cpu\..* CUDA_VISIBLE_DEVICES"),
        ({"device": "cuda:1"}, r"not --device cuda:1\."),
        ({"placement": "streamed"}, None),  # of the other stages of a run
    ],
)
def test_what_keeps_vllm_from_a_model(
    vllm: list[StandIn],
    llava: Source,
    monkeypatch: pytest.MonkeyPatch,
    several: bool,
    wrong: dict[str, Any],
    message: str | None,
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2 if several else 1)
    message = "start it without torchrun, with --tensor-parallel" if several else message
    if message is None:
        targets.check_for_vllm(llava, ComputeSettings(**wrong))
    else:
        with pytest.raises(RegraftError, match=message):
            targets.check_for_vllm(llava, ComputeSettings(**wrong))
    monkeypatch.setattr(by_vllm, "version", _missing)
    with pytest.raises(RegraftError, match=r"not installed: pip install 'regraft\[vllm\]'"):
        targets.check_for_vllm(llava, ComputeSettings(**wrong))


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ({}, None),
        ({"defence": ShieldPrompt("Be careful.", {})}, None),
        ({"patch": Path("patch")}, "takes no patch in memory.*regraft apply"),
        (
            {"defence": Direction(torch.ones(4), 0, 1.0, {})},
            "A refusal direction acts inside the model",
        ),
        ({"text": stages.OnText(Path("text"))}, "by the transformers backend only"),
    ],
)
def test_nothing_acts_inside_of_a_model_of_vllm(
    vllm: list[StandIn],
    llava: Source,
    tmp_path: Path,
    inside: dict[str, Any],
    message: str | None,
) -> None:
    if (defence := inside.get("defence")) is not None:
        save_defence(tmp_path / "defence", defence)
        inside = {"defence": tmp_path / "defence"}
    target = stages.Target(llava, ComputeSettings(), **inside)
    if message is None:
        target.backend(BY_VLLM)
    else:
        with pytest.raises(RegraftError, match=message):
            target.backend(BY_VLLM)


def test_a_recipe_with_a_direction_is_refused() -> None:
    defend = [{"name": "shield"}, {"name": "pushed", "method": "refusal-direction"}]
    Recipe.model_validate({"defend": defend})
    Recipe.model_validate({"defend": defend[:1], "evaluate": {"backend": "vllm"}})
    with pytest.raises(ValueError, match="refusal direction of 'pushed' acts inside the model"):
        Recipe.model_validate({"defend": defend, "evaluate": {"backend": "vllm"}})


@pytest.mark.parametrize("bare", ["dense", "pruned"])
def test_a_run_finds_a_missing_processor_before_anything_else(
    vllm: list[StandIn], tmp_path: Path, bare: str
) -> None:
    for name in ("dense", "pruned"):
        folder = pico.save("llava", tmp_path / name)
    pruned = open_source(folder)
    weight = next(pruned.architecture.linears).tensor
    zeros = torch.zeros_like(pruned.checkpoint.read(weight))
    rewrite(folder, "model.safetensors", {weight: zeros})
    recipe = Recipe.model_validate(
        {
            "model": str(tmp_path / "dense"),
            "pruned": str(tmp_path / "pruned"),
            "calibration": {"data": str(tmp_path / "never-read.jsonl")},
            "evaluate": {"backend": "vllm"},
        }
    )
    (tmp_path / bare / "tokenizer_config.json").unlink()
    with pytest.raises(RegraftError, match=f"{bare} comes without .* copy tokenizer and processor"):
        pipeline.plan_run(recipe, tmp_path / "run", stages.EvaluationCache())


def test_an_evaluation_finds_a_missing_processor_though_there_is_another(
    vllm: list[StandIn], llava: Source, tmp_path: Path
) -> None:
    source = open_source(pico.save("llava", tmp_path / "bare"))
    (source.folder / "processor_config.json").unlink()
    suites = [DataSource(name="jsonl", path=write_data(tmp_path / "data", 1))]
    target = stages.Target(source, ComputeSettings(), processor_from=llava)
    with pytest.raises(RegraftError, match="bare comes without the files of its processor"):
        stages.evaluate(target, tmp_path / "out", suites, BY_VLLM)
    assert not vllm


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_is_told_the_dtype_of_the_checkpoint(
    vllm: list[StandIn], tmp_path: Path, dtype: str, told: bool
) -> None:
    folder = pico.save("llava", tmp_path / "model", getattr(torch, dtype))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config.pop("dtype") == dtype
    if not told:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    suites = [DataSource(name="jsonl", path=write_data(tmp_path / "data", 1))]
    settings = EvalSettings(max_new_tokens=1, backend="vllm")
    target = stages.Target(open_source(folder), ComputeSettings())
    stages.evaluate(target, tmp_path / "out", suites, settings)
    assert [engine.settings["dtype"] for engine in vllm] == [dtype]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            ValueError("No room for\nthe KV cache."),
            r"\(No room for the KV cache\.\)\. Use --backend",
        ),
        (AssertionError(), r"\(AssertionError\(\)\)"),
        (OSError("x" * 600), f"\\({'x' * 500}\\)"),
    ],
)
def test_a_model_that_vllm_refuses_leaves_finished_pieces(
    vllm: list[StandIn],
    llava: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    message: str,
) -> None:
    def refuses(**_: Any) -> None:
        raise raised

    def stops(**given: Any) -> StandIn:
        engine = StandIn(**given)
        pieces = [engine.generate, None]

        def generate(*arguments: Any, **more: Any) -> list[Any]:
            one = pieces.pop(0)
            if one is None:
                raise KeyboardInterrupt
            return one(*arguments, **more)

        engine.generate = generate  # type: ignore[method-assign]
        return engine

    suites = [DataSource(name="jsonl", path=write_data(tmp_path / "data", 2))]

    def evaluated(build: Any) -> None:
        sys.modules["vllm"].LLM = build  # type: ignore[attr-defined]
        target = stages.Target(llava, ComputeSettings(dtype="float32"))
        stages.evaluate(target, tmp_path / "out", suites, BY_VLLM)

    monkeypatch.setattr(by_vllm, "_PIECE", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluated(stops)
    with pytest.raises(PassingError, match=message):
        evaluated(refuses)
    assert len(list(tmp_path.rglob("vllm_*.json"))) == 1
    evaluated(StandIn)
    assert vllm[-1].asked == 2, "a finished piece was answered again"


def test_a_vllm_that_cannot_be_imported_leaves_finished_pieces(
    vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PassingError, match=r"import of vllm halted.*'regraft\[vllm\]'"):
        by_vllm.Engine(tmp_path, None, dtype="float32")


class ClientError(Exception):
    """What newer versions raise in place of a ValueError."""


def _lengths(folder: Path, examples: Sequence[Example]) -> list[int]:
    processor = load_processor(open_source(folder))
    return [prompt_batch(processor, [one]).inputs["input_ids"].shape[1] for one in examples]


@pytest.mark.parametrize("refusal", [ValueError, ClientError])
def test_prompts_and_answers_that_are_too_long_are_named(
    vllm: list[StandIn],
    llava: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: type[Exception],
) -> None:
    exceptions = SimpleNamespace(VLLMClientError=ClientError)
    monkeypatch.setattr(sys.modules["vllm"], "exceptions", exceptions, raising=False)
    monkeypatch.setattr(StandIn, "refusal", refusal)
    folder = llava.folder
    short, long = truth.examples("llava", tmp_path, 2)
    long = replace(long, instruction=20 * "Which is red? ")
    lengths = _lengths(folder, [short, long])
    assert lengths[1] > lengths[0] + TOKENS

    def answers(most: int | None) -> list[str]:
        processor = load_processor(open_source(folder))
        engine = by_vllm.Engine(folder, processor, dtype="float32", max_length=most)
        return engine.answers([short, long], TOKENS)

    whole = answers(None)
    assert answers(lengths[1] + TOKENS) == whole
    refused = f"refuses the prompt of {long.id} .*length {lengths[1]}\\) is too long.* raise --max"
    with pytest.raises(RegraftError, match=refused):
        answers(lengths[1] - 1)
    with pytest.raises(RegraftError, match=f"prompt of {short.id} and 1 more "):
        answers(lengths[0] - 1)
    cut = f"answer to {long.id} short: .* than --max-length {lengths[1] + 2}. Raise --max-length"
    with pytest.raises(RegraftError, match=cut):
        answers(lengths[1] + 2)


def test_an_error_of_no_prompt_is_not_blamed_on_one(
    vllm: list[StandIn], llava: Source, tmp_path: Path
) -> None:
    engine = by_vllm.Engine(llava.folder, load_processor(llava), dtype="float32")
    own, failures = vllm[0].generate, [ValueError("Out of luck")]

    def generate(*arguments: Any, **more: Any) -> list[Any]:
        if failures:
            raise failures.pop()
        return own(*arguments, **more)

    vllm[0].generate = generate  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Out of luck"):
        engine.answers(truth.examples("llava", tmp_path, 2), TOKENS)


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
