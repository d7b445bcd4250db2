"""Whole recipes: `regraft run` and `regraft demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from regraft.cli.options import MaybeOutFolder, OutFolder, watching
from regraft.cli.reporting import show_comparison, show_table
from regraft.console import show_report
from regraft.errors import RegraftError
from regraft.recipe import read_recipe


def run(recipe: Path | None = None, *, out: MaybeOutFolder = None, template: bool = False) -> None:
    """Run a whole recipe: prune, realign, evaluate, report.

    Resumes after a kill. With `seeds` or `models` in the recipe there is one run for each, and a
    comparison or a table over them.

    Example: regraft run --template > recipe.yaml; regraft run recipe.yaml --out run

    Parameters
    ----------
    recipe
        A YAML file.
    template
        Print a recipe with every setting, its default and what it does, to start one's own from.
    """
    if template:
        from regraft.recipe_help import explained_recipe

        sys.stdout.write(explained_recipe())
        return
    if recipe is None or out is None:
        raise RegraftError(
            "Name a recipe and, with --out, a folder; --template prints a recipe to start from."
        )
    _run(recipe, out)


def demo(*, out: OutFolder = Path("demo-run")) -> None:
    """Run the main job on the bundled model: about six minutes on two CPU cores, no network."""
    from importlib.resources import files

    _run(Path(str(files("regraft"))) / "demo" / "demo.yaml", out)


def _run(recipe_file: Path, out: Path) -> None:
    from regraft import pipeline, several, study

    recipe = read_recipe(recipe_file)
    with watching() as watch:
        if recipe.seeds:
            show_comparison(watch, study.run(recipe, out, watch), out / "report")
            return
        if recipe.models:
            show_table(watch, several.run(recipe, out, watch), out / "report")
            return
        made = pipeline.run(recipe, out, watch)
        show_report(watch.console, made)
        watch.note(f"Report: {(pipeline.RunFolder(out).report / 'report.html').absolute()}")
