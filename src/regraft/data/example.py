"""What one row of any data set becomes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from regraft.errors import RegraftError

KINDS = {"safety": "harmful", "utility": "harmless"}
"""The two sets of calibration prompts, D^s and D^u, as artifacts call them -> what is in them."""


@dataclass(frozen=True)
class Example:
    """One prompt, with the answer it should get.

    Attributes:
        category: The harm category of a harmful prompt or the topic of a harmless one.
        response: A refusal for a harmful prompt, a normal answer for a harmless one; None where the
            data set gives none.
        suite: What it was read from; "" outside of a suite.
        references: All right answers, where there are several.
        choices: The options of a multiple-choice question, whose `response` is then a letter.
        group: Examples of one ask the same in other ways, and count as right together.
        request: What is really asked, where the instruction leaves that to the image; only for
            people and judges, no model is shown it.
        content: The part of `response` that answers are compared in, where the rest is a fixed
            frame; "" for all of it.
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

    @property
    def scored_by(self) -> str:
        """What makes it a question of a utility benchmark, and its scale; "" for others."""
        kinds = {"choices": self.choices, "references": self.references, "group": self.group}
        return next((kind for kind, given in kinds.items() if given), "")


@dataclass(frozen=True)
class Reading:
    """The examples of one source and an account of every row that is not among them.

    `skipped` maps a reason to the number of rows left out for it, so that
    `read == len(examples) + sum(skipped.values())` always holds.
    """

    source: str
    examples: tuple[Example, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def read(self) -> int:
        """Rows seen in the source."""
        return len(self.examples) + sum(self.skipped.values())

    def keep(self, kept: Iterable[Example], reason: str) -> Reading:
        """These of the examples alone; the others are counted in `skipped`, under `reason`."""
        examples = tuple(kept)
        left = Counter({reason: len(self.examples) - len(examples)})
        # a sum of counters drops what is 0
        return replace(self, examples=examples, skipped=dict(Counter(self.skipped) + left))

    def of_kind(self, *, harmful: bool) -> Reading:
        """The harmful or the harmless examples alone."""
        kind = "harmful" if harmful else "harmless"
        named = replace(self, source=f"{self.source}#{kind}")
        return named.keep((e for e in self.examples if e.harmful == harmful), f"not {kind}")

    def describe(self, role: str) -> str:
        """One line on what became of every row that was read."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        used = f"{len(self.examples)} used of {self.read} read"
        return f"{role} ({self.source}): {used}" + (f"; {left_out}" if left_out else "")


def draw(
    reading: Reading, *, harmful: bool, samples: int, seed: int, answered: bool = True
) -> Reading:
    """Draw calibration samples: the first `samples` of `in_drawn_order`, or all if fewer fit."""
    ordered = in_drawn_order(
        reading, harmful=harmful, samples=samples, seed=seed, answered=answered
    )
    return ordered.keep(ordered.examples[:samples], "not drawn")


def in_drawn_order(
    reading: Reading, *, harmful: bool, samples: int, seed: int, answered: bool = True
) -> Reading:
    """All that may be D^s (`harmful`) or D^u (harmless): `samples` that are drawn, then the rest.

    Drawn without replacement, both parts in an order of their own by `seed`. Rows of the other
    kind, and if they shall be `answered` those without a response, are counted in `skipped`.

    Raises:
        RegraftError: no row fits.
    """
    kind = "harmful" if harmful else "harmless"
    whole = reading.of_kind(harmful=harmful)
    fit = [e for e in whole.examples if not answered or (e.response and e.response.strip())]
    if not fit:
        raise RegraftError(
            f"{reading.source}: no {kind} examples{' with a response' if answered else ''}; "
            f"calibration needs some. {reading.read} rows were read, {len(whole.examples)} of them "
            f"{kind}."
        )
    generator = random.Random(seed)
    chosen = generator.sample(fit, min(samples, len(fit)))
    taken = {e.id for e in chosen}
    others = [e for e in fit if e.id not in taken]
    generator.shuffle(others)
    return whole.keep((*chosen, *others), "no response")


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split at least two examples into (the rest, those held out), in their order, neither empty.

    Whole categories are held out, the smallest first and of like ones the last by name, as long as
    they are together at most half as many again as wanted: what is learned from some sources is
    then judged on others. What then lacks of `share`, at most a half, is drawn from the rest.
    """
    wanted = min(max(1, round(share * len(examples))), len(examples) - 1)
    sizes = Counter(one.category or "" for one in examples)
    names = sorted(sorted(sizes, reverse=True), key=sizes.__getitem__)
    whole: set[str] = set()
    held: list[int] = []
    for name in names[:-1]:  # never all of them
        if len(held) < wanted and 2 * (len(held) + sizes[name]) <= 3 * wanted:
            whole.add(name)
            held += [i for i, one in enumerate(examples) if (one.category or "") == name]
    rest = [i for i, one in enumerate(examples) if (one.category or "") not in whole]
    missing = max(0, wanted - len(held))
    chosen = {*held, *random.Random(seed).sample(rest, missing)}
    return (
        tuple(one for i, one in enumerate(examples) if i not in chosen),
        tuple(one for i, one in enumerate(examples) if i in chosen),
    )
