"""MMBench and DocVQA: official formats with their traps, and the scores."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft.data.example import Example
from regraft.data.readers.docvqa import read_docvqa
from regraft.data.readers.mmbench import read_mmbench
from regraft.data.storage import CACHE_VARIABLE, cached_image
from regraft.errors import RegraftError
from regraft.evaluation.judges import Verdict
from regraft.evaluation.keywords import REGRAFT_2
from regraft.evaluation.metrics import bootstrap_mean, wilson
from regraft.evaluation.results import result_from_json, result_to_json
from regraft.evaluation.similarity import anls, picked
from regraft.evaluation.summary import group_similarities, judge_answer, summarise
from regraft.evaluation.verdicts import rate
from regraft.report.page import render_markdown
from regraft.report.pooling import study_of
from regraft.report.run import Run, Variant


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _picture(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


HEADER = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "l2-category",
    "split",
    "image",
]
RED = base64.b64encode(_picture("red")).decode()
ROWS: list[dict[str, str]] = [
    {"index": "241", "A": "a dog", "B": "a cat", "answer": "A", "image": RED},
    {"index": "1000241", "A": "a cat", "B": "a dog", "answer": "B", "image": "241"},
    {"index": "252", "A": "1", "B": "2", "answer": "B", "hint": "Count.", "image": RED},
    {"index": "1000252", "A": "2", "B": "1", "answer": "A", "hint": "Count.", "image": "252"},
]


def _mmbench(path: Path, rows: list[dict[str, str]] = ROWS, header: list[str] = HEADER) -> Path:
    defaults = {"question": "What is it?", "category": "identity", "hint": "nan"}
    lines = ["\t".join(header)]
    lines += ["\t".join({**defaults, **row}.get(name, "") for name in header) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_mmbench_rotations_are_groups_and_share_their_image(tmp_path: Path, cache: Path) -> None:
    reading = read_mmbench(_mmbench(tmp_path / "dev.tsv"))
    first, rotated, other, _ = reading.examples
    assert (reading.skipped, reading.source) == ({}, str(tmp_path / "dev.tsv"))
    assert [one.id for one in (first, rotated, other)] == [
        "mmbench-241",
        "mmbench-1000241",
        "mmbench-252",
    ]
    assert (first.group, rotated.group, other.group) == (
        "mmbench-241",
        "mmbench-241",
        "mmbench-252",
    )
    assert (first.response, rotated.response, rotated.choices) == ("A", "B", ("a cat", "a dog"))
    assert first.image == rotated.image
    assert first.image is not None
    assert first.image.is_relative_to(cache)
    assert first.image.read_bytes() == _picture("red")
    assert first.instruction == (
        "What is it? There are several options:\nA. a dog\nB. a cat\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert other.instruction.startswith("Count. What is it? There")


def test_mmbench_without_all_rotations(tmp_path: Path, cache: Path) -> None:
    """A file that was cut between rows, and one that has each question once."""
    cut = read_mmbench(_mmbench(tmp_path / "dev.tsv", ROWS[:3]))
    assert [one.id for one in cut.examples] == ["mmbench-241", "mmbench-1000241"]
    assert cut.skipped == {"rotated copies missing": 1}
    plain = read_mmbench(_mmbench(tmp_path / "dev.tsv", ROWS[::2]))
    assert [one.id for one in plain.examples] == ["mmbench-241", "mmbench-252"]
    assert plain.source == f"{tmp_path / 'dev.tsv'} (no rotated copies: plain accuracy)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "C"}, "row 1: the field 'answer' must be the letter of an option, one of AB"),
        ({"A": "", "C": "x"}, "row 1: expected two or more options A, B, ... without a gap"),
        ({"B": "nan"}, "without a gap"),
        ({"index": "1.0"}, "the field 'index' must be a whole number"),
        ({"index": "9" * 5000}, "the field 'index' must be a whole number"),
        ({"image": "no base64!"}, "the field 'image' is neither an image in base64 nor the index"),
        ({"image": RED[:-3]}, "the field 'image' is neither"),
        ({"index": "252"}, "the id 'mmbench-252' is used twice"),
    ],
)
def test_mmbench_errors(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(RegraftError, match=message):
        read_mmbench(_mmbench(tmp_path / "dev.tsv", [{**ROWS[0], **change}, ROWS[2]]))


def test_mmbench_test_split_has_no_answers(tmp_path: Path) -> None:
    header = [name for name in HEADER if name != "answer"]
    with pytest.raises(RegraftError, match="no column answer: the test split is scored by its"):
        read_mmbench(_mmbench(tmp_path / "test.tsv", header=header))


def test_a_truncated_table_is_an_error(tmp_path: Path) -> None:
    path = _mmbench(tmp_path / "dev.tsv")
    path.write_text(path.read_text()[:-12])
    with pytest.raises(RegraftError, match="row 4 has more or fewer cells than the header"):
        read_mmbench(path)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("(B).", "B"),
        ("**B**", "B"),
        ("B: a cat", "B"),
        ("The answer is B", "B"),
        ("The correct answer is: (C).", "C"),
        ("A small animal on grass", "A"),  # an article, but for the place where it stands
        ("A cat, no doubt", "B"),  # by its text
        ("It is a cat.", "B"),
        ("The answer is (B), since the dog is asleep.", "B"),
        ("a cat or a dog", None),
        ("A or B", "A"),
        ("A. and B,", "A"),  # marks one after another
        ("Not A) but C) or B)", "B"),  # at the end
        ("I know that the answer is C not B or D at all", "D"),  # the last after a phrase
        ("None of them", None),
        ("As an assistant I cannot tell", "A"),  # anywhere at all
        ("", None),
        ("D", "D"),
        ("E", None),  # there is no such option
        ("Looking at it, I choose B because it purrs", "B"),
        ("B) since it has whiskers", "B"),
    ],
)
def test_the_option_picked(answer: str, letter: str | None) -> None:
    assert picked(answer, ("a dog", "a cat", "a horse", "a cow")) == letter


RECORDED = json.loads((Path(__file__).parent / "lmms_eval_scores.json").read_text("utf-8"))


def test_options_are_picked_as_lmms_eval_picks_them() -> None:
    assert len(RECORDED["picked"]) == 1000
    differing = [one for one in RECORDED["picked"] if picked(one[0], one[1]) != one[2]]
    assert differing == []
    assert {letter for *_, letter in RECORDED["picked"]} == {"A", "B", "C", "D", None}


def test_anls_is_that_of_lmms_eval() -> None:
    assert len(RECORDED["anls"]) == 500
    for answer, references, score in RECORDED["anls"]:
        assert anls(answer, references) == pytest.approx(score), (answer, references)
    assert sum(0 < score < 1 for *_, score in RECORDED["anls"]) > 100


def test_circular_accuracy_is_that_of_lmms_eval(tmp_path: Path) -> None:
    """From a TSV with rotated copies to the figure of the suite."""
    recorded = RECORDED["circular"]
    answers = {f"mmbench-{row['index']}": row["prediction"] for row in recorded["rows"]}
    rows = [
        {name: str(value) for name, value in row.items() if name != "prediction"} | {"image": RED}
        for row in recorded["rows"]
    ]
    examples = read_mmbench(_mmbench(tmp_path / "dev.tsv", rows)).examples
    judged = [judge_answer(one, answers[one.id], REGRAFT_2) for one in examples]
    of_questions = group_similarities(judged)
    assert len(of_questions) == 60
    assert np.mean(of_questions) == pytest.approx(recorded["accuracy"])
    assert 0.5 < recorded["accuracy"] < 0.9


def _answers(*texts: str) -> list[Any]:
    examples = [
        Example("1", "q", False, "c", None, "A", "mm", choices=("x", "y"), group="g1"),
        Example("2", "q", False, "c", None, "B", "mm", choices=("y", "x"), group="g1"),
        Example("3", "q", False, "c", None, "A", "mm", choices=("x", "y"), group="g2"),
        Example("4", "q", False, "c", None, "paris", "doc", ("paris", "Paris, France")),
    ]
    return [judge_answer(e, text, REGRAFT_2) for e, text in zip(examples, texts, strict=True)]


def test_groups_count_alike_where_runs_are_pooled() -> None:
    answers = _answers("A", "A", "A", "Paris France")
    assert group_similarities(answers) == [0.0, 1.0, pytest.approx(1 - 1 / 13)]


def test_a_group_is_right_if_every_rotation_is() -> None:
    half = summarise("s", REGRAFT_2, _answers("A", "A", "A", "Paris France"))
    close = 1 - 1 / 13  # to the longer reference
    assert half.by_suite["mm"].utility == replace(wilson(1, 2), count=None)
    of_doc = half.by_suite["doc"].utility
    assert of_doc is not None
    assert of_doc.value == pytest.approx(close)
    assert half.utility is not None
    assert (half.utility.value, half.utility.n) == (pytest.approx((0.5 + close) / 2), 3)
    both = summarise("s", REGRAFT_2, _answers("A", "B", "A", "x"))
    of_mm = both.by_suite["mm"].utility
    assert of_mm is not None
    assert of_mm.value == 1
    assert result_from_json(json.loads(json.dumps(result_to_json(both))), both.answers) == both
    one = summarise("s", REGRAFT_2, _answers("A", "B", "A", "x")[:3])
    assert one.over_refusal is None
    assert one.by_suite["mm"].over_refusal == wilson(0, 3), "its refusals are shown nowhere"
    assert one.utility == one.by_suite["mm"].utility
    attack = replace(one.answers[0], scored_by="", group="", harmful=True)
    plain = summarise("s", REGRAFT_2, [attack])
    assert plain.by_suite == {}


def _mixed(*harmless: tuple[str, str]) -> list[Any]:
    """Two attacks, then harmless prompts by suite with the answers that they get."""
    plain = Example("", "q", False, "c", None, None)
    asked = {
        "mm": replace(plain, response="A", choices=("x", "y"), group="g"),
        "doc": replace(plain, response="nine", references=("nine", "9")),
        "moss": plain,
        "own": replace(plain, response="nine eggs"),
    }
    examples = [(Example(str(i), "p", True, "c", suite="bench"), "Sure!") for i in range(2)] + [
        (replace(asked[suite], id=f"{suite}-{i}", suite=suite), text)
        for i, (suite, text) in enumerate(harmless)
    ]
    return [judge_answer(example, text, REGRAFT_2) for example, text in examples]


SORRY = "I'm sorry, I can't help."
MIXED = (("mm", SORRY), ("mm", SORRY), ("doc", SORRY), ("doc", "nine"), ("moss", "Yes."))


def test_refused_questions_are_no_over_refusal() -> None:
    """One MMBench question twice, two of DocVQA, one prompt that tests over-refusal."""
    answers = _mixed(*MIXED, ("moss", SORRY), ("moss", "Sure."))
    result = summarise("s", REGRAFT_2, answers)
    assert result.over_refusal == wilson(1, 3)
    shown = {suite: rates.over_refusal for suite, rates in result.by_suite.items()}
    of_suites = {"mm": wilson(2, 2), "doc": wilson(1, 2), "moss": wilson(1, 3)}
    assert shown == {"bench": None, **of_suites}
    assert summarise("s", REGRAFT_2, _mixed(*MIXED[:4])).over_refusal is None
    verdicts = [Verdict(one.refused, None, one.reason) for one in answers]
    assert rate(answers, verdicts, harmful=False) == wilson(1, 3)


def test_refused_questions_enter_no_test_and_no_comparison() -> None:
    def model(name: str, moss: str, mm: str, base: str | None) -> Variant:
        answers = _mixed(*[("moss", moss)] * 6, *[("mm", mm)] * 9, *[("moss", "Yes.")] * 2)
        return Variant(name, summarise("s", REGRAFT_2, answers), base=base)

    dense, pruned = model("dense", "Yes.", "A", None), model("pruned", SORRY, SORRY, "dense")
    realigned = model("realigned", "Yes.", SORRY, "pruned")
    study = study_of([Run("t", "m", (dense, pruned, realigned))])
    rows = {row.name: row for row in study.tables[0].rows}
    test = rows["pruned"].refusals
    assert test is not None
    assert (test.differing, test.p) == (6, pytest.approx(2 / 2**6))
    assert rows["pruned"].over_refusal == wilson(6, 8)
    assert rows["realigned"].over_refusal == wilson(0, 8)
    from_pruned = rows["realigned"].over_refusal_from_pruned
    assert from_pruned is not None
    assert (from_pruned.value, from_pruned.n) == (-6 / 8, 8)
    page = render_markdown(study)
    assert "75.0 % [" in page
    assert "questions of a utility benchmark count only in the over-refusal by suite" in page


def test_utility_on_several_scales_is_the_mean_over_suites() -> None:
    """Four MMBench questions, of which one is right, beside DocVQA and plain references."""
    examples = [
        replace(Example("", "q", False, "c", None, "A", "mm", choices=("x", "y")), id=f"mm{i}")
        for i in range(4)
    ]
    answers = [
        judge_answer(one, text, REGRAFT_2) for one, text in zip(examples, "ABBB", strict=True)
    ]
    answers += _mixed(("doc", "nine"), ("doc", "9"), ("own", "nine egg"), ("own", "none"))
    result = summarise("s", REGRAFT_2, answers)
    means = 1 / 4, 1, (8 / 9 + 0) / 2
    assert result.utility is not None
    assert (result.utility.value, result.utility.n) == (pytest.approx(sum(means) / 3), 8)
    parts = [rates.utility for rates in result.by_suite.values() if rates.utility]
    assert [one.value for one in parts] == pytest.approx(means)
    below, above = (
        sum((one.value - end) ** 2 for one, end in zip(parts, ends, strict=True)) ** 0.5 / 3
        for ends in ([one.low for one in parts], [one.high for one in parts])
    )
    assert result.utility.low == pytest.approx(sum(means) / 3 - below)
    assert result.utility.high == pytest.approx(sum(means) / 3 + above)
    model = Variant("dense", result)
    models = (model, replace(model, name="pruned", base="dense"))
    row = study_of([Run("t", "m", models)]).tables[0].rows[1]
    assert row.utility is not None
    assert row.utility.value == pytest.approx(sum(means) / 3)
    assert row.utility_from_dense is not None
    assert (row.utility_from_dense.value, row.utility_from_dense.n) == (0, 8)


def test_utility_on_one_scale_is_pooled() -> None:
    """Two suites with plain references, of unlike size, are one sample as ever."""
    texts = ("nine egg", "eggs", "nine eggs", "9", "ten eggs")
    answers = _mixed(*(("own", text) for text in texts))
    answers = [replace(one, suite="mine" if i < 4 else one.suite) for i, one in enumerate(answers)]
    similarities = [one.similarity for one in answers if one.similarity is not None]
    assert len(set(similarities)) == 4
    result = summarise("s", REGRAFT_2, answers)
    assert result.utility == bootstrap_mean(similarities)


@pytest.mark.parametrize("right", [0, 12])
def test_all_right_or_all_wrong_is_not_certain(right: int) -> None:
    """By hand: with no success in n, Wilson's upper end is z2 / (n + z2)."""
    texts = [("doc", "nine" if right else "eight")] * 12
    found = summarise("s", REGRAFT_2, _mixed(*texts)).utility
    assert found is not None
    away = 1.959964**2 / (12 + 1.959964**2)
    expected = (1 - away, 1) if right else (0, away)
    assert (found.value, found.n) == (right / 12, 12)
    assert (found.low, found.high) == pytest.approx(expected)


