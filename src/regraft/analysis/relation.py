"""Do models that depend more on single heads lose more safety? Total Ships against rise in ASR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from regraft.analysis import write_new
from regraft.disk.files import require_new
from regraft.errors import RegraftError
from regraft.heads.score import load_heads
from regraft.recipes.file import read_recipe
from regraft.report.rate_figures import relation_figure
from regraft.report.study import Correlation
from regraft.runs.reporting import read_run
from regraft.runs.run_dir import RunDir

FEWEST = 3  # models that a rank correlation needs
_EXACT = 8  # models up to which p is exact, over all 40,320 orders


@dataclass(frozen=True)
class ModelPoint:
    """A pruned model: total Ships of its dense model, and its loss of safety.

    Attributes:
        model: Fingerprint of the dense checkpoint.
        ships: Sum of the Ships of all scored heads, in radians.
        degradation: ASR of the pruned model minus ASR of the dense one, in [-1, 1].
        estimated: Number of the scored heads whose Ships is an estimate.
    """

    name: str
    model: str
    ships: float
    degradation: float
    heads: int = 0
    estimated: int = 0


def relate_runs(folders: Sequence[Path], out: Path) -> Correlation:
    """Correlate total Ships with the rise in ASR over the pruned models of runs with head scores.

    Writes relation.json and relation.svg to the new folder `out`.

    Raises:
        RegraftError: a run is not finished or has no head scores, its suite has no harmful
            prompts, or there are fewer than 3 models.
    """
    require_new(out)
    points = tuple(point for folder in folders for point in model_points(folder, _rises(folder)))
    if len(points) < FEWEST:
        raise RegraftError(
            f"A rank correlation needs {FEWEST} pruned models or more; the runs have {len(points)}."
        )
    found = correlate(points)
    numbers = {"rho": found.rho, "p": found.p, "n": len(points)}
    content = {
        "points": [asdict(point) for point in points],
        "spearman": None if found.rho is None else numbers,
        "note": found.note,
    }
    write_new(out, "relation", content, relation_figure(found.points))
    return found


def correlate(points: Sequence[ModelPoint], pruning: str = "") -> Correlation:
    """Correlate total Ships with the rise in ASR; `pruning` names how the models were pruned.

    Without p if points share a dense model: prunings of one model share its Ships, so not all
    orders are equally likely.
    """
    rho, p = spearman([one.ships for one in points], [one.degradation for one in points])
    independent = len({one.model for one in points}) == len(points)
    models = tuple((one.name, one.ships, one.degradation) for one in points)
    return Correlation(pruning, models, rho, p if independent else None, _estimates(points))


def _rises(folder: Path) -> dict[str, float]:
    """Name of each pruned model of a run -> the rise in ASR."""
    run = read_run(folder)
    before, found = run.dense.result.asr, {}
    for group in run.groups:
        after = group[0].result.asr
        if before is None or after is None:
            raise RegraftError(f"{folder} was evaluated on no harmful prompts: it has no ASR.")
        name = f"{run.model} {group[0].label}" if len(run.groups) > 1 else run.model
        found[name] = after.value - before.value
    return found


def model_points(folder: Path, rises: Mapping[str, float]) -> list[ModelPoint]:
    """Total Ships of a run's dense model, with the rise in ASR of each pruned model.

    Raises:
        RegraftError: the folder has no run, or its heads were not scored.
    """
    run_dir = RunDir(folder)
    if not run_dir.heads.exists():
        raise RegraftError(f"{folder} has no head scores: no method in its recipe chooses heads.")
    recipe = read_recipe(run_dir.recipe)
    dense = recipe.compute.opened(recipe.model)
    scores = load_heads(run_dir.heads, dense.architecture)
    scored = ~scores.ships.isnan()
    ships, heads = float(scores.ships[scored].sum()), int(scored.sum())
    estimated = 0 if scores.exact is None else int((scored & ~scores.exact).sum())
    model = dense.checkpoint.fingerprint
    return [ModelPoint(name, model, ships, rise, heads, estimated) for name, rise in rises.items()]


def _estimates(points: Sequence[ModelPoint]) -> str | None:
    """A note on totals that include estimated Ships; None if all are exact."""
    some = [
        f"{one.estimated} of {one.heads} heads of {one.name}" for one in points if one.estimated
    ]
    if not some:
        return None
    return (
        f"Ships are estimates for {', '.join(some)}, as `regraft analyse heads --mode screened` "
        "leaves them: these totals are not sums of exact scores. Score all heads with --mode exact "
        "(in a recipe heads.mode) for exact totals."
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Spearman's rho (1904), with mean ranks for ties, and its two-sided p.

    Both are None if all values of x or of y are equal. p is exact, over all orders, for up to 8
    points, and by Student's t beyond.

    Raises:
        ValueError: the lengths differ, or there are fewer than 3.
    """
    from scipy.stats import rankdata, spearmanr  # slow to import, needed for several models only

    if len(x) != len(y) or len(x) < FEWEST:
        raise ValueError(f"A rank correlation needs 3 pairs or more; got {len(x)} and {len(y)}.")
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None, None
    rho, p = map(float, spearmanr(x, y))
    if len(x) <= _EXACT:
        # Reordering does not change the variance of ranks, so comparing covariances suffices.
        first, second = (rankdata(values) - (len(x) + 1) / 2 for values in (x, y))
        covariances = np.abs(np.array(list(permutations(second))) @ first)
        p = float((covariances >= abs(first @ second) - 1e-9).mean())
    return rho, p
