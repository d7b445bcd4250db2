"""Naming a data set in one word, and reading it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from regraft.data.archives import only_entry, unpacked
from regraft.data.ch3ef import read_ch3ef
from regraft.data.demo import read_demo
from regraft.data.docvqa import read_docvqa
from regraft.data.example import Reading, of_kind
from regraft.data.hub import located
from regraft.data.jsonl import read_jsonl
from regraft.data.mm_safetybench import Variant, read_mm_safetybench
from regraft.data.mmbench import read_mmbench
from regraft.data.mossbench import read_mossbench
from regraft.data.prompts import read_prompts
from regraft.data.rows import require_examples
from regraft.data.safebench import Part, read_safebench
from regraft.data.vlguard import Split, Subset, read_vlguard, split_file
from regraft.data.xstest import read_xstest
from regraft.errors import RegraftError

Name = Literal[
    "demo",
    "vlguard",
    "safebench",
    "ch3ef",
    "mm-safetybench",
    "mossbench",
    "xstest",
    "prompts",
    "benign",
    "mmbench",
    "docvqa",
    "jsonl",
]
Kind = Literal["harmful", "harmless"]
_SPLITS: Mapping[str, tuple[str, ...]] = {  # of the data sets that have named ones
    "vlguard": get_args(Subset),
    "safebench": ("even", "odd", "tiny"),
    "mm-safetybench": get_args(Variant),
}
_ONE_KIND: Mapping[str, Kind] = {
    "safebench": "harmful",
    "ch3ef": "harmful",
    "mm-safetybench": "harmful",
    "prompts": "harmful",
    "mossbench": "harmless",
    "benign": "harmless",
    "mmbench": "harmless",
    "docvqa": "harmless",
}
_NAME_FIRST = re.compile(rf"({'|'.join(get_args(Name))})((?:#[\w-]+)*)(?::(.*))?", re.DOTALL)


class DataSource(BaseModel):
    """A data set by name, where it lies, which split of it, and which kind of its prompts.

    Written as one string, of which `str()` is the inverse: "demo", "demo:SPLIT",
    "jsonl:PATH", "jsonl:PATH#SPLIT", a bare path that ends in ".jsonl"; or NAME:PATH, where some
    names have a SPLIT: safebench (#even, #odd, #tiny), vlguard (#unsafe, #safe-unsafe, #safe-safe,
    #all), mm-safetybench (#SD, #SD_TYPO, #TYPO), ch3ef, mossbench, xstest, prompts (harmful
    ones), benign (harmless ones), mmbench, docvqa. Each may end in "#harmful" or "#harmless", which
    keeps these prompts alone, as in "demo:test#harmless". SPLIT and kind may follow the name
    instead, as in "vlguard#safe-safe:PATH", and a list of words, as in ["safebench#even", PATH], is
    read too. PATH is a file or a folder, a zip file of one, or
    hf:ORG/NAME[@REVISION][/PATH] for a data set on the hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    path: Path | None = None
    split: str | None = None
    kind: Kind | None = None

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
        if self.name == "demo" and self.path is not None:
            raise ValueError("the demo data set is bundled and takes no path")
        if self.name != "demo" and self.path is None:
            raise ValueError(f"{self.name} needs a path, as in {self.name}:PATH")
        splits = _SPLITS.get(self.name, ())
        if self.name not in ("demo", "jsonl") and self.split not in (None, *splits):
            known = f"the splits {', '.join(splits)}" if splits else "no splits"
            raise ValueError(f"{self.name} has {known}; there is no {self.split!r}")
        if self.kind is not None and (only := _ONE_KIND.get(self.name, self.kind)) != self.kind:
            raise ValueError(
                f"{self.name} has {only} prompts only; name another source for {self.kind}"
            )
        if _parse(str(self)) != {name: str(value) for name, value in self if value is not None}:
            raise ValueError(f"{str(self)!r} is ambiguous; rename the path or the split")
        return self

    @model_serializer
    def __str__(self) -> str:
        text = self.name if self.path is None else f"{self.name}:{self.path}"
        if self.split is not None:
            text += f"{':' if self.path is None else '#'}{self.split}"
        return text if self.kind is None else f"{text}#{self.kind}"


