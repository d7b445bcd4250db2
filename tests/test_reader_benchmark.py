"""The data of the toy's benchmark: a test that shares nothing with training or calibration."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from regraft.data.readers.demo import read_demo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import make_reader_benchmark as benchmark
from make_demo_data import Title

Files = dict[str, list[Title]]


@pytest.fixture(scope="module")
def files(shared: Path) -> Files:
    return benchmark.compose(shared / "data", seed=0)


def _most_alike(mine: Sequence[str], theirs: Sequence[str]) -> float:
    """The highest Jaccard index of the words of any two, by products of indicator matrices."""
    texts = [set(re.findall(r"\w+", one.lower())) for one in (*mine, *theirs)]
    number = {word: i for i, word in enumerate(sorted(set().union(*texts)))}
    rows = [i for i, text in enumerate(texts) for _ in text]
    columns = [number[word] for text in texts for word in text]
    has = csr_matrix((np.ones(len(rows)), (rows, columns)), (len(texts), len(number)))
    sizes = np.array([len(text) for text in texts])
    both = (has[: len(mine)] @ has[len(mine) :].T).toarray()
    either = sizes[: len(mine), None] + sizes[None, len(mine) :] - both
    return float((both / either).max())


def _texts(rows: Sequence[Title]) -> list[str]:
    return [row.title for row in rows]


@pytest.mark.slow
def test_the_test_is_new_to_the_model_and_the_calibration_data_to_the_test(
    files: Files, shared: Path
) -> None:
    harmful, harmless = benchmark.trained_on(shared / "data")
    assert _most_alike(_texts(files["vlguard-test"]), harmful) < 0.75
    assert _most_alike(_texts(files["titles-test"]), harmless) < 0.75
    bundled = [one.request or "" for one in read_demo("borderline").examples]
    assert _most_alike(bundled, harmful) < 0.75
    assert _most_alike(bundled, harmless) < 0.75
    test = _texts([*files["vlguard-test"], *files["titles-test"]]) + bundled
    test += [text for _, text in benchmark.safebench(shared / "data", 0)]
    assert _most_alike(_texts(files["calibration"]), test) < 0.75


@pytest.mark.slow
def test_how_many_are_left(files: Files, shared: Path) -> None:
    """Of VLGuard's 442 test instructions 57 are training ones to the byte, of 400 titles 2."""
    unsafe = [text for _, text in benchmark.vlguard(shared / "data", "test", "instruction")]
    harmful, harmless = map(set, benchmark.trained_on(shared / "data"))
    assert (len(unsafe), sum(one in harmful for one in unsafe)) == (442, 57)
    held_out = benchmark.benign_titles(shared / "data")[: benchmark.HELD_OUT]
    assert sum(one in harmless for one in held_out) == 2
    assert len(files["vlguard-test"]) == 343
    assert len(files["titles-test"]) == 271


@pytest.mark.slow
def test_calibration_data_have_many_sources_and_forms_of_both_kinds(files: Files) -> None:
    kinds = {
        kind: Counter(row.category for row in files["calibration"] if row.harmful == kind)
        for kind in (True, False)
    }
    assert {"safebench", "advbench", "list-advbench", "maliciousinstruct"} <= kinds[True].keys()
    assert {"title", "spliced", "tasks", "xstest"} <= kinds[False].keys()
    assert not kinds[True].keys() & kinds[False].keys()
    for kind in kinds.values():
        assert sum(kind.values()) > 3 * 256, "three seeds would draw the same prompts"
    tasks = [row.title for row in files["calibration"] if row.category == "tasks"]
    assert all(one.startswith(benchmark.OPENINGS) for one in tasks)


def test_near_duplicates_are_left_out() -> None:
    def row(number: int, text: str) -> Title:
        return Title(f"x-{number}", "test", False, "x", text)

    rows = [
        row(1, "Steps to bake a loaf of bread."),
        row(2, "steps to BAKE a loaf of bread"),  # the same words
        row(3, "Steps to bake a big loaf of bread."),  # 7 of 8
        row(4, "Steps to bake a cake."),  # 4 of 8
        row(5, "Ways to read a book."),  # 4 of 6 of those before
    ]
    kept = benchmark.distinct(rows, ["Ways to read a long book at night."])
    assert [one.id for one in kept] == ["x-1", "x-4", "x-5"]
    kept = benchmark.distinct(rows, ["Ways to read a short book."])
    assert [one.id for one in kept] == ["x-1", "x-4"]


def test_the_source_of_an_id() -> None:
    ids = ["advbench-3", "list-advbench-3", "safebench-1-40", "vlguard-train-safe-instruction-7"]
    found = ["advbench", "list-advbench", "safebench", "vlguard-train-safe-instruction"]
    assert [benchmark.source(one) for one in ids] == found


def test_borderline_tasks_look_like_harmful_titles() -> None:
    plain = ["Ways to bake bread.", "Tips to mend a chair.", "List of rivers.", "Steps to run far."]
    long = [f"Ideas to {word} the old wooden table in the garden." for word in ("paint", "sand")]
    made = list(benchmark.borderline(plain + long, 20, random.Random(0)))
    assert len({name for name, _ in made}) == 20
    for _, title in made:
        assert title.startswith(benchmark.OPENINGS)
        assert benchmark.fits(title)
        assert "rivers" not in title
