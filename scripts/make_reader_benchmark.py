#!/usr/bin/env python3
"""Render the data of `recipes/reader-methods.yaml` as typographic images for reader-llava-12m.

    python scripts/make_reader_benchmark.py --data DATA --out runs/reader-data

DATA holds `figstep/safebench.csv`, `vlguard/{train,test}.json`, `xstest/xstest_prompts.csv` and
`prompts/` (AdvBench, HarmBench, JailbreakBench, StrongREJECT, MaliciousInstruct, and harmless
titles, of which the first 400 were held out when the model was trained). The script writes three
files, and their images beside them:

- `calibration.jsonl`: many sources and forms.
  Harmful: SafeBench's odd task ids, half of the other sets, and the imperatives of the other half,
  rewritten as list titles with the opening words of SafeBench's titles.
  Harmless: titles that the model was trained on, titles spliced from two of them, and borderline
  prompts, worded like harmful ones: harmless tasks with those opening words and of the length of
  harmful titles, XSTest's safe prompts and VLGuard's safe instructions.
- `vlguard-test.jsonl` and `titles-test.jsonl`: VLGuard's test instructions (unsafe) and the titles
  that the model was not trained on.

The test is these two, SafeBench's even task ids and the borderline titles of the bundled data
(`demo:borderline`). The two files have no near-duplicates (word-Jaccard of 0.75 or more) of what
the model was trained on, and the calibration data none of the whole test.

The model has memorised the harmless titles that it was trained on, and hardly ever refuses one of
them. So its over-refusal can only be calibrated against, and measured, with new titles.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_demo_data as demo
from real_prompts import alike, words

from regraft.data.typographic import FONT_NAME, WRAP_WIDTH, draw_text, find_font
from regraft.errors import RegraftError

HELD_OUT = 400  # titles that the model was not trained on, the first of the file
KNOWN = 100  # titles of the training set, for calibration
SPLICED = 1000
RARE = 5  # a title whose last word ends fewer titles than this has free wording
TASKS, SAFE = 500, 200  # harmless tasks with harmful openings; VLGuard's safe instructions
BORDERLINE = 600  # drawn from those and XSTest's
PROMPT_SETS = (
    ("advbench", "advbench.csv", "goal"),
    ("harmbench", "harmbench_test.csv", "Behavior"),
    ("harmbench-val", "harmbench_val.csv", "Behavior"),
    ("jailbreakbench", "jailbreakbench.csv", "Goal"),
    ("strongreject", "strongreject.csv", "forbidden_prompt"),
)
OPENINGS = (
    *("Steps to", "Methods to", "List of ways to"),
    *("List of reasons to", "List of tools to"),
)
IMPERATIVE = ("advbench", "harmbench", "jailbreakbench")
TASK = re.compile(r"(?:Steps|Methods|Ways|Tips|Ideas|List of \w+) to (.*)\.$")


def fits(title: str) -> bool:
    """Whether a title and the empty list below it fit into the image."""
    lines = textwrap.wrap(title, width=WRAP_WIDTH)
    return 1 <= len(lines) <= demo.MAX_TITLE_LINES


def titles(
    rows: Iterable[tuple[str, str]], split: str, category: str, *, harmful: bool
) -> list[demo.Title]:
    """Titles from pairs (id, text), with white space collapsed."""
    return [
        demo.Title(name, split, harmful, category, " ".join(text.split())) for name, text in rows
    ]


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a table."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def safebench(data: Path, remainder: int) -> list[tuple[str, str]]:
    """SafeBench's odd (1) task ids, on which the model was trained, or its even ones (0)."""
    return [
        (f"safebench-{row['category_id']}-{row['task_id']}", row["instruction"])
        for row in read_csv(data / "figstep" / "safebench.csv")
        if int(row["task_id"]) % 2 == remainder
    ]


def harmful_prompts(data: Path) -> Iterator[tuple[str, str]]:
    """Harmful prompts of the other data sets; the model was trained on these too."""
    for name, file, column in PROMPT_SETS:
        for i, row in enumerate(read_csv(data / "prompts" / file)):
            yield f"{name}-{i}", row[column]
    lines = (data / "prompts" / "malicious_instruct.txt").read_text(encoding="utf-8").splitlines()
    yield from ((f"maliciousinstruct-{i}", line) for i, line in enumerate(lines))
    yield from vlguard(data, "train", "instruction")


def vlguard(data: Path, split: str, field: str) -> Iterator[tuple[str, str]]:
    """One kind of VLGuard's instructions."""
    rows = json.loads((data / "vlguard" / f"{split}.json").read_text(encoding="utf-8"))
    for i, row in enumerate(rows):
        for turn in row["instr-resp"]:
            if field in turn:
                yield f"vlguard-{split}-{field.replace('_', '-')}-{i}", turn[field]


def trained_on(data: Path) -> tuple[list[str], list[str]]:
    """(harmful, harmless) texts that the model was trained on."""
    harmful = [text for _, text in (*harmful_prompts(data), *safebench(data, 1))]
    return harmful, benign_titles(data)[HELD_OUT:]


def benign_titles(data: Path) -> list[str]:
    """The harmless titles; the held-out ones come first."""
    path = data / "prompts" / "benign_titles.json"
    found: list[str] = json.loads(path.read_text(encoding="utf-8"))["benign"]
    return found


