"""Prune a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from regraft import distributed
from regraft.data.example import Reading
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.files import require_space, to_json
from regraft.loading import check_shares, cut, hidden_state_bytes, load_layerwise
from regraft.models.checkpoint import open_checkpoint
from regraft.models.checkpoint_copy import Edit, check_target, write_edited
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.models.loaded import check_unloaded
from regraft.progress import Progress
from regraft.pruning.base import PRUNERS, PruneSettings
from regraft.pruning.prune import LayerPruning, edits_without_data, passes
from regraft.pruning.results import LayerResults
from regraft.stages.answering import calibration_data, responses_folder
from regraft.stages.provenance import describe, fingerprints, is_done, unfinished_bytes, working
from regraft.stages.reading import note_prompts, warn_of_bundled
from regraft.stages.setup import Setup
from regraft.stages.steps import PromptUse, Step

CARD = "README.md"
_PRUNED = 0.01  # share of excess zeros above which a model has been pruned
_ROWS, _BLOCK = 128, 32  # rows of a weight that are read; columns that share a quantisation scale


def prune_step(
    setup: Setup,
    settings: PruneSettings,
    out: Path,
    responses: Path | None = None,
    name: str = "",
) -> Step:
    """The step of `prune_checkpoint`; `name` is that of the pruned model."""
    dense, pruner = setup.dense, PRUNERS.get(settings.method)
    spilled = spilled_bytes(dense, settings)

    def check() -> PromptUse:
        _check_output(dense, out)
        settings.patterns(dense.architecture.linears)
        if pruner.by_gradients:
            setup.check_gradients(f"Pruning by {pruner.label}")
        return PromptUse(learnt=setup.learnt_from(settings.kinds))

    def temporary_bytes() -> int:
        read = map(setup.drawn, settings.kinds)
        return spilled + (setup.state_bytes(read) if pruner.by_gradients else 0)

    return Step(
        "prune",
        name,
        out,
        partial(prune_checkpoint, setup, out, settings, responses),
        check,
        learns=partial(setup.count, settings.kinds),
        passes=passes(settings),
        bytes=dense.checkpoint.bytes,
        temporary_bytes=temporary_bytes,
    )


def prune_checkpoint(
    setup: Setup, out: Path, settings: PruneSettings, responses: Path | None = None
) -> Source:
    """Prune a checkpoint; writes the folder `out`.

    `responses` is the folder for responses of the dense model, by default one next to `out`.

    Raises:
        RegraftError: see `LayerPruning`, `assign_patterns`, the data readers and `write_edited`.
    """
    dense, progress = setup.dense, setup.progress
    patterns = settings.patterns(dense.architecture.linears)
    _check_output(dense, out)
    data = _read_data(setup, settings, responses or responses_folder(out))
    about = describe("prune", fingerprints(progress, dense=dense), settings, setup.compute, data)
    if not is_done(out, about, marker=ABOUT_FILE):
        check_unloaded(dense.checkpoint, dense.unbounded)
        _warn_of_pruned(dense, progress)
        if left := dense.architecture.left_dense:
            progress.note(f"Never pruned in the decoder's layers: {', '.join(left)}")
        with working(out, about) as work:
            if data:
                edits = _calibrated(setup, out, settings, data, LayerResults(work))
            else:
                edits = edits_without_data(settings, patterns)
            if distributed.first():
                files = {ABOUT_FILE: to_json(about), **_card(dense, settings)}
                with progress.task(f"Writing {out}", dense.checkpoint.bytes, "bytes") as done:
                    write_edited(
                        dense.checkpoint,
                        out,
                        edits,
                        files=files,
                        advance=done,
                        unbounded=dense.unbounded,
                    )
    return replace(dense, checkpoint=open_checkpoint(out))


def _check_output(dense: Source, out: Path) -> None:
    if distributed.first() and not (out / ABOUT_FILE).exists():
        check_target(dense.checkpoint, out)


def _read_data(setup: Setup, settings: PruneSettings, responses: Path) -> dict[str, Reading]:
    """A pruner's calibration data by kind; empty if it reads none."""
    dense, calibration = setup.dense, setup.calibration
    found = {}
    for kind in settings.kinds:
        if PRUNERS.get(settings.method).reads_responses:
            found[kind] = calibration_data(setup, responses, kind)
        else:
            warn_of_bundled(dense, calibration.data, setup.progress.note)
            found[kind] = setup.drawn(kind)
    return found


