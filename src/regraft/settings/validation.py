"""On which prompts a choice is made."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, cast

from regraft.data.demo import is_demo
from regraft.data.sources import DataSource, split_off
from regraft.errors import RegraftError
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import RefusalDirectionSettings
from regraft.settings.searching import SearchSettings

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
