"""Restore by gain: settings, the loop over steps, and when it stops.

objective.py has the method in pseudo-code and its formulas, step.py one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field

from regraft import distributed
from regraft.data.example import KINDS, Example, Reading, hold_out
from regraft.disk.files import require_space, size_of
from regraft.errors import RegraftError
from regraft.loading import check_shares, hidden_state_bytes
from regraft.models.load import Source
from regraft.progress import Progress
from regraft.pruning.gradients import BOTH_WAYS
from regraft.restoration.base import DEFAULT_BUDGET, Budgeted, Context, Method, Needs
from regraft.restoration.methods.gain.path import (
    LIMITS,
    MOST_STEPS,
    REASONS,
    End,
    GainPath,
    Losses,
    Room,
    StepRecord,
    path_to_json,
    read_path,
)
from regraft.restoration.methods.gain.step import (
    EXPECTED_TRIES,
    Problem,
    Prompts,
    held_out_losses,
    step,
    weights_of,
)
from regraft.restoration.ranking import Edits, Ranking, empty, joined, load_ranking, save_ranking
from regraft.restoration.teacher import with_teacher
from regraft.settings.compute import ComputeSettings

HELD_OUT = 0.25  # share of the prompts of each kind
LEAST_FALL = 0.01  # relative fall of the held-out loss below which a step is the last


class GainSettings(Budgeted):
    """Restore weights predicted to bring answers closest to the dense model's; stops by itself."""

    method: Literal["gain"] = "gain"
    budget: float | None = Field(
        None,
        gt=0,
        lt=10_000,
        description="Maximum number of restored weights per 10,000 pruned ones; "
        f"{DEFAULT_BUDGET:g} if neither this nor a count is given. Gain usually stops far "
        "earlier by itself, when more do not help on held-out prompts.",
    )
    swap: bool = Field(
        False,
        description="Prune a kept weight of the same row or N:M group for each restored one, so "
        "that sparsity stays exactly as it was.",
    )

    @property
    def exchanges(self) -> bool:
        return self.swap

    @property
    def only_pruned(self) -> str | None:
        if not self.swap:
            return None
        return "a swap prunes a weight that pruning kept. Leave out --swap"

    def without_amount(self) -> Self:
        """The settings without the budget, which takes a prefix of the same path."""
        return self.model_copy(update={"budget": None, "count": None})


class Gain(Method[GainSettings]):
    """See the module."""

    name, settings_type = "gain", GainSettings
    algorithm: ClassVar[int] = 13

    def needs(self, settings: GainSettings) -> Needs:
        """The dense model's own answers."""
        return Needs(answers=True, passes=30)  # five steps, measured, work on weights included

    def check(
        self,
        settings: GainSettings,
        dense: Source,
        seed: int,
        compute: ComputeSettings,
        prompts: Mapping[str, Reading],
    ) -> None:
        """Check that each kind has enough prompts to hold some out and to share among processes.

        A process may have no held-out prompts, but each needs some for gradients.
        """
        for reading in prompts.values():
            if (count := len(reading.examples)) < 2:
                raise RegraftError(
                    f"{reading.source}: gain holds out prompts of each kind to decide when to "
                    f"stop, and needs at least 2; got {count}. Give more prompts, or raise "
                    "--samples."
                )
            check_shares(hold_out(reading.examples, HELD_OUT, seed)[0], compute)

    def rank(self, settings: GainSettings, context: Context) -> Ranking:
        """Restore weights step by step; the ranking is the order in which they are restored.

        Its `about` is the path: held-out losses of the pruned model (`start`), `steps` and why it
        ended (`end`). Every finished step is saved in the work folder.

        Raises:
            RegraftError: the pruned model's loss on held-out prompts is not finite.
        """
        context.work.mkdir(parents=True, exist_ok=True)
        progress, most = context.progress, path_limit(context.survey.restorable)
        problem = _prepare(context, settings.swap)
        ranking, file = empty(), context.work / "so-far.safetensors"
        if distributed.decided(file.exists):
            ranking = load_ranking(file)
            weights = weights_of(problem.model.network, context.dense.architecture)
            Edits(ranking, weights, context.dense).put(len(ranking))
        if (path := read_path(ranking.about)) is None:
            path = GainPath(_start(problem, context))
        while (end := _end(path, most)) is None:
            _require_space(problem)
            before, number = path.held_out, len(path.steps) + 1
            work = _work(problem, BOTH_WAYS, EXPECTED_TRIES)
            with progress.task(f"Step {number} of gain", *work) as done:
                restored, record = step(problem, _room(path, most), ranking, before, done)
            path = replace(path, steps=(*path.steps, record))
            ranking = replace(joined([ranking, restored]), about=path_to_json(path))
            progress.note(_described(record, before))
            if distributed.first():
                save_ranking(file, ranking)
            distributed.barrier()
        progress.note(
            f"Path of {len(ranking):,} weights in {len(path.steps)} steps: {REASONS[end]}"
        )
        return replace(ranking, about=path_to_json(replace(path, end=end)))

    def label(self, settings: GainSettings) -> str:
        return "gain, swapped" if settings.swap else "gain"


