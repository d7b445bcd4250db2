"""How many weights of a ranking come back: the trade-off curve on validation prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft import ranks
from regraft.data.sources import DataSource
from regraft.evaluation.tradeoff import Point, bounds_of, choose
from regraft.files import file_digest, read_json, write_json
from regraft.keys import describe, is_done
from regraft.models.load import Source
from regraft.recipe import ComputeSettings, EvalSettings, RealignSettings, SearchSettings
from regraft.restoration.ranking import load_ranking
from regraft.stages.evaluating import evaluate
from regraft.stages.realigning import realign
from regraft.stages.session import Session
from regraft.watch import Silent, Watch


def suites_of(settings: SearchSettings) -> list[DataSource]:
    """The validation prompts of each kind."""
    kinds = ("harmful", "harmless")
    return [settings.validation.model_copy(update={"kind": kind}) for kind in kinds]


def search(
    dense: Source,
    pruned: Source,
    ranking_file: Path,
    out: Path,
    settings: SearchSettings,
    method: RealignSettings,
    evaluation: EvalSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
    session: Session | None = None,
) -> int:
    """Evaluate the pruned model with more and more of a ranking back; writes the curve `out`.

    Patches and answers of the points are kept in a folder beside it.

    Args:
        dense: The dense checkpoint; it is evaluated too, for RSR and bounds.
        pruned: The pruned one.
        ranking_file: From `rank`.
        out: The curve, JSON.
        settings: Validation prompts, points, target and bounds.
        method: That made the ranking.
        evaluation: How to answer and judge.
        compute: Device, dtype, batch size.
        watch: Progress.
        session: Shared with other evaluations.

    Returns:
        How many weights to restore: 0 where no point keeps to the bounds.

    Raises:
        RegraftError: see the data readers; the ranking is of other checkpoints.
    """
    watch, session = watch or Silent(), session or Session()
    ranking = load_ranking(ranking_file)
    most = len(ranking)
    if settings.most is not None:
        most = min(most, int(settings.most * ranking.about["pruned"] / 10_000))
    suites = suites_of(settings)
    reading = session.reading(dense, suites, settings.validation_limit)
    inputs = {
        "dense": dense.checkpoint.fingerprint,
        "pruned": pruned.checkpoint.fingerprint,
        "ranking": file_digest(ranking_file),
    }
    about = describe("search", inputs, settings, compute, {"validation": reading})
    about["evaluation"] = evaluation.model_dump(mode="json")
    if not is_done(out, out, about, lambda: read_json(out)["about"]):
        evaluation = evaluation.model_copy(update={"limit": settings.validation_limit})
        folder = out.with_suffix("")

        def point(name: str, count: int, model: Source, patch: Path | None = None) -> Point:
            done = evaluate(
                model,
                folder / name,
                suites,
                evaluation,
                compute,
                patch,
                processor_from=dense,
                watch=watch,
                session=session,
            )
            return Point.of(count, done.result)

        full = point("dense", 0, dense)
        points = [point("pruned", 0, pruned)]
        counts = {round(most * (i + 1) / settings.points) for i in range(settings.points)} - {0}
        for count in sorted(counts):
            patch = folder / f"{count:08d}.safetensors"
            realign(dense, pruned, patch, method, ranking_file=ranking_file, count=count)
            points.append(point(f"{count:08d}", count, pruned, patch))
        bounds = bounds_of(
            full,
            points[0],
            target_asr=_fraction(settings.target_asr),
            target_rsr=_fraction(settings.target_rsr),
            over_refusal=settings.over_refusal / 100,
            utility=settings.utility / 100,
            by_dense=settings.reference == "dense",
        )
        chosen = choose(points, bounds)
        if chosen is None:
            watch.note(
                f"{out.stem}: no point of the curve keeps to the bounds; nothing comes back."
            )
        if ranks.first():
            curve = {
                "about": about,
                "pruned": ranking.about["pruned"],
                "chosen": chosen,
                "bounds": asdict(bounds),
                "dense": _plain(full),
                "points": [_plain(one) for one in points],
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, curve)
        ranks.barrier()
    content = read_json(out)
    return 0 if content["chosen"] is None else int(content["points"][content["chosen"]]["restored"])


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _plain(point: Point) -> dict[str, Any]:
    return {
        "restored": point.restored,
        **{
            name: None if (value := getattr(point, name)) is None else asdict(value)
            for name in ("asr", "over_refusal", "utility")
        },
    }
