"""Restore by gain: the teacher distribution, held-out prompts, and the steps; resumable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from regraft import ranks
from regraft.checks import check_shares
from regraft.data.collate import response_batch
from regraft.data.example import Example, Reading, hold_out
from regraft.errors import RegraftError
from regraft.files import require_space, size_of
from regraft.importance.gradients import require_gradients
from regraft.importance.losses import DecisionLoss
from regraft.models.load import Source
from regraft.models.placement import PlacedModel
from regraft.models.walk import Walk
from regraft.restoration.gain import MOST_TRIES
from regraft.restoration.gain_step import (
    Losses,
    Problem,
    Prompts,
    groups_of,
    held_out_losses,
    step,
    weights_of,
)
from regraft.restoration.path import REASONS, End, GainPath, Passed, path_to_json, read_path
from regraft.restoration.ranking import Ranking, empty, load_ranking, put, save_ranking
from regraft.settings.compute import ComputeSettings
from regraft.stages.common import (
    each_of_share,
    hidden_state_bytes,
    load_for_walk,
    write_teacher,
)
from regraft.watch import Watch

ALGORITHM = 11  # rankings of another one are not taken for this one's
HELD_OUT = 0.25  # of the prompts of each kind
MOST_STEPS = 5  # with which a path takes at most about ten passes over its prompts
LEAST_FALL = 0.01  # of the held-out loss, relative: with a smaller one a step is the last
CALLED = {"safety": "harmful", "utility": "harmless"}


@dataclass(frozen=True)
class GainJob:
    """Which model is restored, and how.

    Attributes:
        dense: The dense checkpoint, the teacher.
        pruned: The pruned one, restored in memory.
        work: A folder in which every finished step is kept.
        compute: Device, dtype, batch size, placement.
        watch: Progress.
        swap: Prune a kept weight for each that is restored.
        seed: Of the draw of held-out prompts, where all are of one source.
    """

    dense: Source
    pruned: Source
    work: Path
    compute: ComputeSettings
    watch: Watch
    swap: bool
    seed: int


def restore_by_gain(job: GainJob, readings: Mapping[str, Reading], most: int) -> Ranking:
    """The order in which weights are restored, step by step; see `restoration.gain`.

    Its `about` has the `steps`, the held-out losses of the pruned model at the `start`, and why it
    ended.

    Args:
        job: The models, and how they are run.
        readings: "safety" (harmful prompts) and "utility" (harmless ones) -> examples with the
            dense model's answers, see `imitation_data`.
        most: How many weights at most.

    Raises:
        RegraftError: the pruned model's loss on held-out prompts is not finite.
    """
    dense, pruned, work = job.dense, job.pruned, job.work
    compute, watch = job.compute, job.watch
    work.mkdir(parents=True, exist_ok=True)
    model, sides = _prepare(job, readings)
    groups = groups_of(dense, pruned) if job.swap else {}
    problem = Problem(model, dense, pruned, sides, work / "states", job.swap, groups)
    needed = sum(hidden_state_bytes(dense, side.fit) for side in sides)
    ranking, file = empty(), work / "so-far.safetensors"
    if ranks.decided(file.exists):
        ranking = load_ranking(file)
        put(ranking, weights_of(model.network, dense.anatomy), dense)
    if (path := read_path(ranking.about)) is None:
        with watch.task("Held-out loss of the pruned model", *_work(sides, 0, 1)) as done:
            path = GainPath(_finite(held_out_losses(sides, done), compute))
    while (end := _end(path, most)) is None:
        now = path.held_out
        require_space(work, needed - size_of(work / "states"))  # a killed step leaves some there
        number = len(path.steps) + 1
        with watch.task(f"Step {number} of gain", *_work(sides, 2, MOST_TRIES)) as done:
            new = step(problem, _room(path, most), ranking, now, done)
        ranking = ranking.then(new.ranking)
        path = replace(path, steps=(*path.steps, Passed.of(len(ranking), new)))
        watch.note(_described(path.steps[-1], now))
        ranking = replace(ranking, about=path_to_json(path))
        if ranks.first():
            save_ranking(file, ranking)
        ranks.barrier()
    watch.note(f"Path of {len(ranking):,} weights in {len(path.steps)} steps: {REASONS[end]}")
    return replace(ranking, about=path_to_json(replace(path, end=end)))


def _finite(losses: Losses, compute: ComputeSettings) -> Losses:
    if not math.isfinite(losses.sum):
        raise RegraftError(
            f"The pruned model's loss on held-out prompts is {losses.sum}: activations overflow "
            f"with --dtype {compute.dtype}, or a weight is not finite. Take float32 or prune again."
        )
    return losses


def _room(path: GainPath, most: int) -> int:
    """How many weights the next step may restore.

    At most twice as many as the step before, so that the line search is not spent on numbers that
    were too many already.
    """
    return min(most - path.restored, 2 * path.taken[-1]) if path.steps else most


def path_limit(pruned: int) -> int:
    """How many weights a path may have, so that its candidates fit into memory.

    Paths end long before: on a 0.5 B model at a few weights of a million pruned ones.
    """
    return min(pruned, max(10_000, pruned // 1_000))


def _end(path: GainPath, most: int) -> End | None:
    """Why there is no further step, if there is none."""
    if not path.steps:
        return None
    before = replace(path, steps=path.steps[:-1]).held_out
    if not path.steps[-1].candidates:
        return "candidates"
    if before.sum - path.held_out.sum <= LEAST_FALL * max(before.sum, 0):
        return "held-out"
    return "limit" if path.restored >= most or len(path.steps) == MOST_STEPS else None


def _described(last: Passed, before: Losses) -> str:
    tried = ", ".join(f"{one.restored:,}: {one.loss:.3f}" for one in last.tries)
    return (
        f"calibration loss {last.fit.sum:.3f} nats before the step; held-out loss "
        f"{before.sum:.3f} -> {last.held_out.sum:.3f} (weights tried: {tried or 'none'}); "
        f"{last.restored:,} restored"
    )


def _work(sides: Sequence[Prompts], passes: int, tries: int) -> tuple[int, str]:
    """How much there is to do, at most: passes over calibration prompts and held-out ones."""

    def prompts(walk: Walk) -> int:
        return sum(len(batch.ids) for batch in walk.batches) * walk.layers

    own = sum(passes * prompts(side.fit) + tries * prompts(side.held_out) for side in sides)
    return own, "samples x layers"


def _prepare(
    job: GainJob, readings: Mapping[str, Reading]
) -> tuple[PlacedModel, tuple[Prompts, Prompts]]:
    """The pruned model and both kinds of prompts, before its layers."""
    dense, pruned, work, compute, watch = job.dense, job.pruned, job.work, job.compute, job.watch
    parts = {kind: _split(kind, readings[kind], watch, job.seed) for kind in CALLED}
    teachers = {kind: work / f"teacher-{kind}.safetensors" for kind in CALLED}
    asks = not ranks.decided(lambda: all(path.exists() for path in teachers.values()))
    model, processor = load_for_walk(
        dense if asks else pruned, compute, watch, processor_from=dense
    )
    require_gradients(model.dtype)
    walks: dict[str, list[Walk]] = {kind: [] for kind in CALLED}
    total = sum(len(examples) for part in parts.values() for examples in part)
    with watch.task("Reading the prompts", total) as done:
        for kind, part in parts.items():
            for examples in part:
                batches = each_of_share(processor, response_batch, examples, compute)
                walks[kind].append(Walk(model, batches))
                done(len(examples))
    if asks:
        write_teacher(walks, teachers, watch)
        model.network.to("meta")  # one model in memory at a time; the walks still hold this one
        model, _ = load_for_walk(pruned, compute, watch, processor_from=dense)
        walks = {kind: [walk.on(model) for walk in pair] for kind, pair in walks.items()}
    safety, utility = (
        Prompts(fit, held_out, DecisionLoss(load_file(teachers[kind])))
        for kind, (fit, held_out) in walks.items()
    )
    return model, (safety, utility)


def check_gain_prompts(
    readings: Mapping[str, Reading], seed: int, compute: ComputeSettings
) -> None:
    """Check that prompts of each kind can be held out, and shared by processes.

    A process may have no held-out prompts, but gradients are taken by each.

    Args:
        readings: Kind -> prompts.
        seed: Of the draw of held-out prompts.
        compute: The batch size.

    Raises:
        RegraftError: there are too few.
    """
    for reading in readings.values():
        if (count := len(reading.examples)) < 2:
            raise RegraftError(
                f"{reading.source}: gain holds prompts of each kind out to see where to stop, and "
                f"needs at least 2; there are {count}. Give more prompts, or raise --samples."
            )
        check_shares(hold_out(reading.examples, HELD_OUT, seed)[0], compute)


def _split(
    kind: str, reading: Reading, watch: Watch, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(prompts to take gradients of, prompts held out)."""
    fit, held = hold_out(reading.examples, HELD_OUT, seed)
    apart = {one.category for one in held} - {one.category for one in fit}
    whole = sum(one.category in apart for one in held)
    parts = [f"{whole} of {', '.join(sorted(apart))}"] if whole else []
    parts += [f"{len(held) - whole} drawn"] if whole < len(held) else []
    watch.note(
        f"{CALLED[kind]} prompts: {len(fit)} for gradients, {len(held)} held out "
        f"({', '.join(parts)})"
    )
    return fit, held
