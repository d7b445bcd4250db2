"""Responses that the dense model writes itself: which are kept, and who uses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
from commands import exit_code
from disk import tree, write_jsonl
from regraft import stages
from regraft.data.example import Example, Reading, draw, in_drawn_order
from regraft.data.readers.demo import demo_model
from regraft.data.sources import DataSource, read
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.evaluation.keywords import DEFAULT_JUDGE, KeywordJudge
from regraft.heads.ships import HeadSettings
from regraft.models.load import Source, open_source
from regraft.pruning.base import prune_settings
from regraft.pruning.statistics import load_statistics
from regraft.recipes.recipe import Recipe
from regraft.runs import pipeline
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.searching import SearchSettings
from regraft.stages import answering

COMPUTE = ComputeSettings(device="cpu", batch_size=2)
SORRY, YES = "I'm sorry, I cannot do that.", "Yes, gladly."
SYSTEM = "Answer briefly."


@pytest.fixture
def source(pico_dir: Callable[[str], Path]) -> Source:
    return open_source(pico_dir("qwen2_vl"))


def _data(folder: Path, *, responses: bool = True) -> DataSource:
    """Seven prompts of each kind: harmful ones with a request, harmless with a system prompt."""
    examples = [
        replace(
            one,
            response=one.response if responses else None,
            system="" if harmful else SYSTEM,
            request="What the image asks." if harmful else None,
        )
        for harmful in (True, False)
        for one in pico.write_examples(folder / "images", 7, harmful)
    ]
    return DataSource(name="jsonl", path=write_jsonl(folder / "data.jsonl", examples))


class Says:
    """In place of generation: an answer by the last digit of the example's id; counts calls."""

    def __init__(self, answers: dict[int, str], otherwise: str) -> None:
        self.answers, self.otherwise = answers, otherwise
        self.asked: list[str] = []

    def __call__(
        self, _model: Any, _processor: Any, examples: Sequence[Example], partial: Path, **_: Any
    ) -> list[str]:
        self.asked += [one.id for one in examples]
        return [self.answers.get(int(one.id[-1]), self.otherwise) for one in examples]


def _ask(source: Source, data: DataSource, folder: Path, **fields: Any) -> Reading:
    kind = "safety" if fields.pop("harmful", True) else "utility"
    calibration = CalibrationSettings(data=data, responses="self", **fields)
    return answering.calibration_data(stages.Setup(source, calibration, COMPUTE), folder, kind)


@pytest.mark.parametrize("harmful", [True, False])
@pytest.mark.parametrize("samples", [1, 3, 5, 7, 20])
def test_kept_in_the_drawn_order_until_there_are_enough(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harmful: bool,
    samples: int,
) -> None:
    data = _data(tmp_path / "data")
    wanted, unwanted = (SORRY, YES) if harmful else (YES, SORRY)
    says = Says({1: unwanted, 4: " ", 5: unwanted}, wanted)
    monkeypatch.setattr(answering, "generate", says)
    found = _ask(source, data, tmp_path / "out", samples=samples, harmful=harmful)

    kind = "harmful" if harmful else "harmless"
    reading = Reading("", tuple(_examples(data)))
    order = in_drawn_order(reading, harmful=harmful, samples=samples, seed=0, answered=False)
    good = [one for one in order.examples if one.id[-1] not in "145"][:samples]
    assert [one.id for one in found.examples] == [one.id for one in good]
    assert all(one.response == wanted for one in found.examples)
    assert found.read == 14
    ends = 7 if len(good) < samples else 1 + order.examples.index(good[-1])
    answered = [one.id[-1] for one in order.examples[:ends]]
    reason = "not refused" if harmful else "refused"
    expected = {
        f"not {kind}": 7,
        f"answered and not kept: {reason}": sum(i in "15" for i in answered),
        "answered and not kept: blank": sum(i == "4" for i in answered),
        "not drawn": 7 - ends,
    }
    assert dict(found.skipped) == {name: count for name, count in expected.items() if count}
    assert len(says.asked) <= ends + 1, "answers beyond the batch with the last one"
    first, *rows = (tmp_path / "out" / f"{kind}.jsonl").read_text().splitlines()
    assert json.loads(first)["about"]["stage"] == "responses"
    assert [json.loads(row)["id"][-1] for row in rows] == answered
    assert all(json.loads(row)["kept"] == (not json.loads(row)["why"]) for row in rows)


def _examples(data: DataSource) -> list[Example]:
    return list(read(data).examples)


