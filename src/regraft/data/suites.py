"""Several suites as one, and which prompts of two readings are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource, of_split, read
from regraft.disk.files import file_digest
from regraft.errors import RegraftError


def join_suites(suites: Sequence[DataSource], limit: int | None) -> Reading:
    """Read what is to be evaluated, one suite after the other, at most `limit` a kind of each.

    A prompt that is in a suite before, with the same image, is left out: it would count twice in
    rates over all. What a suite holds twice itself stays as its authors have it. Ids that suites
    share get their suite's name in front. A limit counts groups of examples, such as the rotations
    of a question, as one.

    Raises:
        RegraftError: see the data readers; a suite has no prompt that is in none before it.
    """
    if twice := [suite for i, suite in enumerate(suites) if suite in suites[:i]]:
        raise RegraftError(f"{twice[0]} is named twice: its prompts would count twice.")
    readings = [read(of_split(suite, "test")) for suite in suites]
    examples: list[Example] = []
    skipped: dict[str, int] = {}
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
        for reason, rows in kept.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + rows
    return Reading(", ".join(reading.source for reading in readings), tuple(examples), skipped)


def first_of_kind(reading: Reading, limit: int | None) -> Reading:
    """Those of the first `limit` groups of each kind; an example without one is its own."""
    groups = dict.fromkeys((one.harmful, one.group or one.id) for one in reading.examples)
    kept = {
        one
        for kind in (True, False)
        for one in islice((group for group in groups if group[0] == kind), limit)
    }
    return reading.keep(
        (one for one in reading.examples if (one.harmful, one.group or one.id) in kept),
        "beyond the limit",
    )


def _shown(example: Example) -> tuple[Any, ...]:
    """What a model is shown; of images the file, since copies tell apart what was meant to be."""
    image = None if example.image is None else example.image.resolve()
    return example.instruction, image, example.harmful, example.references, example.choices


def _names(suite: DataSource, example: Example) -> Iterator[str]:
    """What an example may be called, as long as the name is taken."""
    yield example.id
    yield f"{suite.name}:{example.id}"
    yield from (f"{suite.name}-{i}:{example.id}" for i in count(2))


def seen_before(
    evaluated: Reading, used: Mapping[str, Reading], purpose: str = "evaluated"
) -> list[str]:
    """One line on each reading some of whose prompts are evaluated too.

    Prompts are the same if their text and the bytes of their image are; another rendering of the
    same words is not found.

    Args:
        evaluated: The prompts that rates are of.
        used: What is learnt or chosen from, by its role.
        purpose: What is done with the rates' prompts, "evaluated" or "chosen on".
    """
    tested = set(map(_content, evaluated.examples))
    found = {
        role: [one for one in reading.examples if _content(one) in tested]
        for role, reading in used.items()
    }
    return [
        f"{len(same)} of the {len(used[role].examples)} {role} prompts are among those {purpose} "
        f"(first {same[0].id!r}): rates on these do not carry over to new ones"
        for role, same in found.items()
        if same
    ]


def distinct(reading: Reading) -> int:
    """How many different prompts there are, with their images: copies span no more than one."""
    return len(set(map(_content, reading.examples)))


def _content(example: Example) -> tuple[str, str | None]:
    image = None if example.image is None else file_digest(example.image)
    return example.instruction, image
