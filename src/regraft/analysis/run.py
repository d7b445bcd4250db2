"""From files of finished stages to an analysis on disk: JSON and one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.analysis import figures
from regraft.analysis.overlap import LayerOverlap, by_chance, overlaps
from regraft.analysis.relation import (
    ModelPoint,
    Spearman,
    TotalShips,
    correlation,
    estimates,
)
from regraft.analysis.sweep import Sweep, run_sweep
from regraft.errors import RegraftError
from regraft.files import atomic_folder, require_new, write_json, write_text
from regraft.heads.score import load_heads
from regraft.models.load import Source, open_source
from regraft.progress import Progress
from regraft.pruning.statistics import load_statistics
from regraft.recipe import Recipe
from regraft.recipe_file import read_recipe
from regraft.report.drawing import standalone
from regraft.report.rate_figures import relation_figure
from regraft.reporting import model_folder, read_run
from regraft.restoration.methods.hsr import RankingScope
from regraft.run_dir import RunDir


def sweep(
    recipe: Recipe, setting: str, values: Sequence[float], folder: Path, progress: Progress
) -> Sweep:
    """Run a sweep in `folder`; writes sweep.json and sweep.svg beside the run's own files.

    Raises:
        RegraftError: see `run_sweep`.
    """
    found = run_sweep(recipe, setting, values, folder, progress)
    if distributed.first():
        write_json(folder / "sweep.json", asdict(found))
        write_text(folder / "sweep.svg", standalone(figures.sweep_figure(found)))
    return found


def relate(folders: Sequence[Path], out: Path) -> tuple[tuple[ModelPoint, ...], Spearman | None]:
    """Total Ships against the rise in ASR over the pruned models of several runs.

    Writes relation.json and relation.svg into the new folder `out`.

    Args:
        folders: Of runs with head scores, of one model each.
        out: A new folder.

    Raises:
        RegraftError: a run is not finished or has no head scores, its suite has no harmful
            prompts, or there are fewer than 3 models.
    """
    require_new(out)
    points = tuple(point for folder in folders for point in _points(folder))
    if len(points) < 3:
        raise RegraftError(
            f"A rank correlation needs 3 pruned models or more; the runs have {len(points)}."
        )
    found = correlation(points)
    content: dict[str, Any] = {
        "points": [asdict(point) for point in points],
        "spearman": None if found is None else asdict(found),
        "note": estimates(points),
    }
    _write(
        out,
        "relation",
        content,
        relation_figure([(p.name, p.ships, p.degradation) for p in points]),
    )
    return points, found


def overlap(
    dense: Source,
    statistics_file: Path,
    shares: Sequence[float],
    scope: RankingScope,
    out: Path,
    progress: Progress,
) -> dict[float, tuple[LayerOverlap, ...]]:
    """Weights that matter for safety and for utility, by layer, at several shares.

    Writes overlap.json and overlap.svg into the new folder `out`.

    Raises:
        RegraftError: the statistics are of another model, or a share is not in (0, 1].
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise RegraftError(f"Shares lie above 0 and up to 1; got {list(shares)}.")
    require_new(out)
    statistics = load_statistics(statistics_file)
    if statistics.about["inputs"]["dense"] != dense.checkpoint.fingerprint:
        raise RegraftError(f"{statistics_file} was made from another model than {dense.folder}.")
    found: dict[float, tuple[LayerOverlap, ...]] = {}
    layers = len(dense.architecture.layers)
    with progress.task("Comparing importance", layers * len(shares), "layers x shares") as done:
        for share in sorted(set(shares)):
            of_share = []
            for one in overlaps(dense, statistics, share, scope):
                of_share.append(one)
                done(1)
            found[share] = tuple(of_share)
    if not all(found.values()):
        raise RegraftError(f"{statistics_file} holds no statistics of this model's layers.")
    content = {
        "score": statistics.safety.method,
        "scope": scope,
        "shares": [
            {
                "share": share,
                "by_chance": by_chance(share),
                "layers": [{**asdict(one), "jaccard": one.jaccard} for one in layers_],
            }
            for share, layers_ in found.items()
        ],
    }
    _write(out, "overlap", content, figures.overlap_figure(found))
    return found


def total_ships(folder: Path) -> TotalShips:
    """The Ships of all scored heads of a run's dense model together.

    Raises:
        RegraftError: the folder holds no run, or its heads were not scored.
    """
    run_dir = RunDir(folder)
    if not run_dir.heads.exists():
        raise RegraftError(f"{folder} holds no head scores: nothing in its recipe goes by heads.")
    recipe = read_recipe(run_dir.recipe)
    trust = recipe.compute.trust_remote_code
    dense = open_source(model_folder(recipe.model), trust_remote_code=trust)
    scores = load_heads(run_dir.heads, dense.architecture)
    scored = ~scores.ships.isnan()
    estimated = 0 if scores.exact is None else int((scored & ~scores.exact).sum())
    ships = float(scores.ships[scored].sum())
    return TotalShips(dense.checkpoint.fingerprint, ships, int(scored.sum()), estimated)


def _points(folder: Path) -> list[ModelPoint]:
    run = read_run(folder)
    total = total_ships(folder)
    before = run.dense.result.asr
    found = []
    for group in run.groups:
        after = group[0].result.asr
        if before is None or after is None or math.isnan(total.ships):
            raise RegraftError(f"{folder} was evaluated on no harmful prompts: it has no ASR.")
        name = f"{run.model} {group[0].label}" if len(run.groups) > 1 else run.model
        found.append(total.point(name, after.value - before.value))
    return found


def _write(out: Path, name: str, content: Any, figure: str) -> None:
    if distributed.first():
        with atomic_folder(out) as folder:
            write_json(folder / f"{name}.json", content)
            write_text(folder / f"{name}.svg", standalone(figure))
