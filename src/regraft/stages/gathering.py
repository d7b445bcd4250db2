"""Head scores and importance statistics of the dense model, by which weights are ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.data.collate import prompt_batch, response_batch
from regraft.data.example import KINDS, Reading
from regraft.data.sources import distinct
from regraft.disk.files import digest, require_space, size_of
from regraft.errors import RegraftError
from regraft.heads.score import HeadScores, load_heads, save_heads, score_heads
from regraft.heads.ships import HeadSettings, most_rank
from regraft.heads.states import layers_run
from regraft.loading import check_shares, cut, hidden_state_bytes, load, load_layerwise
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source
from regraft.pruning.base import PRUNERS, Pruner
from regraft.pruning.gradients import BOTH_WAYS
from regraft.pruning.statistics import (
    ImportanceStatistics,
    SavedStatistics,
    StatisticsSettings,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.restoration.base import Needs
from regraft.restoration.selection import all_heads
from regraft.stages.answering import calibration_data, responses_folder
from regraft.stages.provenance import describe, fingerprints, is_done, working
from regraft.stages.reading import note_prompts, warn_of_bundled
from regraft.stages.setup import Setup
from regraft.stages.steps import PromptUse, Step


def heads_step(
    setup: Setup, out: Path, wanted: Sequence[Needs] = (), states: Path | None = None
) -> Step:
    """The step of `write_head_scores`, for methods that need the scores."""
    dense, scoring = setup.dense, setup.scoring

    def check() -> PromptUse:
        check_scoring(dense, scoring)
        for needs in wanted:
            check_heads(dense, needs, scoring)
        check_r_max(dense, scoring, setup.drawn("safety"))
        return PromptUse(learnt=setup.learnt_from(["safety"]))

    return Step(
        "score heads",
        "",
        out,
        partial(write_head_scores, setup, out, states),
        check,
        learns=partial(setup.count, ["safety"]),
        passes=scoring.passes(sum(one.heads for one in dense.architecture.layers)),
        loads_model=True,
    )


def write_head_scores(setup: Setup, out: Path, states: Path | None = None) -> HeadScores:
    """Score every attention head by Ships and KL on D^s prompts; writes the file `out`.

    `setup.scoring` says how. If given, the folder `states` keeps the states of ablated models, so
    that scores for another `r_max` or other `candidates` need no new ablation.

    Raises:
        RegraftError: see `score_heads` and the data readers.
    """
    dense, compute, progress = setup.dense, setup.compute, setup.progress
    settings = setup.scoring
    check_scoring(dense, settings)
    data = setup.drawn("safety")
    inputs = fingerprints(progress, dense=dense)
    about = describe("heads", inputs, settings, compute, {"safety": data})
    if headless := dense.architecture.headless:
        about = {**about, "skipped": headless}
        progress.note(f"Not scored, since they have no heads that can be told apart: {headless}")
    if not is_done(out, about, lambda: load_heads(out, dense.architecture).about):
        check_r_max(dense, settings, data)
        warn_of_bundled(dense, setup.calibration.source, progress.note)
        note_prompts(progress.note, {"safety": data})
        with working(out, about) as work:
            model, processor = load(dense, compute, progress)
            prompts = [prompt_batch(processor, one) for one in cut(data.examples, compute)]
            every = {layer.index: range(layer.heads) for layer in dense.architecture.layers}
            total = len(data.examples) * layers_run(dense.architecture, every)
            what = "Scoring heads", total, "prompts x heads x layers to run again"
            with progress.task(*what) as done:
                scores = score_heads(
                    model,
                    dense.architecture,
                    prompts,
                    work if states is None else states / _states_key(about),
                    settings,
                    about=about,
                    advance=done,
                )
            if distributed.first():
                save_heads(out, scores)
    return load_heads(out, dense.architecture)


def _states_key(about: Mapping[str, Any]) -> str:
    """Key of the states of ablated models, without what changes nothing in them but rounding."""
    ignored = ("r_max", "candidates", "tokens_per_pass")
    settings = {k: v for k, v in about["settings"].items() if k not in ignored}
    data = {k: v for k, v in about["data"]["safety"].items() if k != "source"}
    parts = {**about, "settings": settings, "data": data}
    return digest(json.dumps(parts, sort_keys=True))[:16]


def check_r_max(dense: Source, settings: HeadSettings, prompts: Reading) -> None:
    """Raise unless subspaces of rank `r_max` of these prompts' states can differ."""
    count = distinct(prompts)
    limit = most_rank(count, dense.architecture.hidden_size)
    if settings.r_max > limit:
        raise RegraftError(
            f"r_max is {settings.r_max}, but {count} different prompts and states of "
            f"{dense.architecture.hidden_size} features allow at most {limit}. Lower r_max or use "
            "more prompts."
        )


