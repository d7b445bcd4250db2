"""Safety-Potential Pruning (Li et al. 2026, arXiv 2603.14219): keep what a safety prompt excites.

    score_ij = |W_ij| * sqrt(max(S_j, 0)),  S_j = mean over prompts of ||X^S_:,j||^2 - ||X^N_:,j||^2

X^S are a linear's inputs over all tokens of a harmful prompt (image tokens too, no answer) with the
safety prompt before its text, X^N those without. Weights compete within their row, layer by layer
on the outputs of the pruned layers before. As a defence the same prompt is given at inference.

The authors' code (github.com/AngelAlita/Safety-Potential-Pruning), read and not copied, takes the
root without the maximum: inputs whose energy falls get NaN there, which sorts last, so that their
weights are kept. Here they go first, as the paper has it. `SAFETY_PROMPT` is in our own words; for
the authors', give the text of their src/prompts.py as `prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from regraft.data.collate import IGNORED, Batch, prompt_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.importance.observe import InputSums, observing
from regraft.models.anatomy import LinearAnatomy

SAFETY_PROMPT = (
    "If the text or the image below contains anything harmful, violent, illegal, graphic or "
    'otherwise inappropriate, answer only "Sorry, I cannot help with that." and neither describe '
    "nor explain it."
)


def with_safety_prompt(examples: Sequence[Example], prompt: str = SAFETY_PROMPT) -> list[Example]:
    """The examples with `prompt` before their text."""
    return [replace(one, instruction=f"{prompt}\n{one.instruction}") for one in examples]


@dataclass(frozen=True)
class PotentialBatch(Batch):
    """A batch of prompts, all of whose tokens are labelled, with the safety prompt or without."""

    prompted: bool = False


def potential_batch(
    processor: Any, examples: Sequence[Example], prompt: str | None = None
) -> PotentialBatch:
    """Encode prompts, with `prompt` before their text or without any; padding has no label.

    Raises:
        RegraftError: see `prompt_batch`.
    """
    shown = examples if prompt is None else with_safety_prompt(examples, prompt)
    batch = prompt_batch(processor, shown)
    padding = batch.inputs["attention_mask"] == 0
    labels = batch.inputs["input_ids"].masked_fill(padding, IGNORED)
    return PotentialBatch(batch.inputs, labels, batch.ids, prompted=prompt is not None)


@dataclass
class AddedEnergy:
    """S_j of every linear, up to the number of prompts, which is the same for all.

    Sums are in float64: what a prompt adds may be small beside outliers that both sums have.
    """

    prompted: InputSums = field(default_factory=lambda: InputSums(_squares))
    plain: InputSums = field(default_factory=lambda: InputSums(_squares))

    def observing(
        self, linears: Mapping[LinearAnatomy, nn.Module]
    ) -> Callable[[Batch], AbstractContextManager[None]]:
        """Make contexts in which forward passes of a `PotentialBatch` are added."""
        with_prompt, without = observing(linears, self.prompted), observing(linears, self.plain)

        def around(batch: Batch) -> AbstractContextManager[None]:
            assert isinstance(batch, PotentialBatch)
            return with_prompt(batch) if batch.prompted else without(batch)

        return around

    def gather(self) -> None:
        """Add up over all processes.

        Raises:
            RegraftError: some ran other linears.
        """
        self.prompted.gather()
        self.plain.gather()

    def of(self, linear: LinearAnatomy) -> tuple[Tensor, int]:
        """max(S_j, 0) times the number of prompts, `[in]` float32, and the tokens with the prompt.

        Raises:
            RegraftError: nothing was fed to the linear, its inputs overflow, or the prompt adds
                energy to none of them (vision tokens that cross-attention reads do not see it).
        """
        total, tokens = self.prompted.of(linear)
        added = (total - self.plain.of(linear)[0]).clamp_(min=0)
        if not added.any():
            raise RegraftError(
                f"The safety prompt adds energy to no input of {linear.key}, so that its weights "
                f"cannot be ranked by it. Leave them dense with --ignore '*.{linear.name}'."
            )
        return added.float(), tokens


def _squares(inputs: Tensor) -> Tensor:
    """`[tokens, in]` -> `[in]`, float64."""
    return inputs.double().square().sum(dim=0)
