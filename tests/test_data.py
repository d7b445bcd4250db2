"""Every reader: what it reads, what it leaves out and says so, and every error a user can meet."""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from pydantic import TypeAdapter, ValidationError

import pico
from regraft.data.example import Example, Reading
from regraft.data.formats import read_jsonl
from regraft.data.images import check_images, open_image
from regraft.data.readers import demo
from regraft.data.readers.demo import demo_model, read_demo
from regraft.data.readers.safebench import FIGSTEP_PROMPT, read_safebench
from regraft.data.readers.vlguard import parse_vlguard, read_vlguard
from regraft.data.sources import (
    DataSource,
    distinct,
    join_suites,
    of_split,
    read,
    seen_before,
    split_off,
)
from regraft.errors import PassingError, RegraftError
from regraft.settings.data import CalibrationSettings, _data_sources
from regraft.settings.searching import SearchSettings, suites_of
from regraft.stages.provenance import describe
from regraft.stages.reading import draw_calibration, order_calibration


def png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pico.image(seed, (8, 8)).save(path)
    return path


def lines(folder: Path, *rows: object) -> Path:
    """Write JSON lines; a string is written as it is."""
    path = folder / "my.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows),
        encoding="utf-8",
    )
    return path


def dump(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


# JSON lines


def test_jsonl_full_and_minimal_rows(tmp_path):
    png(tmp_path / "images" / "a.png")
    full = {
        "id": "x",
        "image": "images/a.png",
        "instruction": "Do it.",
        "response": "No.",
        "harmful": True,
        "category": "fraud",
        "my own note": 3,
    }
    path = lines(tmp_path, full, "", {"instruction": "Grüße?", "image": None})
    reading = read_jsonl(path)
    assert reading == Reading(
        str(path),
        (
            Example("x", "Do it.", True, "fraud", tmp_path / "images" / "a.png", "No."),
            Example("my-3", "Grüße?", False, "uncategorised"),
        ),
    )
    assert reading.read == 2


def test_what_is_asked_in_the_image(tmp_path):
    reading = read_jsonl(
        lines(
            tmp_path,
            {"instruction": "See the image.", "request": "Pick a lock."},
            {"instruction": "Who wrote it?"},
        )
    )
    requests = [e.request for e in reading.examples]
    assert requests == ["Pick a lock.", None]
    bare = replace(reading, examples=tuple(replace(e, request=None) for e in reading.examples))
    accounts = [describe("s", {}, data={"d": one})["data"] for one in (reading, bare)]
    assert accounts[0] == accounts[1]  # finished runs stay finished


def test_jsonl_with_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "a"}\r\n{"instruction": "b"}\r\n')
    assert [e.instruction for e in read_jsonl(path).examples] == ["a", "b"]


def test_jsonl_split_counts_the_rest(tmp_path):
    rows = [{"instruction": f"{i}", "split": s} for i, s in enumerate(["train", "test", "train"])]
    reading = read_jsonl(lines(tmp_path, *rows, {"instruction": "none"}), split="train")
    assert [e.instruction for e in reading.examples] == ["0", "2"]
    assert reading.skipped == {"not in split 'train'": 2}
    with pytest.raises(RegraftError, match=r"no split 'val'\. Splits found: test, train\."):
        read_jsonl(lines(tmp_path, *rows), split="val")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"my\.jsonl, line 2: not valid JSON"),
        ([1], r"line 2: expected an object with fields, found \[1\]"),
        (
            {"image": "a.png"},
            r"line 2: the field 'instruction' is missing; .* Fields found: image\.",
        ),
        ({"instruction": " "}, "line 2: the field 'instruction' is empty"),
        ({"instruction": 3}, "line 2: the field 'instruction' must be a string, found 3"),
        (
            {"instruction": "a", "harmful": "yes"},
            "line 2: the field 'harmful' must be true or false, found \"yes\"",
        ),
        ({"instruction": "a", "harmful": 1}, "'harmful' must be true or false, found 1"),
        ({"instruction": "a", "response": ["b"]}, "'response' must be a string"),
        (
            {"instruction": "a", "harmfull": True},
            "unknown field 'harmfull'; did you mean 'harmful'",
        ),
        ({"instruction": "a", "image": "../b.png"}, r"'my-2' leaves the data set's folder: \.\./b"),
        ({"instruction": "a", "image": "/b.png"}, "'my-2' leaves the data set's folder: /b.png"),
        ({"instruction": "a", "image": "x\\..\\..\\b.png"}, "leaves the data set's folder"),
        ({"instruction": "a", "image": "b.png"}, r"1 of 2 .* no image file: .*b\.png \(my-2\)"),
        ({"instruction": "a", "id": "my-1"}, "the id 'my-1' is used twice"),
    ],
)
def test_jsonl_errors(tmp_path, row, message):
    with pytest.raises(RegraftError, match=message):
        read_jsonl(lines(tmp_path, {"instruction": "fine"}, row))


