"""The prompts of `make_real_benchmark.py` and their splits; no model is needed.

Every split has harmful prompts from sources of its own:

- test: JailbreakBench (the rows that its authors wrote), MaliciousInstruct, StrongREJECT (the rows
  that its authors wrote: "custom"); harmless: XSTest's safe prompts with an even id, and a third of
  our everyday and borderline prompts.
- validation: 96 of HarmBench's standard behaviours, which need no context and quote no copyrighted
  text; harmless: an eighth of ours.
- confirmation, a second test, first run when the methods were fixed: XSTest's unsafe prompts and
  HarmBench's other standard behaviours; harmless: XSTest's safe prompts with an odd id, and prompts
  written for it (`prompts/everyday-2.txt`, `prompts/borderline-2.txt`). The default judge was
  chosen on other models' answers to XSTest's prompts with an odd id, so that one is not new there.
- calibration 0, 1, 2: AdvBench and SafeBench, divided among the three seeds; harmless: the rest of
  ours. What is learnt from one form of prompt need not hold for others, so prompts get one of
  several forms: AdvBench has only imperatives, which are rewritten, and SafeBench has a question
  and a list title for each task.

Left out: the rows that JailbreakBench and StrongREJECT repeat from AdvBench, HarmBench and
MaliciousInstruct, by their column `source`; SafeBench's legal, financial and health advice, which
is not clearly harmful; and all of VLGuard, whose instructions are about an image, while those that
mention none are mostly harmless by themselves.

Near-duplicates stay in one split only: test before validation before calibration before
confirmation. Within a split the first is kept, so seeds share none either. Prompts are
near-duplicates if their word-Jaccard is 0.75 or more, with or without the words around the task
("Write a tutorial on how to", "Steps to").

The files in `prompts/` were written for this benchmark and have regraft's licence. Borderline
prompts are harmless prompts with alarming words.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regraft.data.example import Example
from regraft.data.rows import csv_rows

OURS = Path(__file__).resolve().parent / "prompts"
SEEDS = 3
JACCARD = 0.75
TEST, VALIDATION = 34, 12  # per cent of our harmless prompts
HARMBENCH = 96  # behaviours for validation
_UNCLEAR = {"Legal Opinion", "Financial Advice", "Health Consultation"}
_FRAME = re.compile(
    r"^(?:.*\bhow to|(?:steps|methods|ways|tips|list of \w+) to|can you|how (?:do|can|could) \w+) ",
    re.IGNORECASE,
)
_HOW_TO = re.compile(r"\b(?:on|for|explaining|detailing|describing) how to (?P<what>.+)$")


@dataclass(frozen=True)
class Splits:
    """The prompts of each split, none with a response.

    `candidates[seed]` are for calibration. `removed` counts near-duplicates by split and source.
    """

    test: tuple[Example, ...]
    validation: tuple[Example, ...]
    candidates: tuple[tuple[Example, ...], ...]
    confirmation: tuple[Example, ...]
    removed: Mapping[str, int]


def splits(data: Path) -> Splits:
    """Read all sources and split them; the same files give the same splits.

    Args:
        data: Folder with `prompts/`, `figstep/safebench.csv` and `xstest/xstest_prompts.csv`.

    Raises:
        RegraftError: a file or a column is missing.
    """
    removed: Counter[str] = Counter()
    ours = [*own("everyday"), *own("borderline")]
    test = distinct(
        [*test_harmful(data), *xstest(data, "safe", (0,)), *part(ours, "test")], [], removed
    )
    behaviours = distinct(harmbench(data), test, removed)
    behaviours = sorted(behaviours, key=lambda one: share(one.instruction))
    validation = [*behaviours[:HARMBENCH], *distinct(part(ours, "validation"), test, removed)]
    # before and after prompts take a form: near-duplicates may show up in either
    raw = distinct([*advbench(data), *safebench(data)], [*test, *validation], removed)
    rest = [*map(formed, raw), *part(ours, "calibration")]
    kept = distinct(rest, [*test, *validation], removed)
    later = [*xstest(data, "unsafe", (0, 1)), *behaviours[HARMBENCH:], *xstest(data, "safe", (1,))]
    later += [*own("everyday-2"), *own("borderline-2")]
    confirmation = distinct(later, [*test, *validation, *kept], removed)
    return Splits(tuple(test), tuple(validation), dealt(kept), tuple(confirmation), dict(removed))


def words(text: str) -> frozenset[str]:
    """The words of a text, in lower case and without punctuation."""
    return frozenset(re.findall(r"\w+", text.lower()))


def task(text: str) -> str:
    """A prompt without the words around its task."""
    return _FRAME.sub("", text)


def alike(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether the Jaccard index of two sets of words makes them near-duplicates."""
    shared = len(one & other)  # without the union, which takes longer
    return shared >= JACCARD * (len(one) + len(other) - shared)


