"""From the artifacts of finished runs to the comparison of their methods; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from regraft import ranks
from regraft.errors import RegraftError
from regraft.folder import study_runs
from regraft.keys import but_for_rounding, difference
from regraft.report.compare import Run, Study
from regraft.report.compare import compare as compare_runs
from regraft.report.model import Report
from regraft.report.write_compare import write_comparison
from regraft.reporting import read_report
from regraft.restoration.base import settings_in


def compare(folders: Sequence[Path], out: Path, against: Sequence[str] = ()) -> Study:
    """Compare the methods of finished runs; writes compare.json, .md, .html and figures.

    Args:
        folders: Of runs whose recipes differ in the calibration seed alone, or of a study, which
            stands for its runs.
        out: A folder; older files of these names are replaced.
        against: Methods that all others are tested against, besides the pruned model.

    Raises:
        RegraftError: a run is not finished, or they cannot be compared.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "compare.json").exists():
        raise RegraftError(
            f"The output folder {out} holds something else than a comparison. Choose a new folder."
        )
    places = [run for folder in folders for run in study_runs(folder) or (folder,)]
    reports = {place: read_report(place) for place in places}
    _check_same_recipe(reports)
    runs = [Run(int(report.recipe["calibration"]["seed"]), report) for report in reports.values()]
    study = compare_runs(runs, against)
    if ranks.first():
        write_comparison(study, out)
    return study


def _check_same_recipe(reports: Mapping[Path, Report]) -> None:
    for (first, one), (place, other) in pairwise(reports.items()):
        wanted, found = (_apart_from_the_seed(report.recipe) for report in (one, other))
        if found != wanted:
            raise RegraftError(
                f"{place} and {first} are runs of recipes that differ in more than the calibration "
                f"seed ({difference(found, wanted)}). Compare runs of one recipe."
            )


def _apart_from_the_seed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """By it, random controls draw other heads and weights too."""
    calibration = {name: value for name, value in recipe["calibration"].items() if name != "seed"}
    realign = {
        one["name"]: {
            k: v for k, v in one.items() if k != "head_seed" or not settings_in(one).drawn
        }
        for one in recipe["realign"]
    }
    kept = {**recipe, "calibration": calibration, "realign": realign}
    rest: dict[str, Any] = but_for_rounding(kept)
    return rest
