"""`Example`, one prompt of any data set, and how calibration and validation prompts are drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from regraft.errors import RegraftError

KINDS = {"safety": "harmful", "utility": "harmless"}
"""The two sets of calibration prompts, D^s and D^u: name in artifacts -> kind of its prompts."""


@dataclass(frozen=True)
class Example:
    """One prompt, with the answer it should get.

    Attributes:
        category: The harm category of a harmful prompt or the topic of a harmless one.
        response: A refusal for a harmful prompt, a normal answer for a harmless one; None or blank
            where the data set gives none.
        suite: The suite it was read from; "" for prompts that are not evaluated.
        references: All accepted answers, where there are several.
        choices: The options of a multiple-choice question, whose `response` is then a letter.
        group: Name shared by the variants of one question, which counts as right if all are.
        request: The actual request, where the image or a context carries it. For people and
            judges; the evaluated model never sees it.
        content: The part of `response` that answers are compared with, where the rest is fixed
            wording; "" for all of it.
        system: The system prompt; "" for what the chat template puts without one.
    """

    id: str
    instruction: str
    harmful: bool
    category: str
    image: Path | None = None
    response: str | None = None
    suite: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""
    request: str | None = None
    content: str = ""
    system: str = ""

    @property
    def has_response(self) -> bool:
        """Whether there is a response that is not blank."""
        return bool(self.response and self.response.strip())

    @property
    def scored_by(self) -> str:
        """The field by which a utility benchmark scores this question; "" for other prompts."""
        kinds = {"choices": self.choices, "references": self.references, "group": self.group}
        return next((kind for kind, given in kinds.items() if given), "")


@dataclass(frozen=True)
class Reading:
    """The examples of one source, and how many rows were left out for which reason.

    `read == len(examples) + sum(skipped.values())` always holds. Counts of 0 are dropped.
    """

    source: str
    examples: tuple[Example, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counted = {reason: count for reason, count in self.skipped.items() if count}
        object.__setattr__(self, "skipped", counted)

    @property
    def read(self) -> int:
        """Rows seen in the source."""
        return len(self.examples) + sum(self.skipped.values())

    def keep(self, kept: Iterable[Example], reason: str) -> Reading:
        """Keep only these of the examples; count the others in `skipped`, under `reason`."""
        examples = tuple(kept)
        left = self.skipped.get(reason, 0) + len(self.examples) - len(examples)
        return replace(self, examples=examples, skipped={**self.skipped, reason: left})

    def of_kind(self, *, harmful: bool) -> Reading:
        """Keep only the harmful, or only the harmless, examples."""
        kind = "harmful" if harmful else "harmless"
        named = replace(self, source=f"{self.source}#{kind}")
        return named.keep((e for e in self.examples if e.harmful == harmful), f"not {kind}")

    def describe(self, role: str) -> str:
        """Say in one line how many rows are used, and why the others are not."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        used = f"{len(self.examples)} used of {self.read} read"
        return f"{role} ({self.source}): {used}" + (f"; {left_out}" if left_out else "")


def draw(
    reading: Reading, *, harmful: bool, samples: int, seed: int, answered: bool = True
) -> Reading:
    """Draw calibration samples: the first `samples` of `in_drawn_order`, or all if fewer exist."""
    ordered = in_drawn_order(
        reading, harmful=harmful, samples=samples, seed=seed, answered=answered
    )
    return ordered.keep(ordered.examples[:samples], "not drawn")


def in_drawn_order(
    reading: Reading, *, harmful: bool, samples: int, seed: int, answered: bool = True
) -> Reading:
    """All candidates for D^s (`harmful`) or D^u: the `samples` that are drawn, then the rest.

    `seed` decides which are drawn, without replacement, and the order of both parts. Rows of the
    other kind and, with `answered`, rows without a response are counted in `skipped`.

    Raises:
        RegraftError: there is no candidate.
    """
    kind = "harmful" if harmful else "harmless"
    kept = reading.of_kind(harmful=harmful)
    candidates = [e for e in kept.examples if not answered or e.has_response]
    if not candidates:
        raise RegraftError(
            f"{reading.source}: no {kind} examples{' with a response' if answered else ''}; "
            f"calibration needs some. {reading.read} rows were read, {len(kept.examples)} of them "
            f"{kind}."
        )
    generator = random.Random(seed)
    drawn = generator.sample(candidates, min(samples, len(candidates)))
    drawn_ids = {e.id for e in drawn}
    rest = [e for e in candidates if e.id not in drawn_ids]
    generator.shuffle(rest)
    return kept.keep((*drawn, *rest), "no response")


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split at least two examples into (rest, held out), both in the given order, neither empty.

    Whole categories are held out as long as they come to at most 1.5 times the wanted number, so
    that what is learned from some sources is judged on others: the smallest category first, the
    last by name among equals. The remainder up to `share` is drawn from the other categories.
    """
    wanted = min(max(1, round(share * len(examples))), len(examples) - 1)
    sizes = Counter(one.category for one in examples)
    names = sorted(sorted(sizes, reverse=True), key=sizes.__getitem__)
    held_categories: set[str] = set()
    held: list[int] = []
    for name in names[:-1]:  # the rest must not be empty
        if len(held) < wanted and 2 * (len(held) + sizes[name]) <= 3 * wanted:
            held_categories.add(name)
            held += [i for i, one in enumerate(examples) if one.category == name]
    rest = [i for i, one in enumerate(examples) if one.category not in held_categories]
    missing = max(0, wanted - len(held))
    chosen = {*held, *random.Random(seed).sample(rest, missing)}
    return (
        tuple(one for i, one in enumerate(examples) if i not in chosen),
        tuple(one for i, one in enumerate(examples) if i in chosen),
    )