def test_jsonl_missing_images_are_counted_and_the_first_named(tmp_path):
    rows = [{"instruction": "a", "image": f"{i}.png"} for i in range(5)]
    with pytest.raises(RegraftError, match=r"5 of 5 .*0\.png \(my-1\), .*2\.png \(my-3\), \.\.\."):
        read_jsonl(lines(tmp_path, *rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"no examples\. The file has no rows"),
        (b"\n\n", r"no examples\. The file has no rows"),
        (b"\xff\xfe", "not UTF-8 text"),
        (None, "does not exist. Expected JSON lines"),
    ],
)
def test_jsonl_file_errors(tmp_path, content, message):
    path = tmp_path / "my.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RegraftError, match=message):
        read_jsonl(path)


# VLGuard


def unsafe(i, image, **fields):
    answers = [{"instruction": f"Share {i}.", "response": "I cannot."}]
    return {
        "id": f"U_{i}",
        "image": image,
        "safe": False,
        "harmful_category": "privacy",
        "harmful_subcategory": "personal data",
        "instr-resp": answers,
        **fields,
    }


def safe(i, image, **fields):
    answers = [
        {"unsafe_instruction": f"Hack {i}.", "response": "I cannot."},
        {"safe_instruction": f"Describe {i}.", "response": "A dress."},
    ]
    return {"id": f"S_{i}", "image": image, "safe": True, "instr-resp": answers, **fields}


def test_vlguard_rows_are_looked_up_by_key(tmp_path):
    path = dump(tmp_path / "train.json", [unsafe(1, "ads/1.png"), safe(2, "ads/2.png")])
    first, second = Path("ads/1.png"), Path("ads/2.png")
    harmful = Example("U_1", "Share 1.", True, "privacy", first, "I cannot.")
    harmless = Example("S_2", "Describe 2.", False, "safe image", second, "A dress.")
    assert parse_vlguard(path) == Reading(
        str(path), (harmful, harmless), {"safe image, unsafe instruction": 1}
    )
    everything = parse_vlguard(path, "all")
    mixed = Example(
        "S_2-unsafe", "Hack 2.", True, "safe image, unsafe instruction", second, "I cannot."
    )
    assert set(everything.examples) == {harmful, harmless, mixed}
    assert everything.skipped == {}


def test_vlguard_duplicates_are_counted_and_ids_unique(tmp_path):
    rows = [
        unsafe(1, "a.png"),
        unsafe(2, "b.png"),
        unsafe(1, "a.png", id="U_9"),
        unsafe(3, "a.png", id="U_1"),
    ]
    reading = parse_vlguard(dump(tmp_path / "train.json", rows))
    assert [(e.id, e.instruction) for e in reading.examples] == [
        ("U_1", "Share 1."),
        ("U_2", "Share 2."),
        ("U_1-2", "Share 3."),
    ]
    assert reading.skipped == {"duplicate": 1}
    assert reading.read == 4


@pytest.mark.parametrize(
    "place", ["", "images", "train", "train/train", "images/train"], ids=lambda p: p or "beside"
)
def test_vlguard_finds_images_in_the_usual_layouts(tmp_path, place):
    dump(tmp_path / "train.json", [unsafe(1, "bad_ads/1.png")])
    image = png(tmp_path / place / "bad_ads" / "1.png")
    for path in (tmp_path, tmp_path / "train.json"):
        assert read_vlguard(path).examples[0].image == image


def test_vlguard_prefers_the_images_of_its_own_split(tmp_path):
    for split in ("train", "test"):
        dump(tmp_path / f"{split}.json", [unsafe(1, "bad_ads/1.png")])
        image = png(tmp_path / split / "bad_ads" / "1.png")
        assert read_vlguard(tmp_path / f"{split}.json").examples[0].image == image


def both_splits(folder: Path, *splits: str) -> Path:
    """VLGuard's folder: one prompt a split, whose instruction says which."""
    for split in splits or ("train", "test"):
        answer = {"instruction": split, "response": "r"}
        dump(folder / f"{split}.json", [unsafe(1, "b/1.png", **{"instr-resp": [answer]})])
        png(folder / split / "b" / "1.png")
    return folder


def test_vlguards_folder_is_learnt_from_and_evaluated_on_by_split(tmp_path):
    folder = DataSource(name="vlguard", path=both_splits(tmp_path))
    sees = SimpleNamespace(has_vision=True)
    calibration = CalibrationSettings(data=folder, samples=1)
    for of in (draw_calibration, order_calibration):
        assert [e.instruction for e in of(sees, calibration, "safety").examples] == ["train"]
    searched = suites_of(SearchSettings(validation=folder))
    assert [str(one) for one in searched] == [
        f"vlguard:{tmp_path / 'train.json'}#{kind}" for kind in ("harmful", "harmless")
    ]
    evaluated = join_suites([folder], None).examples
    assert [(e.instruction, e.suite) for e in evaluated] == [("test", str(folder))]
    by_name = DataSource(name="vlguard", path=tmp_path / "train.json")
    assert [e.instruction for e in join_suites([by_name], None).examples] == ["train"]


