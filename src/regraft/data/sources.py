"""Naming a data set in one word, and reading it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from regraft.data.example import Reading, of_kind
from regraft.data.readers import DATASETS, Kind, Split
from regraft.data.rows import require_examples
from regraft.data.storage import located, only_entry, unpacked
from regraft.errors import RegraftError
from regraft.files import digest

Part = Literal["held-out", "rest"]
_HELD_OUT = 4  # of so many prompts one is held out
_FIRST = re.compile(r"([^:#]+)((?:#[\w-]+)*)(?::(.*))?", re.DOTALL)  # NAME#PARTS:REST


class DataSource(BaseModel):
    """A data set by name, where it lies, which split of it, and which kind of its prompts.

    Written as one string, of which `str()` is the inverse: NAME:PATH or NAME:PATH#SPLIT with a
    name in `DATASETS`; "demo" or "demo:SPLIT", which takes no path; or a bare path that ends in
    ".jsonl". Each may end in "#harmful" or "#harmless", which keeps these prompts alone, as in
    "demo:test#harmless", and in "#held-out" or "#rest", a quarter of the prompts or the others.
    SPLIT and kind may follow the name instead, as in "vlguard#safe-safe:PATH", and a list of words,
    as in ["safebench#even", PATH], is read too. PATH is a file or a folder, a zip file of one, or
    hf:ORG/NAME[@REVISION][/PATH] for a data set on the hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: Path | None = None
    split: str | None = None
    kind: Kind | None = None
    part: Part | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _parse(value)
        if isinstance(value, list | tuple):
            return _parse(":".join(str(word) for word in value))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> DataSource:
        if self.name not in DATASETS:
            raise ValueError(f"unknown data set {self.name!r}; {DATASETS.expected()}")
        dataset = DATASETS.get(self.name)
        if dataset.bundled and self.path is not None:
            raise ValueError(f"the {self.name} data set is bundled and takes no path")
        if not dataset.bundled and self.path is None:
            raise ValueError(f"{self.name} needs a path, as in {self.name}:PATH")
        if dataset.splits is not None and self.split not in (None, *dataset.splits):
            listed = ", ".join(dataset.splits)
            known = f"the splits {listed}" if listed else "no splits"
            raise ValueError(f"{self.name} has {known}; there is no {self.split!r}")
        if self.kind is not None and dataset.only not in (None, self.kind):
            raise ValueError(
                f"{self.name} has {dataset.only} prompts only; name another source for {self.kind}"
            )
        if _parse(str(self)) != {name: str(value) for name, value in self if value is not None}:
            raise ValueError(f"{str(self)!r} is ambiguous; rename the path or the split")
        return self

    @model_serializer
    def __str__(self) -> str:
        text = self.name if self.path is None else f"{self.name}:{self.path}"
        if self.split is not None:
            text += f"{':' if self.path is None else '#'}{self.split}"
        return "#".join([text, *filter(None, (self.kind, self.part))])


def read(source: DataSource) -> Reading:
    """Read the data set that `source` names; of a folder with several files see `of_split` first.

    Raises:
        RegraftError: see its reader; it has no prompt of the kind.
    """
    path = Path() if source.path is None else _found(source, source.path)
    reading = DATASETS.get(source.name).read(path, source.split)
    if source.kind is not None:
        reading = require_examples(of_kind(reading, harmful=source.kind == "harmful"))
    return reading if source.part is None else _of_part(source, reading, source.part)


def split_off(source: DataSource) -> tuple[DataSource, DataSource]:
    """(the rest, a quarter that is held out) of the same prompts, none in both.

    By a digest of the prompt and the name of its image, so that copies are on one side.
    """
    rest, held_out = (source.model_copy(update={"part": part}) for part in ("rest", "held-out"))
    return rest, held_out


