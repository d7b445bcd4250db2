"""Run recipes and report on runs and evaluations: `regraft run`, `demo`, `report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from regraft.cli.options import OutFolder
from regraft.console import ConsoleProgress, live_progress, show_preview, show_study
from regraft.errors import RegraftError
from regraft.recipes.file import read_recipe

if TYPE_CHECKING:
    from regraft.report.study import Study
    from regraft.runs.comparing import Pair

Against = Annotated[
    tuple[str, ...],
    Parameter(consume_multiple=True, help="Methods to test all others against, one or several."),
]
RunFolder = Annotated[
    Path, Parameter(name=["--out", "-o"], help="Folder of the run: new, or to be continued.")
]
PageFolder = Annotated[
    Path | None,
    Parameter(
        name=["--out", "-o"],
        help="New folder for a report on evaluations; by default `report` in that of a single one.",
    ),
]
Bundled = Annotated[
    Path | None, Parameter(help="New .zip file for the run's results, to send to others.")
]


def run(
    recipe: Path | None = None,
    *,
    out: RunFolder | None = None,
    only: str | None = None,
    dry_run: bool = False,
    template: bool = False,
) -> None:
    """Run a whole recipe: prune, realign, evaluate, report.

    Resumes after a kill. With `seeds` or `models` in the recipe there is one run for each, and one
    report over all of them.

    Example: regraft run --template > recipe.yaml; regraft run recipe.yaml --out run

    Parameters
    ----------
    recipe
        YAML file of the recipe.
    only
        Make only this run of a recipe with `seeds` or `models`, named as its folder: `seed-0` or
        `model-NAME`. Several can be made at once, each on a GPU or machine of its own;
        `regraft report` then makes the report over all.
    dry_run
        Check everything and show the steps, which of them are done, and the estimated time of the
        others; write nothing.
    template
        Print a recipe with all settings, their defaults and meanings, to start your own from.
    """
    if template:
        from regraft.recipes.file import explained_recipe

        sys.stdout.write(explained_recipe())
        return
    if recipe is None or out is None:
        raise RegraftError(
            "Name a recipe and, with --out, a folder; --template prints a recipe to start from."
        )
    from regraft.runs import pipeline

    read = read_recipe(recipe)
    progress = live_progress()
    if dry_run:
        plans = pipeline.plan_recipe(read, out, progress=progress, only=only)
        for folder, plan in plans.items():
            show_preview(progress.console, folder, plan)
        return
    study = pipeline.run_recipe(read, out, progress, only)
    show_page(progress, study, (out if only is None else out / only) / "report")


def demo(*, out: RunFolder = Path("demo-run")) -> None:
    """Run an example recipe on the bundled model: about ten minutes on a CPU core, no network."""
    from importlib.resources import files

    run(Path(str(files("regraft"))) / "demo" / "demo.yaml", out=out)


def show_page(progress: ConsoleProgress, study: Study, out: Path) -> None:
    """Print a report and the path of its HTML page."""
    show_study(progress.console, study)
    progress.note(f"Report: {(out / 'report.html').absolute()}")


def report(
    *folder: Path,
    out: PageFolder = None,
    dense: Path | None = None,
    pruned: Path | None = None,
    bundle: Bundled = None,
    texts: bool = False,
) -> None:
    """Write a report (JSON, Markdown, HTML) on evaluations, or rewrite that of a finished run.

    Also bundles a run's results in a zip file, or checks such a bundle and shows its table.

    Example: regraft report ev-gain --dense ev-dense --pruned ev-pruned --out page

    Parameters
    ----------
    folder
        Folder of `regraft run`; or folders of `regraft eval` on the same prompts with the same
        judge, of any checkpoints, which are compared with the first; or a bundle, whose digests are
        checked and whose rates are counted again.
    texts
        Include the texts of prompts and answers in the bundle.
    dense
        Folder of the dense model's evaluation; with --pruned, all others are compared with the
        pruned model, and their RSR is reported.
    pruned
        Folder of the pruned model's evaluation.
    """
    from regraft.runs.comparing import is_evaluation

    pair = _pair(dense, pruned)
    if not folder and pair is None:
        raise RegraftError("Name the folder of a run, or folders of evaluations.")
    if texts and bundle is None:
        raise RegraftError("--texts is for a bundle: name its file with --bundle.")
    if missing := [one for one in folder if not one.exists()]:
        kinds = "the folder of a run, folders of evaluations, or a bundle"
        raise RegraftError(f"{missing[0]} does not exist. Name {kinds}.")
    progress = live_progress()
    if folder and folder[0].suffix == ".zip":
        _check_bundles(progress, folder)
    elif pair is not None or any(map(is_evaluation, folder)):
        if bundle is not None:
            raise RegraftError("A bundle holds a run, and these are evaluations.")
        _report_evaluations(progress, folder, pair, out)
    else:
        _report_run(progress, folder, out)
        if bundle is not None:
            _write_bundle(progress, folder[0], bundle, texts)


def _write_bundle(progress: ConsoleProgress, run: Path, bundle: Path, texts: bool) -> None:
    from regraft.runs.bundle import write_bundle

    write_bundle(run, bundle, texts=texts)
    size = bundle.stat().st_size / 1e6
    progress.note(f"Bundle: {bundle.absolute()} ({size:.1f} MB)")


def _report_evaluations(
    progress: ConsoleProgress, folders: Sequence[Path], pair: Pair | None, out: Path | None
) -> None:
    from regraft.runs import comparing

    if out is None and (pair is not None or len(folders) > 1):
        raise RegraftError("Name a folder for the report on several evaluations: --out.")
    page = out or folders[0] / "report"
    show_page(progress, comparing.report_evaluations(folders, page, pair), page)


def _report_run(progress: ConsoleProgress, folders: Sequence[Path], out: Path | None) -> None:
    from regraft.runs import pipeline

    if len(folders) > 1:
        raise RegraftError(
            "Several folders must be evaluations, which have a results.json; compare runs with "
            "`regraft analyse compare`."
        )
    run = folders[0]
    if out is not None:
        raise RegraftError(
            f"{run} has no results.json, so it is not an evaluation; the report on a run is "
            "written to the run's folder: leave out --out."
        )
    show_page(progress, pipeline.report_recipe(run), run / "report")


def _check_bundles(progress: ConsoleProgress, files: Sequence[Path]) -> None:
    from regraft.runs.bundle_check import read_bundle

    for file in files:
        bundle = read_bundle(file)
        answers = sum(len(one.answers) for one in bundle.evaluations.values())
        progress.note(bundle.page)
        progress.note(
            f"{file}: {bundle.title}, regraft {bundle.version}. All {bundle.files} files match "
            f"their digests, and the verdicts on {answers:,} answers of {len(bundle.evaluations)} "
            f"evaluations give the reported rates. Digest of the bundle: {bundle.digest}"
        )


def _pair(dense: Path | None, pruned: Path | None) -> Pair | None:
    if dense is None and pruned is None:
        return None
    if dense is None or pruned is None:
        given, missing = ("--pruned", "--dense") if dense is None else ("--dense", "--pruned")
        raise RegraftError(f"RSR needs both evaluations: with {given}, name {missing} too.")
    return dense, pruned


def compare(*run: Path, out: OutFolder, against: Against = ()) -> None:
    """Compare methods over finished runs: tests, intervals, verdicts and the trade-off plot.

    Example: regraft analyse compare runs/study --out runs/study/comparison --against hsr

    Parameters
    ----------
    run
        Folders of `regraft run` whose recipes differ only in the calibration seed; the folder of a
        recipe with `seeds` stands for all its runs.
    """
    from regraft.runs.comparing import compare_runs

    progress = live_progress()
    show_page(progress, compare_runs(run, out, against), out)
