"""Score attention heads."""

from __future__ import annotations

from pathlib import Path

from regraft import ranks
from regraft.checks import (
    check_r_max,
    draw_calibration,
    told,
)
from regraft.data.collate import prompt_batch
from regraft.heads.score import HeadScores, load_heads, save_heads, score_heads
from regraft.keys import describe, is_done, working
from regraft.models.load import Source
from regraft.recipe import (
    CalibrationSettings,
    ComputeSettings,
    HeadSettings,
)
from regraft.stages.common import collate, load
from regraft.watch import Silent, Watch


def heads(
    dense: Source,
    out: Path,
    settings: HeadSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
) -> HeadScores:
    """Score every attention head by Ships and KL on D^s prompts; writes the file `out`.

    Raises:
        RegraftError: see `score_heads` and the data readers.
    """
    watch = watch or Silent()
    data = draw_calibration(dense, calibration, harmful=True)
    about = describe(
        "heads", {"dense": dense.checkpoint.fingerprint}, settings, compute, {"safety": data}
    )
    if not is_done(out, out, about, lambda: load_heads(out, dense.anatomy).about):
        check_r_max(dense, settings, len(data.examples))
        watch.note(told("D^s", data))
        with working(out, about) as work:
            model, processor = load(dense, compute, watch)
            prompts = collate(processor, prompt_batch, data.examples, compute)
            passes = 2 if settings.mode == "screened" else 1
            total = passes * len(prompts) * len(dense.anatomy.layers)
            with watch.task("Scoring heads", total, "layers") as done:
                scores = score_heads(
                    model,
                    dense.anatomy,
                    prompts,
                    work,
                    settings.scoring(),
                    about=about,
                    progress=done,
                )
            if ranks.first():
                save_heads(out, scores)
    return load_heads(out, dense.anatomy)