def distinct(
    prompts: Iterable[Example], others: Iterable[Example], removed: Counter[str]
) -> list[Example]:
    """Prompts that are no near-duplicates of `others` or of earlier ones; counts the rest."""
    seen = [_both(one) for one in others]
    kept = []
    for one in prompts:
        mine = _both(one)
        if any(alike(mine[0], other[0]) or alike(mine[1], other[1]) for other in seen):
            removed[one.category] += 1
        else:
            seen.append(mine)
            kept.append(one)
    return kept


def _both(example: Example) -> tuple[frozenset[str], frozenset[str]]:
    """The words of a prompt, and those of its task."""
    return words(example.instruction), words(task(example.instruction))


def formed(example: Example) -> Example:
    """An AdvBench prompt in a form chosen by its id: imperative, request, question, list title."""
    if example.category != "advbench":
        return example
    text = example.instruction.rstrip(".")
    forms = {"imperative": text, "request": f"Can you {text[0].lower()}{text[1:]}?"}
    if found := _HOW_TO.search(text):
        forms |= {
            "question": f"How do I {found['what']}?",
            "list title": f"Steps to {found['what']}.",
        }
    form = list(forms)[share(example.id) % len(forms)]
    return replace(example, instruction=forms[form], category=f"advbench {form}")


def dealt(prompts: Sequence[Example]) -> tuple[tuple[Example, ...], ...]:
    """The prompts of every category in a fixed random order, divided among the seeds."""
    order = list(prompts)
    random.Random(0).shuffle(order)
    order.sort(key=lambda one: one.category)  # stable
    return tuple(tuple(order[seed::SEEDS]) for seed in range(SEEDS))


def share(text: str) -> int:
    """A number from 0 to 99 that depends only on `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100


def part(prompts: Iterable[Example], split: str) -> list[Example]:
    """Our prompts of a split, by a hash of their text."""
    ranges = {
        "test": range(TEST),
        "validation": range(TEST, TEST + VALIDATION),
        "calibration": range(TEST + VALIDATION, 100),
    }
    return [one for one in prompts if share(one.instruction) in ranges[split]]


def own(kind: str) -> list[Example]:
    """The harmless prompts of `prompts/KIND.txt`, one per line."""
    return _lines(OURS / f"{kind}.txt", kind, harmful=False)


def test_harmful(data: Path) -> list[Example]:
    """JailbreakBench and StrongREJECT without rows from other sets; MaliciousInstruct."""
    prompts = data / "prompts"
    jailbreakbench = _table(
        prompts / "jailbreakbench.csv", "jailbreakbench", "Goal", {"Source": {"Original"}}
    )
    strongreject = _table(
        prompts / "strongreject.csv", "strongreject", "forbidden_prompt", {"source": {"custom"}}
    )
    asked = _lines(prompts / "malicious_instruct.txt", "maliciousinstruct", harmful=True)
    return [*jailbreakbench, *asked, *strongreject]


def harmbench(data: Path) -> list[Example]:
    """HarmBench's standard behaviours, validation and test."""
    kept = {"FunctionalCategory": {"standard"}}
    return [
        example
        for half in ("val", "test")
        for example in _table(
            data / "prompts" / f"harmbench_{half}.csv", "harmbench", "Behavior", kept, half
        )
    ]


def advbench(data: Path) -> list[Example]:
    """AdvBench's goals."""
    return _table(data / "prompts" / "advbench.csv", "advbench", "goal")


def safebench(data: Path) -> list[Example]:
    """Each clearly harmful task of SafeBench as a question or a list title, chosen by its id."""
    rows = csv_rows(data / "figstep" / "safebench.csv", "SafeBench is the file safebench.csv.")
    found = []
    for row in rows:
        if row.text("category_name") in _UNCLEAR:
            continue
        name = f"safebench-{row.text('category_id')}-{row.text('task_id')}"
        field, form = [("question", "question"), ("instruction", "list title")][share(name) % 2]
        found.append(Example(name, row.text(field), True, f"safebench {form}"))
    return found


def xstest(data: Path, label: str, remainders: Sequence[int]) -> list[Example]:
    """XSTest's safe or unsafe prompts whose id modulo 2 is one of these.

    Judges are chosen by answers to those with an odd id.
    """
    rows = csv_rows(data / "xstest" / "xstest_prompts.csv", "XSTest is xstest_prompts.csv.")
    return [
        Example(
            f"xstest-{row.text('id')}", row.text("prompt"), label == "unsafe", f"xstest-{label}"
        )
        for row in rows
        if row.text("label") == label and int(row.text("id")) % 2 in remainders
    ]


def _table(
    path: Path,
    category: str,
    column: str,
    kept: Mapping[str, set[str]] | None = None,
    part_of: str = "",
) -> list[Example]:
    """Harmful prompts from a column of a CSV file; `kept` has the allowed values of columns."""
    name = "-".join(filter(None, (category, part_of)))
    rows = csv_rows(path, f"{category} is a CSV file with a column {column}.")
    return [
        Example(f"{name}-{number}", " ".join(row.text(column).split()), True, category)
        for number, row in enumerate(rows, start=1)
        if all(row.text(field) in values for field, values in (kept or {}).items())
    ]


def _lines(path: Path, category: str, *, harmful: bool) -> list[Example]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        Example(f"{category}-{number}", line.strip(), harmful, category)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
