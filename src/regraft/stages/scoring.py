"""Score attention heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.data.collate import prompt_batch
from regraft.disk.files import digest
from regraft.heads.score import HeadScores, load_heads, save_heads, score_heads
from regraft.heads.ships import HeadSettings
from regraft.heads.states import steps
from regraft.loading import collate, load
from regraft.stages.checks import check_r_max, check_scoring
from regraft.stages.provenance import describe, fingerprints, is_done, working
from regraft.stages.reading import draw_calibration, warn_of_bundled
from regraft.stages.setup import Setup


def write_head_scores(
    setup: Setup, out: Path, settings: HeadSettings, states: Path | None = None
) -> HeadScores:
    """Score every attention head by Ships and KL on D^s prompts; writes the file `out`.

    In the folder `states` the states of ablated models are kept, so that scores for another `r_max`
    or other `candidates` need no new ablation.

    Raises:
        RegraftError: see `score_heads` and the data readers.
    """
    dense, compute, progress = setup.dense, setup.compute, setup.progress
    check_scoring(dense, settings)
    data = draw_calibration(dense, setup.calibration, harmful=True)
    inputs = fingerprints(dense=dense)
    about = describe("heads", inputs, settings, compute, {"safety": data})
    if headless := dense.architecture.headless:
        about = {**about, "skipped": headless}
        progress.note(f"Without scores, as they have no heads to tell apart: {headless}")
    if not is_done(out, out, about, lambda: load_heads(out, dense.architecture).about):
        check_r_max(dense, settings, data)
        warn_of_bundled(dense, setup.calibration.source, progress.note)
        progress.note(data.describe("D^s"))
        with working(out, about) as work:
            model, processor = load(dense, compute, progress)
            prompts = collate(processor, prompt_batch, data.examples, compute)
            every = {layer.index: range(layer.heads) for layer in dense.architecture.layers}
            total = len(data.examples) * steps(dense.architecture, every)
            what = "Scoring heads", total, "prompts x heads x layers to run again"
            with progress.task(*what) as done:
                scores = score_heads(
                    model,
                    dense.architecture,
                    prompts,
                    work if states is None else states / _ablated(about),
                    settings,
                    about=about,
                    advance=done,
                )
            if distributed.first():
                save_heads(out, scores)
    return load_heads(out, dense.architecture)


def _ablated(about: Mapping[str, Any]) -> str:
    """The key of states: all that decides them, which these settings do not but for rounding."""
    others = ("r_max", "candidates", "tokens_per_pass")
    settings = {k: v for k, v in about["settings"].items() if k not in others}
    data = {k: v for k, v in about["data"]["safety"].items() if k != "source"}
    parts = {**about, "settings": settings, "data": data}
    return digest(json.dumps(parts, sort_keys=True))[:16]
