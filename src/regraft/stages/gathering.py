"""Gather what importance needs from calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from regraft import distributed
from regraft.data.collate import response_batch
from regraft.data.example import Reading
from regraft.files import require_space, size_of
from regraft.loading import check_shares, cut, hidden_state_bytes, load_for_walk
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.progress import Progress, Silent
from regraft.provenance import describe, is_done, working
from regraft.pruning.base import PRUNERS, GradientPruner, Pruner
from regraft.pruning.statistics import (
    ImportanceStatistics,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.scoring import StatisticsSettings
from regraft.stages.answering import beside, calibration_data


def statistics(
    dense: Source,
    out: Path,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    settings: StatisticsSettings | None = None,
    progress: Progress | None = None,
    responses: Path | None = None,
) -> tuple[ImportanceStatistics, ImportanceStatistics]:
    """Gather statistics of the dense model on D^s and D^u; writes the file `out`.

    `responses` is the folder for those that the dense model writes, by default one beside `out`.

    Returns:
        (safety, utility).
    """
    progress, settings = progress or Silent(), settings or StatisticsSettings()
    folder = responses or beside(out)
    readings = {
        kind: calibration_data(
            dense, calibration, compute, folder, progress, harmful=kind == "safety"
        )
        for kind in ("safety", "utility")
    }
    about = describe(
        "statistics", {"dense": dense.checkpoint.fingerprint}, settings, compute, readings
    )
    if not is_done(out, out, about, lambda: load_statistics(out).about):
        for role, reading in zip(("D^s", "D^u"), readings.values(), strict=True):
            check_shares(reading.examples, compute)
            progress.note(reading.describe(role))
        with working(out, about) as work:
            pruner = PRUNERS.get(settings.score)
            gathered = _gather(dense, work, pruner, readings, compute, progress)
            if distributed.first():
                save_statistics(out, gathered["safety"], gathered["utility"], about)
    loaded = load_statistics(out)
    return loaded.safety, loaded.utility


def _gather(
    dense: Source,
    work: Path,
    pruner: Pruner,
    readings: Mapping[str, Reading],
    compute: ComputeSettings,
    progress: Progress,
) -> dict[str, ImportanceStatistics]:
    model, processor = load_for_walk(dense, compute, progress)
    shares = {
        kind: distributed.share(cut(reading.examples, compute))
        for kind, reading in readings.items()
    }
    by_gradients = isinstance(pruner, GradientPruner)
    passes = 2 if by_gradients else 1
    own = sum(len(chunk) for chunks in shares.values() for chunk in chunks)
    total = passes * own * len(dense.architecture.layers)
    with progress.task("Gathering statistics", total, "samples x layers") as done:
        found = {}
        for kind, chunks in shares.items():
            encoded = (response_batch(processor, chunk) for chunk in chunks)
            walk = LayerwisePass(model, encoded, again=False)
            if by_gradients:  # both sets' gradients twice, in parts and in the file
                kept = [li for li in dense.architecture.linears if pruner.keeps(li)]
                gradients = 4 * 4 * sum(li.shape[0] * li.shape[1] for li in kept)
                require_space(work, gradients + hidden_state_bytes(dense, walk) - size_of(work))
            values = gather(walk, dense.architecture, pruner, work / kind, done, progress.note)
            found[kind] = ImportanceStatistics(pruner.name, values, len(readings[kind].examples))
        return found
