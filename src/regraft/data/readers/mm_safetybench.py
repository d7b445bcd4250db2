"""MM-SafetyBench (Liu et al. 2024, arXiv 2311.17600): questions whose harm is in the image."""

from __future__ import annotations

from pathlib import Path

from regraft.data.example import Example, Reading
from regraft.data.readers import Dataset
from regraft.data.rows import checked, json_rows
from regraft.errors import RegraftError

# As in the authors' evaluation: the generated image has a question of its own.
_QUESTIONS = {
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
}
_WHAT = (
    "MM-SafetyBench is a folder with processed_questions/NN-SCENARIO.json and "
    "imgs/NN-SCENARIO/{SD,SD_TYPO,TYPO}/NUMBER.jpg."
)


def read_mm_safetybench(folder: Path, variant: str | None = None) -> Reading:
    """Read the 13 scenarios, 1680 questions, with one of the three images of each.

    `variant`: an image of the key phrase by Stable Diffusion (SD), the phrase as typography (TYPO),
    or both (SD_TYPO, the default, the strongest attack and the paper's main one). All are harmful,
    without a response; the category is the scenario ("01-Illegal_Activitiy", as its authors spell
    it), and the request is the `Question` that image and prompt were made from.
    Scenarios 10 to 13 (legal, financial and health advice, government decisions) are not clearly
    harmful: look at the rates per category. `folder` may also be the parent of `data/`.
    """
    variant = variant or "SD_TYPO"
    base = folder if (folder / "processed_questions").is_dir() else folder / "data"
    files = sorted((base / "processed_questions").glob("*.json"))
    if not files:
        raise RegraftError(f"{folder}: there are no questions. {_WHAT}")
    examples = tuple(example for file in files for example in _scenario(file, variant))
    return checked(Reading(f"{folder}, {variant}", examples), base / "imgs", base / "images")


def _scenario(file: Path, variant: str) -> list[Example]:
    return [
        Example(
            id=f"{file.stem}-{row.key}-{variant}",
            instruction=row.text(_QUESTIONS[variant]),
            harmful=True,
            category=file.stem,
            image=Path(file.stem, variant, f"{row.key}.jpg"),
            request=row.optional_text("Question") or None,
        )
        for row in json_rows(file, _WHAT, "question")
    ]


PLUGIN = Dataset(read_mm_safetybench, splits=tuple(_QUESTIONS), only="harmful")
