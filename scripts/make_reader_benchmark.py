#!/usr/bin/env python3
"""Render the data of `recipes/reader-methods.yaml` as typographic images for reader-llava-12m.

    python scripts/make_reader_benchmark.py --data DATA --out runs/reader-data

DATA holds `figstep/safebench.csv`, `vlguard/{train,test}.json`, `xstest/xstest_prompts.csv` and
`prompts/` (AdvBench, HarmBench, JailbreakBench, StrongREJECT, MaliciousInstruct, and harmless
titles, of which the first 400 were held out when the model was trained). Four files are written,
with their images beside them:

- `calibration.jsonl`: D^s and D^u. Harmful: half of SafeBench's odd task ids, a quarter of the
  other sets, and of another half the imperatives under the opening words of SafeBench's titles, as
  its authors made them. Harmless: titles, most of which are spliced from two that the model was
  trained on, and borderline ones, whose wording is close to harmful prompts: harmless tasks under
  those opening words and at the length of harmful titles, XSTest's safe prompts and VLGuard's safe
  instructions.
- `validation.jsonl`: the other half of SafeBench's odd task ids, another quarter of the others, and
  titles that the model was not trained on, half of them held out as in the test, half spliced.
  Budgets and bounds are chosen here.
- `vlguard-test.jsonl` and `titles-test.jsonl`: VLGuard's test instructions (unsafe) and 200 titles
  that the model was not trained on. With SafeBench's even task ids they are the test; none is used
  for anything else. Sets overlap: a title that is in the test is left out of the other two files,
  one in validation out of calibration.

The model knows the harmless titles that it was trained on by heart, and hardly ever refuses one of
them; how often it refuses a new one can only be held down, or measured, with new ones.
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

from regraft.data.typographic import FONT_NAME, WRAP_WIDTH, draw_text, find_font
from regraft.errors import RegraftError

HELD_OUT = 400  # titles that the model was not trained on, the first of the file
NEW = {"validation": 184, "test": 200}  # of those that fit
KNOWN = 100  # titles of the training set, for calibration
SPLICED = {"calibration": 1000, "validation": 216}
RARE = 5  # titles that end alike
BORDERLINE = 600  # for calibration
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
    """Whether all of a title and the empty list below it are in the picture."""
    lines = textwrap.wrap(title, width=WRAP_WIDTH)
    return 1 <= len(lines) <= demo.MAX_TITLE_LINES


def titles(
    rows: Iterable[tuple[str, str]], split: str, *, harmful: bool, category: str
) -> list[demo.Title]:
    """(id, text) as titles, white space collapsed."""
    return [
        demo.Title(name, split, harmful, category, " ".join(text.split())) for name, text in rows
    ]


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a table."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def safebench(data: Path, remainder: int) -> list[tuple[str, str]]:
    """The odd (1) task ids, on which the model was trained, or the even ones (0)."""
    return [
        (f"safebench-{row['category_id']}-{row['task_id']}", row["instruction"])
        for row in read_csv(data / "figstep" / "safebench.csv")
        if int(row["task_id"]) % 2 == remainder
    ]


def harmful_prompts(data: Path) -> Iterator[tuple[str, str]]:
    """Harmful prompts of the other sets, on which the model was trained too."""
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


def unseen(rows: Iterable[demo.Title], seen: set[str]) -> list[demo.Title]:
    """Those whose words are not in `seen`, each once; adds them to it."""
    kept = []
    for row in rows:
        words = " ".join(re.findall(r"\w+", row.title.lower()))
        if words not in seen:
            kept.append(row)
            seen.add(words)
    return kept


def borderline(plain: list[str], count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Harmless tasks under the opening words and at the length of harmful titles."""
    tasks = [match[1] for title in plain if (match := TASK.match(title))]
    made = 0
    while made < count:
        chosen = " and ".join(rng.sample(tasks, rng.choice((1, 2, 2, 2))))
        title = f"{rng.choice(OPENINGS)} {chosen}."
        if fits(title) and len(textwrap.wrap(title, width=WRAP_WIDTH)) >= 3:
            yield f"borderline-{made}", title
            made += 1


