"""Malformed files: valid ones broken in every way that is known, and how a reader takes them.

`run` gives one such file to one command (or one function that reads it) and says what is wrong:
anything but success or a `RegraftError`, a message that does not name the file and the field,
tensor or row, something left behind, or more than `PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from regraft.cli import main
from regraft.disk.artifact import _digest
from regraft.errors import RegraftError

PATIENCE = 10  # seconds of work; a busy machine is no fault of a reader
WAITED = 60  # seconds until a reader is said to wait for ever
Words = Callable[[Path], list[object]]
Read = Callable[[Path], object]
RAW = "@@raw:"  # begins text that stands in a JSON file without its quotes
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_NAMES = '{"a":' * 5000 + "1" + "}" * 5000
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, "", "x", [], {}, [None], {"a": 1}, "../../x", "/etc/passwd", "a\0b"),
    *("\ud800", "é" * 300, "n" * 300, "%s{0}{", 2**63, -(2**63) - 1, 10**18, 1e308),
    *(f"{RAW}{'9' * 5000}", f"{RAW}-{'9' * 5000}", f"{RAW}1e999", f"{RAW}NaN", f"{RAW}-Infinity"),
    *(f"{RAW}{DEEP}", f"{RAW}{DEEP_NAMES}", f'{RAW}{{"a":1,"a":2}}', f"{RAW}+1"),
)


@dataclass(frozen=True)
class Case:
    """A malformed file: how it came about, and what writes it in place of the valid one.

    Attributes:
        name: How it came about.
        write: Writes it.
        fields: Groups of names; of each group the message must name one. None where there is
            nothing to be named.
        refused: Whether it must not be taken.
    """

    name: str
    write: Callable[[Path], None]
    fields: tuple[tuple[str, ...], ...] = ()
    refused: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a command made of a malformed file: its exit code, and what is wrong, "" if nothing."""

    code: int | str
    wrong: str
    message: str


class HangError(BaseException):
    """The command took too long."""


# Any file