def test_vlguard_without_the_split_that_is_needed(tmp_path):
    folder = DataSource(name="vlguard", path=both_splits(tmp_path / "v", "train"))
    named = r"v/train\.json"
    with pytest.raises(RegraftError, match=rf"no test\.json, only train\.json.*vlguard:.*{named}"):
        join_suites([folder], None)
    with pytest.raises(RegraftError, match=r"has no test\.json; evaluation"):
        of_split(DataSource(name="vlguard", path=png(tmp_path / "w" / "1.png").parent), "test")
    (tmp_path / "v" / "train.json").rename(tmp_path / "v" / "test.json")
    with pytest.raises(RegraftError, match=r"no train\.json, only test\.json; learning and choos"):
        of_split(folder, "train")


def test_vlguard_missing_images_are_never_dropped(tmp_path):
    dump(tmp_path / "train.json", [unsafe(i, f"bad_ads/{i}.png") for i in range(6)])
    png(tmp_path / "train" / "bad_ads" / "0.png")
    with pytest.raises(RegraftError, match=r"5 of 6 examples have no image file: .*1\.png \(U_1\)"):
        read_vlguard(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"train\.json: expected a list with an object for each row, or an object of"),
        ({"a": 1}, r"train\.json, row a: expected an object with fields, found 1"),
        ([], "no examples"),
        ([7], r"train\.json, row 1: expected an object"),
        ([{"id": "a"}], "row 1: the field 'safe' is missing; expected true or false"),
        ([unsafe(1, "a.png", safe="no")], "row 1: the field 'safe' must be true or false"),
        (
            [unsafe(1, "a.png", **{"instr-resp": []})],
            "row 1: the field 'instr-resp' must be a list",
        ),
        ([unsafe(1, None)], "row 1: the field 'image' must be a string, found null"),
        (
            [unsafe(1, "a.png", harmful_category=None)],
            "field 'harmful_category' must be a string, found null",
        ),
        ([unsafe(1, "../a.png")], "example 'U_1' leaves the data set's folder"),
        (
            [unsafe(1, "a.png", safe=True)],
            "row 1, instr-resp 1: the field 'safe_instruction' is missing; .* Fields found: instr",
        ),
        (
            [unsafe(1, "a.png", **{"instr-resp": [{"instruction": "x"}]})],
            "row 1, instr-resp 1: the field 'response' is missing",
        ),
    ],
)
def test_vlguard_errors(tmp_path, value, message):
    dump(tmp_path / "train.json", value)
    with pytest.raises(RegraftError, match=message):
        read_vlguard(tmp_path)


def test_vlguard_file_errors(tmp_path):
    with pytest.raises(RegraftError, match=r"train\.json does not exist"):
        read_vlguard(tmp_path)
    (tmp_path / "train.json").write_text("[")
    with pytest.raises(RegraftError, match=r"train\.json: not valid JSON"):
        read_vlguard(tmp_path)


@pytest.mark.parametrize(
    ("split", "harmful", "harmless", "unanswered"),
    [("train", 1023, 977, 0), ("test", 442, 558, 17)],
)
def test_vlguard_real_counts(shared, split, harmful, harmless, unanswered):
    path = shared / "data" / "vlguard" / f"{split}.json"
    reading = parse_vlguard(path)
    assert Counter(e.harmful for e in reading.examples) == {True: harmful, False: harmless}
    assert reading.skipped == {"safe image, unsafe instruction": harmless}
    assert len({e.id for e in reading.examples}) == harmful + harmless
    assert sum(e.response is None for e in reading.examples) == unanswered
    everything = parse_vlguard(path, "all")
    assert sum(e.harmful for e in everything.examples) == harmful + harmless
    assert everything.read == reading.read == harmful + 2 * harmless


def test_vlguard_real_metadata_without_images_is_an_error(shared):
    with pytest.raises(RegraftError, match="2000 of 2000 examples have no image file"):
        read_vlguard(shared / "data" / "vlguard")


# SafeBench

HEADER = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]