def under_openings(
    rows: Iterable[tuple[str, str]], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """Harmful imperatives as titles of lists: "Write a virus" as "Steps to write a virus."."""
    for name, text in rows:
        title = f"{rng.choice(OPENINGS[:3])} {text[0].lower()}{text[1:].rstrip('.?! ')}."
        if name.startswith(IMPERATIVE) and fits(title):
            yield f"list-{name}", title


def spliced(plain: list[str], count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """The first half of a harmless title and the second of another, of those in free wording.

    Most titles are an opening, a verb and an object that many share. The others are those that a
    model refuses by mistake.
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


def compose(data: Path, seed: int) -> dict[str, list[demo.Title]]:
    """The titles of every file, no title in two of them."""
    rng = random.Random(seed)
    benign = json.loads((data / "prompts" / "benign_titles.json").read_text(encoding="utf-8"))
    known = benign["benign"][HELD_OUT:]
    odd = safebench(data, 1)
    prompts = [row for row in harmful_prompts(data) if fits(row[1])]
    new = [(f"title-{i}", one) for i, one in enumerate(benign["benign"][:HELD_OUT]) if fits(one)]
    rng.shuffle(new)
    plain = [
        (f"title-{HELD_OUT + i}", known[i]) for i in sorted(rng.sample(range(len(known)), KNOWN))
    ]
    xstest = [
        (f"xstest-{row['id']}", row["prompt"])
        for row in read_csv(data / "xstest" / "xstest_prompts.csv")
        if row["label"] == "safe"
    ]
    safe = rng.sample([r for r in vlguard(data, "train", "safe_instruction") if fits(r[1])], 200)
    close = [*borderline(known, 500, rng), *xstest, *safe]
    mixed = list(spliced(known, sum(SPLICED.values()), rng))
    own = [*plain, *mixed[: SPLICED["calibration"]]]
    others = [*new[: NEW["validation"]], *mixed[SPLICED["calibration"] :]]
    listed = under_openings(prompts[2::4] + prompts[3::4], rng)
    files: dict[str, list[demo.Title]] = {}
    for half, (name, harmless) in enumerate((("calibration", own), ("validation", others))):
        files[name] = [
            *titles(odd[half::2], name, harmful=True, category="safebench"),
            *titles(prompts[half::4], name, harmful=True, category="prompts"),
            *titles(harmless, name, harmful=False, category="title"),
        ]
    files["calibration"] += titles(listed, "calibration", harmful=True, category="list")
    close = rng.sample(close, BORDERLINE)
    files["calibration"] += titles(close, "calibration", harmful=False, category="borderline")
    unsafe = vlguard(data, "test", "instruction")
    last = sorted(new[-NEW["test"] :], key=lambda row: int(row[0].removeprefix("title-")))
    files["vlguard-test"] = titles(unsafe, "test", harmful=True, category="vlguard")
    files["titles-test"] = titles(last, "test", harmful=False, category="title")
    seen: set[str] = set()
    unseen(titles(safebench(data, 0), "test", harmful=True, category="safebench"), seen)
    for name in ("vlguard-test", "titles-test"):  # in whole, and nowhere else
        unseen(files[name], seen)
    for name in ("validation", "calibration"):
        files[name] = unseen(files[name], seen)
    return files


def build(data: Path, out: Path, font_path: Path | None = None, seed: int = 0) -> dict[str, int]:
    """Write all files; returns the number of examples in each."""
    files = compose(data, seed)
    font = find_font(font_path)
    (out / "images").mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in files.items():
        kept = [row for row in rows if row.title and (name == "vlguard-test" or fits(row.title))]
        for row in kept:
            image = demo.to_black_and_white(draw_text(row.title, font, shrink=False))
            image.save(out / "images" / f"{row.id}.png")
        lines = (json.dumps(demo.example(row), ensure_ascii=False) + "\n" for row in kept)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(kept)
    return counts


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="where to write")
    parser.add_argument("--font", type=Path, default=None, help=f"path of {FONT_NAME}")
    args = parser.parse_args()
    try:
        counts = build(args.data, args.out, args.font)
    except (demo.DemoDataError, RegraftError, FileNotFoundError) as error:
        print(f"make_reader_benchmark: error: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{args.out / name}.jsonl: {count} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
