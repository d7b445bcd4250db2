"""Train the values of a few weights instead of restoring the dense ones; writes a patch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import ranks
from regraft.checks import check_gradients, check_restorable, check_shares, told
from regraft.data.collate import response_batch
from regraft.data.example import Example, Reading
from regraft.errors import RegraftError
from regraft.files import atomic_file, file_digest
from regraft.keys import describe, is_done, working
from regraft.models.load import Source
from regraft.models.placement import PlacedModel
from regraft.models.walk import Walk
from regraft.pruning.gradients import require_gradients
from regraft.restoration.fine_tune import TRAINED, Side, SparseAdam, train
from regraft.restoration.patch import Patch, TensorPatch, load_patch, save_patch
from regraft.restoration.ranking import KEPT, Ranking, by_linear, load_ranking, rank
from regraft.restoration.realign import check_pair, survey
from regraft.restoration.selection import random_keys
from regraft.restoration.teacher import DecisionLoss
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.realigning import RealignSettings
from regraft.stages.answering import beside, imitation_data
from regraft.stages.common import each_of_share, load_for_walk, write_teacher
from regraft.stages.realigning import require_made_of, taken, with_violations
from regraft.watch import Silent, Watch

MINIBATCH = 8  # prompts of each kind in an update
KINDS = ("safety", "utility")


def fine_tune(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: RealignSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
    *,
    ranking_file: Path | None = None,
    responses: Path | None = None,
) -> Patch:
    """Train values at the first positions of a ranking, or at random ones; writes the patch `out`.

    Prompts and losses are gain's: the divergence from the dense model's answers. Every pass goes
    once forward and once backward over all prompts, with an update after `MINIBATCH` of each kind.

    Args:
        dense: The dense checkpoint, the teacher.
        pruned: The same network pruned, where training begins.
        out: The patch file.
        settings: `learning_rate`, `passes`, and how many weights.
        calibration: Prompts of both kinds; random positions are drawn by its seed, as for "random".
        compute: Device, dtype, batch size, placement.
        watch: Progress.
        ranking_file: Whose first weights are trained; random pruned ones without.
        responses: Folder for the dense model's answers, by default one beside `out`.

    Raises:
        RegraftError: bad input, or training diverges.
    """
    watch = watch or Silent()
    check_pair(dense, pruned)
    check_gradients(dense, compute, "Fine-tuning")
    inputs = {"dense": dense.checkpoint.fingerprint, "pruned": pruned.checkpoint.fingerprint}
    if ranking_file is not None:
        require_made_of(load_ranking(ranking_file), ranking_file, dense, pruned)
        inputs["ranking"] = file_digest(ranking_file)
    looked = survey(dense, pruned)
    chosen = _chosen(dense, pruned, settings, calibration, ranking_file, looked.restorable)
    readings = imitation_data(dense, calibration, compute, responses or beside(out), watch)
    about = describe("realign", inputs, settings, compute, readings)
    about |= {"seed": calibration.seed, "heads": [], "count": None, "values": TRAINED}
    about |= taken(looked)
    if not is_done(out, out, about, lambda: load_patch(out).about):
        for role, reading in zip(
            ("Harmful prompts", "Harmless prompts"), readings.values(), strict=True
        ):
            watch.note(told(role, reading))
        with working(out, about) as work:
            job = _Job(dense, pruned, work, settings, compute, calibration.seed, watch)
            values, losses = job.run(readings, chosen)
            about["steps"] = [{"pass": i + 1, "loss": loss} for i, loss in enumerate(losses)]
            if ranks.first():
                save_patch(out, with_violations(_patch(chosen, values, pruned, about), pruned))
    return load_patch(out)


def _chosen(
    dense: Source,
    pruned: Source,
    settings: RealignSettings,
    calibration: CalibrationSettings,
    ranking_file: Path | None,
    restorable: int,
) -> Ranking:
    """Where values are trained: among weights that are 0 now, and were not in the dense model."""
    if ranking_file is not None:
        ranking = load_ranking(ranking_file)
        if (ranking.removed != KEPT).any():
            raise RegraftError(
                f"{ranking_file} has swaps, which prune a kept weight for each; give a ranking "
                "made without --swap."
            )
        count = len(ranking) if settings.amount is None else settings.how_many(restorable)
        if count > len(ranking):
            raise RegraftError(
                f"{ranking_file} has {len(ranking):,} weights, and {count:,} are to be trained. "
                "Lower --budget or --count, or leave it out to train them all."
            )
        return ranking.first(count)
    check_restorable(settings, restorable)
    seed = settings.head_seed + 1000 * calibration.seed  # the draw that "random" restores
    return rank(
        dense,
        pruned,
        lambda index, _linear, _weight, free: random_keys(free, seed, index),
        settings.how_many(restorable),
    )


def _patch(
    chosen: Ranking, values: Mapping[str, Tensor], pruned: Source, about: Mapping[str, Any]
) -> Patch:
    """The trained values, which replace zeros of the pruned checkpoint, in its dtype."""
    linears = list(pruned.anatomy.linears)
    tensors = {}
    for index, rows in by_linear(chosen):
        linear = linears[index]
        before = pruned.checkpoint.read(linear.tensor)
        positions, order = chosen.position[rows].sort()
        new = values[linear.key][order].to(before.dtype)
        if not torch.isfinite(new).all():
            raise RegraftError(f"Training diverged at {linear.key}. Lower --learning-rate.")
        moved = new != 0
        tensors[linear.tensor] = TensorPatch.of(before, positions[moved], new[moved])
    return Patch(tensors, about)


@dataclass(frozen=True)
class _Job:
    """Teacher, minibatches and passes; goes on after the last finished pass in `work`."""

    dense: Source
    pruned: Source
    work: Path
    settings: RealignSettings
    compute: ComputeSettings
    seed: int
    watch: Watch

    def run(
        self, readings: Mapping[str, Reading], chosen: Ranking
    ) -> tuple[dict[str, Tensor], list[float]]:
        """(`LinearAnatomy.key` -> trained values in the order of `chosen`, mean loss by pass)."""
        model, batches = self._taught(readings)
        anatomy, path = self.dense.anatomy, self.work / "so-far.safetensors"
        modules, linears = dict(model.network.named_modules()), list(anatomy.linears)
        positions = {linears[i].key: chosen.position[rows] for i, rows in by_linear(chosen)}
        weights = {li.key: modules[li.module].weight.data for li in linears if li.key in positions}
        optimizer = SparseAdam(weights, positions, self.settings.learning_rate)
        losses: list[float] = []
        if ranks.decided(path.exists):
            state = load_file(path)
            optimizer.load(state)
            losses = state["losses"].tolist()
        left = self.settings.passes - len(losses)
        own = sum(len(one.ids) for sides in batches for walk, _ in sides for one in walk.batches)
        total = 2 * own * len(anatomy.layers) * left
        with self.watch.task("Fine-tuning", total, "samples x layers") as done:
            while len(losses) < self.settings.passes:
                order = list(range(len(batches)))
                random.Random(f"{self.seed} {len(losses)}").shuffle(order)
                shuffled = [batches[i] for i in order]
                found = train(optimizer, shuffled, anatomy, self.work / "states", done)
                losses.append(sum(found) / len(found))
                if ranks.first():
                    state = optimizer.state() | {
                        "losses": torch.tensor(losses, dtype=torch.float64)
                    }
                    with atomic_file(path) as temporary:
                        save_file(state, temporary)
                ranks.barrier()
        return optimizer.values, losses

    def _taught(self, readings: Mapping[str, Reading]) -> tuple[PlacedModel, list[list[Side]]]:
        """The pruned model, and minibatches before its first layer with what they cost."""
        teachers = {kind: self.work / f"teacher-{kind}.safetensors" for kind in KINDS}
        asks = not ranks.decided(lambda: all(path.exists() for path in teachers.values()))
        source = self.dense if asks else self.pruned
        model, processor = load_for_walk(source, self.compute, self.watch, self.dense)
        require_gradients(model.dtype)
        walks = [
            {
                kind: Walk(model, each_of_share(processor, response_batch, chunk, self.compute))
                for kind, chunk in zip(KINDS, chunks, strict=True)
            }
            for chunks in minibatches([readings[kind].examples for kind in KINDS], self.compute)
        ]
        if asks:
            by_kind = {kind: [one[kind] for one in walks] for kind in KINDS}
            write_teacher(by_kind, teachers, self.watch)
            model.network.to("meta")  # one model in memory at a time
            model, _ = load_for_walk(self.pruned, self.compute, self.watch, self.dense)
            walks = [{kind: one[kind].on(model) for kind in KINDS} for one in walks]
        losses = {kind: DecisionLoss(load_file(path)) for kind, path in teachers.items()}
        return model, [[(one[kind], losses[kind]) for kind in KINDS] for one in walks]


def minibatches(
    kinds: Sequence[Sequence[Example]], compute: ComputeSettings
) -> list[list[Sequence[Example]]]:
    """Cut the examples of all kinds into the same number of batches, as even as can be.

    Args:
        kinds: The examples of each kind.
        compute: How many processes share a batch.

    Returns:
        Of each minibatch the examples of each kind, none of them empty.

    Raises:
        RegraftError: a batch is too small for all processes.
    """
    most, fewest = max(map(len, kinds)), min(map(len, kinds))
    count = min(-(-most // MINIBATCH), fewest)
    cut = [[examples[i::count] for examples in kinds] for i in range(count)]
    for chunks in cut:
        for chunk in chunks:
            check_shares(chunk, compute)
    return cut
