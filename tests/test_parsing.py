"""Reading a file gives a checked value or a clear error, and nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.disk.descriptions import Fields, described
from regraft.disk.parsing import MOST_DEPTH, json_value, read_json, read_yaml
from regraft.disk.paths import is_file, is_name, read_text, within
from regraft.errors import RegraftError
from regraft.recipes.file import read_recipe

NAMES = st.text(max_size=5).filter(lambda text: "\0" not in text)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_every_value_within_the_bounds_is_read_as_json_does(value: Any) -> None:
    assert json_value(json.dumps(value), "x") == value


@given(VALUES, st.binary(max_size=20))
def test_bytes_are_a_value_or_a_clear_error(value: Any, tail: bytes) -> None:
    for content in (json.dumps(value).encode() + tail, tail):
        try:
            found = json_value(content, "file.json")
        except RegraftError as error:
            assert str(error).startswith("file.json")
        else:
            json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [{"b": "x\\ud83d"}]}', r'"a.0.b" holds half a character'),
        ('{"a": {"b": NaN}}', r'"a.b" is nan'),
        ('{"a": -1e999}', r'"a" is -inf'),
        ('{"a": 18446744073709551616}', r'"a" is an integer of more than 64 bits'),
        (f'{{"a": {"9" * 5000}}}', r'"a" is an integer of more than 4,000 digits'),
        ('{"a": 1, "b": 2, "a": 3}', r'the field "a" appears twice'),
        ('{"a\\u0000b": 1}', "holds a NUL"),
        ("[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2), "levels deep"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_values_beyond_the_bounds(text: str, message: str) -> None:
    with pytest.raises(RegraftError, match=message):
        json_value(text, "file.json")


def test_names_of_large_objects_are_compared_at_once() -> None:
    names = [f"n{i}" for i in range(200_000)]
    text = json.dumps(dict.fromkeys(names, 0))
    began = time.monotonic()
    assert list(json_value(text, "x")) == names
    with pytest.raises(RegraftError, match='the field "n199999" appears twice'):
        json_value(f'{text[:-1]}, "n199999": 1}}', "x")
    assert time.monotonic() - began < 10


def test_other_programs_numbers_are_taken_as_they_are() -> None:
    """Configs have Infinity, and tokenizers a length of 1e30."""
    text = '{"a": Infinity, "b": 1000000000000000019884624838656, "c": 1, "c": 2}'
    assert json_value(text, "x", lenient=True) == {
        "a": float("inf"),
        "b": 10**30 + 19884624838656,
        "c": 2,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: &b [*a, *a]\n", None),
        ("x: &a [*a]\n", "refers to a value that contains it"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("b: 1\na: !!bool x\n", '(?s)not valid YAML: "x" cannot be read.*line 2, column 4'),
        ("a: !!timestamp x\n", "(?s)not valid YAML.*line 1, column 4"),
        (f"a: {'9' * 5000}\n", "(?s)not valid YAML.*line 1, column 4"),
        (f"a: {'9' * 50}\n", "more than 64 bits"),
        ("a: .nan\n", '"a" is nan'),
        ("1: x\n", "the name 1 is not text"),
        ("a: 1\na: 2\n", "'a' appears twice"),
        ('a: "x\\ud83d"\n', "half a character"),
        ("", "is empty"),
    ],
)
def test_yaml(tmp_path: Path, text: str, message: str | None) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    if message is None:
        assert read_yaml(path, "") == {"a": [1], "b": [[1], [1]]}
        return
    with pytest.raises(RegraftError, match=message) as error:
        read_yaml(path, "")
    assert str(path) in str(error.value)


def test_aliases_that_would_fill_all_memory(tmp_path: Path) -> None:
    """Nine lines that expand to a thousand million values; also through merge keys."""
    for first, rest in (("[x]", "[{}]"), ("{x: 1}", "{{<<: [{}]}}")):
        lines = [f"a0: &a0 {first}"]
        tens = (", ".join([f"*a{i}"] * 10) for i in range(9))
        lines += [f"a{i}: &a{i} " + rest.format(ten) for i, ten in enumerate(tens, 1)]
        (tmp_path / "bomb.yaml").write_text("\n".join(lines) + "\n")
        began = time.monotonic()
        with pytest.raises(RegraftError, match=r"bomb.yaml: it has more than 50,000 values"):
            read_yaml(tmp_path / "bomb.yaml", "")
        assert time.monotonic() - began < 5


def test_ratios_and_dates_are_the_text_that_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 would read 2:4 as the number 124 (base 60)."""
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 2:4\nb: 4:8\nc: 2024-13-45\n")
    assert read_yaml(path, "") == {"a": "2:4", "b": "4:8", "c": "2024-13-45"}
    path.write_text("prune: [{name: p, n_m: 4:8}]\n")
    assert read_recipe(path).prune[0].n_m == "4:8"


def test_only_ordinary_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "pipe": "a device, a pipe or a socket",
        "null": "a device, a pipe or a socket",
        "loop": "Too many levels of symbolic links",
        "gone": "does not exist",
        "n" * 300: "File name too long",
        ".": "is a folder",
    }.items():
        with pytest.raises(RegraftError, match=message):
            read_text(tmp_path / name)
    assert not is_file(tmp_path / ("n" * 300))
    assert not is_file(tmp_path / "a\0b")
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "mark") == [1]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "n" * 256, "é" * 128])
def test_what_is_no_name_of_a_file(name: str) -> None:
    assert not is_name(name)
    assert is_name("a" * 255)
    assert is_name("..a")


def test_within(tmp_path: Path) -> None:
    hub = tmp_path / "models--a--b"
    snapshot = hub / "snapshots" / "0"
    (hub / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for target, inside in {
        "../../blobs/x": True,
        "../../refs/x": False,
        "../../../other/blobs/x": False,
        "/etc/passwd": False,
        "y": True,
    }.items():
        link = snapshot / "link"
        link.symlink_to(target)
        assert within(link, snapshot) == inside, target
        link.unlink()
    (tmp_path / "model").symlink_to(snapshot)
    assert within(tmp_path / "model" / "config.json", tmp_path / "model")


def test_descriptions_name_the_field_that_is_missing_or_wrong() -> None:
    found = described({"inputs": {"dense": "0"}, "new": [{"a": 1}]}, "file: about")
    assert isinstance(found["new"][0], Fields)
    with pytest.raises(RegraftError, match=r"file: about.inputs: the field 'pruned' is missing"):
        found["inputs"]["pruned"]
    with pytest.raises(RegraftError, match=r"file: about: inputs: field 'dense' is 1"):
        described({"inputs": {"dense": 1}}, "file: about")
    with pytest.raises(RegraftError, match="file: about: expected an object"):
        described([], "file: about")
