"""From two checkpoints to a patch: head scores, statistics, ranking and search beside it."""

from __future__ import annotations

from pathlib import Path

from regraft.checks import (
    check_budget,
    check_gradients,
    check_r_max,
    check_scored,
    check_top_heads,
)
from regraft.data.example import Reading
from regraft.models.load import Source, check_split
from regraft.restoration.patch import Patch
from regraft.restoration.realign import check_pair
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.realigning import RANDOM, RealignSettings
from regraft.settings.scoring import HeadSettings, StatisticsSettings
from regraft.settings.searching import SearchSettings
from regraft.stages.fine_tuning import fine_tune, minibatches
from regraft.stages.gaining import check_gain_prompts
from regraft.stages.gathering import statistics
from regraft.stages.ranking import rank
from regraft.stages.realigning import (
    check_made_by,
    chosen_heads,
    importance_of,
    realign,
    scores_of,
)
from regraft.stages.scoring import heads
from regraft.stages.searching import check_search, search, warn_of_learnt
from regraft.stages.session import Session
from regraft.watch import Silent, Watch


def restore(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: RealignSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
    *,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    scoring: HeadSettings | None = None,
    choice: SearchSettings | None = None,
    evaluation: EvalSettings | None = None,
) -> Patch:
    """All that a method needs, each an artifact beside `out`, and then the patch `out`.

    Args:
        dense: The dense checkpoint.
        pruned: The same network pruned, by whomever.
        out: The patch file.
        settings: The method.
        calibration: Prompts of both kinds, with responses where the method learns from them.
        compute: Device, dtype, batch size, placement.
        watch: Progress.
        heads_file: From `heads`, where that has been done.
        statistics_file: From `statistics`, likewise.
        scoring: Of heads, where they are scored here.
        choice: Search how much of the ranking is restored; the curve lies at `curve_beside`.
        evaluation: How validation prompts are answered and judged.

    Raises:
        RegraftError: bad input, all of which is looked for before any long work; see the stages.
    """
    watch, session = watch or Silent(), Session()
    check_pair(dense, pruned)
    check_top_heads(dense, settings)
    check_budget(dense, settings)
    if choice is not None:
        validation = check_search(dense, choice, compute, session)
    if settings.imitates:
        check_split(compute.device, compute.placement)
    if settings.method == "fine-tune":
        imitated = session.imitated(dense, calibration)
        minibatches([one.examples for one in imitated.values()], compute)
        positions = None if settings.positions == RANDOM else Path(settings.positions)
        return fine_tune(
            dense, pruned, out, settings, calibration, compute, watch, ranking_file=positions
        )
    if out.exists():
        check_made_by(out, dense, pruned, settings, searched=choice is not None)
    gathers = settings.needs_statistics and statistics_file is None
    scores = settings.by_heads and heads_file is None
    if heads_file is not None:
        chosen_heads(dense, settings, scores_of(dense, settings, heads_file))
    if statistics_file is not None:
        importance_of(dense, settings, statistics_file)
    learnt: dict[str, Reading] = {}
    if settings.method == "gain":
        learnt = session.imitated(dense, calibration)
        check_gain_prompts(learnt, calibration.seed, compute)
    for harmful in (True, False) if gathers else (True,) if scores else ():
        session.drawn(dense, calibration, harmful=harmful)
        if choice is not None:
            learnt |= session.learnt_from(dense, calibration, harmful=harmful)
    if scores:
        prompts = session.drawn(dense, calibration, harmful=True)
        check_r_max(dense, scoring or HeadSettings(), prompts)
        check_scored(settings, scoring or HeadSettings())
    if choice is not None:
        warn_of_learnt(validation, learnt, watch)
    if settings.method == "gain" or (gathers and settings.needs_gradients):
        check_gradients(dense, compute, f"Realigning by {settings.method}")
    if scores:
        heads_file = _beside(out, "heads.safetensors")
        heads(dense, heads_file, scoring or HeadSettings(), calibration, compute, watch)
    if gathers:
        statistics_file = _beside(out, "statistics.safetensors")
        wanted = StatisticsSettings(score=settings.score)
        statistics(dense, statistics_file, calibration, compute, wanted, watch)
    files = (heads_file, statistics_file)
    ranking, count = None, None
    if settings.ranked:
        ranking = _beside(out, "ranking.safetensors")
        rank(dense, pruned, ranking, settings, calibration, *files, compute, watch)
    if ranking is not None and choice is not None:
        how = evaluation or EvalSettings()
        count = search(
            dense,
            pruned,
            ranking,
            curve_beside(out),
            choice,
            settings,
            how,
            compute,
            watch,
            session,
        )
    return realign(
        dense,
        pruned,
        out,
        settings,
        *files,
        compute,
        watch,
        ranking_file=ranking,
        count=count,
    )


def curve_beside(out: Path) -> Path:
    """Where the search for the patch `out` leaves its validation results."""
    return _beside(out, "curve.json")


def _beside(out: Path, what: str) -> Path:
    """A file beside a patch, named after it: of x.safetensors and of x alone x.WHAT."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.{what}")
