"""Safety-Potential Pruning (Li et al. 2026, arXiv 2603.14219): keep inputs a safety prompt excites.

    score_ij = |W_ij| * sqrt(max(S_j, 0)),  S_j = mean over prompts of ||X^S_:,j||^2 - ||X^N_:,j||^2

    for each layer, first to last:
        S_j  = squared inputs with the safety prompt less those without it, over all prompts
        W_ij = 0                                        where the score is lowest in row i
        run the pruned layer: its outputs are the next layer's inputs

X^S are a linear's inputs over all tokens of a harmful prompt (image tokens included, no answer)
with the safety prompt before its text, X^N those without it. As a defence the same prompt is given
at inference.

The authors' code (github.com/AngelAlita/Safety-Potential-Pruning; not copied) takes the root
without the maximum: inputs whose energy falls get NaN, which sorts last, so their weights are kept.
Here they are pruned first, as in the paper. `SAFETY_PROMPT` is in our own words; to use the
authors', give the text of their src/prompts.py as `prompt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from regraft.data.collate import IGNORED, Batch, prompt_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture
from regraft.pruning.base import Encode, InputPruner, LayerwiseSettings, Note
from regraft.pruning.inputs import Sums

SAFETY_PROMPT = (
    "If the text or the image below contains anything harmful, violent, illegal, graphic or "
    'otherwise inappropriate, answer only "Sorry, I cannot help with that." and neither describe '
    "nor explain it."
)


class SafetyPotentialSettings(LayerwiseSettings):
    """Settings of Safety-Potential Pruning."""

    method: Literal["safety-potential"] = "safety-potential"
    prompt: str = Field(
        SAFETY_PROMPT,
        min_length=1,
        description="The safety prompt, before the user's text; `regraft analyse defence "
        "safety-prompt` gives it at inference.",
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Harmful prompts alone, whose responses are not read."""
        return ("safety",)


class SafetyPotential(InputPruner):
    """|W| times the root of the input energy that a safety prompt adds to harmful prompts."""

    name, label, settings_type = "safety-potential", "Safety-Potential", SafetyPotentialSettings
    reads_responses = False
    restores = False  # its statistic compares prompts with and without the safety prompt, not D^u

    def accumulate(self, inputs: Tensor) -> Tensor:
        """Sum over tokens of squared inputs `[tokens, in]`, `[in]` float64.

        In float64, since the difference may be small beside outliers that both sums contain.
        """
        return inputs.double().square().sum(dim=0)

    def add(self, inputs: Tensor, batch: Batch) -> Tensor:
        """Two sums `[2, in]`: with the safety prompt and without it.

        They are kept apart, because one running difference would leave rounding errors to rank by
        where the prompt changes nothing, as for the vision tokens that cross-attention reads.
        """
        assert isinstance(batch, PotentialBatch)
        energy = self.accumulate(inputs)
        rows = (energy, energy.new_zeros(()).expand_as(energy))
        return torch.stack(rows if batch.prompted else rows[::-1])

    def statistics(
        self, linears: Iterable[LinearArchitecture], found: Sums, note: Note = lambda _: None
    ) -> Iterator[tuple[LinearArchitecture, Tensor]]:
        """max(S_j, 0) times the number of prompts, a constant factor. `[in]` float32.

        Raises:
            RegraftError: a linear never ran, its inputs overflow, or the prompt adds energy to none
                of them.
        """
        for linear in linears:
            prompted, plain = found.of(linear)
            added = (prompted - plain).clamp_(min=0)
            if not added.any():
                raise RegraftError(
                    f"The safety prompt adds energy to no input of {linear.key}, so its weights "
                    f"cannot be ranked. Leave them dense with --ignore '*.{linear.name}'."
                )
            yield linear, added.float()

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """|W_ij| sqrt(max(S_j, 0)), up to a constant factor. `[out, in]` float32."""
        return weight.float().abs().mul_(statistic.sqrt())

    def encoders(self, settings: Any) -> tuple[Encode, ...]:
        """Encode all prompts without the safety prompt, then all with it."""
        return potential_batch, partial(potential_batch, prompt=settings.prompt)


def with_safety_prompt(examples: Sequence[Example], prompt: str = SAFETY_PROMPT) -> list[Example]:
    """The examples with `prompt` before their text."""
    return [replace(one, instruction=f"{prompt}\n{one.instruction}") for one in examples]


@dataclass(frozen=True)
class PotentialBatch(Batch):
    """A batch of prompts, with the safety prompt or without; all of their tokens count."""

    prompted: bool = False


def potential_batch(
    processor: Any, examples: Sequence[Example], prompt: str | None = None
) -> PotentialBatch:
    """Encode prompts, with `prompt` before their text if given; all tokens but padding count."""
    shown = examples if prompt is None else with_safety_prompt(examples, prompt)
    batch = prompt_batch(processor, shown)
    padding = batch.inputs["attention_mask"] == 0
    labels = batch.inputs["input_ids"].masked_fill(padding, IGNORED)
    return PotentialBatch(batch.inputs, labels, batch.ids, prompted=prompt is not None)


PLUGIN = SafetyPotential()
