"""Prune a checkpoint."""

from __future__ import annotations

from pathlib import Path

from regraft.checks import (
    check_pattern,
    draw_calibration,
    told,
)
from regraft.data.collate import response_batch
from regraft.keys import describe, is_done, to_json, working
from regraft.models.checkpoint import check_target, open_checkpoint, write_edited
from regraft.models.load import Source
from regraft.pruning.pruner import LayerMasks, prune_wanda
from regraft.recipe import (
    CalibrationSettings,
    ComputeSettings,
    PruneSettings,
)
from regraft.stages.common import ABOUT_FILE, collate, load
from regraft.watch import Silent, Watch


def prune(
    dense: Source,
    out: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
) -> Source:
    """Prune a checkpoint with Wanda, calibrated on D^u; writes the folder `out`.

    Raises:
        RegraftError: see `prune_wanda`, the data readers and `write_edited`.
    """
    watch = watch or Silent()
    data = draw_calibration(dense, calibration, harmful=False)
    about = describe(
        "prune", {"dense": dense.checkpoint.fingerprint}, settings, compute, {"utility": data}
    )
    if not is_done(out, out / ABOUT_FILE, about):
        check_pattern(dense, settings)
        check_target(dense.checkpoint, out)
        watch.note(told("D^u", data))
        pattern = settings.pattern()
        with working(out, about) as work:
            masks = LayerMasks(work)
            model, processor = load(dense, compute, watch)
            calibrating = collate(processor, response_batch, data.examples, compute)
            total = len(data.examples) * len(dense.anatomy.layers)
            if settings.order == "one-shot":
                total = len(data.examples)
            with watch.task("Pruning, layer by layer", total, "samples") as done:
                prune_wanda(
                    model,
                    dense.anatomy,
                    calibrating,
                    pattern,
                    masks,
                    order=settings.order,
                    progress=done,
                )
            del model
            with watch.task(f"Writing {out}", dense.checkpoint.bytes, "bytes") as done:
                write_edited(
                    dense.checkpoint,
                    out,
                    masks.edits(dense.anatomy),
                    files={ABOUT_FILE: to_json(about)},
                    progress=done,
                )
    return Source(open_checkpoint(out), dense.anatomy, dense.trust_remote_code)
