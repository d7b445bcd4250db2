"""Ch3Ef's harmless dimension (Shi et al. 2024, arXiv 2403.17830), as the HSR paper uses it."""

from __future__ import annotations

from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset
from regraft.data.rows import Row, checked, json_rows

_META = Path("meta_file", "Harmless.json")
_WHAT = "Ch3Ef is a folder with meta_file/Harmless.json and the images that it names."


def read_ch3ef(folder: Path) -> Reading:
    """Read the harmful questions of Harmless.json.

    Each item has `query`, `image` (a list of paths), `source` (the category), `options`, the first
    of which is the reference, and maybe `id`. Items with several images are counted in `skipped`:
    a prompt has at most one.
    """
    rows = json_rows(folder / _META, _WHAT, "item", inside="items")
    examples = tuple(_example(row) for row in rows if len(_images(row)) <= 1)
    skipped = {"several images": len(rows) - len(examples)}
    return checked(Reading(str(folder), examples, skipped), folder)


def _example(row: Row) -> Example:
    images = _images(row)
    return Example(
        id=f"ch3ef-{row.key if row.values.get('id') is None else row.name('id')}",
        instruction=row.text("query"),
        harmful=True,
        category=row.optional_text("source") or "uncategorised",
        image=Path(images[0]) if images else None,
        response=row.texts("options", "a list of answers, the reference first")[0] or None,
    )


def _images(row: Row) -> list[str]:
    image = row.values.get("image")
    return [image] if isinstance(image, str) else row.texts("image", "a list of paths", least=0)


PLUGIN = Dataset(lambda path, _split: read_ch3ef(path), only="harmful")
