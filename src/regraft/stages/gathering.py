"""Gather what importance needs from calibration data."""

from __future__ import annotations

from pathlib import Path

from regraft import ranks
from regraft.checks import draw_calibration, told
from regraft.data.collate import response_batch
from regraft.data.example import Reading
from regraft.importance.statistics import (
    ImportanceStatistics,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.keys import describe, is_done, working
from regraft.models.load import Source
from regraft.models.walk import Walk
from regraft.recipe import CalibrationSettings, ComputeSettings, StatisticsSettings
from regraft.stages.common import collate_share, load_for_walk
from regraft.watch import Silent, Watch


def statistics(
    dense: Source,
    out: Path,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    settings: StatisticsSettings | None = None,
    watch: Watch | None = None,
) -> tuple[ImportanceStatistics, ImportanceStatistics]:
    """Gather statistics of the dense model on D^s and D^u; writes the file `out`.

    Returns:
        (safety, utility).
    """
    watch, settings = watch or Silent(), settings or StatisticsSettings()
    readings = {
        "safety": draw_calibration(dense, calibration, harmful=True),
        "utility": draw_calibration(dense, calibration, harmful=False),
    }
    about = describe(
        "statistics", {"dense": dense.checkpoint.fingerprint}, settings, compute, readings
    )
    if not is_done(out, out, about, lambda: load_statistics(out).about):
        for role, reading in zip(("D^s", "D^u"), readings.values(), strict=True):
            watch.note(told(role, reading))
        with working(out, about) as work:
            safety, utility = (
                _gather(dense, work / kind, settings, reading, compute, watch)
                for kind, reading in readings.items()
            )
            if ranks.first():
                save_statistics(out, safety, utility, about)
    loaded = load_statistics(out)
    return loaded.safety, loaded.utility


def _gather(
    dense: Source,
    scratch: Path,
    settings: StatisticsSettings,
    reading: Reading,
    compute: ComputeSettings,
    watch: Watch,
) -> ImportanceStatistics:
    samples = len(reading.examples)
    if settings.score == "magnitude":
        return ImportanceStatistics("magnitude", {}, samples)
    model, processor = load_for_walk(dense, compute, watch)
    batches = collate_share(processor, response_batch, reading.examples, compute)
    passes = 2 if settings.score == "snip" else 1
    own = sum(len(batch.ids) for batch in batches)
    total = passes * own * len(dense.anatomy.layers)
    with watch.task("Gathering statistics", total, "samples x layers") as done:
        values = gather(Walk(model, batches), dense.anatomy, settings.score, scratch, done)
    return ImportanceStatistics(settings.score, values, samples)