def replaced(content: bytes) -> Callable[[Path], None]:
    """Writes other content."""

    def write(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return write


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Puts something else at the file's place."""

    def write(path: Path) -> None:
        path.unlink()
        make(path)

    return write


def of_any_file(valid: bytes, seed: int, count: int = 8) -> Iterator[Case]:
    """What can become of any file: cut off, bits turned, another encoding, no file at all."""
    generator = random.Random(seed)
    for size in {0, 1, 7, 8, 9, len(valid) // 2, len(valid) - 1}:
        yield Case(f"cut to {size}", replaced(valid[:size]))
    for i in range(count):
        broken = bytearray(valid)
        for _ in range(1 + i % 3):
            place = generator.randrange(min(len(valid), 2000))
            broken[place] ^= 1 << generator.randrange(8)
        yield Case(f"bits {i}", replaced(bytes(broken)))
    text = valid.decode("utf-8", "replace")
    for name, content in {
        "noise": generator.randbytes(500),
        "zeros": b"\0" * 500,
        "byte order mark": b"\xef\xbb\xbf" + valid,
        "two marks": b"\xef\xbb\xbf\xef\xbb\xbf" + valid,
        "UTF-16": text.encode("utf-16"),
        "Latin-1": b"\xe9\xff" + valid,
        "carriage returns": valid.replace(b"\n", b"\r\n"),
        "twice": valid + valid,
        "a tail": valid + b"\0rest",
        "a deep tail": valid + DEEP.encode(),
        "deep": DEEP.encode(),
        "only a number": b"1" * 5000,
    }.items():
        yield Case(name, replaced(content))
    yield Case("a folder", instead(Path.mkdir))
    yield Case("a pipe", instead(lambda path: os.mkfifo(path)))
    yield Case("no file", instead(lambda _: None))
    yield Case("a link to nothing", instead(lambda path: path.symlink_to("gone")))
    yield Case("a link to itself", instead(lambda path: path.symlink_to(path.name)))
    yield Case("a device", instead(lambda path: path.symlink_to("/dev/null")))


# JSON


def as_text(value: Any) -> str:
    """JSON in which raw pieces stand without quotes, and surrogates as escapes."""
    text = json.dumps(value)
    parts = text.split(f'"{RAW}')
    for i in range(1, len(parts)):
        raw, _, rest = _until_quote(parts[i])
        parts[i] = json.loads(f'"{raw}"') + rest
    return "".join(parts)


def _until_quote(text: str) -> tuple[str, str, str]:
    place = 0
    while text[place] != '"':
        place += 2 if text[place] == "\\" else 1
    return text[:place], '"', text[place + 1 :]


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document, three of each list."""
    found = [above]
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*above, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:3]):
            found += places(inner, (*above, i))
    return found


def put(document: Any, place: Sequence[Any], change: Any) -> Any:
    """A copy with the value at a place changed: replaced, or taken away ("delete"), or renamed."""
    if not place:
        return change[1] if change[0] == "put" else {"other": document}
    copy = deepcopy(document)
    inside = copy
    for name in place[:-1]:
        inside = inside[name]
    kind, value = change
    if kind == "put":
        inside[place[-1]] = value
    elif kind == "delete" or isinstance(inside, list):
        del inside[place[-1]]
    else:
        inside[value] = inside.pop(place[-1])
    return copy


def blamed(document: Any, place: Sequence[Any], change: Any) -> tuple[tuple[str, ...], ...]:
    """Fields of which one must be named where `put` made this change; see `Case.fields`.

    Those are the innermost named one that was changed, and where something else was put there also
    what that holds and what it lacks. There is none to be named where the whole document was
    replaced, or the text is no JSON, of which the line and column are known.
    """
    names = [one for one in place if isinstance(one, str)]
    kind, value = change
    if not names:
        return ()
    if isinstance(value, str) and value.startswith(RAW):
        return ((names[-1], "nested", "line", "'a'", '"a"'),)
    held = document
    for one in place:
        held = held[one]
    inside = [one for one in _names(held) | _names(value) if one] if kind == "put" else []
    texts = [value] if isinstance(value, str) and value else []
    renamed = [repr(value), json.dumps(value, ensure_ascii=False)] if kind == "rename" else []
    return ((names[-1], *inside, *renamed, *(one[:50] for one in texts), "half a character"),)


def _names(value: Any) -> set[str]:
    return {one[-1] for one in places(value) if one and isinstance(one[-1], str)}


def changes() -> st.SearchStrategy[tuple[str, Any]]:
    """What may happen to a value of a JSON document."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    trees = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=5,
    )
    return st.one_of(
        st.tuples(st.just("put"), st.sampled_from(VALUES)),
        st.tuples(st.just("put"), trees),
        st.just(("delete", None)),
        st.tuples(st.just("rename"), st.sampled_from(["x", "", "a\0b", "n" * 300, "\ud800"])),
    )


# Tensors with a header


def artifact(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and tensors of an artifact, unchecked."""
    with safe_open(source, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return json.loads(handle.metadata()["regraft"]), tensors


def write_artifact(path: Path, header: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """An artifact whose digest is right, so that what is wrong in it is not taken for damage."""
    if isinstance(header, dict) and "digest" in header:
        header = {**header, "digest": _digest(tensors)}
    path.unlink()
    save_file(dict(tensors), path, metadata={"regraft": as_text(header)})


def of_tensors(source: Path) -> Iterator[Case]:
    """Tensors of other types, shapes and values, missing and too many.

    Of tensors that are alike, as one a weight, the first and the last are changed.
    """
    header, tensors = artifact(source)

    def case(called: str, change: dict[str, torch.Tensor | None]) -> Case:
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        (name,) = change
        return Case(
            called, lambda path: write_artifact(path, header, changed), ((name, name[:50]),)
        )

    yield case("one more", {"x": torch.ones(2)})
    yield case("a long name", {"n" * 3000: torch.ones(2)})
    alike: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        alike.setdefault((tensor.dtype, tensor.ndim), []).append(name)
    for name in dict.fromkeys(name for names in alike.values() for name in (names[0], names[-1])):
        tensor = tensors[name]
        flat = tensor.clone().flatten()
        yield case(f"{name} missing", {name: None})
        yield case(f"{name} empty", {name: flat[:0].clone()})
        yield case(f"{name} flat and longer", {name: torch.cat([flat, flat[:1]])})
        yield case(f"{name} of another rank", {name: tensor[None].clone()})
        yield case(f"{name} a scalar", {name: torch.ones((), dtype=tensor.dtype)})
        yield case(f"{name} as bytes", {name: tensor.to(torch.uint8)})
        yield case(f"{name} as halves", {name: tensor.to(torch.float16)})
        if tensor.is_floating_point():
            for value in (float("nan"), float("inf"), -float("inf")):
                filled = flat.clone()
                filled[:1] = value
                yield case(f"{name} with {value}", {name: filled.view(tensor.shape)})
        elif tensor.dtype != torch.bool:
            for value in (-5, torch.iinfo(tensor.dtype).max):
                filled = flat.clone()
                filled[-1:] = value
                yield case(f"{name} with {value}", {name: filled.view(tensor.shape)})


def of_weights(valid: bytes) -> Iterator[Case]:
    """A checkpoint's shard with another header."""
    length = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    name = next(one for one in header if one != "__metadata__")
    size = len(data)

    def case(called: str, text: str | bytes, claimed: int | None = None) -> Case:
        inside = text if isinstance(text, bytes) else text.encode()
        count = len(inside) if claimed is None else claimed
        return Case(called, replaced(count.to_bytes(8, "little") + inside + data))

    for claimed in (0, 2**63, 2**64 - 1, len(valid), len(valid) - 7, 10**9):
        yield case(f"header of {claimed}", valid[8 : 8 + length], claimed)
    for field in ("dtype", "shape", "data_offsets", None):
        for value in (*VALUES, [-1, 4], [0, size + 8], [4, 0], [0, 2**70], ["0", "4"], [0.0, 4.0]):
            entry = value if field is None else {**header[name], field: value}
            yield case(f"{field} {str(value)[:20]}", as_text({**header, name: entry}))
    for field in ("dtype", "shape", "data_offsets"):
        entry = {k: v for k, v in header[name].items() if k != field}
        yield case(f"no {field}", as_text({**header, name: entry}))
    one = json.dumps(header[name])
    yield case("a name twice", f'{{"{name}":{one},"{name}":{one}}}')
    yield case("overlapping", as_text({**header, "x": header[name]}))
    yield case("no tensors", "{}")
    yield case("a list", "[]")
    yield case("a NUL", as_text({**header, "a\0b": header[name]}))
    yield case("metadata of a list", as_text({**header, "__metadata__": [1]}))


def of_values(valid: bytes, *, run: bool) -> Iterator[Case]:
    """A shard of float32 with numbers that are none, or said to be integers, which none can run."""
    length = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + length])
    names = [one for one in header if one != "__metadata__"]
    for name in (names[0], names[-1], next(one for one in names if "q_proj" in one)):
        stop = 8 + length + header[name]["data_offsets"][1]
        for value in (float("nan"), float("inf"), -float("inf")):
            content = valid[: stop - 4] + struct.pack("<f", value) + valid[stop:]
            yield Case(f"{value} in {name}", replaced(content), ((name,),), refused=True)
        for dtype in ("I32", "U32"):
            head = as_text({**header, name: {**header[name], "dtype": dtype}}).encode()
            content = len(head).to_bytes(8, "little") + head + valid[8 + length :]
            yield Case(f"{name} as {dtype}", replaced(content), ((name,),), refused=run)


