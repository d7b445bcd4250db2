"""DocVQA (Mathew et al. 2021, arXiv 2007.00398): questions about scanned documents."""

from __future__ import annotations

from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset
from regraft.data.rows import Row, checked, json_rows
from regraft.errors import RegraftError

_ENDING = "\nAnswer the question using a single word or phrase."  # lmms-eval's
_WHAT = "DocVQA is a JSON file such as val_v1.0_withQT.json, beside the folder documents/."


def read_docvqa(path: Path) -> Reading:
    """Read the official annotations, or a folder with one `val*.json`.

    Each entry of `data` has questionId, question, image ("documents/NAME.png") and answers, all of
    which are right; the first of `question_types`, if any, is the category.

    Raises:
        RegraftError: the file, a field or an image is missing or wrong, or there are no answers
            (the test split has none).
    """
    if path.is_dir():
        found = sorted(path.glob("val*.json"))
        if len(found) != 1:
            raise RegraftError(f"{path} holds {len(found)} files val*.json; name one. {_WHAT}")
        path = found[0]
    rows = json_rows(path, _WHAT, "entry", inside="data")
    reading = Reading(str(path), tuple(map(_example, rows)))
    return checked(reading, path.parent, path.parent.parent)


def _example(row: Row) -> Example:
    answers = row.texts("answers", "a list of texts (the test split has none)")
    kinds = row.values.get("question_types")
    return Example(
        id=f"docvqa-{row.name('questionId')}",
        instruction=row.text("question") + _ENDING,
        harmful=False,
        category=str(kinds[0]) if isinstance(kinds, list) and kinds else "documents",
        image=Path(row.text("image")),
        response=answers[0],
        references=tuple(answers),
    )


PLUGIN = Dataset(lambda path, _split: read_docvqa(path), only="harmless")
