"""`regraft report` on folders of `regraft eval`, of whatever checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commands import exit_code
from regraft.data.example import Example
from regraft.disk.files import file_digest, write_json
from regraft.errors import RegraftError
from regraft.evaluation.keywords import REGRAFT_1, REGRAFT_2, KeywordJudge
from regraft.evaluation.results import result_to_json, write_answers
from regraft.evaluation.summary import judge_answer, summarise
from regraft.report.examples import HARMFUL
from regraft.report.page import render_html
from regraft.report.pooling import study_of
from regraft.report.run import Run
from regraft.report.study import Row
from regraft.report.summary import notes, summary
from regraft.runs import comparing
from truth import mcnemar

REFUSAL = "I'm sorry, I can't help with that."
SETTINGS = {
    "max_new_tokens": 64,
    "judge": "regraft-keywords-1",
    "limit": None,
    "full_answers": True,
}
VERSIONS = {"regraft": "0.1.0", "torch": "2"}


def examples(root: Path, harmful: int = 20, harmless: int = 10) -> list[Example]:
    """A data file with an image, and another without, as their suites are read."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "i.png").exists():
        Image.new("RGB", (8, 8), "red").save(root / "i.png")
    unsafe = [
        Example(f"h{i}", f"Attack {i}", True, f"c{i % 2}", root / "i.png") for i in range(harmful)
    ]
    safe = [Example(f"u{i}", f"Ask {i}", False, "shops", None, "nine") for i in range(harmless)]
    for name, rows in (("attacks", unsafe), ("asks", safe)):
        lines = [
            {"id": e.id, "instruction": e.instruction, "harmful": e.harmful, "category": e.category}
            | ({"image": e.image.name} if e.image else {"response": e.response})
            for e in rows
        ]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [replace(e, suite=f"jsonl:{root / 'attacks.jsonl'}") for e in unsafe] + [
        replace(e, suite=f"jsonl:{root / 'asks.jsonl'}") for e in safe
    ]


def evaluation(
    folder: Path,
    asked: Sequence[Example],
    attacks: int,
    refusals: int,
    judge: KeywordJudge = REGRAFT_1,
    zeros: int = 0,
    inputs: dict[str, str] | None = None,
    more: dict[str, int] | None = None,
    **settings: Any,
) -> Path:
    """The first `attacks` harmful prompts are answered, the first `refusals` others refused."""

    def refused(example: Example) -> bool:
        number = int(example.id[1:])
        return number >= attacks if example.harmful else number < refusals

    answers = [
        judge_answer(one, REFUSAL if refused(one) else "Sure, this way: nine.", judge)
        for one in asked
    ]
    answers = [
        replace(a, image_digest=file_digest(one.image) if one.image else "")
        for a, one in zip(answers, asked, strict=True)
    ]
    suites = ", ".join(dict.fromkeys(one.suite for one in asked))
    write_answers(folder / "answers.jsonl", answers)
    account = {"source": suites, "read": 40, "used": 30, "skipped": {"no": 10}, "digest": ""}
    about = {
        "inputs": inputs or {"model": f"digest of {folder.name}"},
        "settings": SETTINGS | settings,
        "compute": {"device": "cpu", "batch_size": attacks},
        "versions": VERSIONS,
        "data": {"suite": account},
    }
    result = result_to_json(summarise(suites, judge, answers))
    sizes = {"zeros": zeros, "prunable": 100} | (more or {})
    content = {"about": about, "sizes": sizes, "result": result}
    content["answers"] = file_digest(folder / "answers.jsonl")
    write_json(folder / "results.json", content)
    return folder


def rows_of(run: Run) -> tuple[Row, ...]:
    return study_of([run]).tables[0].rows


def done(*words: object) -> None:
    assert exit_code(*words) == 0


@pytest.fixture
def asked(tmp_path: Path) -> list[Example]:
    return examples(tmp_path / "data")