def _start(problem: Problem, context: Context) -> Losses:
    """Losses of the pruned model on the held-out prompts."""
    label = "Held-out loss of the pruned model"
    with context.progress.task(label, *_work(problem, 0, 1)) as done:
        losses = held_out_losses(problem.sides, done)
    if not math.isfinite(losses.sum):
        raise RegraftError(
            f"The pruned model's loss on held-out prompts is {losses.sum}: activations overflow "
            f"with --dtype {context.compute.dtype}, or a weight is not finite. Use float32 or "
            "prune again."
        )
    return losses


def _require_space(problem: Problem) -> None:
    """Raise unless the layer inputs of a step fit on the disk."""
    needed = sum(hidden_state_bytes(problem.dense, side.gradient) for side in problem.sides)
    reused = size_of(problem.scratch)  # files of a killed step, which this one overwrites
    require_space(problem.scratch.parent, needed - reused)


def _room(path: GainPath, most: int) -> Room:
    """Maximum number of weights of the next step.

    It is twice that of the step before, so that the line search does not waste tries on numbers
    that were already too many.
    """
    left = Room(most - path.restored, "weights")
    return min(Room(2 * path.taken[-1], "doubling"), left) if path.steps else left


def path_limit(restorable: int) -> int:
    """Maximum number of weights of a path, so that its candidates fit into memory.

    Paths end far earlier: on a 0.5 B model after a few weights per million pruned ones.
    """
    return min(restorable, max(10_000, restorable // 1_000))


def _end(path: GainPath, most: int) -> End | None:
    """Why the path ends here, or None to take another step."""
    if not path.steps:
        return None
    before = replace(path, steps=path.steps[:-1]).held_out
    if not path.steps[-1].candidates:
        return "candidates"
    least = LEAST_FALL * max(before.sum, 0)  # rounding can make a loss of 0 slightly negative
    if before.sum - path.held_out.sum <= least:
        return "held-out"
    if path.restored >= most:
        return "weights"
    return "steps" if len(path.steps) == MOST_STEPS else None


def _described(last: StepRecord, before: Losses) -> str:
    tried = ", ".join(f"{one.number:,}: {one.loss:.3f}" for one in last.tries)
    return (
        f"loss on gradient prompts {last.gradient.sum:.3f} nats before the step; held-out loss "
        f"{before.sum:.3f} -> {last.held_out.sum:.3f} (weights tried: {tried or 'none'}); "
        f"{last.restored:,} restored; {LIMITS[last.limit]}"
    )


def _work(problem: Problem, passes: int, tries: int) -> tuple[int, str]:
    """(total work, its unit) of passes over gradient prompts and tries over held-out ones."""
    work = sum(passes * side.gradient.work + tries * side.held_out.work for side in problem.sides)
    return work, "samples x layers"


def _prepare(context: Context, swap: bool) -> Problem:
    """Load the pruned model and embed the prompts of both kinds."""
    answered = context.answered or {}
    parts = {kind: _split(kind, answered[kind], context.progress, context.seed) for kind in KINDS}
    model, embedded, losses = with_teacher(context, parts)
    safety, utility = (
        Prompts(gradient, held_out, losses[kind]) for kind, (gradient, held_out) in embedded.items()
    )
    scratch = context.work / "states"
    pair, kind = (context.dense, context.pruned), context.survey.kind
    return Problem(model, *pair, (safety, utility), scratch, swap, kind)


def _split(
    kind: str, reading: Reading, progress: Progress, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(prompts for gradients, held-out prompts); notes how many of which categories."""
    gradient, held = hold_out(reading.examples, HELD_OUT, seed)
    whole = {one.category for one in held} - {one.category for one in gradient}
    in_whole = sum(one.category in whole for one in held)  # their categories are held out entirely
    parts = [f"{in_whole} of {', '.join(sorted(whole))}"] if in_whole else []
    parts += [f"{len(held) - in_whole} drawn"] if in_whole < len(held) else []
    progress.note(
        f"{KINDS[kind]} prompts: {len(gradient)} for gradients, {len(held)} held out "
        f"({', '.join(parts)})"
    )
    return gradient, held


PLUGIN = Gain()