def _of_part(source: DataSource, reading: Reading, part: Part) -> Reading:
    kept = tuple(
        one
        for one in reading.examples
        if (int(digest(one.instruction, one.image.name if one.image else "")[:8], 16) % _HELD_OUT)
        == 0
    )
    if part == "rest":
        held = {one.id for one in kept}
        kept = tuple(one for one in reading.examples if one.id not in held)
    if not kept:
        raise RegraftError(
            f"{source}: none of its {len(reading.examples)} prompts are in this part. Give more "
            "prompts, or name others to choose on with --validation."
        )
    left = len(reading.examples) - len(kept)
    return replace(reading, examples=kept, skipped={**reading.skipped, f"not {part}": left})


def of_split(source: DataSource, split: Split) -> DataSource:
    """The source, or of a folder (zip file, hub id) with a file a split that file.

    Learn and choose from "train", evaluate on "test". A file that is named itself stays.

    Raises:
        RegraftError: the file is not there.
    """
    split_file = DATASETS.get(source.name).split_file
    if split_file is None or source.path is None or source.path.suffix == ".json":
        return source
    path = _found(source, source.path)
    if path.is_file() and source.path.suffix != ".zip":
        return source
    folder = path.parent if path.is_file() else path  # of a zip file with no other in it
    return source.model_copy(update={"path": split_file(folder, split)})


def _found(source: DataSource, path: Path) -> Path:
    """Where the path of a source lies on this disk, downloaded and unpacked."""
    path = located(path)
    if not path.exists():
        raise RegraftError(f"{source}: {path} does not exist.")
    return only_entry(unpacked(path)) if path.suffix == ".zip" and path.is_file() else path


def words_of_first(words: Sequence[str]) -> int:
    """How many of `words` name the first data set: 2 for a NAME before its PATH, or demo SPLIT."""
    match = _FIRST.fullmatch(words[0])
    following = "".join(words[1:2])
    if match is None or match[3] is not None or not following or match[1] not in DATASETS:
        return 1
    dataset = DATASETS.get(match[1])
    is_split = following.partition("#")[0] in (dataset.splits or ())
    return 2 if not dataset.bundled or is_split else 1


def _parse(text: str) -> dict[str, str]:
    match = _FIRST.fullmatch(text)
    if match is None or not match[2] or match[1] not in DATASETS:
        return _parse_behind(text)
    name, parts, rest = match.groups()
    fields = _parse_behind(name if rest is None else f"{name}:{rest}")
    for part in parts[1:].split("#"):
        field = "kind" if part in get_args(Kind) else "part" if part in get_args(Part) else "split"
        if field in fields:
            raise ValueError(
                f"{text!r} asks for {fields[field]!r} and for {part!r}; give one of them"
            )
        fields[field] = part
    return fields


def _parse_behind(text: str) -> dict[str, str]:
    before, _, last = text.rpartition("#")
    if last in get_args(Part):
        return {**_parse_behind(before), "part": last}
    if last in get_args(Kind):
        return {**_parse_all(before), "kind": last}
    return _parse_all(text)


def _parse_all(text: str) -> dict[str, str]:
    if re.fullmatch(r"([^:/]*|[^:/]*/.*)\.jsonl(#[\w-]+)?", text):
        text = f"jsonl:{text}"
    name, _, rest = text.partition(":")
    if name not in DATASETS:
        hint = ""
        if re.fullmatch(r"([^:/]*|[^:/]*/.*)\.(txt|csv|json)(#[\w-]+)?", text, re.IGNORECASE):
            hint = f". For a list of prompts write prompts:{text} (harmful) or benign:{text}"
        raise ValueError(
            f"unknown data set {text!r}; {DATASETS.expected()} "
            f"(as in demo:test or vlguard:PATH), or a path ending in .jsonl{hint}"
        )
    path, _, split = rest.rpartition("#")
    if DATASETS.get(name).bundled:
        path, split = "", rest
    elif not (path and re.fullmatch(r"[\w-]+", split)):
        path, split = rest, ""
    fields = {"name": name, "path": path, "split": split}
    return {field: value for field, value in fields.items() if value}
