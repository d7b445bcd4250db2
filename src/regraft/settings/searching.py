"""How many weights are restored, chosen on validation prompts, and which settings are tuned."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from regraft.evaluation.tradeoff import Reference
from regraft.settings.base import EXPERT, NAMED, Settings
from regraft.settings.data import Validation


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
