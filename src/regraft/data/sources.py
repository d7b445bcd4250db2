"""Parse NAME:PATH#SPLIT, read data sets, join suites, and find prompts that two sets share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from regraft.data.example import Example, Reading
from regraft.data.parquet import table_in
from regraft.data.readers import DATASETS, Kind, Split
from regraft.data.rows import checked
from regraft.data.storage import kept_if_read, located, only_entry, unpacked
from regraft.disk.files import digest, file_digest
from regraft.disk.paths import real
from regraft.errors import PassingError, RegraftError

Part = Literal["held-out", "rest"]
_HELD_OUT = 4  # one prompt in so many is held out
_WORD = r"[\w-]+"
_BARE = r"([^:/]*|[^:/]*/.*)\.{}(#[\w-]+)*"  # a path alone, without NAME:
_SUFFIXES = {"part": get_args(Part), "kind": get_args(Kind)}


class DataSource(BaseModel):
    """A data set: its name and path, and which split, kind and part of its prompts to use.

    Parsed from one string, which `str()` gives back: NAME:PATH or NAME:PATH#SPLIT with a name in
    `DATASETS`; "demo" or "demo:SPLIT", which takes no path; or a bare path that ends in ".jsonl"
    or ".parquet". "#harmful" or "#harmless" at the end keeps only these prompts, as in
    "demo:test#harmless"; "#held-out" keeps a quarter of the prompts, "#rest" the others. SPLIT and
    kind may follow the name instead, as in "vlguard#safe-safe:PATH", and the string may be a list
    of words, as in ["safebench#even", PATH]. PATH is a file or folder, a zip file of one, or
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
        if not isinstance(value, Mapping | DataSource):
            kind = type(value).__name__
            raise ValueError(f"expected NAME:PATH or the path of a .jsonl file, not {kind}")
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


@kept_if_read()
def read(source: DataSource, split: Split | None = None) -> Reading:
    """Read a data set; of a folder with one file per split, the file of `split`.

    Raises:
        RegraftError: see its reader; no prompt is of the wanted kind or part.
    """
    try:
        return _read(source if split is None else of_split(source, split))
    except PassingError:
        raise
    except RegraftError as error:
        if source.path is None or source.path.suffix != ".zip" or source.path.name in str(error):
            raise
        # the message names a file in the unpacked copy, which is deleted
        raise RegraftError(f"{source.path}: {error}") from error


def _read(source: DataSource) -> Reading:
    path = Path() if source.path is None else _found(source, source.path)
    split = source.split
    if source.path is not None and path.is_dir() and (table := table_in(path, split)):
        path, split = table, None
    reading = checked(DATASETS.get(source.name).read(path, split))
    if source.kind is not None:
        reading = checked(reading.of_kind(harmful=source.kind == "harmful"))
    return reading if source.part is None else _of_part(source, reading, source.part)


def split_off(source: DataSource) -> tuple[DataSource, DataSource]:
    """Split a source into (rest, a held-out quarter), which share no prompt.

    A digest of the prompt and its image's name decides, so copies of a prompt are in the same part.
    """
    rest, held_out = (source.model_copy(update={"part": part}) for part in ("rest", "held-out"))
    return rest, held_out


def _of_part(source: DataSource, reading: Reading, part: Part) -> Reading:
    def is_held_out(one: Example) -> bool:
        name = one.image.name if one.image else ""
        return int(digest(one.instruction, name)[:8], 16) % _HELD_OUT == 0

    wanted = part == "held-out"
    kept = reading.keep((e for e in reading.examples if is_held_out(e) == wanted), f"not {part}")
    if not kept.examples:
        raise RegraftError(
            f"{source}: none of its {len(reading.examples)} prompts are in this part. Give more "
            "prompts, or name others to choose on with --validation."
        )
    return kept


def of_split(source: DataSource, split: Split) -> DataSource:
    """Replace a folder, zip file or hub id with a file per split by the file of `split`.

    "train" is for learning and choosing, "test" for evaluation. Other sources are returned as is.
    """
    split_file = DATASETS.get(source.name).split_file
    if split_file is None or source.path is None or source.path.suffix == ".json":
        return source
    path = _found(source, source.path)
    if path.is_file() and source.path.suffix != ".zip":
        return source
    folder = path.parent if path.is_file() else path  # a file: the only one in a zip
    return source.model_copy(update={"path": split_file(folder, split)})


def _found(source: DataSource, path: Path) -> Path:
    """The path of a source on this disk, downloaded and unpacked if needed."""
    path = located(path)
    if not path.exists():
        raise RegraftError(f"{source}: {path} does not exist.")
    return only_entry(unpacked(path)) if path.suffix == ".zip" and path.is_file() else path


def words_of_first(words: Sequence[str]) -> int:
    """How many of `words` name the first data set: 2 for NAME PATH or demo SPLIT, otherwise 1."""
    name, following = words[0].partition("#")[0], "".join(words[1:2])
    if name not in DATASETS or ":" in words[0] or not following:
        return 1
    dataset = DATASETS.get(name)
    is_split = following.partition("#")[0] in (dataset.splits or ())
    return 2 if not dataset.bundled or is_split else 1


