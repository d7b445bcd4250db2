"""Data sets as flags and recipes name them, and what is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter
from pydantic import Field, model_validator

from regraft.data.readers import DATASETS
from regraft.data.sources import DataSource, words_of_first
from regraft.settings.base import EXPERT, NAMED, Settings


def _words(_type: Any, tokens: Sequence[Any]) -> DataSource:
    return DataSource.model_validate([token.value for token in tokens])


def _several(_type: Any, tokens: Sequence[Any]) -> tuple[DataSource, ...]:
    """Words of several data sets in a row."""
    words, found = [str(token.value) for token in tokens], []
    while words:
        count = words_of_first(words)
        found.append(DataSource.model_validate(words[:count]))
        words = words[count:]
    return tuple(found)


_NAMES = ", ".join(one for one in DATASETS.built_in() if one not in ("demo", "jsonl"))
_ONE_OR_TWO_WORDS = Parameter(
    converter=_words, n_tokens=-1, consume_multiple=True, accepts_keys=False
)
_ONE_WORD = Parameter(n_tokens=1, accepts_keys=False)  # no converter is asked inside of settings

Data = Annotated[
    DataSource,
    _ONE_WORD,
    Parameter(
        help="A .jsonl file ({seed} in its name is --seed) or vlguard PATH; needed unless the "
        "model is demo.",
        show_default=False,
    ),
]
TextPrompts = Annotated[
    DataSource,
    _ONE_OR_TWO_WORDS,
    Parameter(
        help="Prompts without images: prompts FILE (harmful; AdvBench and its like, or a line "
        "each), benign FILE (harmless), xstest PATH or a .jsonl file."
    ),
]
Prompts = Annotated[
    DataSource,
    _ONE_OR_TWO_WORDS,
    Parameter(
        help="A .jsonl file, demo:calibration, vlguard PATH, prompts FILE (harmful; AdvBench and "
        "its like) or benign FILE (harmless). Responses in it are not read."
    ),
]
Suites = Annotated[
    tuple[DataSource, ...],
    Parameter(converter=_several, n_tokens=-1, consume_multiple=True, accepts_keys=False),
    Parameter(
        help="One or, the flag repeated, several: demo:test, a .jsonl file, or NAME PATH with one "
        f"of {_NAMES} (prompts: AdvBench and its like), or the name that an installed package "
        "registers. With #harmful or #harmless behind it these prompts alone."
    ),
]
Validation = Annotated[DataSource | None, _ONE_WORD]


class PromptSettings(Settings):
    """Harmful prompts (D^s) and harmless ones (D^u)."""

    data: Data = DataSource(name="demo", split="calibration")  # `source` is what is read
    samples: int = Field(128, ge=1, description="Prompts of each kind at most.")
    seed: int = Field(0, description="Seed of the draw of prompts.")

    @property
    def source(self) -> DataSource:
        """`data`, with the seed in place of `{seed}` in its path: a file for each seed."""
        if self.data.path is None:
            return self.data
        path = Path(str(self.data.path).replace("{seed}", str(self.seed)))
        return self.data.model_copy(update={"path": path})

    def with_responses(self) -> CalibrationSettings:
        """With the defaults of what is said of responses."""
        return CalibrationSettings(**self.model_dump(exclude_unset=True))


class CalibrationSettings(PromptSettings):
    """Harmful prompts (D^s) and harmless ones (D^u), with responses for methods that read them."""

    responses: Annotated[Literal["auto", "given", "self"], NAMED] = Field(
        "auto",
        description="given: the data set's. self: the dense model's own, if they refuse what "
        "is harmful and nothing else. auto: given if any, else self.",
    )
    max_response_tokens: Annotated[int, EXPERT] = Field(
        64, ge=1, description="Length of the model's responses."
    )

    @model_validator(mode="after")
    def _check_responses(self) -> Self:
        if self.responses == "given" and self.first_set("max_response_tokens"):
            raise ValueError("`max_response_tokens` changes nothing where `responses` are given")
        return self
