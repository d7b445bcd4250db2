"""Analyses of models and runs, with the paper's, and baseline defences: `regraft analyse`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console

from regraft.cli.describing import describe
from regraft.cli.options import (
    Calibration,
    Compute,
    DryRun,
    Flat,
    Model,
    OutFile,
    OutFolder,
    Trust,
    as_command,
)
from regraft.cli.running import compare
from regraft.console import live_progress, say, show_grid, show_preview, show_table
from regraft.heads.ships import HeadSettings
from regraft.models.load import open_source
from regraft.pruning.statistics import StatisticsSettings
from regraft.recipes.file import read_recipe
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, PromptSettings
from regraft.settings.defending import DEFENCES, AnyDefenceSettings, DefencePromptSettings

if TYPE_CHECKING:
    from regraft.analysis.overlap import LayerOverlap
    from regraft.heads.score import HeadScores
    from regraft.runs.sweep import Sweep


app = App(
    name="analyse",
    help="Analyse models and runs: layers, heads, importance, comparisons, sweeps, baseline "
    "defences.",
)
app.command(describe, name="model")
app.command(compare, name="compare")


@app.command(name="heads")
def heads(
    model: Model,
    *,
    out: OutFile,
    settings: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
    show: Annotated[int, Parameter(validator=Number(gte=0))] = 10,
    dry_run: DryRun = False,
) -> None:
    """Score every head for safety on harmful prompts, by ablation: Ships and KL.

    Example: regraft analyse heads MODEL --data vlguard VLGuard/train.json --out heads.safetensors

    Parameters
    ----------
    show
        Number of top heads to print.
    """
    from regraft import stages
    from regraft.heads.score import load_heads
    from regraft.stages.gathering import heads_step
    from regraft.stages.steps import plan_steps

    progress = live_progress()
    opened = compute.opened(model)
    setup = stages.Setup(opened, calibration, compute, progress, scoring=settings)
    plan = plan_steps(setup, [heads_step(setup, out)])
    if dry_run:
        show_preview(progress.console, out, plan)
        return
    plan.carry_out()
    _show_heads(progress.console, load_heads(out, opened.architecture), show)


@app.command(name="statistics")
def statistics(
    model: Model,
    *,
    out: OutFile,
    settings: Annotated[StatisticsSettings, Flat] = StatisticsSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
    dry_run: DryRun = False,
) -> None:
    """Gather statistics on harmful and harmless prompts, by which HSR ranks weights.

    Wanda's take 9 MB for a model of 7B.
    """
    from regraft import stages
    from regraft.stages.gathering import statistics_step
    from regraft.stages.steps import plan_steps

    progress = live_progress()
    setup = stages.Setup(compute.opened(model), calibration, compute, progress)
    plan = plan_steps(setup, [statistics_step(setup, out, settings)])
    if dry_run:
        show_preview(progress.console, out, plan)
        return
    plan.carry_out()
    progress.note(f"Wrote {out}")


@app.command(name="sweep")
def sweep(
    recipe: Path,
    setting: str,
    *,
    values: Annotated[tuple[float, ...], Parameter(consume_multiple=True)],
    out: OutFolder,
) -> None:
    """Run a recipe at several values of one setting: ASR, over-refusal and utility by value.

    Shows how much pruning is too much (sparsity), or how large a share by importance (q), how many
    heads (top-heads) or weights (budget) are needed. Resumes after a kill.

    Example: regraft analyse sweep recipe.yaml sparsity --values 0.3 0.4 0.5 0.6 --out sweep

    Parameters
    ----------
    recipe
        YAML file of the recipe; its first pruning and its first variant are varied.
    setting
        Setting to vary: sparsity, or a setting of the first variant's method, such as q, top-heads
        or budget.
    values
        Values of the setting.
    """
    from regraft.runs.sweep import run_sweep

    progress = live_progress()
    found = run_sweep(read_recipe(recipe), setting, values, out, progress)
    _show_sweep(progress.console, found)
    progress.note(f"Figure: {(out / 'sweep.svg').absolute()}")


@app.command(name="relate")
def relate(*run: Path, out: OutFolder) -> None:
    """Correlate total Ships with the rise in ASR over the pruned models of several runs.

    Example: regraft analyse relate runs/qwen2-vl runs/llava-mistral --out relation

    Parameters
    ----------
    run
        Folders of `regraft run` with head scores.
    """
    from regraft.analysis.relation import relate_runs
    from regraft.report.summary import correlation_text
    from regraft.report.tables import ships

    progress = live_progress()
    found = relate_runs(run, out)
    show_grid(progress.console, ships(found))
    say(progress.console, correlation_text(found))
    progress.note(f"Figure: {(out / 'relation.svg').absolute()}")


@app.command(name="overlap")
def overlap(
    model: Model,
    statistics_file: Path,
    *,
    share: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.05, 0.1, 0.2),
    scope: Literal["row", "matrix"] = "matrix",
    out: OutFolder,
    trust_remote_code: Trust = False,
) -> None:
    """Overlap of the top weights for safety and for utility: Jaccard index by layer.

    Example: regraft analyse overlap MODEL statistics.safetensors --share 0.05 0.1 --out overlap

    Parameters
    ----------
    statistics_file
        File from `regraft analyse statistics`.
    share
        Shares of the weights to count as top weights.
    scope
        Whether weights compete within their row or their matrix.
    """
    from regraft.analysis.overlap import write_overlap

    progress = live_progress()
    dense = open_source(model, trust_remote_code=trust_remote_code)
    found = write_overlap(dense, statistics_file, share, scope, out, progress)
    _show_overlap(progress.console, found)
    progress.note(f"Figure: {(out / 'overlap.svg').absolute()}")


def _show_heads(console: Console, scores: HeadScores, show: int) -> None:
    """Print the top heads by Ships and by KL, and how precise the scores are."""

    def name(head: tuple[int, int]) -> str:
        estimated = scores.exact is not None and not scores.exact[head]
        return f"{head[0]}.{head[1]}" + (" (estimate)" if estimated else "")

    pairs = list(zip(scores.ranked("ships"), scores.ranked("kl"), strict=True))
    show_table(
        console,
        ("rank", "Ships: layer.head", "radians", "KL: layer.head", "nats"),
        (
            (rank, name(a), f"{scores.ships[a]:.4f}", name(b), f"{scores.kl[b]:.4f}")
            for rank, (a, b) in enumerate(pairs[:show], start=1)
        ),
    )
    if scores.exact is not None:
        exact = int(scores.exact.sum())
        scored = f"{exact} of {len(pairs)} heads were scored exactly; the others are estimates."
        say(console, scored, "dim")
    below = scores.below_noise("ships"), scores.below_noise("kl")
    if below != (None, None):
        noise = "Heads whose exact score is below the noise floor of this dtype"
        say(console, f"{noise}: {below[0]} by Ships, {below[1]} by KL.", "dim")


def _show_sweep(console: Console, sweep: Sweep) -> None:
    named = [*sweep.references.items(), *((f"{one.value:g}", one) for one in sweep.points)]
    show_table(
        console,
        (sweep.setting, "restored", "ASR", "over-refusal", "utility"),
        ((name, one.restored, one.asr, one.over_refusal, one.utility) for name, one in named),
        title=f"judge {sweep.judge}",
    )


def _show_overlap(console: Console, found: Mapping[float, Sequence[LayerOverlap]]) -> None:
    """Print the Jaccard index by layer and over all layers, one column per share."""
    from regraft.analysis.overlap import by_chance

    overall = (
        sum(one.shared for one in layers) / sum(one.either for one in layers)
        for layers in found.values()
    )
    show_table(
        console,
        ("layer", *(f"top {100 * share:g} %" for share in found)),
        (
            (of_layer[0].layer, *(f"{one.jaccard:.3f}" for one in of_layer))
            for of_layer in zip(*found.values(), strict=True)
        ),
        [
            ("all", *(f"{one:.3f}" for one in overall)),
            ("by chance", *(f"{by_chance(share):.3f}" for share in found)),
        ],
    )


def defence(
    name: str,
    pruned: Model,
    *,
    out: OutFile,
    settings: AnyDefenceSettings,
    prompts: Annotated[PromptSettings, Flat] = PromptSettings(),
    compute: Compute = ComputeSettings(),
    trust_remote_code: Trust = False,
    dry_run: DryRun = False,
) -> None:
    """Make a defence for a model."""
    from regraft import stages
    from regraft.defence import Direction, load_defence
    from regraft.stages.defending import defence_step
    from regraft.stages.steps import plan_steps

    progress = live_progress()
    trust = trust_remote_code or compute.trust_remote_code
    model = open_source(pruned, trust_remote_code=trust)
    setup = stages.Setup(model, prompts.with_responses(), compute, progress)
    plan = plan_steps(setup, [defence_step(setup, lambda: model, out, settings)])
    if dry_run:
        show_preview(progress.console, out, plan)
        return
    plan.carry_out()
    found = load_defence(out)
    if isinstance(found, Direction):
        progress.note(
            f"{out}: adds {found.strength:g} times the difference of means after layer "
            f"{found.layer}."
        )
    progress.note(f"Evaluate it with `regraft eval {pruned} --defence {out} ...`.")


defence_app = App(
    name="defence",
    help="Make an inference-time defence as a baseline: a prompt or a refusal direction.\n\n"
    "Example: regraft analyse defence refusal-direction pruned --data prompts.jsonl --validation "
    "validation.jsonl --out direction.safetensors",
)
for _name, _kind in DEFENCES.items():
    _is_prompt = issubclass(_kind, DefencePromptSettings)
    _unread = ("prompts", "compute") if _is_prompt else ("trust_remote_code",)
    defence_app.command(as_command(defence, _name, _kind, _kind.__doc__ or "", _unread), name=_name)
app.command(defence_app)