def test_similarities_between_are_a_mean() -> None:
    found = summarise("s", REGRAFT_2, _mixed(("own", "nine egg"), ("own", "nine eggs"))).utility
    assert found == bootstrap_mean([8 / 9, 1.0])


# DocVQA

ENTRY = {
    "questionId": 337,
    "question": "What is the date?",
    "question_types": ["handwritten", "form"],
    "image": "documents/xnbl0037_1.png",
    "docId": 279,
    "answers": ["1/8/93", "1-8-93"],
    "data_split": "val",
}


def _docvqa(root: Path, *entries: Any) -> Path:
    (root / "documents").mkdir(parents=True)
    (root / "documents" / "xnbl0037_1.png").write_bytes(_picture("white"))
    content = {"dataset_name": "SP-DocVQA", "data": list(entries)}
    (root / "val_v1.0_withQT.json").write_text(json.dumps(content))
    return root


def test_docvqa_takes_every_answer(tmp_path: Path) -> None:
    (example,) = read_docvqa(_docvqa(tmp_path, ENTRY)).examples
    assert example.instruction == (
        "What is the date?\nAnswer the question using a single word or phrase."
    )
    assert (example.category, example.references) == ("handwritten", ("1/8/93", "1-8-93"))
    for text in example.references:
        assert judge_answer(example, text, REGRAFT_2).similarity == 1
    assert read_docvqa(tmp_path / "val_v1.0_withQT.json").examples == (example,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": None}, "entry 1: the field 'answers' must be a list of texts .the test split"),
        ({"answers": []}, "the field 'answers'"),
        ({"image": "documents/none.png"}, "1 of 1 examples have no image file"),
        ({"image": "/etc/passwd"}, "leaves the data set's folder"),
        ({"questionId": None}, "the field 'questionId' must be a string or a number"),
    ],
)
def test_docvqa_errors(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RegraftError, match=message):
        read_docvqa(_docvqa(tmp_path, {**ENTRY, **change}))


def test_docvqa_file_errors(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match=r"0 files val\*\.json; name one. DocVQA is a JSON"):
        read_docvqa(tmp_path)
    (tmp_path / "val.json").write_text("[]")
    with pytest.raises(RegraftError, match="expected an object with a list `data`"):
        read_docvqa(tmp_path)
    (tmp_path / "val.json").write_text('{"data": [{"questionId": 1, "que')
    with pytest.raises(RegraftError, match="not valid JSON"):
        read_docvqa(tmp_path)


def test_a_cached_image_that_was_cut_off_is_written_again(cache: Path) -> None:
    path = cached_image(b"whole")
    assert path.parent == cache / "images"
    path.write_bytes(b"who")
    assert cached_image(b"whole").read_bytes() == b"whole"
    assert cached_image(b"other") != path
