"""A YAML file of published figures, in per cent as papers print them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from regraft.errors import RegraftError
from regraft.report.published import Published, PublishedRow
from regraft.settings.base import Settings, explain

Percent = Annotated[float, Field(ge=0, le=100)]


class RowSettings(Settings):
    """Figures of one model; see `PublishedRow`."""

    model: str = Field(min_length=1, description="Its name in the recipe.")
    pruning: str = Field("", description="The pruning's name; none for the dense model.")
    method: str = Field("", description="The name under realign; none for the pruned model.")
    asr: dict[str, Percent] = Field({}, description="ASR of each data set, per cent.")
    mean_asr: Percent | None = Field(None, description="Mean over the data sets, per cent.")
    rsr: float | None = Field(None, description="RSR, per cent.")
    per_ten_thousand: float | None = Field(None, ge=0, description="Restored per 10,000 pruned.")
    utility: dict[str, Percent] = Field({}, description="Score of each data set, per cent.")
    checked: bool = Field(False, description="Whether the figures follow from each other.")

    def row(self) -> PublishedRow:
        """The same in fractions."""
        return PublishedRow(
            self.model,
            self.pruning,
            self.method,
            {name: rate / 100 for name, rate in self.asr.items()},
            None if self.mean_asr is None else self.mean_asr / 100,
            None if self.rsr is None else self.rsr / 100,
            self.per_ten_thousand,
            {name: score / 100 for name, score in self.utility.items()},
            self.checked,
        )


class PublishedSettings(Settings):
    """Figures of one publication; see `Published`."""

    source: str = Field(min_length=1, description="The publication, and where in it.")
    prompts: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="How many prompts each data set of attacks has."
    )
    rows: tuple[RowSettings, ...] = Field(min_length=1, description="One a model.")
    spearman: float | None = Field(None, ge=-1, le=1, description="Total Ships, lost safety.")
    spearman_n: int | None = Field(None, ge=3, description="Over how many models.")

    @model_validator(mode="after")
    def _check(self) -> PublishedSettings:
        keys = [(one.model, one.pruning, one.method) for one in self.rows]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"two rows are of {', '.join(filter(None, twice[0]))}")
        if (self.spearman is None) != (self.spearman_n is None):
            raise ValueError("give both of `spearman` and `spearman_n`, or none")
        return self


def read_published(path: Path) -> Published:
    """Read published figures.

    Raises:
        RegraftError: the file is missing, or a field is wrong; the message names each.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RegraftError(f"The published figures {path} do not exist.") from error
    except OSError as error:
        raise RegraftError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegraftError(f"{path} is not valid YAML: {error}") from error
    try:
        found = PublishedSettings.model_validate(content)
    except ValidationError as error:
        raise RegraftError(f"{path}:\n{explain(error)}") from error
    rows = tuple(one.row() for one in found.rows)
    return Published(found.source, found.prompts, rows, found.spearman, found.spearman_n)