def _calibrated(
    setup: Setup,
    out: Path,
    settings: PruneSettings,
    data: Mapping[str, Reading],
    results: LayerResults,
) -> dict[str, Edit]:
    """Prune layer by layer; returns the edits of the checkpoint."""
    dense, compute, progress = setup.dense, setup.compute, setup.progress
    examples = [example for reading in data.values() for example in reading.examples]
    check_shares(examples, compute)
    note_prompts(progress.note, data)
    model, processor = load_layerwise(dense, compute, progress)
    pruner = PRUNERS.get(settings.method)
    chunks = distributed.share(cut(examples, compute))
    encoded = (encode(processor, one) for encode in pruner.encoders(settings) for one in chunks)
    layerwise = LayerwisePass(model, encoded, again=False)
    needed = dense.checkpoint.bytes + spilled_bytes(dense, settings)
    if pruner.by_gradients:
        needed += hidden_state_bytes(dense, layerwise)
    require_space(out, needed - unfinished_bytes(out))
    total = passes(settings) * layerwise.work
    patterns = settings.patterns(dense.architecture.linears)
    with progress.task("Pruning, layer by layer", total, "samples x layers") as done:
        LayerPruning(
            settings, dense, layerwise, patterns, results, advance=done, note=progress.note
        ).run()
    return results.edits(dense.architecture)


def _warn_of_pruned(dense: Source, progress: Progress) -> None:
    """Warn if the model seems to be pruned already, judging by its first layer."""
    weights = [dense.weight(linear) for linear in dense.architecture.layers[0].linears]
    if sum(map(excess_zeros, weights)) / len(weights) > _PRUNED:
        share = sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)
        progress.note(
            f"Warning: {100 * share:.0f} % of the first layer of {dense.folder} is zero before "
            "pruning. Is it the dense model?"
        )


def excess_zeros(weight: Tensor) -> float:
    """Share of a weight `[out, in]` that is zero beyond what a quantisation grid explains.

    Within 32 columns of a row, which share a scale, dequantised weights take few values, and zero
    is about as frequent as its neighbours. Pruning makes zero more frequent than any other value.
    The share is negative if another value is more frequent. Only the first 128 rows are read.
    """
    blocks = min(weight.shape[1], _BLOCK)
    rows = weight[:_ROWS, : weight.shape[1] // blocks * blocks].reshape(-1, blocks)  # [n, 32]
    equal = (rows[:, :, None] == rows[:, None, :]).sum(2)  # [n, 32], count of each value
    zero = rows == 0
    others = equal.masked_fill(zero, 0).amax(1)
    return float((zero.sum(1) - others).sum()) / rows.numel()


def _card(dense: Source, settings: PruneSettings) -> dict[str, str]:
    """The dense model's card, if any, with a line on top that says how the model was pruned."""
    path = dense.folder / CARD
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    metadata = front.group() if front else ""
    how_much = settings.n_m or f"{100 * settings.sparsity:g} %"
    line = (
        f"> **Pruned** by regraft ({settings.method}, {how_much}; see {ABOUT_FILE}). What follows "
        "is the card of the dense model.\n\n"
    )
    return {CARD: metadata + line + text[len(metadata) :]}


def spilled_bytes(dense: Source, settings: PruneSettings) -> int:
    """Disk space for results of finished layers, which are kept until the checkpoint is written."""
    pruner = PRUNERS.get(settings.method)
    if not pruner.reads_data:
        return 0
    if pruner.updates:
        record = dense.checkpoint.record
        return sum(
            math.prod(li.shape) * record(li.tensor).torch_dtype.itemsize
            for li in dense.architecture.linears
        )
    return dense.architecture.prunable // 8
