"""Gather what importance needs from calibration data."""

from __future__ import annotations

from pathlib import Path

from regraft.checks import (
    draw_calibration,
    told,
)
from regraft.data.collate import response_batch
from regraft.importance.statistics import (
    InputStatistics,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.keys import describe, is_done, working
from regraft.models.load import Source
from regraft.recipe import (
    CalibrationSettings,
    ComputeSettings,
    Settings,
)
from regraft.stages.common import collate, load
from regraft.watch import Silent, Watch


def statistics(
    dense: Source,
    out: Path,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
) -> tuple[InputStatistics, InputStatistics]:
    """Gather input statistics of the dense model on D^s and D^u; writes the file `out`.

    Returns:
        (safety, utility).
    """
    watch = watch or Silent()
    safety = draw_calibration(dense, calibration, harmful=True)
    utility = draw_calibration(dense, calibration, harmful=False)
    about = describe(
        "statistics",
        {"dense": dense.checkpoint.fingerprint},
        Settings(),
        compute,
        {"safety": safety, "utility": utility},
    )
    if not is_done(out, out, about, lambda: load_statistics(out).about):
        for role, one in (("D^s", safety), ("D^u", utility)):
            watch.note(told(role, one))
        model, processor = load(dense, compute, watch)
        samples = len(safety.examples) + len(utility.examples)
        gathering = watch.task("Gathering input statistics", samples, "samples")
        with working(out, about), gathering as done:
            gathered = [
                gather(
                    model,
                    dense.anatomy,
                    collate(processor, response_batch, one.examples, compute),
                    done,
                )
                for one in (safety, utility)
            ]
            save_statistics(out, gathered[0], gathered[1], about)
    loaded = load_statistics(out)
    return loaded.safety, loaded.utility