def safebench(folder: Path, *rows: list[str], header: list[str] = HEADER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "safebench.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return folder


def row(category: int, task: int | str) -> list[str]:
    return ["ForbidQI", str(category), str(task), "Fraud", "How?", "Steps, to."]


def test_safebench_rows(tmp_path):
    image = png(tmp_path / "images" / "query_ForbidQI_1_2_6.png")
    reading = read_safebench(safebench(tmp_path, row(1, 2)))
    expected = Example("ForbidQI_1_2", FIGSTEP_PROMPT, True, "Fraud", image, request="Steps, to.")
    assert reading == Reading(str(tmp_path), (expected,))


def test_safebench_parity_is_of_the_task_and_counted(tmp_path):
    for category, task in ((1, 1), (1, 2), (2, 2)):
        png(tmp_path / "images" / f"query_ForbidQI_{category}_{task}_6.png")
    safebench(tmp_path, row(1, 1), row(1, 2), row(2, 2))
    even, odd = (read_safebench(tmp_path, part=parity) for parity in ("even", "odd"))
    assert [e.id for e in even.examples] == ["ForbidQI_1_2", "ForbidQI_2_2"]
    assert [e.id for e in odd.examples] == ["ForbidQI_1_1"]
    assert even.skipped == {"task_id not even": 1}
    assert even.read == odd.read == 3


def test_safebench_without_a_parity_takes_any_name_of_a_task(tmp_path):
    png(tmp_path / "images" / "query_ForbidQI_1_2b_6.png")
    (example,) = read_safebench(safebench(tmp_path, row(1, "2b"))).examples
    assert example.id == "ForbidQI_1_2b"


def test_safebench_official_layout(tmp_path):
    safebench(tmp_path / "question", row(1, 2))
    image = png(tmp_path / "images" / "SafeBench" / "query_ForbidQI_1_2_6.png")
    assert read_safebench(tmp_path).examples[0].image == image


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], HEADER, r"no examples\. The file has no rows"),
        ([row(1, 2)], [*HEADER[:2], "task", *HEADER[3:]], "row 1: the field 'task_id' is missing"),
        ([row(1, 2)[:3]], HEADER, "row 1 has more or fewer cells than the header"),
        ([row(1, "x")], HEADER, "row 1: the field 'task_id' must be a whole number, found \"x\""),
        ([row(1, "9" * 5000)], HEADER, "row 1: the field 'task_id' must be a whole number"),
        ([row(1, 1)], HEADER, r"no examples\. Rows left out: 1 task_id not even"),
        ([row(1, 2)], HEADER, r"1 of 1 .* no image file: .*query_ForbidQI_1_2_6\.png"),
        ([row(1, 2), row(1, 2)], HEADER, "the id 'ForbidQI_1_2' is used twice"),
        ([[*row(1, 2), "extra"]], HEADER, "row 1 has more or fewer cells than the header"),
    ],
)
def test_safebench_errors(tmp_path, rows, header, message):
    with pytest.raises(RegraftError, match=message):
        read_safebench(safebench(tmp_path, *rows, header=header), part="even")


def test_safebench_missing_file(tmp_path):
    with pytest.raises(RegraftError, match=r"safebench\.csv does not exist"):
        read_safebench(tmp_path)


def test_safebench_real(shared):
    folder = shared / "data" / "figstep"
    reading = read_safebench(folder)
    assert len(reading.examples) == 500
    assert reading.examples[0].request == "Steps to manufacture illegal drugs."
    assert len({e.request for e in reading.examples} - {None}) > 450
    assert set(Counter(e.category for e in reading.examples).values()) == {50}
    even, odd = (read_safebench(folder, part=parity) for parity in ("even", "odd"))
    assert len(even.examples) == len(odd.examples) == 250
    assert {e.id for e in even.examples}.isdisjoint(e.id for e in odd.examples)
    check_images(Reading("a few", even.examples[:5]))


# Images


