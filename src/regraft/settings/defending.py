"""Defences at inference, the baselines that leave the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from regraft.defence.prompt import DEFENCE_PROMPT
from regraft.pruning.pruners.safety_potential import SAFETY_PROMPT
from regraft.settings.base import Settings
from regraft.settings.data import Validation

_OF_SEARCH = ("strengths", "validation_limit", "max_over_refusal", "max_new_tokens")


class DefenceSettings(Settings):
    """A defence at inference, which leaves the weights as pruning left them."""

    method: Literal["adashield", "safety-prompt", "refusal-direction"] = Field(
        "adashield",
        description="adashield: a defence prompt around the user's text. safety-prompt: one before "
        "it, that of Safety-Potential Pruning. refusal-direction: the "
        "difference of means of harmful and harmless prompts added to the hidden states.",
    )
    prompt: str = Field(
        DEFENCE_PROMPT,
        min_length=1,
        description="adashield, safety-prompt: the text; if not given, AdaShield-S's scheme in our "
        "own words, or what `regraft prune --method safety-potential` calibrates with.",
    )
    layer: int | None = Field(
        None,
        ge=0,
        description="Direction: the decoder layer behind which it is taken and added; if not "
        "given, chosen on the validation prompts from the middle layers.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        description="Direction: how many differences of means are added; if not given, chosen on "
        "the validation prompts.",
    )
    strengths: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 1.5, 2.0),
        min_length=1,
        description="Direction: those to choose from; repeat the flag for more.",
    )
    validation: Validation = Field(
        None,
        description="Direction: harmful and harmless prompts on which layer and strength are "
        "chosen, none of which should be evaluated on. The bundled model or data come with some; "
        "any other needs its own.",
    )
    validation_limit: int | None = Field(
        None, ge=1, description="Direction: use only the first of these prompts, of each kind."
    )
    max_over_refusal: float = Field(
        5.0,
        ge=0,
        le=100,
        description="Direction: how many percentage points more over-refusal than without it the "
        "choice may cost.",
    )
    max_new_tokens: int = Field(
        64, ge=1, description="Direction: length of an answer to a validation prompt."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_prompt(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("method") == "safety-prompt":
            return {"prompt": SAFETY_PROMPT, **given}
        return given

    @field_validator("strengths")
    @classmethod
    def _check_strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if min(strengths) <= 0:
            raise ValueError(f"strengths must be above 0, not {min(strengths)}")
        return strengths

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        if self.method != "refusal-direction":
            name = self.first_set("layer", "strength", *self._of_search)
            return None if name is None else f"`{name}` changes nothing with {self.method}"
        if self.first_set("prompt"):
            return "`prompt` changes nothing with refusal-direction"
        if not self.searches and (name := self.first_set(*self._of_search)):
            return f"`{name}` changes nothing where layer and strength are given"
        if self.strength is not None and self.first_set("strengths"):
            return "`strengths` changes nothing where a strength is given"
        return None

    @property
    def _of_search(self) -> tuple[str, ...]:
        """Settings of the search; bundled prompts are filled in and not set by anyone."""
        bundled = self.validation is not None and self.validation.name == "demo"
        return _OF_SEARCH if bundled else ("validation", *_OF_SEARCH)

    @property
    def searches(self) -> bool:
        """Whether layer or strength are chosen on validation prompts."""
        return self.method == "refusal-direction" and None in (self.layer, self.strength)
