"""How many weights of a ranking are restored: the trade-off curve on validation prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from regraft import distributed
from regraft.data.example import Reading
from regraft.data.sources import DataSource, of_split
from regraft.data.suites import seen_before
from regraft.evaluation.tradeoff import (
    Bounds,
    Point,
    Searched,
    bounds_of,
    choose,
    curve_to_json,
    nearest,
    read_curve,
)
from regraft.files import file_digest, read_json, write_json
from regraft.models.load import Source, check_split
from regraft.progress import Progress, Silent
from regraft.provenance import describe, is_done
from regraft.restoration.base import MethodSettings
from regraft.restoration.ranking import load_ranking
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings
from regraft.settings.validation import validation_of
from regraft.stages.evaluating import evaluate
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.realigning import realign
from regraft.stages.targets import Target


def search(
    dense: Source,
    pruned: Source,
    ranking_file: Path,
    out: Path,
    settings: SearchSettings,
    method: MethodSettings,
    evaluation: EvalSettings,
    compute: ComputeSettings,
    progress: Progress | None = None,
    cache: EvaluationCache | None = None,
    references: Path | None = None,
    points_folder: Path | None = None,
    *,
    tell: bool = True,
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
        progress: Progress.
        cache: Shared with other evaluations.
        references: Folder for the evaluations of the dense and the pruned model, where other
            searches on the same prompts share them.
        points_folder: Folder for the points, where other searches along the same ranking and on
            the same prompts share them; one beside `out` by default.
        tell: Say where a target is missed or nothing is restored, and why.

    Returns:
        How many weights to restore: 0 where no point with weights back is better within the bounds.

    Raises:
        RegraftError: see the data readers; the ranking is of other checkpoints; a model that is
            spread over devices and host memory has weights on disk too.
    """
    progress, cache = progress or Silent(), cache or EvaluationCache()
    ranking = load_ranking(ranking_file)
    wanted = method.how_many(ranking.about["pruned"])
    most = len(ranking) if wanted is None else min(len(ranking), wanted)
    if settings.most is not None:
        most = min(most, int(settings.most * ranking.about["pruned"] / 10_000))
    reading = check_search(dense, settings, compute, cache)
    inputs = {
        "dense": dense.checkpoint.fingerprint,
        "pruned": pruned.checkpoint.fingerprint,
        "ranking": file_digest(ranking_file),
    }
    about = describe("search", inputs, settings, compute, {"validation": reading})
    about["evaluation"] = evaluation.model_dump(mode="json")
    if not is_done(out, out, about, lambda: read_json(out)["about"]):
        folder = points_folder or out.with_suffix("")
        references = references or folder

        def point(path: Path, count: int, model: Source, patch: Path | None = None) -> Point:
            return evaluate_point(
                dense, model, path, count, settings, evaluation, compute, progress, cache, patch
            )

        full, start = evaluate_references(
            dense, pruned, references, settings, evaluation, compute, progress, cache
        )
        points = [start]
        grid = {round(most * (i + 1) / settings.points) for i in range(settings.points)}
        for count in sorted({count for count in grid if 0 < count < most} | ({most} - {0})):
            patch = folder / f"{count:08d}.safetensors"
            first = method.ranking()  # searches of other budgets along this ranking take it too
            realign(dense, pruned, patch, first, ranking_file, count)
            points.append(point(folder / f"{count:08d}", count, pruned, patch))
        bounds = bounds_by(settings, full, points[0])
        chosen = choose(points, bounds)
        if distributed.first():
            taken = None if chosen is None else points[chosen].restored
            found = Searched(full, tuple(points), bounds, taken, ranking.about["pruned"])
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, {"about": about, **curve_to_json(found)})
        distributed.barrier()
    found = read_curve(out)
    if tell:
        for line in remarks(found):
            progress.note(f"{out.stem}: {line}")
    return found.chosen or 0


def remarks(found: Searched) -> Iterator[str]:
    """What the number of weights taken does not tell: what was not to be had, and why."""
    if found.bounds.utility is None:
        yield (
            "utility is not bounded, since no harmless validation prompt has a reference to "
            "compare answers with."
        )
    if found.taken is None:
        why = why_nothing(found.points, found.bounds)
        yield f"nothing is restored. {why}"
    elif found.bounds.asr is not None and not found.bounds.meets(found.taken):
        yield (
            f"the target, ASR {100 * found.bounds.asr:.1f} %, is not met within the bounds. The "
            f"lowest there is {100 * found.taken.asr.value:.1f} % ({_recovery(found)}), with "
            f"{found.taken.restored:,} weights back."
        )


