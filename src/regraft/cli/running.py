"""Whole recipes: `regraft run`, `regraft demo`, and `regraft recipe` to start one from."""

from __future__ import annotations

import sys
from pathlib import Path

from regraft.cli.options import OutFolder, watching
from regraft.cli.reporting import show_page
from regraft.recipe import read_recipe


def run(recipe: Path, *, out: OutFolder) -> None:
    """Run a whole recipe: prune, score heads, realign, evaluate, report. Resumes after a kill.

    With `seeds` or `models` in the recipe there is one run for each, and a comparison or a table
    over them.

    Parameters
    ----------
    recipe
        A YAML file; `regraft recipe` prints one with every setting and its default.
    """
    _run(recipe, out)


def demo(*, out: OutFolder = Path("demo-run")) -> None:
    """Run the main job on the bundled model: about six minutes on two CPU cores, no network."""
    from importlib.resources import files

    _run(Path(str(files("regraft"))) / "demo" / "demo.yaml", out)


def recipe() -> None:
    """Print a recipe with every setting and its default, to start one's own from."""
    from regraft.recipe_help import explained_recipe

    sys.stdout.write(explained_recipe())


def _run(recipe_file: Path, out: Path) -> None:
    from regraft import pipeline, several, study

    recipe = read_recipe(recipe_file)
    with watching() as watch:
        run = study.run if recipe.seeds else several.run if recipe.models else pipeline.run
        show_page(watch, run(recipe, out, watch), out / "report")