# Values that make transformers or tokenizers go wrong, by reader: place and value.
_LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
ODD: Mapping[str, Sequence[tuple[str, Any]]] = {
    "processor settings": [
        *(("image_processor.image_std", one) for one in ([0, 0, 0], [1e-300] * 3, "x")),
        *(("image_processor.image_mean", one) for one in ([f"{RAW}NaN"] * 3, "x")),
        *(("image_processor.rescale_factor", one) for one in (0, f"{RAW}Infinity", "x")),
        *((f"image_processor.{n}", 0) for n in ("patch_size", "merge_size", "temporal_patch_size")),
        *(("image_processor.size", one) for one in ({}, {"shortest_edge": -5, "longest_edge": -1})),
        ("image_processor.resample", 99),
    ],
    "tokenizer": [
        ("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}),
        ("normalizer", {"type": "Sequence", "normalizers": [_LONG] * 4}),
        ("normalizer", {"type": "Sequence", "normalizers": 5}),
        *(("model.vocab", one) for one in ({}, [])),
    ],
    "config": [
        *(("hidden_act", one) for one in ("nope", [1])),
        *((name, 10**6) for name in ("intermediate_size", "vocab_size")),
        ("num_hidden_layers", 1000),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("quantization_config", {"quant_method": 5}),
        ("num_hidden_layers", -1),
        ("model_type", "tomorrow"),
        ("rms_norm_eps", f"{RAW}NaN"),
        ("rope_parameters.rope_theta", 0),
    ],
    "generation settings": [
        *(("max_new_tokens", one) for one in (-1, 0, "x")),
        *((f"{name}_config", "x") for name in ("watermarking", "compile")),
    ],
    "index": [("metadata", 5)],
    "results": [
        *(("result.asr.n", one) for one in (-1, 0)),
        *(("result.asr.value", one) for one in (-0.5, 7.5)),
    ],
    "checked results": [("about.inputs", {})],
}


def of_settings(valid: bytes, odd: Sequence[tuple[str, Any]]) -> Iterator[Case]:
    """A file of JSON with one of its values changed."""
    for place, value in odd:
        changed = put(json.loads(valid), place.split("."), ("put", value))
        name = f"{place} {value!r:.40}"
        yield Case(name, replaced(as_text(changed).encode()), refused=True)


# Zip files


def of_zip(valid: bytes) -> Iterator[Case]:
    """Archives with names that leave the folder, bombs, and entries that cannot be read."""

    def case(called: str, *names: str, mode: int = 0o644, content: bytes = b"x") -> Case:
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                entry = zipfile.ZipInfo(name)
                entry.external_attr = mode << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)
        return Case(called, replaced(memory.getvalue()))

    for name in ("/x", "../x", "a/../../x", "C:/x", "..\\x", "n" * 300, "a//b", "x/", "\ud7ff"):
        yield case(f"entry {name[:8]!r}", name)
    yield case("a link", "x", mode=0o120777, content=b"/etc/passwd")
    yield case("a file and a folder of one name", "x", "x/y")
    yield case("a file twice", "x", "x")
    yield case("a bomb", "x", content=b"\0" * 2**21)
    yield Case(
        "flags",
        replaced(
            valid.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
        ),
    )
    for offset in (6, 8, 10, 14, 18, 22, 26, 28):  # fields of the first entry and of the directory
        for start in (0, valid.rindex(b"PK\x01\x02") + 2):
            broken = bytearray(valid)
            broken[start + offset] ^= 0xFF
            yield Case(f"byte {offset} from {start}", replaced(bytes(broken)))