def read(source: DataSource) -> Reading:
    """Read the data set that `source` names; VLGuard's folder needs `of_split` first.

    Raises:
        RegraftError: see its reader; it has no prompt of the kind.
    """
    reading = _read_all(source)
    if source.kind is None:
        return reading
    return require_examples(of_kind(reading, harmful=source.kind == "harmful"))


def of_split(source: DataSource, split: Split) -> DataSource:
    """The source, or of VLGuard's folder (zip file, hub id) its file of a split.

    Learn and choose from "train", evaluate on "test". A file that is named itself stays.

    Raises:
        RegraftError: the file is not there.
    """
    if source.name != "vlguard" or source.path is None or source.path.suffix == ".json":
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


def _read_all(source: DataSource) -> Reading:
    if source.path is None:
        return read_demo(source.split)
    path = _found(source, source.path)
    readers: Mapping[str, Callable[[], Reading]] = {
        "vlguard": lambda: read_vlguard(path, cast(Subset | None, source.split)),
        "safebench": lambda: read_safebench(path, part=cast(Part, source.split or "all")),
        "ch3ef": lambda: read_ch3ef(path),
        "mm-safetybench": lambda: read_mm_safetybench(
            path, cast(Variant, source.split or "SD_TYPO")
        ),
        "mossbench": lambda: read_mossbench(path),
        "xstest": lambda: read_xstest(path),
        "prompts": lambda: read_prompts(path),
        "mmbench": lambda: read_mmbench(path),
        "docvqa": lambda: read_docvqa(path),
        "benign": lambda: read_prompts(path, harmful=False),
        "jsonl": lambda: read_jsonl(path, source.split),
    }
    return readers[source.name]()


def words_of_first(words: Sequence[str]) -> int:
    """How many of `words` name the first data set: 2 for a NAME before its PATH, or demo SPLIT."""
    match = _NAME_FIRST.fullmatch(words[0])
    if match is None or match[3] is not None:
        return 1
    following = "".join(words[1:2])
    is_split = following.partition("#")[0] in ("calibration", "validation", "test")
    return 2 if following and (match[1] != "demo" or is_split) else 1


def _parse(text: str) -> dict[str, str]:
    match = _NAME_FIRST.fullmatch(text)
    if match is None or not match[2]:
        return _parse_behind(text)
    name, parts, rest = match.groups()
    fields = _parse_behind(name if rest is None else f"{name}:{rest}")
    for part in parts[1:].split("#"):
        field = "kind" if part in get_args(Kind) else "split"
        if field in fields:
            raise ValueError(
                f"{text!r} asks for {fields[field]!r} and for {part!r}; give one of them"
            )
        fields[field] = part
    return fields


def _parse_behind(text: str) -> dict[str, str]:
    before, _, kind = text.rpartition("#")
    if kind in get_args(Kind):
        return {**_parse_all(before), "kind": kind}
    return _parse_all(text)


def _parse_all(text: str) -> dict[str, str]:
    if re.fullmatch(r"([^:/]*|[^:/]*/.*)\.jsonl(#[\w-]+)?", text):
        text = f"jsonl:{text}"
    name, _, rest = text.partition(":")
    if name not in get_args(Name):
        hint = ""
        if re.fullmatch(r"([^:/]*|[^:/]*/.*)\.(txt|csv|json)(#[\w-]+)?", text, re.IGNORECASE):
            hint = f". For a list of prompts write prompts:{text} (harmful) or benign:{text}"
        raise ValueError(
            f"unknown data set {text!r}; expected {', '.join(get_args(Name))} "
            f"(as in demo:test or vlguard:PATH), or a path ending in .jsonl{hint}"
        )
    path, _, split = rest.rpartition("#")
    if name == "demo":
        path, split = "", rest
    elif not (path and re.fullmatch(r"[\w-]+", split)):
        path, split = rest, ""
    fields = {"name": name, "path": path, "split": split}
    return {field: value for field, value in fields.items() if value}