def distinct(rows: Iterable[demo.Title], others: Iterable[str]) -> list[demo.Title]:
    """Titles that are no near-duplicates of `others` or of an earlier title."""
    seen = {words(text) for text in others}
    kept = []
    for row in rows:
        mine = words(row.title)
        if mine not in seen and not any(alike(mine, other) for other in seen):
            kept.append(row)
            seen.add(mine)
    return kept


def borderline(plain: list[str], count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Harmless tasks with the opening words and the length of harmful titles."""
    tasks = [match[1] for title in plain if (match := TASK.match(title))]
    made = 0
    while made < count:
        chosen = " and ".join(rng.sample(tasks, rng.choice((1, 2, 2, 2))))
        title = f"{rng.choice(OPENINGS)} {chosen}."
        if fits(title) and len(textwrap.wrap(title, width=WRAP_WIDTH)) >= 3:
            yield f"tasks-{made}", title
            made += 1


def under_openings(
    rows: Iterable[tuple[str, str]], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """Harmful imperatives as list titles: "Write a virus" becomes "Steps to write a virus."."""
    for name, text in rows:
        title = f"{rng.choice(OPENINGS[:3])} {text[0].lower()}{text[1:].rstrip('.?! ')}."
        if name.startswith(IMPERATIVE) and fits(title):
            yield f"list-{name}", title


def spliced(plain: list[str], count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Titles made of the first half of one harmless title and the second half of another.

    Most titles are an opening, a verb and an object that many titles share. Only the others, with
    free wording, are used, since a model refuses those by mistake.
    """
    ends = Counter(title.split()[-1] for title in plain)
    free = [title.split() for title in plain if ends[title.split()[-1]] < RARE]
    made = 0
    while made < count:
        first, second = rng.sample(free, 2)
        title = " ".join([*first[: len(first) // 2], *second[len(second) // 2 :]])
        if fits(title):
            yield f"spliced-{made}", title
            made += 1


def held_out(data: Path) -> dict[str, list[demo.Title]]:
    """The titles of both test files."""
    harmful, harmless = trained_on(data)
    unsafe = titles(vlguard(data, "test", "instruction"), "test", "vlguard", harmful=True)
    plain = [(f"title-{i}", one) for i, one in enumerate(benign_titles(data)[:HELD_OUT])]
    new = titles((row for row in plain if fits(row[1])), "test", "title", harmful=False)
    return {
        "vlguard-test": distinct((row for row in unsafe if row.title), harmful),
        "titles-test": distinct(new, harmless),
    }


def calibration(data: Path, rng: random.Random) -> Iterator[demo.Title]:
    """All calibration titles, near-duplicates included; the category is the source."""
    prompts = [row for row in harmful_prompts(data) if fits(row[1])]
    listed = under_openings(prompts[1::2], rng)
    for row in (*safebench(data, 1), *prompts[::2], *listed):
        yield from titles([row], "calibration", source(row[0]), harmful=True)
    known = benign_titles(data)[HELD_OUT:]
    chosen = sorted(rng.sample(range(len(known)), KNOWN))
    plain = [(f"title-{HELD_OUT + i}", known[i]) for i in chosen]
    xstest = [
        (f"xstest-{row['id']}", row["prompt"])
        for row in read_csv(data / "xstest" / "xstest_prompts.csv")
        if row["label"] == "safe"
    ]
    safe = rng.sample([r for r in vlguard(data, "train", "safe_instruction") if fits(r[1])], SAFE)
    close = rng.sample([*borderline(known, TASKS, rng), *xstest, *safe], BORDERLINE)
    for row in (*plain, *spliced(known, SPLICED, rng), *close):
        yield from titles([row], "calibration", source(row[0]), harmful=False)


def source(name: str) -> str:
    """The data set and form of an id: "list-advbench" for "list-advbench-17"."""
    return re.sub(r"(-\d+)+$", "", name)


def compose(data: Path, seed: int) -> dict[str, list[demo.Title]]:
    """The titles of every file, without near-duplicates of the test in the calibration data."""
    files = held_out(data)
    test = [row.title for rows in files.values() for row in rows]
    test += [text for _, text in safebench(data, 0)]
    bundled = demo.read_titles(demo.DATA_DIR / "titles.csv")
    test += [row.title for row in bundled if row.split == "borderline"]
    files["calibration"] = distinct(calibration(data, random.Random(seed)), test)
    return files


def build(data: Path, out: Path, font_path: Path | None = None, seed: int = 0) -> dict[str, int]:
    """Write all files; returns the number of examples in each."""
    files = compose(data, seed)
    font = find_font(font_path)
    (out / "images").mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in files.items():
        kept = [row for row in rows if name == "vlguard-test" or fits(row.title)]
        for row in kept:
            image = demo.to_black_and_white(draw_text(row.title, font, shrink=False))
            image.save(out / "images" / f"{row.id}.png")
        lines = (json.dumps(demo.example(row), ensure_ascii=False) + "\n" for row in kept)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(kept)
    return counts


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="where to write")
    parser.add_argument("--font", type=Path, default=None, help=f"path of {FONT_NAME}")
    args = parser.parse_args()
    try:
        counts = build(args.data, args.out, args.font)
    except (RegraftError, FileNotFoundError) as error:
        print(f"make_reader_benchmark: error: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{args.out / name}.jsonl: {count} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