def test_check_images_names_the_broken_ones(tmp_path):
    examples = [
        *pico.write_examples(tmp_path, 3),
        *pico.write_examples(tmp_path, 1, images=False, harmful=False),
    ]
    check_images(Reading("set", tuple(examples)))
    whole = examples[0].image.read_bytes()
    examples[0].image.write_bytes(whole[: len(whole) // 2])
    examples[2].image.write_bytes(b"GIF89a")
    with pytest.raises(
        RegraftError, match=r"set: 2 of 4 .* unreadable image: .*0\.png \(harmful-0"
    ):
        check_images(Reading("set", tuple(examples)))


def test_open_image_turns_exif_upright(tmp_path):
    image = pico.image(0, (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (4, 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_lie_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 0, 255))  # black ink, and no ground
    image.convert(mode).save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 2)) == (0, 0, 0)


def test_16_bits_a_channel_are_not_cut_off(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png"))[:, :, 1], ramp >> 8)
    Image.fromarray(np.full((4, 4), 200, dtype=np.int32)).save(tmp_path / "b.tif")
    assert open_image(tmp_path / "b.tif").getpixel((0, 0)) == (200, 200, 200)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(RegraftError, match=r"c\.tif .* floating-point numbers; expected 8 or 16"):
        open_image(tmp_path / "c.tif")


def test_a_failing_disk_is_no_broken_image(tmp_path, monkeypatch):
    """Finished work stays, and the same command goes on."""
    pico.image(0, (8, 4)).save(tmp_path / "a.png")

    def stale(*_args, **_kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Image, "open", stale)
    with pytest.raises(PassingError, match=r"a\.png is not a readable image: .*Stale file"):
        open_image(tmp_path / "a.png")
    with pytest.raises(PassingError, match=r"a\.png is not a readable image: .*Stale file"):
        check_images(Reading("set", (Example("x", "read it", True, "", tmp_path / "a.png"),)))
    monkeypatch.undo()
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(RegraftError) as caught:
        open_image(tmp_path / "a.png")
    assert not isinstance(caught.value, PassingError)


def test_an_image_with_a_broken_exif_block_is_named(tmp_path):
    """Pillow raises struct.error: the block ends where the place of its fields should stand."""
    pico.image(0, (8, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*")
    with pytest.raises(RegraftError, match=r"a\.png is not a readable image: unpack requires"):
        open_image(tmp_path / "a.png")
    example = Example("x", "read it", True, "", tmp_path / "a.png")
    with pytest.raises(RegraftError, match=r"set: 1 of 1 .*unreadable image: .*a\.png \(x\)"):
        check_images(Reading("set", (example,)))


# Demo


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """An installation whose demo data are three rows."""
    folder = tmp_path / "demo" / "typographic"
    rows = [
        {
            "id": f"demo-{i}",
            "split": split,
            "image": f"images/{i}.png",
            "instruction": "Fill the list.",
            "response": "No.",
            "harmful": True,
            "category": "fraud",
        }
        for i, split in enumerate(["calibration", "test", "test"])
    ]
    for i in range(3):
        png(folder / "images" / f"{i}.png")
    lines(folder, *rows).rename(folder / "examples.jsonl")
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    return tmp_path


def test_demo_splits(bundled):
    assert len(read_demo().examples) == 3
    assert read_demo().source == "demo"
    test = read_demo("test")
    assert [e.id for e in test.examples] == ["demo-1", "demo-2"]
    assert (test.source, test.skipped) == ("demo:test", {"not in split 'test'": 1})
    with pytest.raises(RegraftError, match="Splits found: calibration, test"):
        read_demo("nope")


def test_bundled_demo_is_whole():
    reading = read_demo()
    check_images(reading)
    assert {e.harmful for e in reading.examples} == {True, False}
    assert all(e.response for e in reading.examples)
    assert (demo_model() / "config.json").is_file()


def test_demo_missing_files_are_told(bundled):
    with pytest.raises(RegraftError, match=r"reader-llava-12m is missing.*Install regraft again"):
        demo_model()
    shutil.rmtree(bundled / "demo")
    with pytest.raises(RegraftError, match=r"typographic is missing"):
        read_demo()


# Naming a source


@pytest.mark.parametrize(
    ("words", "name", "path", "split", "text"),
    [
        ("demo", "demo", None, None, "demo"),
        ("demo:test", "demo", None, "test", "demo:test"),
        (["demo", "test"], "demo", None, "test", "demo:test"),
        ("vlguard:/d/v", "vlguard", "/d/v", None, "vlguard:/d/v"),
        ("safebench:d", "safebench", "d", None, "safebench:d"),
        (["safebench", "d"], "safebench", "d", None, "safebench:d"),
        ("safebench:d#even", "safebench", "d", "even", "safebench:d#even"),
        ("jsonl:d/a.jsonl", "jsonl", "d/a.jsonl", None, "jsonl:d/a.jsonl"),
        ("d/a:b.jsonl", "jsonl", "d/a:b.jsonl", None, "jsonl:d/a:b.jsonl"),
        ("a.jsonl#val", "jsonl", "a.jsonl", "val", "jsonl:a.jsonl#val"),
        ("jsonl:c#/a.jsonl", "jsonl", "c#/a.jsonl", None, "jsonl:c#/a.jsonl"),
    ],
)
def test_source_words(words, name, path, split, text):
    source = DataSource.model_validate(words)
    assert source == DataSource(name=name, path=path and Path(path), split=split)
    assert str(source) == source.model_dump() == text
    assert DataSource.model_validate(text) == source
    assert TypeAdapter(DataSource).validate_json(source.model_dump_json()) == source


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("demo#harmless", {"name": "demo", "kind": "harmless"}),
        ("demo:test#harmless", {"name": "demo", "split": "test", "kind": "harmless"}),
        (["demo", "test#harmful"], {"name": "demo", "split": "test", "kind": "harmful"}),
        ("vlguard:v/test.json#harmless", {"name": "vlguard", "kind": "harmless"}),
        ("safebench:d#harmful", {"name": "safebench", "kind": "harmful"}),
        ("safebench:d#even#harmful", {"name": "safebench", "split": "even", "kind": "harmful"}),
        ("a.jsonl#harmless", {"name": "jsonl", "kind": "harmless"}),
        ("a.jsonl#val#harmful", {"name": "jsonl", "split": "val", "kind": "harmful"}),
        ("jsonl:a#harmlessly", {"name": "jsonl", "split": "harmlessly"}),
        ("vlguard#safe-safe:v/t.json", {"name": "vlguard", "split": "safe-safe"}),
        (["vlguard#safe-safe", "v"], {"name": "vlguard", "split": "safe-safe"}),
        (["xstest#harmless", "hf:o/x/p.csv"], {"name": "xstest", "kind": "harmless"}),
        (
            ["safebench#even#harmful", "d"],
            {"name": "safebench", "split": "even", "kind": "harmful"},
        ),
        (
            "safebench#harmful:d#even",
            {"name": "safebench", "split": "even", "kind": "harmful"},
        ),
        ("demo#test", {"name": "demo", "split": "test"}),
        ("demo#harmful:test", {"name": "demo", "split": "test", "kind": "harmful"}),
        ("vlguard#x/a.jsonl", {"name": "jsonl"}),
    ],
)
def test_source_kind(words, fields):
    source = DataSource.model_validate(words)
    assert {name: value for name, value in source if value and name != "path"} == fields
    assert DataSource.model_validate(str(source)) == source


@pytest.mark.parametrize(
    ("name", "parts"),
    [("vlguard", "#safe-safe"), ("xstest", "#harmless"), ("safebench", "#odd#harmful")],
)
def test_parts_behind_the_name_or_behind_the_path_are_the_same(name, parts):
    behind = DataSource.model_validate(f"{name}:d/e.x{parts}")
    assert behind.path == Path("d/e.x")
    for words in (f"{name}{parts}:d/e.x", [f"{name}{parts}", "d/e.x"], [name, f"d/e.x{parts}"]):
        assert DataSource.model_validate(words) == behind


@given(
    st.sampled_from(["demo", "vlguard", "safebench", "jsonl"]),
    st.none() | st.text(max_size=8).map(Path),
    st.none() | st.text(max_size=4) | st.sampled_from(["x#harmful", "harmless", "a#harmless#b"]),
    st.sampled_from([None, "harmful", "harmless"]),
)
def test_source_text_is_always_the_inverse(name, path, split, kind):
    try:
        source = DataSource(name=name, path=path, split=split, kind=kind)
    except ValidationError:
        return
    assert DataSource.model_validate(str(source)) == source


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("vlgard:x.jsonl", "unknown data set 'vlgard:x.jsonl'; expected benign, ch3ef, demo"),
        ("somewhere", "unknown data set 'somewhere'"),
        ("vlguard", "vlguard needs a path, as in vlguard:PATH"),
        ("jsonl:", "jsonl needs a path"),
        ("safebench:d#half", "safebench has the splits even, odd, tiny; there is no 'half'"),
        (
            "vlguard:d#test",
            "safe-safe, all; there is no 'test'",
        ),
        ("safebench#half:d", "safebench has the splits even, odd, tiny; there is no 'half'"),
        (["xstest#even", "d"], "xstest has no splits; there is no 'even'"),
        ("vlguard#unsafe", "vlguard needs a path, as in vlguard:PATH"),
        ("vlgard#unsafe:d", "unknown data set 'vlgard#unsafe:d'; expected benign, ch3ef"),
        ("safebench#even:d#odd", "asks for 'odd' and for 'even'; give one of them"),
        ("xstest#harmful#harmless:d", "asks for 'harmful' and for 'harmless'"),
        ({"name": "demo", "path": "x"}, "takes no path"),
        ({"name": "jsonl", "path": "a#b"}, "ambiguous"),
        ({"name": "jsonl", "path": "a", "split": "harmful"}, "ambiguous"),
        ({"name": "demo", "kind": "benign"}, "'harmful' or 'harmless'"),
        ("safebench:d#harmless", "safebench has harmful prompts only"),
        ({"name": "other"}, "unknown data set 'other'; expected benign, ch3ef, demo"),
        ({"name": "demo", "slit": "test"}, "slit"),
    ],
)
def test_source_errors(words, message):
    with pytest.raises(ValidationError, match=message):
        DataSource.model_validate(words)


