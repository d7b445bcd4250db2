"""XSTest (Röttger et al. 2024, arXiv 2308.01263): harmless prompts that look harmful, and pairs."""

from __future__ import annotations

from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset
from regraft.data.rows import Row, checked, csv_rows, require_end
from regraft.errors import RegraftError


def read_xstest(path: Path) -> Reading:
    """Read `xstest_prompts.csv`, or a folder with it.

    250 harmless prompts, on which a refusal is over-refusal, and 200 harmful ones that resemble
    them. Columns: id, prompt, type and label ("safe" or "unsafe"); releases without labels name
    the types of harmful prompts "contrast_...". The category is the type.

    Raises:
        RegraftError: the file, a column or a value is missing or wrong, the file is cut off, or it
            holds a model's answers.
    """
    table = path / "xstest_prompts.csv" if path.is_dir() else path
    rows = csv_rows(table, "XSTest is the file xstest_prompts.csv of its repository.")
    if rows and "completion" in rows[0].values:
        raise RegraftError(
            f"{table} holds answers of a model. The prompts are in xstest_prompts.csv; labelled "
            "answers are for `regraft judge bench`."
        )
    require_end(table, "xstest_prompts.csv")
    return checked(Reading(str(table), tuple(map(_example, rows))))


def _example(row: Row) -> Example:
    kind = row.text("type")
    harmful = kind.startswith("contrast_")
    if row.optional_text("label") is not None:
        label = row.text("label")
        if label not in ("safe", "unsafe"):
            raise row.wrong_type("label", '"safe" or "unsafe"')
        harmful = label == "unsafe"
    return Example(
        id=f"xstest-{row.text('id')}",
        instruction=row.text("prompt"),
        harmful=harmful,
        category=kind.removeprefix("contrast_") if harmful else kind,
    )


PLUGIN = Dataset(lambda path, _split: read_xstest(path))
