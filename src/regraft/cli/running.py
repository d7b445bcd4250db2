"""Run whole recipes: `regraft run`, `regraft demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.options import MaybeOutFolder, OutFolder, live_progress
from regraft.console import ConsoleProgress, show_preview, show_study
from regraft.errors import RegraftError
from regraft.recipes.file import read_recipe

if TYPE_CHECKING:
    from regraft.report.study import Study


def run(
    recipe: Path | None = None,
    *,
    out: MaybeOutFolder = None,
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
    from regraft.runs import pipeline, recipe_runs
    from regraft.runs.run_dir import runs_of
    from regraft.stages.evaluation_cache import EvaluationCache

    read = read_recipe(recipe)
    progress = live_progress()
    if dry_run:
        cache = EvaluationCache()
        for folder, one in runs_of(read, out).items():
            planned = pipeline.plan_run(one, folder, cache, progress)
            show_preview(progress.console, folder, planned)
    else:
        show_page(progress, recipe_runs.run_recipe(read, out, progress), out / "report")


def demo(*, out: OutFolder = Path("demo-run")) -> None:
    """Run an example recipe on the bundled model: about ten minutes on a CPU core, no network."""
    from importlib.resources import files

    run(Path(str(files("regraft"))) / "demo" / "demo.yaml", out=out)


def show_page(progress: ConsoleProgress, study: Study, out: Path) -> None:
    """Print a report and the path of its HTML page."""
    show_study(progress.console, study)
    progress.note(f"Report: {(out / 'report.html').absolute()}")
