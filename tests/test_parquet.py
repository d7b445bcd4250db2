"""Tables in Parquet: the same examples as from other formats, images out of cells, bad files."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from disk import tree
from regraft.data import parquet
from regraft.data.example import KINDS
from regraft.data.formats import read_jsonl, read_prompts
from regraft.data.images import check_images, open_image
from regraft.data.readers.demo import demo_model
from regraft.data.readers.docvqa import read_docvqa
from regraft.data.readers.mmbench import read_mmbench
from regraft.data.readers.vlguard import read_vlguard
from regraft.data.readers.xstest import read_xstest
from regraft.data.rows import table_rows
from regraft.data.sources import DataSource, read
from regraft.data.storage import CACHE_VARIABLE, located
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.settings.data import CalibrationSettings
from regraft.stages.reading import read_suites
from regraft.stages.setup import Setup
from regraft.stages.steps import PromptUse, Step, plan_steps


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _png(red: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, form)
    return file.getvalue()


def _write(path: Path, *rows: dict[str, Any], **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **how)
    return path


ROWS = [
    {"instruction": "Do it.", "harmful": True, "category": "fraud", "response": "No.", "id": "x"},
    {"instruction": "Grüße?", "harmful": False, "category": None, "response": "Hi.", "id": None},
]


def test_a_table_is_read_as_json_lines_are(tmp_path: Path) -> None:
    table = _write(tmp_path / "my.parquet", *ROWS)
    lines = tmp_path / "my.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_jsonl(table).examples == read_jsonl(lines).examples
    named = read(DataSource.model_validate(f"{table}#harmful"))
    assert [one.id for one in named.examples] == ["x"]


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "id": 0}, {"instruction": "b", "id": None}]
    examples = read_jsonl(_write(tmp_path / "t.parquet", *rows)).examples
    assert [one.id for one in examples] == ["0", "t-2"]


def test_images_in_cells_go_to_the_cache(tmp_path: Path, cache: Path) -> None:
    """By the digest of their bytes, whatever path stands in the cell."""
    outside = tmp_path / "outside.png"
    cells = [
        {"bytes": _png(250), "path": str(outside)},
        {"bytes": _png(9, "JPEG"), "path": "../../outside.png"},
        {"bytes": _png(250), "path": None},
        None,
    ]
    rows = [{"instruction": f"{i}?", "image": cell} for i, cell in enumerate(cells)]
    path = _write(tmp_path / "data" / "test.parquet", *rows)
    before = tree(tmp_path / "data")
    reading = read_jsonl(path)
    check_images(reading)
    images = [one.image for one in reading.examples]
    assert images[0] == images[2] != images[1]
    assert images[3] is None
    assert [open_image(one).getpixel((0, 0))[0] > 200 for one in images if one] == [1, 0, 1]
    assert {one.suffix for one in images if one} == {".png", ".jpg"}
    assert all(one.parent == cache / "images" for one in images if one)
    assert not outside.exists()
    assert tree(tmp_path / "data") == before
    assert len(list((cache / "images").glob("*.*g"))) == 2


def test_an_image_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(1))
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def table(name: str) -> Path:
        cell = pa.array([{"bytes": None, "path": name}], type_)
        pq.write_table(pa.table({"instruction": ["?"], "image": cell}), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    assert read_jsonl(table("a.png")).examples[0].image == tmp_path / "a.png"
    for name in ("../a.png", str(tmp_path / "a.png")):
        with pytest.raises(RegraftError, match="leaves the data set's folder"):
            read_jsonl(table(name))


def test_all_shards_are_one_table(tmp_path: Path) -> None:
    files = [
        _write(tmp_path / f"data/train-0000{i}-of-00003.parquet", {"instruction": f"{i}?"})
        for i in range(3)
    ]
    for file in files:
        assert [one.instruction for one in read_jsonl(file).examples] == ["0?", "1?", "2?"]
    assert len({one.id for one in read_jsonl(files[0]).examples}) == 3
    files[1].unlink()
    with pytest.raises(RegraftError, match=r"train-00001-of-00003\.parquet is missing, one of the"):
        read_jsonl(files[0])


def test_splits_of_a_folder(tmp_path: Path) -> None:
    _write(tmp_path / "set/data/train-00000-of-00001.parquet", {"instruction": "a"})
    _write(tmp_path / "set/data/test-00000-of-00001.parquet", {"instruction": "b", "harmful": True})
    (tmp_path / "set" / "README.md").write_text("A data set.")

    def of(text: str) -> list[str]:
        return [one.instruction for one in read(DataSource.model_validate(text)).examples]

    assert of(f"jsonl:{tmp_path}/set#train") == ["a"]
    assert of(f"jsonl:{tmp_path}/set#test#harmful") == ["b"]
    with pytest.raises(RegraftError, match=r"holds the tables data/test, data/train; choose one"):
        of(f"jsonl:{tmp_path}/set")
    with pytest.raises(RegraftError, match="split 'val' fits 0"):
        of(f"jsonl:{tmp_path}/set#val")
    (tmp_path / "set" / "other.csv").write_text("goal\nx\n")
    with pytest.raises(RegraftError, match="is a folder"):  # as before: no data set of tables
        of(f"jsonl:{tmp_path}/set#train")


def test_the_hub_gives_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **how: Any) -> str:
        asked.append(how["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _write(tmp_path / "data/train-00000-of-00001.parquet", {"prompt": "Do it."})
    shard = "data/train-00000-of-00001.parquet"
    for text in (f"prompts:hf:org/x/{shard}", "prompts:hf:org/x"):
        assert read(DataSource.model_validate(text)).examples[0].instruction == "Do it."
    located(Path("hf:org/x/one.parquet"))
    assert asked == [["data/train-*-of-00001.parquet"], None, ["one.parquet"]]


def test_other_readers_take_tables(tmp_path: Path) -> None:
    """Those of CSV, TSV and JSON, with numbers and images as the hub has them."""
    xstest = _write(tmp_path / "xs.parquet", {"id": 7, "prompt": "p", "type": "t", "label": "safe"})
    assert read_xstest(xstest).examples[0].id == "xstest-7"
    columns = {"goal": "g", "target": "t"}
    assert read_prompts(_write(tmp_path / "adv.parquet", columns)).examples[0].instruction == "g"
    image = {"bytes": _png(3), "path": "1.png"}
    bench = {"index": 4, "question": "q", "hint": None, "A": "a", "B": "b", "C": None, "D": None}
    row = {**bench, "answer": "B", "category": "c", "image": image}
    one = read_mmbench(_write(tmp_path / "bench.parquet", row)).examples[0]
    assert (one.id, one.choices, one.response) == ("mmbench-4", ("a", "b"), "B")
    assert one.image is not None
    assert one.image.read_bytes() == image["bytes"]
    page = {"questionId": 3, "question": "q", "answers": ["x", "y"], "image": image}
    asked = read_docvqa(_write(tmp_path / "val.parquet", page)).examples[0]
    assert (asked.id, asked.references, asked.image) == ("docvqa-3", ("x", "y"), one.image)
    told = {"id": "i", "safe": False, "harmful_category": "h", "image": image}
    guard = {**told, "instr-resp": [{"instruction": "a", "response": "r"}]}
    example = read_vlguard(_write(tmp_path / "guard.parquet", guard)).examples[0]
    assert (example.harmful, example.response, example.image) == (True, "r", one.image)


def test_values_as_text(tmp_path: Path) -> None:
    row = {"i": 3, "f": 0.5, "n": None, "s": "x", "l": ["a"], "d": {"k": 1}, "b": _png(2)}
    path = _write(tmp_path / "t.parquet", row, {**row, "n": "there"})
    (found, _) = table_rows(path, "", as_text=True)
    assert found.values == {
        "i": "3",
        "f": "0.5",
        "n": "",
        "s": "x",
        "l": '["a"]',
        "d": '{"k": 1}',
        "b": base64.b64encode(row["b"]).decode(),
    }
    assert found.where == f"{path}, row 1"


def test_a_table_that_is_refused_late_leaves_no_images(tmp_path: Path, cache: Path) -> None:
    """Its second image is damaged, which is found once all rows have been read."""
    cells = [{"bytes": _png(1), "path": None}, {"bytes": _png(2)[:40], "path": None}]
    rows = [
        {"instruction": "a", "harmful": not i, "response": "b", "image": cells[i]} for i in (0, 1)
    ]
    source = DataSource.model_validate(str(_write(tmp_path / "t.parquet", *rows)))
    with pytest.raises(RegraftError, match="image"):
        read_suites(None, [source], None)
    assert not list((cache / "images").glob("*.*g"))
    model = open_source(demo_model())
    setup = Setup(model, CalibrationSettings(data=source, samples=1, responses="self"))
    drawn = [
        Step("learn", kind, tmp_path, print, lambda kind=kind: PromptUse({kind: setup.drawn(kind)}))
        for kind in KINDS
    ]
    with pytest.raises(RegraftError, match="image"):
        plan_steps(setup, drawn)  # of the second kind; the first is fine
    assert not list((cache / "images").glob("*.*g"))


@pytest.mark.parametrize("as_text", [False, True])
def test_text_in_plain_bytes_is_text(tmp_path: Path, cache: Path, as_text: bool) -> None:
    """As Impala and older Spark write it, which do not say that it is UTF-8."""
    texts = ["Grüße?", "BMW is a car.", "", "RIFF"]
    cells = pa.array([one.encode() for one in texts], pa.binary())
    pq.write_table(pa.table({"instruction": cells}), tmp_path / "t.parquet")
    rows = table_rows(tmp_path / "t.parquet", "", as_text=as_text)
    assert [row.values["instruction"] for row in rows] == texts
    assert not cache.exists()


@pytest.mark.parametrize("as_text", [False, True])
def test_bytes_that_are_nothing_are_refused_where_they_are_read(
    tmp_path: Path, cache: Path, as_text: bool
) -> None:
    path = _write(tmp_path / "t.parquet", {"instruction": "a", "b": b"\x00\xff"})
    (row,) = table_rows(path, "", as_text=as_text)
    assert row.text("instruction") == "a"
    with pytest.raises(RegraftError, match=r"t\.parquet, row 1: the field 'b' must be a string"):
        row.text("b")
    assert not cache.exists()


def test_images_in_plain_bytes(tmp_path: Path, cache: Path) -> None:
    kinds = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
    rows = [{"instruction": kind, "image": _png(9, kind)} for kind in kinds]
    reading = read_jsonl(_write(tmp_path / "t.parquet", *rows))
    check_images(reading)
    assert [one.image.read_bytes() for one in reading.examples if one.image] == [
        row["image"] for row in rows
    ]


def test_columns_that_python_has_no_values_for(tmp_path: Path) -> None:
    """Nanoseconds, and a zone that this machine does not know: nobody reads them."""
    times = pa.array([1], pa.timestamp("ns"))
    lost = pa.array([0], pa.timestamp("us", "Nowhere/Land"))
    table = pa.table({"instruction": ["a"], "t": times, "z": lost})
    pq.write_table(table, tmp_path / "t.parquet")
    (row,) = table_rows(tmp_path / "t.parquet", "", as_text=True)
    assert row.text("instruction") == "a"
    assert row.text("t").startswith("1970-01-01 00:00:00")
    assert row.text("z").startswith("1970-01-01 00:00:00")


def test_a_small_file_with_much_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "t.parquet", *({"instruction": "a" * 2**20},) * 200)
    assert path.stat().st_size < 2**16
    with pytest.raises(RegraftError, match=r"t\.parquet, row 65: the values of .* 67,108,864 byte"):
        read_jsonl(path)
    monkeypatch.setattr(parquet, "_MOST_TEXT", 2**20 - 1)
    with pytest.raises(
        RegraftError, match=r"row 1: the field 'instruction' holds a text of 1,048,5"
    ):
        read_jsonl(path)


def test_a_small_file_with_long_lists_is_refused(tmp_path: Path) -> None:
    lists = pa.array([[0] * 2**20] * 5, pa.list_(pa.int8()))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"instruction": ["a"] * 5, "zeros": lists}), path)
    with pytest.raises(RegraftError, match=r"the column 'zeros' holds 5,242,880 elements of lists"):
        read_jsonl(path)


def test_a_folder_or_a_pipe_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(RegraftError, match=r"folder\.parquet is a folder"):
        read_mmbench(tmp_path / "folder.parquet")
    with pytest.raises(RegraftError, match=r"pipe\.parquet is a device, a pipe or a socket"):
        read_mmbench(tmp_path / "pipe.parquet")


def test_fields_are_named_in_errors(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.parquet", {"instruction": "a"}, {"instruction": None})
    with pytest.raises(RegraftError, match=r"t\.parquet, row 2: the field 'instruction' is miss"):
        read_jsonl(path)
    path = _write(tmp_path / "u.parquet", {"instruction": "a", "harmful": 1})
    with pytest.raises(RegraftError, match=r"row 1: the field 'harmful' must be true or false"):
        read_jsonl(path)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "t.parquet", *({"instruction": "a", "image": _png(1)},) * 3)
    monkeypatch.setattr(parquet, "_MOST_CELL", 10)
    with pytest.raises(RegraftError, match=r"row 1: the field 'image' holds \d+ bytes; at most 10"):
        read_jsonl(path)
    monkeypatch.setattr(parquet, "_MOST_ROWS", 2)
    with pytest.raises(RegraftError, match="has more than 2 rows"):
        read_jsonl(path)
    for i in range(2):
        _write(tmp_path / f"s-0000{i}-of-00002.parquet", *({"instruction": "a"},) * 2)
    with pytest.raises(RegraftError, match="has more than 2 rows"):
        read_jsonl(tmp_path / "s-00000-of-00002.parquet")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["instruction"] * 2)
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(RegraftError, match="two columns 'instruction'"):
        read_jsonl(tmp_path / "t.parquet")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    cell = pa.array([b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"instruction": cell}), tmp_path / "t.parquet")
    with pytest.raises(RegraftError, match=r"t\.parquet: the column 'instruction' \(string\)"):
        read_jsonl(tmp_path / "t.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1\x15\x80", b"PAR1" * 9, b"{}\n"])
def test_files_that_are_no_table(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(
        RegraftError, match=r"t\.parquet is not a complete, readable Parquet file.* Get it again"
    ):
        read_mmbench(tmp_path / "t.parquet")


def test_damaged_files_never_give_another_error(tmp_path: Path) -> None:
    """Bytes changed or cut off anywhere: the rows as they were written, or an error."""
    rows = [{"instruction": f"{i} {'ab' * i}", "image": _png(i)} for i in range(40)]
    path = _write(tmp_path / "t.parquet", *rows, row_group_size=10, write_page_checksum=True)
    whole, generator = path.read_bytes(), random.Random(0)
    outcomes = []
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(generator.choice((1, 1, 3))):
            broken[generator.randrange(len(broken))] ^= 1 << generator.randrange(8)
        path.write_bytes(
            broken[: generator.choice((len(broken), generator.randrange(len(broken))))]
        )
        try:
            read_jsonl(path)
        except RegraftError as error:
            assert "t.parquet" in str(error)
            outcomes.append(False)
        else:
            outcomes.append(True)
    assert outcomes.count(False) > 100


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "t.parquet", {"instruction": "a"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RegraftError, match=r"needs pyarrow: pip install 'regraft\[parquet\]'"):
        read_jsonl(path)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match=r"t\.parquet does not exist"):
        read_jsonl(tmp_path / "t.parquet")
