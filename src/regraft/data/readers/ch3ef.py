"""Ch3Ef's harmless dimension (Shi et al. 2024, arXiv 2403.17830), as the HSR paper uses it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.images import locate_images
from regraft.data.readers import Dataset
from regraft.data.rows import Row, json_file, require_examples
from regraft.errors import RegraftError

_META = Path("meta_file", "Harmless.json")
_WHAT = "Ch3Ef is a folder with meta_file/Harmless.json and the images that it names."


def read_ch3ef(folder: Path) -> Reading:
    """Read the harmful questions of Harmless.json.

    Each item has `query`, `image` (a list of paths), `source` (the category), `options`, of which
    the first is the reference, and maybe `id`. Items with several images are counted in `skipped`:
    a prompt has one.

    Raises:
        RegraftError: the file, a field or an image is missing or wrong.
    """
    content = json_file(folder / _META, _WHAT)
    items = content.get("items") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise RegraftError(f"{folder / _META}: expected an object with a list `items`.")
    rows = [Row.of(f"{folder / _META}, item {i}", item) for i, item in enumerate(items, start=1)]
    examples = tuple(
        _example(i, row) for i, row in enumerate(rows, start=1) if len(_images(row)) <= 1
    )
    skipped = Counter({"several images": len(rows) - len(examples)})
    reading = require_examples(Reading(str(folder), examples, dict(+skipped)))
    return locate_images(reading, [folder])


def _example(number: int, row: Row) -> Example:
    options = row.values.get("options")
    if not (isinstance(options, list) and options and all(isinstance(o, str) for o in options)):
        raise row.wrong_type("options", "a list of answers, the reference first")
    name, images = row.values.get("id"), _images(row)
    return Example(
        id=f"ch3ef-{number if name is None else name}",
        instruction=row.text("query"),
        harmful=True,
        category=row.optional_text("source") or "uncategorised",
        image=Path(images[0]) if images else None,
        response=options[0] or None,
    )


def _images(row: Row) -> list[str]:
    images = row.values.get("image")
    if isinstance(images, str):
        return [images]
    if not (isinstance(images, list) and all(isinstance(one, str) for one in images)):
        raise row.wrong_type("image", "a list of paths")
    return images


PLUGIN = Dataset(lambda path, _split: read_ch3ef(path), only="harmful")