def check_heads(dense: Source, needs: Needs, scoring: HeadSettings | None) -> None:
    """Raise unless the model has enough heads to choose from, and they will be scored.

    `scoring` is None if scores are given.
    """
    count = len(all_heads(dense.architecture))
    wanted = max(needs.some_heads, needs.heads.count if needs.heads else 0)
    if wanted and not count:
        raise _no_heads(dense)
    if wanted > count:
        raise RegraftError(f"top_heads is {wanted}; the model has {count} heads.")
    if scoring is None or needs.heads is None:
        return
    if needs.heads.criterion == "released" and scoring.mode != "exact":
        raise RegraftError(
            f"The criterion `released` needs every head scored exactly, and `mode` is "
            f"{scoring.mode}. Leave it out, or rank heads by ships or kl."
        )
    if scoring.mode == "screened" and scoring.candidates < needs.heads.count:
        raise RegraftError(
            f"top_heads is {needs.heads.count}, but of the screened heads only the "
            f"{scoring.candidates} best will be scored exactly. Give --candidates "
            f"{needs.heads.count} or more (in a recipe heads.candidates)."
        )


def check_scoring(dense: Source, scoring: HeadSettings) -> None:
    """Raise unless the model's heads can be scored with these settings.

    Screening follows an ablation through the keys and values of every layer.
    """
    if not all_heads(dense.architecture):
        raise _no_heads(dense)
    if scoring.mode == "screened" and dense.architecture.headless:
        raise RegraftError(
            f"{dense.folder}: heads cannot be screened where some layers have none that can be "
            f"told apart ({dense.architecture.headless}). Score them exactly (--mode exact)."
        )


def _no_heads(dense: Source) -> RegraftError:
    return RegraftError(
        f"{dense.folder} has no attention heads that can be told apart "
        f"({dense.architecture.headless}). Restore with a method that needs none, such as gain."
    )


def statistics_step(
    setup: Setup,
    out: Path,
    settings: StatisticsSettings = StatisticsSettings(),
    responses: Path | None = None,
) -> Step:
    """The step of `write_statistics`."""
    pruner = PRUNERS.get(settings.score)

    def check() -> PromptUse:
        if pruner.by_gradients:
            setup.check_gradients(f"Importance by {pruner.label}")
        return PromptUse(learnt=setup.learnt_from())

    def states() -> int:  # the kinds are read one after the other
        if not pruner.by_gradients:
            return 0
        return max(setup.state_bytes([setup.drawn(kind)]) for kind in KINDS)

    return Step(
        f"statistics for {settings.score}",
        "",
        out,
        partial(write_statistics, setup, out, settings, responses),
        check,
        learns=setup.count,
        passes=forward_passes(pruner),
        loads_model=True,
        temporary_bytes=states,
    )


def write_statistics(
    setup: Setup,
    out: Path,
    settings: StatisticsSettings = StatisticsSettings(),
    responses: Path | None = None,
) -> None:
    """Gather statistics of the dense model on D^s and D^u; writes the file `out`.

    `responses` is the folder for responses of the dense model, by default one next to `out`.
    """
    readings = {
        kind: calibration_data(setup, responses or responses_folder(out), kind) for kind in KINDS
    }
    inputs = fingerprints(setup.progress, dense=setup.dense)
    about = describe("statistics", inputs, settings, setup.compute, readings)
    if not is_done(out, about, lambda: load_statistics(out).about):
        for reading in readings.values():
            check_shares(reading.examples, setup.compute)
        note_prompts(setup.progress.note, readings)
        with working(out, about) as work:
            gathered = _gather(setup, work, PRUNERS.get(settings.score), readings)
            if distributed.first():
                save_statistics(
                    out, SavedStatistics(gathered["safety"], gathered["utility"], about)
                )


def forward_passes(pruner: Pruner) -> int:
    """Cost of a pruner's statistics, in forward passes over the prompts."""
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
    total = forward_passes(pruner) * own * len(architecture.layers)
    with progress.task("Gathering statistics", total, "samples x layers") as done:
        found = {}
        for kind, chunks in shares.items():
            encoded = (response_batch(processor, chunk) for chunk in chunks)
            layerwise = LayerwisePass(model, encoded, again=False)
            if pruner.by_gradients:  # gradients of both kinds, each as a part and in the file
                kept = [linear for linear in architecture.linears if pruner.keeps(linear)]
                gradients = 4 * 4 * sum(math.prod(linear.shape) for linear in kept)
                needed = gradients + hidden_state_bytes(dense, layerwise)
                require_space(work, needed - size_of(work))
            values = gather(layerwise, architecture, pruner, work / kind, done, progress.note)
            found[kind] = ImportanceStatistics(pruner.name, values, len(readings[kind].examples))
        return found