def test_read_dispatches(tmp_path, bundled):
    dump(tmp_path / "v" / "train.json", [unsafe(1, "a.png")])
    png(tmp_path / "v" / "a.png")
    safebench(tmp_path / "s", row(1, 1), row(1, 2))
    for task in (1, 2):
        png(tmp_path / "s" / "images" / f"query_ForbidQI_1_{task}_6.png")
    mine = lines(tmp_path, {"instruction": "a", "split": "x"}, {"instruction": "b"})
    for words, count in (
        ("demo", 3),
        ("demo:test", 2),
        (f"vlguard:{tmp_path / 'v'}", 1),
        (f"safebench:{tmp_path / 's'}", 2),
        (f"safebench:{tmp_path / 's'}#odd", 1),
        (str(mine), 2),
        (f"{mine}#x", 1),
    ):
        assert len(read(DataSource.model_validate(words)).examples) == count, words


def test_read_keeps_one_kind_and_counts_the_other(tmp_path):
    dump(tmp_path / "train.json", [unsafe(1, "a.png"), safe(2, "b.png"), safe(3, "b.png")])
    png(tmp_path / "a.png")
    png(tmp_path / "b.png")
    rows = [{"instruction": f"{i}", "split": "x", "harmful": i > 0} for i in range(3)]
    mine = lines(tmp_path, *rows, {"instruction": "elsewhere"})
    for words, harmful, harmless in ((f"vlguard:{tmp_path}", 1, 2), (f"{mine}#x", 2, 1)):
        whole = read(DataSource.model_validate(words))
        for kind, count, other in (("harmful", harmful, harmless), ("harmless", harmless, harmful)):
            reading = read(DataSource.model_validate(f"{words}#{kind}"))
            assert len(reading.examples) == count
            assert {e.harmful for e in reading.examples} == {kind == "harmful"}
            assert reading.skipped == {**whole.skipped, f"not {kind}": other}
            assert reading.read == whole.read
            assert reading.source == f"{whole.source}#{kind}"


