"""Settings of defences at inference, baselines that change no weights: one class per method."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from regraft.defence import DEFENCE_PROMPT, MAX_STRENGTH
from regraft.errors import RegraftError
from regraft.pruning.pruners.safety_potential import SAFETY_PROMPT
from regraft.settings.base import Settings
from regraft.settings.data import Validation

_OF_SEARCH = ("strengths", "validation", "validation_limit", "max_over_refusal", "max_new_tokens")


class DefenceSettings(Settings):
    """Base class of the settings of a defence at inference."""

    method: str

    @property
    def searches(self) -> bool:
        """Whether something is chosen on validation prompts."""
        return False


class DefencePromptSettings(DefenceSettings):
    """A prompt that is added to the user's text."""

    before: ClassVar[bool]  # before the text, else between two copies of it
    prompt: str


class AdaShieldSettings(DefencePromptSettings):
    """Put a defence prompt between two copies of the user's text, after AdaShield-S."""

    before: ClassVar[bool] = False
    method: Literal["adashield"] = "adashield"
    prompt: str = Field(
        DEFENCE_PROMPT,
        min_length=1,
        description="The prompt; by default AdaShield-S's scheme in our own words.",
    )


class SafetyPromptSettings(DefencePromptSettings):
    """Put a safety prompt before the user's text, as Safety-Potential Pruning does."""

    before: ClassVar[bool] = True
    method: Literal["safety-prompt"] = "safety-prompt"
    prompt: str = Field(
        SAFETY_PROMPT,
        min_length=1,
        description="The prompt; by default the one that `regraft prune --method "
        "safety-potential` calibrates with.",
    )


class RefusalDirectionSettings(DefenceSettings):
    """Add the difference of means of harmful and harmless prompts to the hidden states."""

    method: Literal["refusal-direction"] = "refusal-direction"
    layer: int | None = Field(
        None,
        ge=0,
        description="Decoder layer after which the direction is taken and added; by default chosen "
        "from the middle layers on the validation prompts.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=MAX_STRENGTH,
        description="Factor by which the difference is multiplied; by default chosen on the "
        "validation prompts.",
    )
    strengths: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 1.5, 2.0),
        min_length=1,
        description="Strengths to choose from: a list, on the command line one per flag.",
    )
    validation: Validation = Field(
        None,
        description="Harmful and harmless prompts for choosing layer and strength; do not evaluate "
        "on them. Required, unless the model or the data are the bundled ones.",
    )
    validation_limit: int | None = Field(
        None, ge=1, description="Use only the first N of these prompts of each kind."
    )
    max_over_refusal: float = Field(
        5.0,
        ge=0,
        le=100,
        description="Most percentage points of over-refusal that the direction may add.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Maximum tokens of a validation answer.")

    @field_validator("strengths")
    @classmethod
    def _check_strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        for strength in strengths:
            if not 0 < strength <= MAX_STRENGTH:
                raise ValueError(f"strengths must be in (0, {MAX_STRENGTH:g}], not {strength}")
        return strengths

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if not self.searches and (name := self.first_set(*_OF_SEARCH)):
            raise ValueError(f"`{name}` has no effect when `layer` and `strength` are given")
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
    """The settings class of a method.

    Raises:
        RegraftError: there is no such method.
    """
    if method not in DEFENCES:
        raise RegraftError(f"There is no defence {method!r}; expected {', '.join(DEFENCES)}.")
    return DEFENCES[method]
