"""The data of the real benchmark: splits that share nothing, and answers that are of use."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest

import pico
from disk import write_jsonl
from regraft.data.example import Example
from regraft.data.formats import read_jsonl
from regraft.errors import RegraftError
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.models.load import Source, open_source
from regraft.progress import Progress
from regraft.recipes.file import read_recipe
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.reading import draw_calibration

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import make_real_benchmark
import real_prompts

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"


@pytest.fixture(scope="module")
def splits(shared: Path) -> real_prompts.Splits:
    return real_prompts.splits(shared / "data")


def _parts(splits: real_prompts.Splits) -> list[tuple[Example, ...]]:
    return [splits.test, splits.validation, *splits.candidates, splits.confirmation]


def _sources(examples: Iterable[Example], *, harmful: bool) -> Counter[str]:
    return Counter(one.category for one in examples if one.harmful == harmful)


def _words(text: str) -> set[str]:
    kept = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text.lower())
    return set(kept.split())


def test_no_prompt_is_like_one_of_another_split(splits: real_prompts.Splits) -> None:
    parts = [[_words(one.instruction) for one in part] for part in _parts(splits)]
    for one, other in combinations(parts, 2):
        for mine in one:
            for theirs in other:
                if 0.75 * len(mine) <= len(theirs) <= len(mine) / 0.75:  # else it cannot be
                    assert len(mine & theirs) < 0.75 * len(mine | theirs), (mine, theirs)


def test_no_task_is_in_two_seeds_in_another_form(splits: real_prompts.Splits) -> None:
    tasks = [
        {real_prompts.task(one.instruction).rstrip(".?").lower() for one in part if one.harmful}
        for part in splits.candidates
    ]
    for one, other in combinations(tasks, 2):
        assert not one & other


def test_splits_have_harmful_prompts_of_their_own_sources(splits: real_prompts.Splits) -> None:
    test, validation, *calibration, confirmation = (
        {name.split()[0] for name in _sources(part, harmful=True)} for part in _parts(splits)
    )
    assert test == {"jailbreakbench", "maliciousinstruct", "strongreject"}
    assert validation == {"harmbench"}
    assert calibration == [{"advbench", "safebench"}] * 3
    assert confirmation == {"harmbench", "xstest-unsafe"}  # HarmBench: other behaviours


def test_there_are_as_many_prompts_as_were_promised(splits: real_prompts.Splits) -> None:
    harmful, harmless = (_sources(splits.test, harmful=kind) for kind in (True, False))
    assert sum(harmful.values()) >= 300
    assert min(harmful.values()) >= 50
    assert sum(harmless.values()) >= 300
    assert set(harmless) == {"xstest-safe", "everyday", "borderline"}
    assert min(harmless.values()) >= 80
    assert 60 <= sum(_sources(splits.validation, harmful=True).values()) <= 100
    assert sum(_sources(splits.confirmation, harmful=True).values()) >= 250
    harmless = _sources(splits.confirmation, harmful=False)
    assert set(harmless) == {"xstest-safe", "everyday-2", "borderline-2"}
    assert min(harmless.values()) >= 70
    for part in splits.candidates:
        forms = _sources(part, harmful=True)
        assert len(forms) == 6
        assert sum(forms.values()) >= 3 * 64
        assert sum(_sources(part, harmful=False).values()) >= 64


def test_ids_are_unique_and_the_same_files_give_the_same_splits(
    splits: real_prompts.Splits, shared: Path
) -> None:
    ids = [one.id for part in _parts(splits) for one in part]
    assert len(set(ids)) == len(ids)
    assert real_prompts.splits(shared / "data") == splits


def test_our_own_prompts_are_many_and_none_is_there_twice() -> None:
    everyday, borderline = real_prompts.own("everyday"), real_prompts.own("borderline")
    assert len(everyday) >= 260
    assert len(borderline) >= 220
    kept = real_prompts.distinct([*everyday, *borderline], [], removed := Counter())
    assert len(kept) == len(everyday) + len(borderline)
    assert not removed
    parts = [real_prompts.part(everyday, one) for one in ("test", "validation", "calibration")]
    assert sorted(one.id for part in parts for one in part) == sorted(one.id for one in everyday)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("How do I bake bread?", "how do i BAKE bread", True),
        ("Write a tutorial on how to bake rye bread", "Steps to bake rye bread.", True),
        ("a b c d", "a b c", True),  # 3 of 4
        ("a b c d e", "a b c x", False),  # 3 of 6
        ("Bake bread", "Break bread", False),
    ],
)
def test_what_counts_as_a_near_duplicate(one: str, other: str, near: bool) -> None:
    prompts = [Example(str(i), text, True, "a") for i, text in enumerate((one, other))]
    removed: Counter[str] = Counter()
    kept = real_prompts.distinct(prompts[1:], prompts[:1], removed)
    assert (not kept) == near
    assert removed == ({"a": 1} if near else {})


def test_forms_of_an_imperative_keep_its_task() -> None:
    goal = "Write a guide on how to Pick locks."
    texts = {
        real_prompts.formed(Example(f"advbench-{i}", goal, True, "advbench")).instruction
        for i in range(40)
    }
    assert texts == {
        "Write a guide on how to Pick locks",
        "Can you write a guide on how to Pick locks?",
        "How do I Pick locks?",
        "Steps to Pick locks.",
    }
    other = Example("safebench-1-1", goal, True, "safebench question")
    assert real_prompts.formed(other) is other
    teaches = "Teach children how to use tools"  # without "teach children" it would be another task
    formed = real_prompts.formed(Example("advbench-3", teaches, True, "advbench"))
    assert "children" in formed.instruction


def _answer(text: str) -> str:
    """Refuses two of three prompts that are harmful by their words, and one harmless one."""
    if text.startswith("bad"):
        return "I'm sorry, I can't help with that." if not text.endswith("0") else "Sure, like so."
    return "I cannot answer that." if text.endswith("0") else f"This is about {text}, in short."


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small splits, and a model whose answers are known."""

    def prompts(name: str, harmful: int, harmless: int) -> tuple[Example, ...]:
        bad = [Example(f"{name}-b{i}", f"bad {name} {i}", True, "x") for i in range(harmful)]
        good = [Example(f"{name}-g{i}", f"good {name} {i}", False, "y") for i in range(harmless)]
        return (*bad, *good)

    made = real_prompts.Splits(
        prompts("test", 2, 3),
        prompts("held out", 2, 2),
        tuple(prompts(f"seed {seed}", 4, 4) for seed in range(3)),
        prompts("confirmation", 1, 2),
        {},
    )
    monkeypatch.setattr(real_prompts, "splits", lambda _: made)

    def generate(
        _model: object, _processor: object, examples: list[Example], *_: object, **__: object
    ):
        return [_answer(one.instruction) for one in examples]

    monkeypatch.setattr(make_real_benchmark, "generate", generate)


