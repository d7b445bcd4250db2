"""From the artifacts of finished runs to the comparison of their methods; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from regraft.errors import RegraftError
from regraft.report.pooling import study_of
from regraft.report.run import Run
from regraft.report.study import Study
from regraft.report.write import check_report_folder, write_report
from regraft.restoration.base import settings_in
from regraft.runs.reporting import read_run
from regraft.runs.run_dir import study_runs
from regraft.stages.provenance import but_for_rounding, difference


def compare_runs(folders: Sequence[Path], out: Path, against: Sequence[str] = ()) -> Study:
    """Compare the methods of finished runs; writes report.json, .md, .html and figures.

    Args:
        folders: Of runs whose recipes differ in the calibration seed alone, or of a study, which
            stands for its runs.
        out: A folder; older files of these names are replaced.
        against: Methods that all others are tested against, besides the pruned model.

    Raises:
        RegraftError: a run is not finished, or they cannot be compared.
    """
    check_report_folder(out)
    run_dirs = [run for folder in folders for run in study_runs(folder) or (folder,)]
    runs = {run_dir: read_run(run_dir) for run_dir in run_dirs}
    _check_same_recipe(runs)
    study = study_of(list(runs.values()), against)
    write_report(study, out)
    return study


def _check_same_recipe(runs: Mapping[Path, Run]) -> None:
    for (first, one), (run_dir, other) in pairwise(runs.items()):
        wanted, found = (_apart_from_the_seed(run.recipe) for run in (one, other))
        if found != wanted:
            raise RegraftError(
                f"{run_dir} and {first} are runs of recipes that differ in more than the "
                f"calibration seed ({difference(found, wanted)}). Compare runs of one recipe."
            )


def _apart_from_the_seed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """By it, random controls draw other heads and weights too."""
    calibration = {name: value for name, value in recipe["calibration"].items() if name != "seed"}
    realign = {
        one["name"]: {
            k: v for k, v in one.items() if k != "draw_seed" or not settings_in(one).drawn
        }
        for one in recipe["realign"]
    }
    kept = {**recipe, "calibration": calibration, "realign": realign}
    rest: dict[str, Any] = but_for_rounding(kept)
    return rest