# What becomes of them


def run(case: Case, path: Path, act: Words | Read, above: Path) -> Outcome:
    """Write the malformed file in place of `path` and have it read.

    Args:
        case: What is wrong with it.
        path: The valid file, a copy of its own.
        act: The words of a command line about it, or a function that reads it.
        above: The folder in which nothing may change.
    """
    case.write(path)
    before = listing(above)
    began = time.process_time()
    code, message = _within_patience(act, path)
    wrong, worked = "", time.process_time() - began
    if worked > PATIENCE:
        wrong = f"worked for {worked:.0f} s"
    elif case.refused and not code:
        wrong = "was taken"
    elif code not in (0, 2):
        wrong = f"ended with {code}"
    elif code and ("Traceback" in message or not message.startswith("Error:")):
        wrong = "shows a traceback"
    elif code and not names(message, path):
        wrong = "does not name the file"
    elif code and (unnamed := [one for one in case.fields if not names_one(message, path, one)]):
        wrong = f"does not name {' or '.join(unnamed[0][:5])}"
    elif code and (left := {*listing(above)} ^ {*before}):
        wrong = f"left {sorted(left)[:3]}"
    return Outcome(code, wrong, message)


def names(message: str, path: Path) -> bool:
    """Whether a message names the file, or the folder that is a model or an evaluation."""
    return path.name in message or f"{path.parent}" in message or path.stem in message


def names_one(message: str, path: Path, fields: Sequence[str]) -> bool:
    """Whether a message names one of these, outside of the paths in it; long ones may go on."""
    said = message.replace(str(path), "").replace(str(path.parent), "").replace(path.name, "")
    patterns = (rf"(?<!\w){re.escape(one)}" + r"(?!\w)" * (len(one) < 50) for one in fields)
    return any(re.search(one, said) for one in patterns)


def listing(folder: Path) -> list[str]:
    """All names below a folder; three times a case, for which pathlib would be too slow."""
    return sorted(
        f"{above}/{name}".removeprefix(f"{folder}/")
        for above, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def _within_patience(act: Words | Read, path: Path) -> tuple[int | str, str]:
    def late(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"no end after {WAITED} seconds")

    out, err = io.StringIO(), io.StringIO()
    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(WAITED)
    code: int | str = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            words = act(path)
            if isinstance(words, list) and words[:1] != ["read"]:
                main([str(word) for word in words])
    except RegraftError as error:
        code = 2
        err.write(f"Error: {error}")
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        code = "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    return code, err.getvalue()


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder of which each file is the same one on disk, so that it costs nothing."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def put_back(path: Path, valid: Path) -> None:
    """Whatever is at `path` goes, and what is valid is linked to it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.link(valid, path)