def _parse(text: str) -> dict[str, str]:
    """The fields of NAME:PATH, with split, kind and part after the name or after the path."""
    if re.fullmatch(_BARE.format("(jsonl|parquet)"), text):
        text = f"jsonl:{text}"
    head, _, path = text.partition(":")
    name, *name_suffixes = head.split("#")
    if name not in DATASETS or not all(re.fullmatch(_WORD, one) for one in name_suffixes):
        hint = ""
        if re.fullmatch(_BARE.format("(txt|csv|json)"), text, re.IGNORECASE):
            hint = f". For a list of prompts write prompts:{text} (harmful) or benign:{text}"
        raise ValueError(
            f"unknown data set {text!r}; {DATASETS.expected()} "
            f"(as in demo:test or vlguard:PATH), or a path ending in .jsonl or .parquet{hint}"
        )
    fields = {"name": name}
    for field, known in _SUFFIXES.items():  # from the end
        before, mark, last = path.rpartition("#")
        if mark and last in known:
            path, fields[field] = before, last
    before, _, last = path.rpartition("#")
    if DATASETS.get(name).bundled:
        path, fields["split"] = "", path
    elif before and re.fullmatch(_WORD, last):
        path, fields["split"] = before, last
    fields = {field: value for field, value in (fields | {"path": path}).items() if value}
    for one in name_suffixes:
        field = next((field for field, known in _SUFFIXES.items() if one in known), "split")
        if field in fields:
            raise ValueError(
                f"{text!r} asks for {fields[field]!r} and for {one!r}; give one of them"
            )
        fields[field] = one
    return fields


def join_suites(suites: Sequence[DataSource], limit: int | None) -> Reading:
    """Read the suites to evaluate, at most `limit` harmful and `limit` harmless prompts of each.

    A prompt that an earlier suite has, with the same image, is left out: it would count twice in
    rates over all suites. Duplicates within a suite stay, as its authors have them. An id that an
    earlier suite uses is prefixed with the suite's name. For `limit`, a group of examples, such as
    the rotations of a question, counts as one.

    Raises:
        RegraftError: see the data readers; a suite is named twice, or adds no new prompt.
    """
    if twice := [suite for i, suite in enumerate(suites) if suite in suites[:i]]:
        raise RegraftError(f"{twice[0]} is named twice: its prompts would count twice.")
    readings = [read(suite, "test") for suite in suites]
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    taken: set[str] = set()
    known: set[Any] = set()
    for suite, reading in zip(suites, readings, strict=True):
        new = [one for one in reading.examples if _shown(one) not in known]
        if not new:
            raise RegraftError(
                f"{suite}: all of its prompts are in suites named before, and would count twice. "
                "Leave it out."
            )
        known.update(map(_shown, new))
        kept = first_of_kind(reading.keep(new, "in a suite named before"), limit)
        for example in kept.examples:
            unique = next(name for name in _names(suite, example) if name not in taken)
            taken.add(unique)
            examples.append(replace(example, id=unique, suite=str(suite)))
        skipped.update(kept.skipped)
    return Reading(", ".join(reading.source for reading in readings), tuple(examples), skipped)


def first_of_kind(reading: Reading, limit: int | None) -> Reading:
    """Keep the first `limit` groups of each kind; an example without a group is its own."""
    keys = [(one.harmful, one.group, one.group or one.id) for one in reading.examples]
    kept = {
        one
        for kind in (True, False)
        for one in islice((key for key in dict.fromkeys(keys) if key[0] == kind), limit)
    }
    pairs = zip(reading.examples, keys, strict=True)
    return reading.keep((one for one, key in pairs if key in kept), "beyond the limit")


def _shown(example: Example) -> tuple[Any, ...]:
    """Identity of a prompt across suites; a copy of an image, under another name, is another."""
    image = None if example.image is None else real(example.image)
    asked = example.system, example.instruction, image
    return *asked, example.harmful, example.references, example.choices


def _names(suite: DataSource, example: Example) -> Iterator[str]:
    """Ids for an example, by preference; the first that is free is used."""
    yield example.id
    yield f"{suite.name}:{example.id}"
    yield from (f"{suite.name}-{i}:{example.id}" for i in count(2))


def seen_before(
    evaluated: Reading, used: Mapping[str, Reading], purpose: str = "evaluated"
) -> Iterator[str]:
    """Warnings, one line per reading that shares prompts with the evaluated ones.

    Prompts are the same if their text and the bytes of their image are; another rendering of the
    same words is not found.

    Args:
        evaluated: The prompts that rates are computed on.
        used: The prompts that are learned from or chosen on, by role.
        purpose: What the prompts of `evaluated` are used for, "evaluated" or "chosen on".
    """
    tested = set(map(_content, evaluated.examples))
    for role, reading in used.items():
        if same := [one for one in reading.examples if _content(one) in tested]:
            yield (
                f"{len(same)} of the {len(reading.examples)} {role} prompts are among those "
                f"{purpose} (first {same[0].id!r}): rates on these do not carry over to new ones"
            )


def distinct(reading: Reading) -> int:
    """Count the different prompts, with their images and system prompts.

    Copies do not raise the rank of statistics.
    """
    return len({(one.system, _content(one)) for one in reading.examples})


def _content(example: Example) -> tuple[str, str | None]:
    image = None if example.image is None else file_digest(example.image)
    return example.instruction, image
