"""VLGuard (Zong et al. 2024, arXiv 2402.02207): images with safe and unsafe instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.images import locate_images
from regraft.data.readers import Dataset, Split
from regraft.data.rows import Row, checked, json_rows
from regraft.data.storage import unpacked
from regraft.errors import RegraftError

UNSAFE_ON_SAFE = "safe image, unsafe instruction"
SAFE_ON_SAFE = "safe image"
_KINDS = {UNSAFE_ON_SAFE: "safe-unsafe", SAFE_ON_SAFE: "safe-safe"}  # by category; else "unsafe"


def read_vlguard(path: Path, subset: str | None = None) -> Reading:
    """Read VLGuard's `train.json` or `test.json` and find its images.

    `path` is the JSON file, or a folder with `train.json`. Images are looked for below the JSON's
    folder: in `train/` or `test/` (the JSON's own split first), `images/`, or the folder itself. If
    neither a folder named after the split nor `images/` exists, the split's zip file, as the hub
    has it, is unpacked into the cache and searched first. See `parse_vlguard` for the examples.
    """
    metadata = path / "train.json" if path.is_dir() else path
    return locate_images(parse_vlguard(metadata, subset), _image_roots(metadata))


def split_file(folder: Path, split: Split) -> Path:
    """The JSON file of a split in VLGuard's folder."""
    file = folder / f"{split}.json"
    if file.is_file():
        return file
    other = folder / ("train.json" if split == "test" else "test.json")
    use = "evaluation" if split == "test" else "learning and choosing"
    found = f", only {other.name}" if other.is_file() else ""
    advice = f", or name a file, as in vlguard:{other}" if other.is_file() else ""
    raise RegraftError(
        f"{folder} has no {file.name}{found}; {use} needs VLGuard's {split} split. "
        f"Put {file.name} there{advice}."
    )


def parse_vlguard(path: Path, subset: str | None = None) -> Reading:
    """Read VLGuard's JSON without looking for images: `Example.image` stays relative.

    An unsafe image gives one harmful example, with its `harmful_category`. A safe image gives a
    harmless one (category "safe image") from `safe_instruction` and a harmful one (category "safe
    image, unsafe instruction") from `unsafe_instruction`. Without a `subset` the last kind is left
    out; "unsafe", "safe-unsafe" or "safe-safe", the paper's names for the three, keeps only that
    kind. Rows left out are counted in `skipped`, and so are repeated pairs of image and instruction
    ("duplicate"). An empty response (test.json has 17) becomes None.
    """
    rows = json_rows(path, "VLGuard is the files train.json and test.json.", "row")
    parsed = Reading(str(path), tuple(example for row in rows for example in _examples(row)))
    wanted = parsed.keep(
        (e for e in parsed.examples if _is_of(subset, e)),
        UNSAFE_ON_SAFE if subset is None else f"not {subset}",
    )
    distinct: dict[tuple[Path | None, str], Example] = {}
    for example in wanted.examples:
        distinct.setdefault((example.image, example.instruction), example)
    return checked(wanted.keep(_with_unique_ids(distinct.values()), "duplicate"))


def _is_of(subset: str | None, example: Example) -> bool:
    kind = _KINDS.get(example.category, "unsafe")
    return subset in ("all", kind) or (subset is None and kind != "safe-unsafe")


def _examples(row: Row) -> Iterator[Example]:
    safe = row.flag("safe")
    for answer in _answers(row):
        unsafe_on_safe = safe and "unsafe_instruction" in answer.values
        if unsafe_on_safe:
            field, category = "unsafe_instruction", UNSAFE_ON_SAFE
        elif safe:
            field, category = "safe_instruction", SAFE_ON_SAFE
        else:
            field, category = "instruction", row.text("harmful_category")
        yield Example(
            id=row.text("id") + ("-unsafe" if unsafe_on_safe else ""),
            instruction=answer.text(field),
            harmful=not safe or unsafe_on_safe,
            category=category,
            image=Path(row.text("image")),
            response=answer.text("response", blank=True) or None,
        )


def _answers(row: Row) -> list[Row]:
    answers = row.values.get("instr-resp")
    if not isinstance(answers, list) or not answers:
        raise row.wrong_type("instr-resp", "a list of instructions with responses")
    return [
        Row.of(f"{row.where}, instr-resp {number}", answer)
        for number, answer in enumerate(answers, start=1)
    ]


def _with_unique_ids(examples: Iterable[Example]) -> Iterator[Example]:
    """Number repeated ids from the second use on: the official train.json repeats one."""
    uses: Counter[str] = Counter()
    for example in examples:
        uses[example.id] += 1
        again = f"-{uses[example.id]}" if uses[example.id] > 1 else ""
        yield replace(example, id=example.id + again)


def _image_roots(metadata: Path) -> list[Path]:
    folder, split = metadata.parent, metadata.stem
    names = dict.fromkeys([split, f"{split}/{split}", "images", f"images/{split}", "train", "test"])
    roots = [*(folder / name for name in names if (folder / name).is_dir()), folder]
    archive = folder / f"{split}.zip"
    unpacked_already = any((folder / name).is_dir() for name in (split, "images"))
    if unpacked_already or not archive.is_file():
        return roots
    contents = unpacked(archive)
    return [contents, contents / split, *roots]


PLUGIN = Dataset(
    read_vlguard, splits=("unsafe", "safe-unsafe", "safe-safe", "all"), split_file=split_file
)
