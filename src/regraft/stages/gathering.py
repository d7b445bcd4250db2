"""Gather what importance needs from calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from regraft import distributed
from regraft.data.collate import response_batch
from regraft.data.example import Reading
from regraft.disk.files import require_space, size_of
from regraft.loading import check_shares, cut, hidden_state_bytes, load_layerwise
from regraft.models.layerwise import LayerwisePass
from regraft.pruning.base import PRUNERS, Pruner
from regraft.pruning.gradients import BOTH_WAYS
from regraft.pruning.statistics import (
    ImportanceStatistics,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.settings.scoring import StatisticsSettings
from regraft.stages.answering import beside, calibration_data
from regraft.stages.provenance import describe, fingerprints, is_done, working
from regraft.stages.setup import Setup


def write_statistics(
    setup: Setup,
    out: Path,
    settings: StatisticsSettings = StatisticsSettings(),
    responses: Path | None = None,
) -> tuple[ImportanceStatistics, ImportanceStatistics]:
    """Gather statistics of the dense model on D^s and D^u; writes the file `out`.

    `responses` is the folder for those that the dense model writes, by default one beside `out`.

    Returns:
        (safety, utility).
    """
    readings = {
        kind: calibration_data(setup, responses or beside(out), harmful=kind == "safety")
        for kind in ("safety", "utility")
    }
    inputs = fingerprints(dense=setup.dense)
    about = describe("statistics", inputs, settings, setup.compute, readings)
    if not is_done(out, out, about, lambda: load_statistics(out).about):
        for role, reading in zip(("D^s", "D^u"), readings.values(), strict=True):
            check_shares(reading.examples, setup.compute)
            setup.progress.note(reading.describe(role))
        with working(out, about) as work:
            gathered = _gather(setup, work, PRUNERS.get(settings.score), readings)
            if distributed.first():
                save_statistics(out, gathered["safety"], gathered["utility"], about)
    loaded = load_statistics(out)
    return loaded.safety, loaded.utility


def gathering_passes(pruner: Pruner) -> int:
    """What statistics for a pruner take, in forward passes over the prompts."""
    return BOTH_WAYS if pruner.by_gradients else 1


def _gather(
    setup: Setup, work: Path, pruner: Pruner, readings: Mapping[str, Reading]
) -> dict[str, ImportanceStatistics]:
    dense, progress = setup.dense, setup.progress
    architecture = dense.architecture
    model, processor = load_layerwise(dense, setup.compute, progress)
    shares = {
        kind: distributed.share(cut(reading.examples, setup.compute))
        for kind, reading in readings.items()
    }
    own = sum(len(chunk) for chunks in shares.values() for chunk in chunks)
    total = gathering_passes(pruner) * own * len(architecture.layers)
    with progress.task("Gathering statistics", total, "samples x layers") as done:
        found = {}
        for kind, chunks in shares.items():
            encoded = (response_batch(processor, chunk) for chunk in chunks)
            layerwise = LayerwisePass(model, encoded, again=False)
            if pruner.by_gradients:  # both sets' gradients twice, in parts and in the file
                kept = [linear for linear in architecture.linears if pruner.keeps(linear)]
                gradients = 4 * 4 * sum(math.prod(linear.shape) for linear in kept)
                needed = gradients + hidden_state_bytes(dense, layerwise)
                require_space(work, needed - size_of(work))
            values = gather(layerwise, architecture, pruner, work / kind, done, progress.note)
            found[kind] = ImportanceStatistics(pruner.name, values, len(readings[kind].examples))
        return found
