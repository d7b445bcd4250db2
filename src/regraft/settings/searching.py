"""Search for a number of weights, tuning, and the validation prompts that both choose on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar, cast

from pydantic import Field, model_validator

from regraft.data.sources import DataSource, of_split, split_off
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import Reference
from regraft.settings.base import EXPERT, NAMED, Settings
from regraft.settings.data import CalibrationSettings, Validation
from regraft.settings.defending import RefusalDirectionSettings


class BoundSettings(Settings):
    """Which numbers of weights are tried on validation prompts, and bounds for the rates there."""

    validation: Validation = Field(
        None,
        description="Prompts to choose on, not to report on; by default a quarter of --data, held "
        "out; recipes need them.",
    )
    validation_limit: Annotated[int | None, EXPERT] = Field(
        None, ge=1, description="Use only the first N of each kind."
    )
    points: int = Field(8, ge=1, description="How many numbers of weights to try.")
    most: float | None = Field(
        None, gt=0, description="Try at most this many weights per 10,000 pruned."
    )
    over_refusal: float = Field(
        1.0,
        ge=-100,
        le=100,
        description="Bound: points of over-refusal above `reference`.",
    )
    utility: float = Field(
        0.0, ge=0, le=100, description="Bound: points of utility below the pruned model."
    )
    reference: Annotated[Reference, EXPERT, NAMED] = Field(
        "higher", description="Model whose over-refusal is the reference: pruned, dense or higher."
    )


class SearchSettings(BoundSettings):
    """How many weights of a ranking are restored, chosen on validation prompts."""

    target_asr: float | None = Field(
        None, ge=0, le=100, description="Take the fewest weights with an ASR (%) this low."
    )
    target_rsr: float | None = Field(
        None, ge=1, le=200, description="Take the fewest weights with an RSR (%) this high."
    )

    @model_validator(mode="after")
    def _check(self) -> SearchSettings:
        if self.target_asr is not None and self.target_rsr is not None:
            raise ValueError("`target_asr` and `target_rsr` exclude each other; give one of them")
        return self


class TuneSettings(Settings):
    """How a method's settings are tuned; the method says which, and in which ranges."""

    trials: int = Field(40, ge=1, description="Finished trials in total.")
    sampler_seed: int = Field(
        0, ge=0, description="Seed of the sampler, for the same trials again."
    )
    random_trials: int = Field(10, ge=1, description="Random trials before TPE begins.")
    keep: tuple[str, ...] = Field((), description="Settings not to tune, such as scope.")


Choosing = TypeVar("Choosing", bound=SearchSettings | RefusalDirectionSettings)


def with_validation(
    settings: Choosing, model: str | Path, calibration: CalibrationSettings
) -> Choosing:
    """Fill in the bundled validation prompts if none are named and model or data are bundled."""
    # a data set's module, which importing a method must not load
    from regraft.data.readers.demo import is_demo

    if settings.validation is not None:
        return settings
    if calibration.data.name != "demo" and not is_demo(model):
        return settings
    bundled = {"validation": DataSource(name="demo", split="validation")}
    return cast(Choosing, settings.model_copy(update=bundled))


def with_held_out(
    choice: SearchSettings,
    model: str | Path,
    calibration: CalibrationSettings,
    note: Callable[[str], None],
) -> tuple[SearchSettings, CalibrationSettings]:
    """A search with validation prompts, and the calibration data without them.

    If none are named or bundled (`with_validation`), a quarter of the calibration data is held out.
    """
    choice = with_validation(choice, model, calibration)
    if choice.validation is not None:
        return choice, calibration
    note("No validation prompts were given: a quarter of the calibration prompts is held out.")
    rest, held_out = split_off(calibration.source)
    return (
        choice.model_copy(update={"validation": held_out}),
        calibration.model_copy(update={"data": rest}),
    )


def validation_of(settings: SearchSettings | RefusalDirectionSettings) -> DataSource:
    """The validation prompts.

    Raises:
        RegraftError: none are named.
    """
    if settings.validation is None:
        raise RegraftError(
            "No validation prompts are named to choose on, and the bundled ones are only for the "
            "bundled model or data. Give harmful and harmless ones with --validation (in a recipe "
            "`validation`)."
        )
    return settings.validation


def suites_of(settings: SearchSettings | RefusalDirectionSettings) -> list[DataSource]:
    """The harmful and the harmless validation prompts.

    Raises:
        RegraftError: none are named, or only one kind.
    """
    validation = of_split(validation_of(settings), "train")
    if validation.kind is not None:
        raise RegraftError(
            f"{validation}: to choose on, both harmful and harmless prompts are needed. Leave out "
            f"#{validation.kind}."
        )
    return [validation.model_copy(update={"kind": kind}) for kind in ("harmful", "harmless")]
