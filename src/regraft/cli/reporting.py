"""What came out of runs and evaluations: `regraft report` and `regraft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from regraft.cli.options import MaybeOutFolder, OutFolder, watching
from regraft.console import ConsoleWatch, show_report, show_study
from regraft.errors import RegraftError

if TYPE_CHECKING:
    from regraft.evaluations import Pair
    from regraft.report.compare import Study

Against = Annotated[
    tuple[str, ...],
    Parameter(consume_multiple=True, help="Methods to test all others against, one or several."),
]


def report(
    *folder: Path,
    out: MaybeOutFolder = None,
    dense: Path | None = None,
    pruned: Path | None = None,
) -> None:
    """Write a report: JSON, Markdown and one HTML page, of a finished run again or of evaluations.

    Example: regraft report ev-gain --dense ev-dense --pruned ev-pruned --out page

    Parameters
    ----------
    folder
        Of `regraft run`; or one or several of `regraft eval`, on the same prompts by the same
        judge, of any checkpoints. All after the first are compared with it.
    out
        New folder, for evaluations; of a single one `report` in it if not given.
    dense
        The evaluation of the dense model, with --pruned: all others are compared with the pruned
        model, and their RSR is reported.
    pruned
        The evaluation of the pruned model.
    """
    from regraft import evaluations, pipeline, study

    pair = _pair(dense, pruned)
    named = (*folder, *((pair.dense, pair.pruned) if pair else ()))
    if not named:
        raise RegraftError("Name the folder of a run, or folders of evaluations.")
    run = named[0]
    with watching() as watch:
        if pair is not None or any(map(evaluations.is_evaluation, folder)):
            if out is None and len(named) > 1:
                raise RegraftError("Say where the report of several evaluations goes: --out.")
            page = out or run / "report"
            show_report(watch.console, evaluations.report(folder, page, pair))
            watch.note(f"Report: {page / 'report.html'}")
            return
        if len(folder) > 1:
            raise RegraftError(
                "Several folders are for evaluations, which hold a results.json; runs are compared "
                "by `regraft compare`."
            )
        if out is not None:
            raise RegraftError("The report of a run lies in its own folder: leave out --out.")
        if study.is_study(run):
            show_comparison(watch, study.report(run), run / "report")
            return
        show_report(watch.console, pipeline.report(run))
        watch.note(f"Report: {pipeline.RunFolder(run).report / 'report.html'}")


def _pair(dense: Path | None, pruned: Path | None) -> Pair | None:
    if dense is None and pruned is None:
        return None
    if dense is None or pruned is None:
        given, missing = ("--pruned", "--dense") if dense is None else ("--dense", "--pruned")
        raise RegraftError(f"RSR needs both evaluations: beside {given} name {missing} too.")
    from regraft.evaluations import Pair

    return Pair(dense, pruned)


def compare(*run: Path, out: OutFolder, against: Against = ()) -> None:
    """Tell methods apart over finished runs: tests, intervals, verdicts and the trade-off plot.

    Example: regraft compare runs/study --out runs/study/comparison --against hsr

    Parameters
    ----------
    run
        Folders of `regraft run` whose recipes differ in the calibration seed alone; the folder of a
        recipe with `seeds` stands for all its runs.
    """
    from regraft.comparing import compare as compare_folders

    with watching() as watch:
        show_comparison(watch, compare_folders(run, out, against), out)


def show_comparison(watch: ConsoleWatch, study: Study, out: Path) -> None:
    """Print methods compared over runs, and say where the page lies."""
    show_study(watch.console, study)
    watch.note(f"Comparison: {(out / 'compare.html').absolute()}")