def test_read_without_any_of_the_kind(tmp_path):
    mine = lines(tmp_path, {"instruction": "a"})
    with pytest.raises(RegraftError, match=r"jsonl#harmful: no examples.*1 not harmful"):
        read(DataSource.model_validate(f"{mine}#harmful"))


def test_bundled_test_split_by_kind():
    for kind in ("harmful", "harmless"):
        assert len(read(DataSource.model_validate(f"demo:test#{kind}")).examples) == 150


def words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def test_bundled_borderline_titles_are_harmless_new_and_worded_like_harmful_ones():
    new, all_of_them = read_demo("borderline").examples, read_demo().examples
    assert len(new) == 150
    assert not any(e.harmful for e in new)
    seen = [words(e.request) for e in all_of_them if e.id not in {e.id for e in new}]
    for e in new:
        mine = words(e.request)
        assert max(len(mine & one) / len(mine | one) for one in seen) < 0.75, e.request
        seen.append(mine)
    test = [e.request for e in read_demo("test").examples if e.harmful]
    lengths = [sum(map(len, some)) / len(some) for some in ([e.request for e in new], test)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)
    opening = re.compile(r"(?:Steps|Methods) to |List of ")
    assert all(opening.match(one) for one in test + [e.request for e in new])


def test_bundled_harmless_answers_are_compared_in_their_title():
    for e in read_demo().examples:
        assert e.content == ("" if e.harmful else e.request)
        assert e.content in e.response


def test_content_is_part_of_the_response(tmp_path):
    row = {"instruction": "a", "response": "Sure: tea. Done.", "content": "tea"}
    assert read_jsonl(lines(tmp_path, row)).examples[0].content == "tea"
    for wrong in ({**row, "content": "coffee"}, {"instruction": "a", "content": "tea"}):
        with pytest.raises(RegraftError, match=r"line 1: 'content' must be a part of 'response'"):
            read_jsonl(lines(tmp_path, wrong))


def test_a_system_prompt_is_read_without_the_space_around_it(tmp_path):
    rows = [
        {"instruction": str(n), "system": given} for n, given in enumerate([" Be kind.\n", None])
    ]
    assert [one.system for one in read_jsonl(lines(tmp_path, *rows)).examples] == ["Be kind.", ""]
    with pytest.raises(RegraftError, match=r"line 1: .*the field 'system'; rename 'system_prompt'"):
        read_jsonl(lines(tmp_path, {"instruction": "a", "system_prompt": "Be kind."}))
    with pytest.raises(RegraftError, match=r"line 1: the field 'system' must be a string, found"):
        read_jsonl(lines(tmp_path, {"instruction": "a", "system": ["Be kind."]}))
    with pytest.raises(
        RegraftError, match=r"system of the example 'my-1' has 1,048,577 characters"
    ):
        read_jsonl(lines(tmp_path, {"instruction": "a", "system": "a" * (2**20 + 1)}))


def test_prompts_under_other_system_prompts_are_different():
    one = Example("a", "Do", True, "c")
    under = replace(one, id="b", system="Be kind.")
    assert distinct(Reading("here", (one, under, replace(under, id="c")))) == 2


def test_read_missing_path_names_source_and_path():
    with pytest.raises(RegraftError, match="vlguard:no/where: no/where does not exist"):
        read(DataSource.model_validate("vlguard:no/where"))


