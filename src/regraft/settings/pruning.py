"""What is pruned, by which criterion, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, model_validator

from regraft.errors import RegraftError
from regraft.importance.safety_potential import SAFETY_PROMPT
from regraft.models.anatomy import LinearAnatomy
from regraft.pruning.masks import Pattern, Scope
from regraft.pruning.patterns import assign_patterns, parse_override
from regraft.pruning.pruner import Order, PruneMethod, Pruner
from regraft.settings.base import Settings


class PruneSettings(Settings):
    """What is pruned, by which criterion, and how much of it."""

    method: PruneMethod = Field(
        "wanda",
        description="wanda, sparsegpt, snip, magnitude or safety-potential: |W| times the root of "
        "the input energy that a safety prompt adds to harmful prompts (arXiv 2603.14219).",
    )
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of prunable weights set to 0.")
    n_m: str | None = Field(
        None, description="N:M pattern such as 2:4, kept of each M inputs; instead of sparsity."
    )
    scope: Scope | None = Field(
        None,
        description="Weights compete within their row or the matrix; each method's own if not "
        "given: row for wanda and safety-potential, matrix for the others (SparseGPT: of each "
        "block of columns).",
    )
    ignore: tuple[str, ...] = Field(
        (),
        description="Weights left dense, as a pattern: `layers.0.*`, `*.down_proj`; repeat the "
        "flag for more.",
    )
    overrides: tuple[str, ...] = Field(
        (),
        description="Another sparsity for some weights: `*.v_proj=0.3`, `layers.0.*=2:4`; repeat "
        "for more, the last that fits counts.",
    )
    calibrate_on: Literal["harmless", "both"] = Field(
        "harmless",
        description="Harmless prompts and answers (D^u, the paper's), or harmful prompts and "
        "refusals (D^s) as well.",
    )
    damp: float = Field(0.01, gt=0, le=1, description="SparseGPT: share of the mean diagonal.")
    block: int = Field(128, ge=1, description="SparseGPT: columns pruned before an update.")
    prompt: str = Field(
        SAFETY_PROMPT,
        min_length=1,
        description="safety-potential: the safety prompt, before the user's text; `regraft defend "
        "--method safety-prompt` gives it at inference.",
    )
    order: Order = Field(
        "sequential",
        description="Layer by layer on pruned inputs (the paper's), or one-shot. SNIP and "
        "magnitude are always one-shot.",
    )

    @model_validator(mode="after")
    def _check(self) -> PruneSettings:
        try:
            self.pattern()
            self._overrides()
        except RegraftError as error:
            raise ValueError(str(error)) from error
        return self

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        if self.n_m is not None and self.first_set("sparsity"):
            return f"`n_m` {self.n_m} takes the place of `sparsity` {self.sparsity:g}"
        if self.n_m is not None and not self.overrides and self.first_set("scope"):
            return f"`scope` changes nothing where `n_m` is {self.n_m}: groups are within rows"
        not_read = {
            "wanda": ("damp", "block", "prompt"),
            "sparsegpt": ("prompt",),
            "snip": ("damp", "block", "order", "prompt"),
            "magnitude": ("damp", "block", "order", "calibrate_on", "prompt"),
            "safety-potential": ("damp", "block", "calibrate_on"),
        }[self.method]
        name = self.first_set(*not_read)
        return None if name is None else f"`{name}` changes nothing with {self.method}"

    def pattern(self) -> Pattern:
        """The pattern that these settings ask for, overrides aside."""
        if self.n_m is not None:
            return Pattern.parse_n_m(self.n_m)
        return Pattern(self.sparsity, self._scope)

    def patterns(self, linears: Iterable[LinearAnatomy]) -> Mapping[LinearAnatomy, Pattern]:
        """The pattern of each weight that is to be pruned.

        Raises:
            RegraftError: see `assign_patterns`.
        """
        return assign_patterns(linears, self.pattern(), self._overrides(), self.ignore)

    def pruner(self) -> Pruner:
        """The method that these settings ask for."""
        return Pruner(self.method, self.order, self.damp, self.block)

    @property
    def _scope(self) -> Scope:
        return self.scope or ("row" if self.method in ("wanda", "safety-potential") else "matrix")

    def _overrides(self) -> list[tuple[str, Pattern]]:
        return [parse_override(text, self._scope) for text in self.overrides]
