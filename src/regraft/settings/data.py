"""Data sets as flags and recipes name them, and calibration settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter
from pydantic import Field, model_validator

from regraft.data.readers import DATASETS
from regraft.data.sources import DataSource, words_of_first
from regraft.settings.base import EXPERT, NAMED, Settings


def _data_source(_type: Any, tokens: Sequence[Any]) -> DataSource:
    return DataSource.model_validate([token.value for token in tokens])


def _data_sources(_type: Any, tokens: Sequence[Any]) -> tuple[DataSource, ...]:
    """Several data sets, of one or two words each."""
    words, found = [str(token.value) for token in tokens], []
    while words:
        count = words_of_first(words)
        found.append(DataSource.model_validate(words[:count]))
        words = words[count:]
    return tuple(found)


_NAMES = ", ".join(one for one in DATASETS.built_in() if one not in ("demo", "jsonl"))
_ONE_OR_TWO_WORDS = Parameter(
    converter=_data_source, n_tokens=-1, consume_multiple=True, accepts_keys=False
)
# no converter: cyclopts does not call those of a settings class's fields
_ONE_WORD = Parameter(n_tokens=1, accepts_keys=False)

Data = Annotated[
    DataSource,
    _ONE_WORD,
    Parameter(
        help="A .jsonl file ({seed} in its name is --seed) or NAME PATH, such as vlguard PATH; not "
        "needed for demo.",
        show_default=False,
    ),
]
TextPrompts = Annotated[
    DataSource,
    _ONE_OR_TWO_WORDS,
    Parameter(
        help="Prompts without images: prompts FILE (harmful; AdvBench and the like, or one per "
        "line), benign FILE (harmless), xstest PATH or a .jsonl file."
    ),
]
Prompts = Annotated[
    DataSource,
    _ONE_OR_TWO_WORDS,
    Parameter(
        help="A .jsonl file, demo:calibration, vlguard PATH, prompts FILE (harmful; AdvBench and "
        "the like) or benign FILE (harmless). Its responses are not read."
    ),
]
Suites = Annotated[
    tuple[DataSource, ...],
    Parameter(converter=_data_sources, n_tokens=-1, consume_multiple=True, accepts_keys=False),
    Parameter(
        help="demo:test, a .jsonl file, or NAME PATH, where NAME is one of "
        f"{_NAMES} (prompts: AdvBench and the like), or registered by an installed package. Append "
        "#harmful or #harmless for these prompts alone; repeat the flag for several suites."
    ),
]
Validation = Annotated[DataSource | None, _ONE_WORD]


class PromptSettings(Settings):
    """Harmful prompts (D^s) and harmless ones (D^u)."""

    data: Data = DataSource(name="demo", split="calibration")  # `source` is what is read
    samples: int = Field(128, ge=1, description="Maximum number of prompts of each kind.")
    seed: int = Field(0, description="Seed for drawing prompts.")

    @property
    def source(self) -> DataSource:
        """`data`, with `{seed}` in its path replaced by the seed, for data in a file per seed."""
        if self.data.path is None:
            return self.data
        path = Path(str(self.data.path).replace("{seed}", str(self.seed)))
        return self.data.model_copy(update={"path": path})

    def with_responses(self) -> CalibrationSettings:
        """As calibration settings, with the defaults for responses."""
        return CalibrationSettings(**self.model_dump(exclude_unset=True))


class CalibrationSettings(PromptSettings):
    """Harmful prompts (D^s) and harmless ones (D^u), with responses for methods that read them."""

    responses: Annotated[Literal["auto", "given", "self"], NAMED] = Field(
        "auto",
        description="given: the data set's. self: the dense model's own refusals of harmful "
        "prompts and answers to harmless ones. auto: given if any, else self.",
    )
    max_response_tokens: Annotated[int, EXPERT] = Field(
        64, ge=1, description="Maximum tokens of a response."
    )

    @model_validator(mode="after")
    def _check_responses(self) -> Self:
        if self.responses == "given" and self.first_set("max_response_tokens"):
            raise ValueError("`max_response_tokens` has no effect when `responses` are given")
        return self
