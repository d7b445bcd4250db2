"""How many weights are restored, which settings are tuned, and on which prompts they are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar, cast

from pydantic import Field, model_validator

from regraft.data.demo import is_demo
from regraft.data.sources import DataSource, split_off
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import Reference
from regraft.settings.base import EXPERT, NAMED, Settings
from regraft.settings.data import CalibrationSettings, Validation
from regraft.settings.defending import RefusalDirectionSettings


class SearchSettings(Settings):
    """How many weights of a ranking are restored, chosen on validation prompts."""

    validation: Validation = Field(
        None,
        description="Prompts to choose on; report no rates on them. If not given, a quarter of "
        "--data is held out.",
    )
    validation_limit: Annotated[int | None, EXPERT] = Field(
        None, ge=1, description="Validate on the first of each kind only."
    )
    points: int = Field(8, ge=1, description="Numbers of weights to try.")
    most: float | None = Field(None, gt=0, description="Try at most so many per 10,000.")
    target_asr: float | None = Field(
        None, ge=0, le=100, description="Take the fewest weights with an ASR (%) this low."
    )
    target_rsr: float | None = Field(
        None, ge=1, le=200, description="Take the fewest weights with an RSR (%) this high."
    )
    over_refusal: float = Field(
        1.0,
        ge=-100,
        le=100,
        description="Bound: points of over-refusal above the reference.",
    )
    utility: float = Field(
        0.0, ge=0, le=100, description="Bound: points of utility below the pruned model."
    )
    reference: Annotated[Reference, EXPERT, NAMED] = Field(
        "higher", description="Whose over-refusal is the reference: pruned, dense or the higher."
    )

    @model_validator(mode="after")
    def _check(self) -> SearchSettings:
        if self.target_asr is not None and self.target_rsr is not None:
            raise ValueError("`target_asr` and `target_rsr` exclude each other; give one of them")
        return self


class TuneSettings(Settings):
    """Which settings of a method are tried, and how many times.

    What is tried, and in which range, every method says itself; gain has nothing to tune.
    """

    trials: int = Field(
        40, ge=1, description="Finished trials in all; the same command goes on to more."
    )
    sampler_seed: int = Field(
        0, ge=0, description="With one worker and the same seed the same trials come again."
    )
    random_trials: int = Field(
        10, ge=1, description="Trials at random before TPE learns from them."
    )
    workers: int = Field(1, ge=1, description="Processes that share the trials.")
    devices: tuple[str, ...] = Field(
        (), description="Those of the workers, in turn; if not given, the one device."
    )
    keep: tuple[str, ...] = Field((), description="Settings that stay as given, such as scope.")


Choosing = TypeVar("Choosing", bound=SearchSettings | RefusalDirectionSettings)


def with_validation(
    settings: Choosing, model: str | Path, calibration: CalibrationSettings
) -> Choosing:
    """The settings, with the bundled validation prompts where none are named and these will do.

    They will for the bundled model, and for data that are bundled too.
    """
    if settings.validation is not None:
        return settings
    if calibration.data.name != "demo" and not is_demo(model):
        return settings
    bundled = {"validation": DataSource(name="demo", split="validation")}
    return cast(Choosing, settings.model_copy(update=bundled))


def with_held_out(
    choice: SearchSettings, model: str | Path, calibration: CalibrationSettings
) -> tuple[SearchSettings, CalibrationSettings]:
    """A search with prompts to choose on, and what is left to learn from.

    Where no prompts are named and the bundled ones will not do (`with_validation`), it chooses on
    a quarter of the calibration data, and nothing is learnt from these.
    """
    found = with_validation(choice, model, calibration)
    if found.validation is not None:
        return found, calibration
    rest, held_out = split_off(calibration.data)
    return (
        found.model_copy(update={"validation": held_out}),
        calibration.model_copy(update={"data": rest}),
    )


def validation_of(settings: SearchSettings | RefusalDirectionSettings) -> DataSource:
    """The prompts to choose on.

    Raises:
        RegraftError: none are named.
    """
    if settings.validation is None:
        raise RegraftError(
            "No validation prompts are named to choose on, and the bundled ones say nothing about "
            "another model and other data. Give harmful and harmless ones with --validation (in a "
            "recipe `validation`)."
        )
    return settings.validation