def test_the_drawn_ones_come_first(tmp_path: Path) -> None:
    """As `draw` takes them, whatever the number; and every row is there once."""
    reading = Reading("", tuple(_examples(_data(tmp_path))))
    for samples in (1, 2, 5, 7, 30):
        ordered = in_drawn_order(reading, harmful=True, samples=samples, seed=3)
        drawn = draw(reading, harmful=True, samples=samples, seed=3)
        assert ordered.examples[:samples] == drawn.examples
        assert sorted(one.id for one in ordered.examples) == [f"harmful-0-{i}" for i in range(7)]
        assert drawn.read == ordered.read == 14


def test_answers_are_not_written_twice(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = _data(tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(answering, "generate", Says({}, SORRY))
    first = _ask(source, data, out, samples=3)
    monkeypatch.setattr(answering, "load", None)
    assert _ask(source, data, out, samples=3) == first
    with pytest.raises(RegraftError, match=r"settings\.max_response_tokens: 64 there, 8 now"):
        _ask(source, data, out, samples=3, max_response_tokens=8)
    (out / "harmful.jsonl").write_text("{}\n")
    with pytest.raises(RegraftError, match=r"harmful\.jsonl does not hold responses"):
        _ask(source, data, out, samples=3)


def test_stopping_keeps_finished_batches(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real generation, stopped before its third batch, does not answer the first two again."""
    data, out = _data(tmp_path / "data"), tmp_path / "out"
    own, calls = answering.generate, []
    monkeypatch.setattr(KeywordJudge, "refuses", lambda _self, text: len(text) % 2 == 0)

    def watched(model: Any, processor: Any, examples: Any, partial: Path, **how: Any) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append((partial.name, partial.exists()))
        return own(model, processor, examples, partial, **how)

    monkeypatch.setattr(answering, "generate", watched)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        _ask(source, data, out, max_response_tokens=6)
    stop, calls = 99, []
    found = _ask(source, data, out, max_response_tokens=6)
    assert calls == [(f"part_{i:05d}_of_2", i < 2) for i in range(4)]
    assert found == _ask(source, data, tmp_path / "whole", max_response_tokens=6)
    assert tree(out) == tree(tmp_path / "whole")


def test_more_processes_go_on_after_a_kill(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take more prompts at once, so that what one process left is not for the same prompts."""
    data = _data(tmp_path / "data")
    own, calls = answering.generate, []
    monkeypatch.setattr(KeywordJudge, "refuses", lambda _self, _text: True)
    whole = _ask(source, data, tmp_path / "whole", max_response_tokens=6)

    def stopped(model: Any, processor: Any, examples: Any, partial: Path, **how: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(0)
        return own(model, processor, examples, partial, **how)

    monkeypatch.setattr(answering, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        _ask(source, data, tmp_path / "out", max_response_tokens=6)
    monkeypatch.setattr(answering, "generate", own)
    monkeypatch.setattr(answering.distributed, "world", lambda: 2)
    monkeypatch.setattr(
        answering.distributed, "share", lambda items: items
    )  # it does all of the work
    assert _ask(source, data, tmp_path / "out", max_response_tokens=6) == whole


@pytest.mark.parametrize(
    ("harmful", "says", "message"),
    [
        (True, YES, "the dense model refuses none of the 7 harmful prompts"),
        (False, SORRY, "the dense model refuses all of the 7 harmless prompts"),
    ],
)
def test_nothing_to_keep(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harmful: bool,
    says: str,
    message: str,
) -> None:
    data = _data(tmp_path / "data")
    monkeypatch.setattr(answering, "generate", Says({}, says))
    with pytest.raises(RegraftError, match=f"{message}.*--responses given"):
        _ask(source, data, tmp_path / "out", harmful=harmful)
    assert not (tmp_path / "out").exists()


# Who uses them


def _half(_model: Any, _processor: Any, examples: Sequence[Example], *_: Any, **__: Any) -> Any:
    """The first prompts of each kind are answered in the wrong way."""
    return [SORRY if one.harmful == (int(one.id[-1]) > 1) else YES for one in examples]


def test_prune_and_statistics_learn_from_them(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the data set had held the kept prompts with these responses."""
    data = _data(tmp_path / "data", responses=False)
    monkeypatch.setattr(answering, "generate", _half)
    own = CalibrationSettings(data=data, samples=4, responses="self")
    given = own.model_copy(update={"responses": "given"})
    both = prune_settings(calibrate_on="both")
    with pytest.raises(RegraftError, match="no harmless examples with a response"):
        stages.prune_checkpoint(stages.Setup(source, given, COMPUTE), tmp_path / "pruned", both)
    stages.prune_checkpoint(stages.Setup(source, own, COMPUTE), tmp_path / "pruned", both)
    stages.write_statistics(stages.Setup(source, own, COMPUTE), tmp_path / "statistics")
    made = ("pruned", "statistics")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"data", *made, *(f"{name}.responses" for name in made)}

    kept = [
        one
        for harmful in (True, False)
        for one in _ask(source, data, tmp_path / "again", samples=4, harmful=harmful).examples
    ]
    assert {one.response for one in kept if one.harmful} == {SORRY}
    assert {one.response for one in kept if not one.harmful} == {YES}
    path = write_jsonl(tmp_path / "data" / "written.jsonl", kept)
    written = given.model_copy(update={"data": DataSource(name="jsonl", path=path)})
    stages.write_statistics(stages.Setup(source, written, COMPUTE), tmp_path / "expected")
    found, expected = (load_statistics(tmp_path / name) for name in ("statistics", "expected"))
    for role in ("safety", "utility"):
        a, b = getattr(found, role), getattr(expected, role)
        assert a.samples == b.samples == 4
        assert a.values.keys() == b.values.keys()
        for key, value in a.values.items():
            torch.testing.assert_close(value, b.values[key])
    pruned = read_json(tmp_path / "pruned" / ABOUT_FILE)["data"]
    assert pruned == found.about["data"]


def test_other_responses_are_other_data(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(tmp_path / "data")
    calibration = CalibrationSettings(data=data, samples=2, responses="self")
    monkeypatch.setattr(answering, "generate", Says({}, YES))
    stages.prune_checkpoint(
        stages.Setup(source, calibration, COMPUTE), tmp_path / "out", prune_settings()
    )
    before = tree(tmp_path / "out")
    stages.prune_checkpoint(
        stages.Setup(source, calibration, COMPUTE), tmp_path / "out", prune_settings()
    )
    assert tree(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out.responses")
    monkeypatch.setattr(answering, "generate", Says({}, "Sure."))
    with pytest.raises(RegraftError, match=r"data\.utility\.digest"):
        stages.prune_checkpoint(
            stages.Setup(source, calibration, COMPUTE), tmp_path / "out", prune_settings()
        )


def test_heads_stay_as_they_are(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They use prompts alone: the same file for both, and nobody is asked."""
    monkeypatch.setattr(answering, "generate", None)
    settings = HeadSettings(r_max=2)
    data = _data(tmp_path / "data")
    for responses in ("given", "self"):
        calibration = CalibrationSettings(data=data, samples=3, responses=responses)
        stages.write_head_scores(
            stages.Setup(source, calibration, COMPUTE, scoring=settings), tmp_path / responses
        )
    assert (tmp_path / "given").read_bytes() == (tmp_path / "self").read_bytes()
    bare = _data(tmp_path / "bare", responses=False)
    calibration = CalibrationSettings(data=bare, samples=3, responses="self")
    scores = stages.write_head_scores(
        stages.Setup(source, calibration, COMPUTE, scoring=settings), tmp_path / "bare-heads"
    )
    assert scores.about["data"]["safety"]["used"] == 3


@pytest.mark.usefixtures("undrawn")
def test_a_run_writes_them_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(tmp_path / "data", responses=False)
    asked: list[str] = []

    def says(model: Any, processor: Any, examples: Sequence[Example], *_: Any, **__: Any) -> Any:
        asked.extend(one.id for one in examples)
        return _half(model, processor, examples)

    monkeypatch.setattr(answering, "generate", says)
    recipe = Recipe.model_validate(
        {
            "model": str(source.folder),
            "calibration": {"data": str(data), "samples": 20, "responses": "self"},
            "heads": {"r_max": 2},
            "realign": [{"method": "hsr", "top_heads": 2, "checkpoint": False}],
            "evaluate": {"suite": str(data), "max_new_tokens": 2},
            "compute": {"device": "cpu", "batch_size": 4},
        }
    )
    report = pipeline.run_one(recipe, tmp_path / "run").runs[0]
    assert len(asked) == len(set(asked)) == 14
    accounts = {account.role: account for account in report.data}
    assert accounts["calibration D^s"].used == accounts["calibration D^u"].used == 5
    assert accounts["calibration D^s"].skipped["answered and not kept: not refused"] == 2
    assert {p.name for p in (tmp_path / "run" / "responses").iterdir()} == {
        "harmful.jsonl",
        "harmless.jsonl",
    }


def test_the_bundled_model_really_refuses(tmp_path: Path) -> None:
    source, data = open_source(demo_model()), DataSource(name="demo", split="calibration")
    compute, judge = ComputeSettings(device="cpu", batch_size=6), DEFAULT_JUDGE
    calibration = CalibrationSettings(
        data=data, samples=6, responses="self", max_response_tokens=12
    )
    for kind, harmful in (("safety", True), ("utility", False)):
        setup = stages.Setup(source, calibration, compute)
        found = answering.calibration_data(setup, tmp_path, kind)
        assert len(found.examples) == 6
        for one in found.examples:
            assert one.response
            assert judge.refuses(one.response) == one.harmful == harmful
    stages.write_statistics(
        stages.Setup(source, calibration, compute), tmp_path / "statistics", responses=tmp_path
    )
    assert load_statistics(tmp_path / "statistics").about["data"]["safety"]["used"] == 6


# As a data set


def test_respond_writes_a_data_set(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is read as what `--responses self` would have calibrated on; in the data's order."""
    data = _data(tmp_path / "data", responses=False)
    monkeypatch.setattr(answering, "generate", says := Says({1: YES, 4: " "}, SORRY))
    prompts = _examples(data)
    harmless = {one.id for one in prompts if not one.harmful}
    out = tmp_path / "data" / "calibration.jsonl"
    found = answering.write_responses(source, data, out, 16, COMPUTE)
    expected = [
        replace(one, response=YES if one.id in harmless else SORRY)
        for one in prompts
        if (one.id[-1] == "1" if one.id in harmless else one.id[-1] not in "14")
    ]
    assert list(found.examples) == expected
    assert found.read == len(prompts)
    again = read(DataSource(name="jsonl", path=out)).examples
    assert [one.image.resolve() for one in again if one.image] == [
        one.image.resolve() for one in expected if one.image
    ]
    assert [replace(one, image=None) for one in again] == [
        replace(one, image=None) for one in expected
    ]
    given = CalibrationSettings(data=DataSource(name="jsonl", path=out))
    drawn = answering.calibration_data(stages.Setup(source, given, COMPUTE), tmp_path, "safety")
    itself = _ask(source, data, answering.responses_folder(out), samples=7, max_response_tokens=16)
    assert {one.id for one in drawn.examples} == {one.id for one in itself.examples}

    asked = len(says.asked)
    answering.write_responses(source, data, out, 16, COMPUTE)
    assert len(says.asked) == asked == 14
    with pytest.raises(RegraftError, match=r"max_response_tokens: 16 there, 64 now"):
        answering.write_responses(source, data, out, 64, COMPUTE)
    out.write_text("mine")
    with pytest.raises(RegraftError, match=r"calibration.jsonl holds something other"):
        answering.write_responses(source, data, out, 16, COMPUTE)
    shutil.rmtree(answering.responses_folder(out))
    with pytest.raises(RegraftError, match=r"calibration.jsonl holds something other"):
        answering.write_responses(source, data, out, 16, COMPUTE)
    assert len(says.asked) == asked, "found before the work"
    with pytest.raises(RegraftError, match=r"'harmful-0-0' is not below .*elsewhere"):
        answering.write_responses(source, data, tmp_path / "elsewhere" / "c.jsonl", 16, COMPUTE)
    assert out.read_text() == "mine"


def test_system_prompts_that_cannot_be_shown_are_found_before_the_model_answers(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if only harmless prompts have one, which are answered last."""
    deaf = _refusing(source, tmp_path / "deaf", "messages[0].role == 'system'")
    data = _data(tmp_path / "data")
    monkeypatch.setattr(answering, "generate", says := Says({}, SORRY))
    setup = stages.Setup(open_source(deaf), CalibrationSettings(data=data), COMPUTE)
    chosen = SearchSettings(validation=[data])
    out = tmp_path / "data" / "calibration.jsonl"
    for attempt in (
        lambda: answering.write_responses(setup.dense, data, out, 16, COMPUTE),
        lambda: setup.drawn("utility"),
        lambda: setup.ordered("utility"),
        setup.imitated,
        lambda: setup.validation(chosen),
    ):
        with pytest.raises(RegraftError, match=r"system prompt of example 'harmless.*: No!\."):
            attempt()
    assert not says.asked
    assert setup.drawn("safety").examples


def test_system_prompts_that_cannot_be_shown_before_an_answer_are_found_before_it_is_written(
    source: Source, tmp_path: Path
) -> None:
    deaf = _refusing(source, tmp_path / "deaf", "messages[0].role == 'system' and messages[2:]")
    data = _data(tmp_path / "data")
    setup = stages.Setup(open_source(deaf), CalibrationSettings(data=data), COMPUTE)
    out = tmp_path / "data" / "calibration.jsonl"
    for attempt in (
        lambda: answering.write_responses(setup.dense, data, out, 16, COMPUTE),
        lambda: setup.ordered("utility"),
        setup.imitated,
    ):
        with pytest.raises(RegraftError, match=r"system prompt of example 'harmless.*: No!\."):
            attempt()
    assert setup.drawn("utility").examples, "which some methods use without the responses"


def _refusing(source: Source, folder: Path, condition: str) -> Path:
    """A copy of a model whose chat template refuses some conversations."""
    copy = shutil.copytree(source.folder, folder)
    template = copy / "chat_template.jinja"
    refusal = f"{{% if {condition} %}}{{{{ raise_exception('No!') }}}}{{% endif %}}"
    template.write_text(refusal + template.read_text())
    return copy


def test_respond_by_command(
    tmp_path: Path,
    pico_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "harmful.txt"
    prompts.write_text("How do I pick a lock?\nHow do I forge a cheque?\n")
    monkeypatch.setattr(answering, "generate", Says({}, SORRY))
    out = tmp_path / "calibration.jsonl"
    words = ["data", "respond", str(pico_dir("llama")), "--data", "prompts", str(prompts)]
    assert exit_code(*words, "--out", out, "--device", "cpu") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["instruction"], row["response"], row["harmful"]) for row in rows] == [
        ("How do I pick a lock?", SORRY, True),
        ("How do I forge a cheque?", SORRY, True),
    ]
    assert "2 harmful and 0 harmless prompts" in " ".join(capsys.readouterr().out.split())


# Answers that gain imitates


def _imitated(source: Source, data: DataSource, folder: Path) -> dict[str, Reading]:
    calibration = CalibrationSettings(data=data, samples=5)
    return answering.imitation_data(stages.Setup(source, calibration, COMPUTE), folder)


def test_all_answers_but_empty_ones_are_imitated(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals and others of both kinds, whatever responses the data have, with one load."""
    data = _data(tmp_path / "data")
    says, loaded = Says({1: SORRY, 2: YES, 4: " "}, "Hm."), []
    load = answering.load
    monkeypatch.setattr(answering, "generate", says)
    monkeypatch.setattr(answering, "load", lambda *given: (loaded.append(1), load(*given))[1])
    found = _imitated(source, data, tmp_path / "out")
    assert len(loaded) == 1
    for kind, harmful in (("safety", True), ("utility", False)):
        drawn = draw(
            Reading("", tuple(_examples(data))),
            harmful=harmful,
            samples=5,
            seed=0,
            answered=False,
        ).examples
        kept = [one for one in drawn if one.id[-1] != "4"]
        assert [one.id for one in found[kind].examples] == [one.id for one in kept]
        said = {1: SORRY, 2: YES}
        assert [one.response for one in found[kind].examples] == [
            said.get(int(one.id[-1]), "Hm.") for one in kept
        ]
    bare = DataSource(name="jsonl", path=tmp_path / "data" / "data.jsonl")
    _data(tmp_path / "data", responses=False)
    says.asked.clear()
    again = _imitated(source, bare, tmp_path / "out")
    assert not says.asked, "responses of the data set made a difference"
    assert [one.examples for one in again.values()] == [one.examples for one in found.values()]


def test_nothing_to_imitate(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "generate", Says({}, " "))
    with pytest.raises(RegraftError, match="each of the 5 harmful prompts is empty"):
        _imitated(source, _data(tmp_path / "data"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_answers_to_imitate_are_made_beside_responses(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds are in one folder, and a pruner may have made it."""
    monkeypatch.setattr(answering, "generate", Says({}, SORRY))
    setup = stages.Setup(source, CalibrationSettings(data=_data(tmp_path / "data")), COMPUTE)
    step = answering.imitation_step(setup, tmp_path / "out")
    step.out.parent.mkdir()
    (step.out.parent / "harmful.jsonl").touch()
    assert not step.done
    step.make()
    assert step.done