def _recovery(found: Searched) -> str:
    value = found.rsr(found.taken) if found.taken else None
    return "RSR is undefined" if value is None else f"RSR {100 * value:.0f} %"


def why_nothing(points: Sequence[Point], bounds: Bounds) -> str:
    """Why of a curve's points, the pruned model first, none with weights back was taken."""
    pruned, *tried = points
    if not tried:
        return "There is no weight to bring back, or `most` is less than one."
    if bounds.meets(pruned):
        return "The pruned model meets the target as it is."
    safer = [one for one in tried if one.asr.value < pruned.asr.value]
    if not safer:
        return "No number of weights tried lowers ASR."
    point = nearest(safer, bounds)
    beyond = {name: by for name, by in bounds.excess(point).items() if by}
    called = {"degenerate": "the share of degenerate answers"}
    excess = " and ".join(
        f"{called.get(name, name.replace('_', '-'))} {100 * by:.2g} points beyond its bound"
        for name, by in beyond.items()
    )
    ways = []
    if allowed := [name for name in beyond if name not in called]:
        ways.append(f"allow more by {' and '.join(allowed)}")
    ways = ways or ["take another method"]
    advice = ", or ".join(ways).capitalize()
    return (
        f"The nearest to the bounds of those with less ASR, {point.restored:,} weights, has ASR "
        f"{100 * point.asr.value:.1f} % and {excess}. {advice}."
    )


def check_search(
    dense: Source, settings: SearchSettings, compute: ComputeSettings, cache: EvaluationCache
) -> Reading:
    """Read the validation prompts, and see that points can be evaluated on them.

    Raises:
        RegraftError: see the data readers and, `check_split`.
    """
    check_split(compute.device, compute.placement)
    return cache.reading(dense, suites_of(settings), settings.validation_limit)


def warn_of_learnt(validation: Reading, learnt: Mapping[str, Reading], progress: Progress) -> None:
    """Say which validation prompts are calibrated on too: the choice would be too hopeful.

    `learnt` are the calibration prompts that something is learnt from, by their role.
    """
    for line in seen_before(validation, learnt, "chosen on"):
        progress.note(f"Warning: {line}.")


def suites_of(settings: SearchSettings) -> list[DataSource]:
    """The harmful and the harmless validation prompts."""
    kinds = ("harmful", "harmless")
    validation = of_split(validation_of(settings), "train")
    return [validation.model_copy(update={"kind": kind}) for kind in kinds]


def evaluate_point(
    dense: Source,
    model: Source,
    out: Path,
    restored: int,
    settings: SearchSettings,
    evaluation: EvalSettings,
    compute: ComputeSettings,
    progress: Progress,
    cache: EvaluationCache,
    patch: Path | None = None,
) -> Point:
    """`evaluate` on the validation prompts; writes the folder `out`."""
    target = Target(model, compute, patch, processor_from=dense, progress=progress, cache=cache)
    limited = evaluation.model_copy(update={"limit": settings.validation_limit})
    done = evaluate(target, out, suites_of(settings), limited)
    return Point.of(restored, done.result)


def evaluate_references(
    dense: Source,
    pruned: Source,
    folder: Path,
    settings: SearchSettings,
    evaluation: EvalSettings,
    compute: ComputeSettings,
    progress: Progress,
    cache: EvaluationCache,
) -> tuple[Point, Point]:
    """The dense and the pruned model on the validation prompts; writes two folders in `folder`."""
    given = settings, evaluation, compute, progress, cache
    return (
        evaluate_point(dense, dense, folder / "dense", 0, *given),
        evaluate_point(dense, pruned, folder / "pruned", 0, *given),
    )


def bounds_by(settings: SearchSettings, dense: Point, pruned: Point) -> Bounds:
    """The bounds that the settings ask for, given both models on the same prompts."""
    return bounds_of(
        dense,
        pruned,
        target_asr=_fraction(settings.target_asr),
        target_rsr=_fraction(settings.target_rsr),
        over_refusal=settings.over_refusal / 100,
        utility=settings.utility / 100,
        reference=settings.reference,
    )


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
