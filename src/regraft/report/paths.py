"""The path of gain in words: a row a step, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.report.words import DASH
from regraft.restoration.methods.gain.path import REASONS, GainPath

PATHS_CAPTION = (
    "Mean loss along the path of gain, safety and utility together, in nats. Calibration: prompts "
    "whose gradients choose the weights, before each step. Held out: prompts that decide how many "
    "weights a step restores, after it. Points: numbers of weights that were tried, those with "
    "losses above the frame left out. Weights are on a logarithmic scale."
)


@dataclass(frozen=True)
class StepRow:
    """What a table has of a step; the first row is the pruned model."""

    step: int
    tried: str
    taken: str
    restored: str
    fit: str
    held_out: str


def step_rows(path: GainPath) -> tuple[StepRow, ...]:
    """The pruned model, then a row a step; losses are sums of safety and utility, in nats."""
    rows = [StepRow(0, DASH, DASH, "0", DASH, f"{path.start.sum:.3f}")]
    for number, (step, taken) in enumerate(zip(path.steps, path.taken, strict=True), start=1):
        tried = ", ".join(f"{one.restored:,}" for one in step.tries)
        losses = f"{step.fit.sum:.3f}", f"{step.held_out.sum:.3f}"
        rows.append(StepRow(number, tried or DASH, f"{taken:,}", f"{step.restored:,}", *losses))
    return tuple(rows)


def ending(path: GainPath) -> str:
    """ "The path ended after 3 steps with 1,043 weights restored: ..." """
    steps, weights = len(path.steps), path.restored
    found = (
        f"after {steps} step{'' if steps == 1 else 's'} with {weights:,} "
        f"weight{'' if weights == 1 else 's'} restored"
    )
    if path.end is None:
        return f"The path has not ended, {found}."
    return f"The path ended {found}: {REASONS[path.end]}."