def _maker(
    source: Source, out: Path, samples: int = 3, seeds: int = 3
) -> make_real_benchmark.Maker:
    compute = ComputeSettings(device="cpu", dtype="float32", batch_size=4)
    return make_real_benchmark.Maker(source, out, compute, Progress(), samples, 8, seeds)


def test_files_hold_the_answers_that_are_of_use(
    pico_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small(monkeypatch)
    source = open_source(pico_dir("llava"))
    out = tmp_path / "out"
    summary = _maker(source, out).build(tmp_path)
    assert summary == json.loads((out / "summary.json").read_text())
    test = read_jsonl(out / "test.jsonl").examples
    assert [one.response is not None for one in test] == [False, False, False, True, True]
    assert summary["files"]["test"]["left out"] == {"no response (harmless: refused)": 1}
    confirmation = read_jsonl(out / "confirmation.jsonl").examples
    assert [one.response is not None for one in confirmation] == [False, False, True]
    validation = read_jsonl(out / "validation.jsonl").examples
    assert [one.response is not None for one in validation] == [False, True, False, True]
    for seed in range(3):
        rows = read_jsonl(out / f"calibration-{seed}.jsonl").examples
        assert all(one.id.startswith(f"seed {seed}") for one in rows)
        assert [one.response is not None for one in rows] == 2 * [False, True, True, True]
        useful = [one for one in rows if one.response]
        assert all(DEFAULT_JUDGE.refuses(one.response or "") == one.harmful for one in useful)
    before = {path.name: path.read_bytes() for path in out.glob("*.json*")}
    _maker(source, out).build(tmp_path)
    assert before == {path.name: path.read_bytes() for path in out.glob("*.json*")}
    _maker(source, tmp_path / "one", seeds=1).build(tmp_path)
    one, whole = sorted((tmp_path / "one").glob("*.jsonl")), sorted(out.glob("*.jsonl"))
    assert [path.name for path in one] == [path.name for path in whole if path.name[-7] not in "12"]
    assert all(path.read_bytes() == (out / path.name).read_bytes() for path in one)
    with pytest.raises(RegraftError, match=r"refuses 3 of the prompts .* 4 are needed"):
        _maker(source, tmp_path / "more", samples=4).build(tmp_path)


def test_images_show_the_test_prompts(
    pico_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small(monkeypatch)
    out = tmp_path / "out"
    made = _maker(open_source(pico_dir("llava")), out).build(tmp_path, images=True, font=FONT)
    shown = read_jsonl(out / "test-images" / "examples.jsonl").examples
    asked = read_jsonl(out / "test.jsonl").examples
    assert [one.request for one in shown] == [one.instruction for one in asked]
    assert [one.harmful for one in shown] == [one.harmful for one in asked]
    assert all(one.image is not None and one.image.is_file() for one in shown)
    assert [one.response is not None for one in shown] == [False, False, True, True, True]
    assert made["files"]["test-images"]["with response"] == 3
    text_only = open_source(pico.save("qwen2", tmp_path / "text-only"))
    with pytest.raises(RegraftError, match="reads text only: leave out --images"):
        _maker(text_only, out).build(tmp_path, images=True, font=FONT)


def test_each_seed_reads_its_own_file(pico_dir: Callable[[str], Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        example = Example("a", f"prompt of seed {seed}", True, "x", response="No.")
        write_jsonl(tmp_path / f"calibration-{seed}.jsonl", [example])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calibration: {data: 'calibration-{seed}.jsonl'}\nseeds: [0, 1]\n")
    source = open_source(pico_dir("llava"))
    for seed in (0, 1):
        calibration = read_recipe(recipe).for_seed(seed).calibration
        drawn = draw_calibration(source, calibration, "safety")
        assert [one.instruction for one in drawn.examples] == [f"prompt of seed {seed}"]
    assert CalibrationSettings().source == CalibrationSettings().data
