"""Into a model or a run: `regraft analyse`, the paper's analyses and what realigning goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from regraft.cli.flags import refuse_unread
from regraft.cli.options import (
    Calibration,
    Compute,
    Flat,
    Model,
    OutFile,
    OutFolder,
    open_model,
    watching,
)
from regraft.cli.reporting import compare
from regraft.console import show_heads, show_overlap, show_relation, show_sweep
from regraft.heads.ships import HeadSettings
from regraft.recipe_file import read_recipe
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.scoring import StatisticsSettings

app = App(
    name="analyse",
    help="Look into models and runs: heads, importance, comparisons, a setting at many values.",
)
app.command(compare, name="compare")


@app.command(name="heads")
def heads(
    model: Model,
    *,
    out: OutFile,
    settings: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
    show: int = 10,
) -> None:
    """Score every head for safety on harmful prompts (D^s): Ships and KL by ablation.

    Example: regraft analyse heads MODEL --data vlguard VLGuard/train.json --out heads.safetensors

    Parameters
    ----------
    show
        How many top heads to print.
    """
    from regraft import stages

    with watching() as progress:
        refuse_unread(settings, calibration)
        source = open_model(model, compute.trust_remote_code)
        scores = stages.heads(source, out, settings, calibration, compute, progress)
        show_heads(progress.console, scores, show)


@app.command(name="statistics")
def statistics(
    model: Model,
    *,
    out: OutFile,
    settings: Annotated[StatisticsSettings, Flat] = StatisticsSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Gather statistics on D^s and D^u, from which HSR ranks weights (Wanda: 9 MB for 7B)."""
    from regraft import stages

    with watching() as progress:
        refuse_unread(calibration)
        source = open_model(model, compute.trust_remote_code)
        stages.statistics(stages.Setup(source, calibration, compute, progress), out, settings)
        progress.note(f"Wrote {out}")


@app.command(name="sweep")
def sweep(
    recipe: Path,
    setting: str,
    *,
    values: Annotated[tuple[float, ...], Parameter(consume_multiple=True)],
    out: OutFolder,
) -> None:
    """Run a recipe at several values of one setting: ASR, over-refusal and utility by the value.

    How much pruning is too much (sparsity), how many neurons matter (q), how many heads
    (top-heads), how many weights (budget). Resumes after a kill.

    Example: regraft analyse sweep recipe.yaml sparsity --values 0.3 0.4 0.5 0.6 --out sweep

    Parameters
    ----------
    recipe
        A YAML file; its first pruning and its first variant are varied.
    setting
        What is varied: sparsity, or a setting of the first variant's method, such as q, top-heads
        or budget.
    values
        The values.
    """
    from regraft.analysis.sweep import sweep

    with watching() as progress:
        found = sweep(read_recipe(recipe), setting, values, out, progress)
        show_sweep(progress.console, found)
        progress.note(f"Figure: {(out / 'sweep.svg').absolute()}")


@app.command(name="relate")
def relate(*run: Path, out: OutFolder) -> None:
    """Over the pruned models of several runs: total Ships against the rise in ASR, Spearman's rho.

    Example: regraft analyse relate runs/qwen2-vl runs/llava-mistral --out relation

    Parameters
    ----------
    run
        Folders of `regraft run` with head scores.
    """
    from regraft.analysis.relation import relate

    with watching() as progress:
        points, found = relate(run, out)
        show_relation(progress.console, points, found)
        progress.note(f"Figure: {(out / 'relation.svg').absolute()}")


@app.command(name="overlap")
def overlap(
    model: Model,
    statistics_file: Path,
    *,
    share: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.05, 0.1, 0.2),
    scope: Literal["row", "matrix"] = "matrix",
    out: OutFolder,
    trust_remote_code: bool = False,
) -> None:
    """Which weights matter for safety and utility alike: Jaccard's index of the top by layer.

    Example: regraft analyse overlap MODEL statistics.safetensors --share 0.05 0.1 --out overlap

    Parameters
    ----------
    statistics_file
        From `regraft analyse statistics`.
    share
        Top shares of every weight matrix.
    scope
        Weights compete within their row or their matrix.
    trust_remote_code
        Run Python code that comes with the checkpoint.
    """
    from regraft.analysis.overlap import overlap

    with watching() as progress:
        dense = open_model(model, trust_remote_code)
        found = overlap(dense, statistics_file, share, scope, out, progress)
        show_overlap(progress.console, found)
        progress.note(f"Figure: {(out / 'overlap.svg').absolute()}")
