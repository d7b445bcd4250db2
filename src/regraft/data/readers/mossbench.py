"""MOSSBench (Li et al. 2024, arXiv 2406.17806): harmless questions about alarming images."""

from __future__ import annotations

from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset
from regraft.data.rows import Row, checked, json_rows

_INFORMATION = Path("images_information", "information.json")
_WHAT = (
    "MOSSBench is the folder data/ of its repository, with images_information/information.json and "
    "images/."
)


def read_mossbench(folder: Path) -> Reading:
    """Read the 300 harmless questions; to refuse one is over-refusal.

    Each entry has `pid`, `question`, `image` ("images/1.png") and `metadata` with `over`, the kind
    of stimulus, which is the category. `folder` may also be the parent of `data/`.

    Raises:
        RegraftError: a file, field or image is missing or wrong; the data set on the hub comes
            without the questions, and some copies without all images.
    """
    base = folder if (folder / _INFORMATION).is_file() else folder / "data"
    rows = json_rows(base / _INFORMATION, _WHAT, "entry")
    return checked(Reading(str(folder), tuple(map(_example, rows))), base)


def _example(row: Row) -> Example:
    metadata = Row.of(f"{row.where}, metadata", row.values.get("metadata"))
    return Example(
        id=f"mossbench-{row.name('pid')}",
        instruction=row.text("question"),
        harmful=False,
        category=metadata.text("over"),
        image=Path(row.text("image")),
    )


PLUGIN = Dataset(lambda path, _split: read_mossbench(path), only="harmless")