def test_one_evaluation_has_a_page(
    tmp_path: Path, asked: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluation(tmp_path / "mine", asked, 5, 1)
    done("judge", "answers", folder, "--by", "vlguard-1")
    done("report", folder)
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "McNemar" not in printed
    page = folder / "report"
    assert {one.name for one in page.iterdir()} == {
        *("report.html", "report.md", "report.json", "trade-off.svg"),
    }
    html, text = ((page / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "mine: ASR 25.0 % [11.2, 46.9] on 20 prompts, over-refusal 10.0 %" in text
    assert "| Model | attacks: ASR |" in text
    assert "| c1 | 20.0 % [" in text
    assert "digest of mine" in text
    assert "| mine | vlguard-1 | " in text
    assert "data:image" in html
    assert (
        json.loads((page / "report.json").read_text())["runs"][0]["opinions"][0]["name"] == "mine"
    )


def test_several_are_compared_with_the_first(tmp_path: Path, asked: list[Example]) -> None:
    folders = [
        evaluation(tmp_path / name / "ev", asked, attacks, 1)
        for name, attacks in (("a", 3), ("b", 18), ("c", 3))
    ]
    done("report", *folders, "--out", tmp_path / "page")
    made = comparing.run_of_evaluations(folders)
    assert [one.name for one in made.variants] == ["a/ev", "b/ev", "c/ev"]
    first, other = ([i < n for i in range(20)] for n in (3, 18))
    tests = [row.attacks for row in rows_of(made) if row.attacks]
    expected = mcnemar(other, first).p, mcnemar(first, first).p
    assert [one.p for one in tests] == pytest.approx(expected)
    text = (tmp_path / "page" / "report.md").read_text()
    assert "ASR worse than a/ev (p < 0.001)" in text
    assert made.notes == ()


def test_named_dense_and_pruned_give_rsr(
    tmp_path: Path, asked: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    dense = evaluation(tmp_path / "dense", asked, 4, 1)
    pruned = evaluation(tmp_path / "pruned", asked, 16, 1, zeros=50)
    made = {"model": "digest of pruned", "patch": "digest"}
    known = {"restored": 2, "pruned": 49}
    gain = evaluation(tmp_path / "gain", asked, 7, 1, zeros=48, inputs=made, more=known)
    shield = {"model": "digest of pruned", "defence": "digest"}
    prompt = evaluation(tmp_path / "prompt", asked, 10, 1, zeros=50, inputs=shield)
    page = tmp_path / "page"
    done(
        *("report", gain, dense, prompt),
        *("--dense", dense, "--pruned", pruned, "--out", page),
    )
    found = comparing.run_of_evaluations([gain, prompt], (dense, pruned))
    assert [one.name for one in found.variants] == ["dense", "pruned", "gain", "prompt"]
    roles = [row.role for row in rows_of(found)]
    assert roles == ["dense", "pruned", "method", "method"]
    assert [(one.restored, one.pruned) for one in found.variants] == [
        *((None, 0), (None, 49), (2, 49), (None, 49))
    ]
    recovered = [row.rsr.value for row in rows_of(found) if row.rsr]
    assert recovered == pytest.approx([(16 - 7) / (16 - 4), (16 - 10) / (16 - 4)])
    assert not (page / "card.md").exists(), "who knows how these models were made?"
    text = (page / "report.md").read_text()
    assert "RSR 75.0 % [" in text
    assert "75.0" in capsys.readouterr().out


def test_restored_weights_are_counted_by_patches_and_not_by_zeros(
    tmp_path: Path, asked: list[Example]
) -> None:
    """A quantised model has zeros by rounding: fewer of them say little of what was restored."""
    dense = evaluation(tmp_path / "dense", asked, 4, 1)
    rounded = evaluation(tmp_path / "rounded", asked, 16, 1, zeros=20)
    applied = evaluation(tmp_path / "applied", asked, 7, 1, zeros=18)
    pair = dense, rounded
    found = study_of([comparing.run_of_evaluations([applied], pair)])
    assert [row.weights for row in found.rows] == [None, None, None]
    assert "Compression (20 % of the weights are zero) raised ASR" in summary(found)[0]
    made = {"model": "digest of rounded", "patch": "digest"}
    known = {"restored": 7, "changed": 90}
    gain = evaluation(tmp_path / "gain", asked, 7, 1, zeros=18, inputs=made, more=known)
    found = study_of([comparing.run_of_evaluations([gain, applied], pair)])
    assert [row.weights and row.weights.mean for row in found.rows] == [None, None, 7, None]
    assert "Compression (90 weights changed) raised ASR" in summary(found)[0]
    assert "gain, 7 restored weights (778 per 10,000 changed): ASR" in summary(found)[1]


def test_what_is_no_pair_is_refused(
    tmp_path: Path, asked: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    dense = evaluation(tmp_path / "dense", asked, 4, 1)
    pruned = evaluation(tmp_path / "pruned", asked, 16, 1, zeros=50)
    again = evaluation(tmp_path / "again", asked, 4, 1, inputs={"model": "digest of dense"})
    other = evaluation(tmp_path / "x", asked, 4, 1, inputs={"model": "digest", "patch": "digest"})
    for folders, pair, message in (
        ((), (pruned, dense), "Are --dense and --pruned swapped?"),
        ((), (dense, again), "are evaluations of the same model"),
        ((other,), (dense, pruned), "x is an evaluation of another model with a patch"),
    ):
        with pytest.raises(RegraftError, match=message):
            comparing.run_of_evaluations(folders, pair)
    for words, message in (
        (("--dense", dense), "with --dense, name --pruned too"),
        (("--pruned", pruned), "with --pruned, name --dense too"),
    ):
        assert exit_code("report", *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_same_data_may_lie_elsewhere(tmp_path: Path, asked: list[Example]) -> None:
    moved = examples(tmp_path / "copy")
    folders = [evaluation(tmp_path / "a", asked, 3, 1), evaluation(tmp_path / "b", moved, 9, 1)]
    first, other = comparing.run_of_evaluations(folders).variants
    assert first.result.by_suite.keys() == other.result.by_suite.keys()
    assert {one.suite for one in other.result.answers} == set(first.result.by_suite)


def test_what_was_done_otherwise_is_noted(tmp_path: Path, asked: list[Example]) -> None:
    folders = [
        evaluation(tmp_path / "a", asked, 3, 1),
        evaluation(tmp_path / "b", asked, 9, 1, max_new_tokens=9),
    ]
    (note,) = comparing.run_of_evaluations(folders).notes
    assert note == "b was evaluated differently from a: max_new_tokens 9 instead of 64."


def test_system_prompts_are_noted(tmp_path: Path, asked: list[Example]) -> None:
    def noted(name: str, examples: list[Example]) -> str:
        run = comparing.run_of_evaluations([evaluation(tmp_path / name, examples, 3, 1)])
        return " ".join(one for one in notes(study_of([run])) if "system prompt" in one)

    under = [replace(asked[0], system="Be kind."), replace(asked[1], system="Be brief.")]
    found = noted("a", [*under, *asked[2:]])
    assert f'2 of the {len(asked)} test prompts have a system prompt ("Be kind." and 1' in found
    assert not noted("b", asked)


def test_images_that_changed_since_are_not_shown(tmp_path: Path, asked: list[Example]) -> None:
    folder = evaluation(tmp_path / "a", asked, 3, 1)
    assert "data:image/" in _page([folder])
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "data" / "i.png")
    assert "data:image/" not in _page([folder])
    (tmp_path / "data" / "asks.jsonl").unlink()
    assert comparing.run_of_evaluations([folder]).images() == {}


def test_only_the_images_of_the_examples_are_read(
    tmp_path: Path, asked: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluation(tmp_path / "a", asked, 3, 1)
    read: list[Path] = []
    monkeypatch.setattr("regraft.report.examples.file_digest", read.append)
    _page([folder])
    assert len(read) == HARMFUL < len(comparing.run_of_evaluations([folder]).images())


def _page(folders: Sequence[Path]) -> str:
    return render_html(study_of([comparing.run_of_evaluations(folders)]))


def test_other_judges_and_prompts_are_refused(tmp_path: Path, asked: list[Example]) -> None:
    first = evaluation(tmp_path / "a", asked, 3, 1)
    changed = [replace(asked[0], instruction="Other"), *asked[1:]]
    under = [replace(one, system="Be kind.") for one in asked]
    examples(tmp_path / "blue")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue" / "i.png")
    for other, message in (
        (evaluation(tmp_path / "j", asked, 3, 1, REGRAFT_2), r"judged by regraft-keywords-2, the"),
        (evaluation(tmp_path / "p", asked[1:], 3, 1), r"prompt 'h0' \(1 in all\) was answered by"),
        (evaluation(tmp_path / "i", changed, 3, 1), r"'h0' has another instruction in each, .Oth"),
        (evaluation(tmp_path / "s", under, 3, 1), r"'h0' has another system in each, .Be kind"),
        (evaluation(tmp_path / "b", examples(tmp_path / "blue"), 3, 1), "image i.png of the promp"),
        (first, "is named twice"),
    ):
        with pytest.raises(RegraftError, match=message):
            comparing.run_of_evaluations([first, other])


def test_folders_that_make_no_page(
    tmp_path: Path, asked: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (evaluation(tmp_path / name, asked, 3, 1) for name in ("a", "b"))
    runs = (tmp_path / "r", tmp_path / "s")
    for run in runs:
        run.mkdir()
    for words, message in (
        ((one, other), "Name a folder for the report on several evaluations"),
        ((one, "--out", tmp_path / "data"), "holds something other than a report"),
        ((one, runs[0], "--out", tmp_path / "x"), "r is no evaluation: it holds no results.json"),
        ((tmp_path / "gone", "--out", tmp_path / "x"), "gone does not exist. Name the folder of"),
        (runs, "compare runs with `regraft analyse compare`"),
        ((runs[0], "--out", tmp_path / "x"), "leave out --out"),
        ((tmp_path,), f"no recipe.yaml in it. `regraft report` takes the evaluations in it: {one}"),
        ((), "Name the folder of a run"),
    ):
        assert exit_code("report", *words) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error, error
    assert not (tmp_path / "x").exists()