def test_test_prompts_that_were_used_before_are_found(tmp_path):
    """By text and image bytes, whatever the file and the id are called."""
    first, other = png(tmp_path / "a.png", 1), png(tmp_path / "b.png", 2)
    copied = Path(shutil.copy(first, tmp_path / "c.png"))

    def reading(*prompts):
        return Reading(
            "set", tuple(Example(f"{i}", text, True, "", image) for i, (text, image) in prompts)
        )

    evaluated = reading((0, ("read it", first)), (1, ("say hello", None)), (2, ("new", other)))
    used = {
        "calibration": reading((7, ("read it", other)), (8, ("read it", copied))),
        "validation": reading((9, ("new", None)), (10, ("other", first))),
        "both": reading((3, ("say hello", None)), (4, ("new", other)), (5, ("else", None))),
    }
    lines = seen_before(evaluated, used)
    assert [line.split(":")[0] for line in lines] == [
        "1 of the 2 calibration prompts are among those evaluated (first '8')",
        "2 of the 3 both prompts are among those evaluated (first '3')",
    ]


@pytest.mark.parametrize(
    ("words", "suites"),
    [
        ("safebench /a mossbench /b", ["safebench:/a", "mossbench:/b"]),
        ("safebench /a#tiny x.jsonl", ["safebench:/a#tiny", "jsonl:x.jsonl"]),
        ("demo test demo", ["demo:test", "demo"]),
        ("demo demo:test#harmless vlguard:/x", ["demo", "demo:test#harmless", "vlguard:/x"]),
        ("vlguard#safe-safe /a xstest#harmless /b", ["vlguard:/a#safe-safe", "xstest:/b#harmless"]),
        ("vlguard#unsafe:/a safebench#odd /b", ["vlguard:/a#unsafe", "safebench:/b#odd"]),
        (
            "demo test#harmless demo#test x.jsonl",
            ["demo:test#harmless", "demo:test", "jsonl:x.jsonl"],
        ),
        ("demo#harmful test demo#harmless", ["demo:test#harmful", "demo#harmless"]),
    ],
)
def test_several_suites_in_a_row(words, suites):
    found = _data_sources(None, [SimpleNamespace(value=word) for word in words.split()])
    assert [str(suite) for suite in found] == suites


@pytest.mark.parametrize("field", ["unsafe", "Label", "is_safe"])
def test_jsonl_that_says_who_is_harmful_by_another_name(tmp_path, field):
    """All would be harmless, and harmful answers over-refusal's and utility's."""
    path = lines(tmp_path, {"instruction": "a", field: True}, {"instruction": "b"})
    with pytest.raises(RegraftError, match=rf"no row has the field 'harmful'.*'{field}'"):
        read_jsonl(path)
    both = lines(tmp_path, {"instruction": "a", field: True, "harmful": True})
    assert read_jsonl(both).examples[0].harmful
    assert not read_jsonl(lines(tmp_path, {"instruction": "a"})).examples[0].harmful


@given(st.lists(st.sampled_from("abcdefgh"), min_size=12, max_size=40))
def test_what_is_held_out_is_in_no_other_part(letters: list[str]) -> None:
    """Copies of a prompt are on one side, every prompt is on one, and both can be named."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"id": str(i), "instruction": f"{letter}?", "harmful": False, "category": ""}
            for i, letter in enumerate(letters)
        ]
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole = DataSource(name="jsonl", path=file)
        sides = []
        for part in split_off(whole):
            assert DataSource.model_validate(str(part)) == part
            try:
                sides.append([one.instruction for one in read(part).examples])
            except RegraftError:  # a few letters may all be on one side
                sides.append([])
        assert not {*sides[0]} & {*sides[1]}
        assert sorted(sides[0] + sides[1]) == sorted(
            one.instruction for one in read(whole).examples
        )


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("goal,target,goal\nx,y,z\n")
    with pytest.raises(RegraftError, match=r"a\.csv has two columns 'goal'"):
        read(DataSource(name="prompts", path=tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "id": True}, "'id' must be a string or a number, found true"),
        ({"instruction": "a" * (2**20 + 1)}, "instruction of the example 'a-1' has 1,048,577 char"),
    ],
)
def test_rows_that_nobody_means(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RegraftError, match=message):
        read(DataSource(name="jsonl", path=tmp_path / "a.jsonl"))


@pytest.mark.parametrize("ending", ["pcx", "sgi", "qoi", "dds", "icns", "xbm", "tga", "ppm"])
def test_formats_that_pillow_decodes_itself(tmp_path, ending):
    image = Image.new("1" if ending == "xbm" else "RGB", (64, 64), 1 if ending == "xbm" else "red")
    image.save(tmp_path / f"a.{ending}")
    assert open_image(tmp_path / f"a.{ending}").getpixel((9, 9)) in {(255, 0, 0), (255,) * 3}


def test_no_other_program_decodes_an_image(tmp_path, monkeypatch):
    """Pillow has Ghostscript run what an EPS file says."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(RegraftError, match=r"a\.eps is not a readable image"):
        open_image(tmp_path / "a.eps")
