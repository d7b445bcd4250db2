"""Defences at inference, the baselines that leave the weights alone: a class a method."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from regraft.defence import DEFENCE_PROMPT
from regraft.errors import RegraftError
from regraft.pruning.pruners.safety_potential import SAFETY_PROMPT
from regraft.settings.base import Settings
from regraft.settings.data import Validation

_OF_SEARCH = ("strengths", "validation", "validation_limit", "max_over_refusal", "max_new_tokens")


class DefenceSettings(Settings):
    """A defence at inference, which leaves the weights as pruning left them."""

    method: str

    @property
    def searches(self) -> bool:
        """Whether something is chosen on validation prompts."""
        return False


class DefencePromptSettings(DefenceSettings):
    """A prompt that goes with the user's text."""

    before: ClassVar[bool]  # whether it stands before the text, or between two copies of it
    prompt: str


class AdaShieldSettings(DefencePromptSettings):
    """Put a defence prompt between two copies of the user's text, after AdaShield-S."""

    before: ClassVar[bool] = False
    method: Literal["adashield"] = "adashield"
    prompt: str = Field(
        DEFENCE_PROMPT,
        min_length=1,
        description="The text; if not given, AdaShield-S's scheme in our own words.",
    )


class SafetyPromptSettings(DefencePromptSettings):
    """Put a safety prompt before the user's text, as Safety-Potential Pruning does."""

    before: ClassVar[bool] = True
    method: Literal["safety-prompt"] = "safety-prompt"
    prompt: str = Field(
        SAFETY_PROMPT,
        min_length=1,
        description="The text; if not given, what `regraft prune --method safety-potential` "
        "calibrates with.",
    )


class RefusalDirectionSettings(DefenceSettings):
    """Add the difference of means of harmful and harmless prompts to the hidden states."""

    method: Literal["refusal-direction"] = "refusal-direction"
    layer: int | None = Field(
        None,
        ge=0,
        description="The decoder layer behind which it is taken and added; if not given, chosen on "
        "the validation prompts from the middle layers.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        description="How many differences of means are added; if not given, chosen on the "
        "validation prompts.",
    )
    strengths: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 1.5, 2.0),
        min_length=1,
        description="Those to choose from; repeat the flag for more.",
    )
    validation: Validation = Field(
        None,
        description="Harmful and harmless prompts on which layer and strength are chosen, none of "
        "which should be evaluated on. The bundled model or data come with some; any other needs "
        "its own.",
    )
    validation_limit: int | None = Field(
        None, ge=1, description="Use only the first of these prompts, of each kind."
    )
    max_over_refusal: float = Field(
        5.0,
        ge=0,
        le=100,
        description="How many percentage points more over-refusal than without it the choice may "
        "cost.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Length of an answer to a validation prompt.")

    @field_validator("strengths")
    @classmethod
    def _check_strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if min(strengths) <= 0:
            raise ValueError(f"strengths must be above 0, not {min(strengths)}")
        return strengths

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if not self.searches and (name := self.first_set(*_OF_SEARCH)):
            raise ValueError(f"`{name}` changes nothing where `layer` and `strength` are given")
        if self.strength is not None and self.first_set("strengths"):
            raise ValueError("`strengths` change nothing where a `strength` is given")
        return self

    @property
    def searches(self) -> bool:
        return None in (self.layer, self.strength)


AnyDefenceSettings = DefencePromptSettings | RefusalDirectionSettings
DEFENCES: dict[str, type[DefenceSettings]] = {
    "adashield": AdaShieldSettings,
    "safety-prompt": SafetyPromptSettings,
    "refusal-direction": RefusalDirectionSettings,
}


def defence_type(method: str) -> type[DefenceSettings]:
    """The settings of a method.

    Raises:
        RegraftError: there is no such method.
    """
    if method not in DEFENCES:
        raise RegraftError(f"There is no defence {method!r}; expected {', '.join(DEFENCES)}.")
    return DEFENCES[method]
