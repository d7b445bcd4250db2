"""The command line: one thin command a stage, and `run` for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

import regraft
from regraft import ranks
from regraft.console import (
    ConsoleWatch,
    show_agreement,
    show_harness,
    show_heads,
    show_judged,
    show_overlap,
    show_quality,
    show_relation,
    show_report,
    show_result,
    show_search,
    show_study,
    show_sweep,
    show_tuned,
)
from regraft.data.demo import demo_model
from regraft.data.sources import words_of_first
from regraft.errors import RegraftError
from regraft.evaluation.keywords import KEYWORD_JUDGES
from regraft.models.anatomy import LayerAnatomy
from regraft.models.load import Source, open_source
from regraft.pruning.pruner import zeros
from regraft.recipe import read_recipe
from regraft.restoration.apply import Operation
from regraft.restoration.patch import Patch
from regraft.settings.base import Settings, explain
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, Suites, TextPrompts
from regraft.settings.defending import DefenceSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.pruning import PruneSettings
from regraft.settings.realigning import RealignSettings
from regraft.settings.scoring import HeadSettings, StatisticsSettings
from regraft.settings.searching import SearchSettings, Swept, TuneSettings
from regraft.settings.validation import with_validation

if TYPE_CHECKING:
    from regraft.report.compare import Study
    from regraft.stages import Preview

app = App(
    name="regraft",
    version=regraft.__version__,
    help=(
        "Give a pruned vision-language model its safety back.\n\n"
        "Start with `regraft demo`, which prunes, realigns and reports on a bundled model. "
        "MODEL is always a folder with safetensors, a hub id, or the word demo for that model."
    ),
)
Flat = Parameter(name="*")
Model = Annotated[str, Parameter(help="Checkpoint folder or hub id; 'demo' is the bundled model.")]
DEFAULT_VALIDATION_TOKENS = 64
OutFolder = Annotated[Path, Parameter(name=["--out", "-o"], help="New folder to write.")]
OutFile = Annotated[Path, Parameter(name=["--out", "-o"], help="New file to write.")]
MaybeOutFolder = Annotated[
    Path | None, Parameter(name=["--out", "-o"], help="New folder to write.")
]
MaybeOutFile = Annotated[Path | None, Parameter(name=["--out", "-o"], help="New file to write.")]
Against = Annotated[
    tuple[str, ...],
    Parameter(consume_multiple=True, help="Methods to test all others against, one or several."),
]
Judges = Annotated[
    tuple[str, ...],
    Parameter(
        help="A keyword judge by name; llama-guard:MODEL, qwen3guard:MODEL or harmbench:MODEL with "
        "a folder or hub id; endpoint:URL#MODEL, which speaks OpenAI's protocol.",
    ),
]
Calibration = Annotated[CalibrationSettings, Flat]
Compute = Annotated[ComputeSettings, Flat]


@app.command
def inspect(model: Model, *, trust_remote_code: bool = False, names: bool = False) -> None:
    """Show layers, heads, prunable weights and names on disk; loads no weights.

    Parameters
    ----------
    trust_remote_code
        Run Python code that comes with the checkpoint.
    names
        Also list every prunable weight by its name on disk.
    """
    source = _open(model, trust_remote_code)
    anatomy, console = source.anatomy, Console(emoji=False)
    about = Table.grid(padding=(0, 2))
    about.add_column()
    about.add_column(overflow="fold")
    for key, value in {
        "folder": str(source.folder),
        "family": anatomy.family,
        "vision": "yes" if anatomy.has_vision else "no",
        "parameters": f"{anatomy.parameters:,}",
        "prunable": f"{anatomy.prunable:,} in {sum(1 for _ in anatomy.linears)} linears",
        "hidden size": str(anatomy.hidden_size),
        "vocabulary": f"{anatomy.vocabulary:,}" + (" (tied head)" if anatomy.tied else ""),
        "on disk": f"{source.checkpoint.bytes / 2**30:.2f} GiB in "
        f"{len(source.checkpoint.shards)} file(s)",
    }.items():
        about.add_row(key, value)
    console.print(about)
    layers = Table("layers", "attention", "query heads", "kv heads", "head size", "linears")
    for first, last, layer in _runs(anatomy.layers):
        layers.add_row(
            f"{first}" if first == last else f"{first}-{last}",
            layer.attention,
            str(layer.heads),
            str(layer.kv_heads),
            str(layer.head_dim),
            ", ".join(f"{li.role} {li.shape[0]}x{li.shape[1]}" for li in layer.linears),
        )
    console.print(layers)
    linears = list(anatomy.linears)
    console.print("names on disk" if names else "names on disk, first and last:")
    for linear in linears if names else (linears[0], linears[-1]):
        record = source.checkpoint.record(linear.tensor)
        console.print(f"  {linear.tensor}  {record.dtype}  {record.shard}", highlight=False)


@app.command
def prune(
    model: Model,
    *,
    out: OutFolder,
    settings: Annotated[PruneSettings, Flat] = PruneSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Prune by Wanda, SparseGPT, SNIP or magnitude, calibrated on harmless prompts (D^u).

    Example: regraft prune MODEL --sparsity 0.5 --data vlguard VLGuard/train.json --out pruned
    """
    from regraft import stages

    with _watch() as watch:
        _refuse_unread(settings)
        _refuse_unread(calibration)
        if settings.method == "magnitude" and calibration != CalibrationSettings():
            raise RegraftError("magnitude reads no data: settings of it would change nothing.")
        source = _open(model, compute.trust_remote_code)
        pruned = stages.prune(source, out, settings, calibration, compute, watch)
        count = zeros(pruned.checkpoint, pruned.anatomy)
        watch.note(
            f"{out}: {count:,} of {pruned.anatomy.prunable:,} prunable weights are zero "
            f"({100 * count / pruned.anatomy.prunable:.2f} %)."
        )


@app.command
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

    Example: regraft heads MODEL --data vlguard VLGuard/train.json --out heads.safetensors

    Parameters
    ----------
    show
        How many top heads to print.
    """
    from regraft import stages

    with _watch() as watch:
        _refuse_unread(settings)
        _refuse_unread(calibration)
        source = _open(model, compute.trust_remote_code)
        scores = stages.heads(source, out, settings, calibration, compute, watch)
        show_heads(watch.console, scores, show)


@app.command
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

    with _watch() as watch:
        source = _open(model, compute.trust_remote_code)
        stages.statistics(source, out, calibration, compute, settings, watch)
        watch.note(f"Wrote {out}")


@app.command
def realign(
    dense: Model,
    pruned: Model,
    *,
    out: OutFile,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    search: bool = False,
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    settings: Annotated[RealignSettings, Flat] = RealignSettings(),
    choice: Annotated[SearchSettings, Flat] = SearchSettings(),
    scoring: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Select the pruned weights that carried safety and write their dense values as a patch.

    Head scores, input statistics and the ranking of weights are computed beside the patch where no
    file is given.

    Example: regraft realign MODEL pruned --method gain --budget 2 --data vlguard
    VLGuard/train.json --out gain.safetensors

    Parameters
    ----------
    dense
        The dense checkpoint.
    pruned
        The same model pruned, by regraft or by any other tool.
    heads_file
        From `regraft heads`.
    statistics_file
        From `regraft statistics`.
    search
        Choose how many weights of the budget come back, on validation prompts.
    max_new_tokens
        Search: length of an answer to a validation prompt.
    """
    from regraft import stages

    with _watch() as watch:
        _refuse_unread(settings)
        _refuse_unread(calibration)
        _check_search_flags(search, settings, choice)
        if heads_file is not None and not settings.by_heads:
            raise RegraftError("No scored heads decide here: --heads-file would change nothing.")
        if statistics_file is not None and not settings.needs_statistics:
            raise RegraftError(
                f"{settings.method} by these settings reads no statistics: --statistics-file would "
                "change nothing."
            )
        if heads_file is not None and scoring != HeadSettings():
            raise RegraftError("--heads-file has scores: settings of scoring would change nothing.")
        if not settings.by_heads and scoring != HeadSettings():
            raise RegraftError(
                "No heads are scored for these settings: those of scoring would change nothing."
            )
        _refuse_unread(scoring)
        if not search and max_new_tokens != DEFAULT_VALIDATION_TOKENS:
            raise RegraftError("--max-new-tokens is of answers in a search: add --search.")
        dense_source = _open(dense, compute.trust_remote_code)
        found = with_validation(choice, dense_source.folder, calibration) if search else None
        patch = stages.restore(
            dense_source,
            _open(pruned, compute.trust_remote_code),
            out,
            settings,
            calibration,
            compute,
            watch,
            heads_file=heads_file,
            statistics_file=statistics_file,
            scoring=scoring,
            choice=found,
            evaluation=EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
        )
        if search:
            curve = stages.curve_beside(out)
            show_search(watch.console, stages.read_curve(curve))
            watch.note(f"All points: {curve}")
        _tell_patch(watch, out, patch)


def _refuse_unread(settings: Settings) -> None:
    if (found := settings.unread()) is not None:
        raise RegraftError(f"{found}. Leave it out.".replace("_", "-"))


def _check_search_flags(search: bool, settings: RealignSettings, choice: SearchSettings) -> None:
    """What a recipe says by the place of a setting, flags must say together."""
    if search and settings.method == "hsr-a":
        raise RegraftError("hsr-a has no number of weights to choose: leave --search out.")
    if search and not settings.ranked:
        raise RegraftError("--search chooses a number of weights: give a --budget too.")
    if not search and choice != SearchSettings():
        raise RegraftError("Bounds, targets and points are those of a search: add --search.")
    if not search and settings.pushes:
        raise RegraftError("Only a search can hold --pushes to bounds: add --search.")
    _check_most(settings, choice)


def _check_most(settings: RealignSettings, choice: SearchSettings) -> None:
    if settings.pushes and choice.most is not None:
        raise RegraftError("--most cuts off the pushes, which come last: lower --budget.")


@app.command
def tune(
    dense: Model,
    pruned: Model,
    *,
    out: OutFolder,
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    tuning: Annotated[TuneSettings, Flat] = TuneSettings(),
    settings: Annotated[RealignSettings, Flat] = RealignSettings(),
    choice: Annotated[SearchSettings, Flat] = SearchSettings(),
    scoring: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Search for a method's settings that give the lowest ASR within bounds, on validation prompts.

    Constrained TPE (Optuna: pip install 'regraft[tune]'). The same command continues after a kill,
    goes on to more --trials, and started twice at once shares them. Of a ranking the best prefix
    tried within the bounds counts. What is not tuned stays as given, the budget above all. Writes
    tuned.json and best.yaml, an item of a recipe's `realign`.

    Example: regraft tune MODEL pruned --method gain --budget 2 --data vlguard VLGuard/train.json
    --validation validation.jsonl --trials 40 --points 3 --out tuned

    Parameters
    ----------
    dense
        The dense checkpoint.
    pruned
        The same model pruned, by regraft or by any other tool.
    max_new_tokens
        Length of an answer to a validation prompt.
    """
    from regraft import stages

    with _watch() as watch:
        _refuse_unread(_before_tuning(settings, tuning))
        _refuse_unread(scoring)
        _refuse_unread(calibration)
        if tuning.devices and compute.device not in ("auto", *tuning.devices):
            raise RegraftError("--devices takes the place of --device: leave one of them out.")
        if not settings.ranked and choice.first_set("points", "most"):
            raise RegraftError("Without a --budget there is no ranking of which --points are.")
        _check_most(settings, choice)
        tuned = stages.tune(
            _open(dense, compute.trust_remote_code),
            _open(pruned, compute.trust_remote_code),
            out,
            settings,
            calibration,
            compute,
            tuning,
            choice,
            scoring,
            EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
            watch,
        )
        show_tuned(watch.console, tuned)
        watch.note(f"All trials: {out / 'tuned.json'}")
        if tuned.best is not None:
            watch.note(f"The best settings, for a recipe: {out / 'best.yaml'}")


def _before_tuning(settings: RealignSettings, tuning: TuneSettings) -> RealignSettings:
    """The settings, where tuning varies what others of them hang on as if all of them counted."""
    counts = {"within": "heads", "constraint": "utility-gain"} if settings.method == "gain" else {}
    varied = {name: value for name, value in counts.items() if name not in tuning.keep}
    return settings.model_copy(update=varied)


def _tell_patch(watch: ConsoleWatch, out: Path, patch: Patch) -> None:
    pruned = patch.about["pruned"]
    exchanged = f" and {patch.removed:,} kept ones go in exchange" if patch.removed else ""
    watch.note(
        f"{out}: {patch.restored:,} weights come back{exchanged}, "
        f"{10_000 * patch.restored / pruned:.3f} per 10,000 of {pruned:,} zeros."
    )
    if "n_m" in patch.about:
        watch.note(
            f"{patch.about['violated_groups']:,} of {patch.about['groups']:,} "
            f"{patch.about['n_m']} groups are violated: kernels for {patch.about['n_m']} "
            "sparsity cannot run the realigned checkpoint."
            if patch.about["violated_groups"]
            else f"All {patch.about['groups']:,} {patch.about['n_m']} groups are kept."
        )


@app.command
def apply(
    pruned: Path,
    *patch: Path,
    out: MaybeOutFolder = None,
    in_place: bool = False,
    dry_run: bool = False,
) -> None:
    """Put one or several patches on a pruned checkpoint.

    Example: regraft apply pruned hsr.safetensors --out realigned

    Parameters
    ----------
    pruned
        Folder of the pruned checkpoint.
    patch
        From `regraft realign`, in any order.
    in_place
        Change the folder itself. A stopped run leaves a journal in it, with which the same
        command finishes and `regraft revert` undoes.
    dry_run
        Check everything and show what would be written, by --out or --in-place; write nothing.
    """
    _patch("apply", pruned, patch, out, in_place, dry_run)


@app.command
def revert(
    realigned: Path,
    *patch: Path,
    out: MaybeOutFolder = None,
    in_place: bool = False,
    dry_run: bool = False,
) -> None:
    """Take one or several patches off a realigned checkpoint; gives the pruned bytes back.

    Example: regraft revert realigned hsr.safetensors --out pruned-again

    Parameters
    ----------
    realigned
        Folder of the realigned checkpoint.
    patch
        Those that were applied and are to go, in any order.
    in_place
        Change the folder itself; see `regraft apply`.
    dry_run
        Check everything and show what would be written, by --out or --in-place; write nothing.
    """
    _patch("revert", realigned, patch, out, in_place, dry_run)


@app.command
def defend(
    pruned: Model,
    *,
    out: OutFile,
    settings: Annotated[DefenceSettings, Flat] = DefenceSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Make a defence at inference to compare with: a prompt (AdaShield) or a refusal direction.

    Example: regraft defend pruned --method refusal-direction --out direction.safetensors
    """
    from regraft import stages
    from regraft.defence.artifact import Direction

    with _watch() as watch:
        _refuse_unread(settings)
        source = _open(pruned, compute.trust_remote_code)
        made = stages.defend(source, out, settings, calibration, compute, watch)
        if isinstance(made, Direction):
            watch.note(f"{out}: {made.strength:g} differences of means behind layer {made.layer}.")
        watch.note(f"Evaluate under it with `regraft eval {pruned} --defence {out} ...`.")


@app.command(name="eval")
def evaluate(
    model: Model,
    *,
    suite: Suites,
    out: OutFolder,
    patch: Path | None = None,
    defence: Path | None = None,
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Answer suites greedily and report ASR, over-refusal and utility with 95 % intervals.

    Example: regraft eval pruned --suite safebench FigStep/data --suite mossbench MOSSBench/data
    --out eval/pruned

    Parameters
    ----------
    patch
        Put this patch on the model in memory first.
    defence
        Answer under this defence at inference, from `regraft defend`.
    """
    from regraft import stages

    with _watch() as watch:
        _refuse_unread(settings)
        source = _open(model, compute.trust_remote_code)
        done = stages.evaluate(
            source, out, suite, settings, compute, patch, watch=watch, defence_file=defence
        )
        show_result(watch.console, done.result)
        watch.note(f"Answers and results: {out}. As a page: regraft report {out}")


@app.command
def harness(
    model: Model,
    *task: str,
    out: OutFile,
    patch: Path | None = None,
    limit: int | None = None,
    include: Path | None = None,
    compute: Compute = ComputeSettings(),
) -> None:
    """Run tasks of lmms-eval on the model in memory (pip install 'regraft[harness]').

    Example: regraft harness MODEL mmbench_en_dev_static docvqa_val --patch gain.safetensors
    --out utility.json

    Parameters
    ----------
    task
        Names of lmms-eval's tasks that generate answers to prompts with one image or none.
    patch
        Put this patch on the model in memory first.
    limit
        Use only the first prompts of each task.
    include
        A folder with tasks of your own, in place of lmms-eval's.
    """
    from regraft import stages

    with _watch() as watch:
        source = _open(model, compute.trust_remote_code)
        results = stages.harness(
            source, task, out, compute, watch, patch_file=patch, limit=limit, include=include
        )
        show_harness(watch.console, results)
        watch.note(f"Wrote {out}")


@app.command
def sweep(
    recipe: Path,
    setting: Swept,
    *,
    values: Annotated[tuple[float, ...], Parameter(consume_multiple=True)],
    out: OutFolder,
) -> None:
    """Run a recipe at several values of one setting: ASR, over-refusal and utility by the value.

    How much pruning is too much (sparsity), how many neurons matter (q), how many heads
    (top-heads), how many weights (budget). Resumes after a kill.

    Example: regraft sweep recipe.yaml sparsity --values 0.3 0.4 0.5 0.6 --out sweep

    Parameters
    ----------
    recipe
        A YAML file; its first pruning and its first variant are varied.
    setting
        What is varied.
    values
        The values.
    """
    from regraft.analysis import run as analysis

    with _watch() as watch:
        found = analysis.sweep(read_recipe(recipe), setting, values, out, watch)
        show_sweep(watch.console, found)
        watch.note(f"Figure: {(out / 'sweep.svg').absolute()}")


@app.command
def relate(*run: Path, out: OutFolder) -> None:
    """Over the pruned models of several runs: total Ships against the rise in ASR, Spearman's rho.

    Example: regraft relate runs/qwen2-vl runs/llava-mistral runs/llava-vicuna --out relation

    Parameters
    ----------
    run
        Folders of `regraft run` with head scores.
    """
    from regraft.analysis import run as analysis

    with _watch() as watch:
        points, found = analysis.relate(run, out)
        show_relation(watch.console, points, found)
        watch.note(f"Figure: {(out / 'relation.svg').absolute()}")


@app.command
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

    Example: regraft overlap MODEL statistics.safetensors --share 0.05 0.1 --out overlap

    Parameters
    ----------
    statistics_file
        From `regraft statistics`.
    share
        Top shares of every weight matrix.
    scope
        Weights compete within their row or their matrix.
    trust_remote_code
        Run Python code that comes with the checkpoint.
    """
    from regraft.analysis import run as analysis

    with _watch() as watch:
        dense = _open(model, trust_remote_code)
        found = analysis.overlap(dense, statistics_file, share, scope, out, watch)
        show_overlap(watch.console, found)
        watch.note(f"Figure: {(out / 'overlap.svg').absolute()}")


@app.command
def render(prompts: TextPrompts, *, out: OutFolder, font: Path | None = None) -> None:
    """Draw prompts as FigStep's typographic images: a data set of images from one of text.

    Example: regraft render prompts:advbench.csv --out advbench-images

    Parameters
    ----------
    font
        The file of FreeMono Bold, or of another font.
    """
    from regraft.data.sources import read
    from regraft.data.typographic import write_typographic

    with _watch() as watch:
        reading = read(prompts)
        drawn = write_typographic(reading, out, watch, font)
        if drawn.left_out:
            watch.note(
                f"{len(drawn.left_out)} of {len(reading.examples)} left out, as they do not fit "
                f"into an image: {', '.join(drawn.left_out)}"
            )
        if drawn.unwritten:
            watch.note(
                f"{len(drawn.unwritten)} of {len(reading.examples)} left out, as the font has not "
                f"all of their letters (--font names another): {', '.join(drawn.unwritten)}"
            )
        watch.note(
            f"{len(drawn.images)} images; evaluate them by the name {out / 'examples.jsonl'}"
        )


@app.command
def judge(
    evaluation: Path,
    *,
    by: Judges,
    out: MaybeOutFolder = None,
    images: Path | None = None,
    compute: Compute = ComputeSettings(),
) -> None:
    """Judge the saved answers of an evaluation by other judges; how far do any two agree?

    Example: regraft judge run/evaluation/pruned --by vlguard-1 --by qwen3guard:Qwen3Guard-Gen-4B

    Parameters
    ----------
    evaluation
        Folder of `regraft eval`, or one below `evaluation` in that of a run.
    images
        Show judges that see the prompts' images, which lie in this folder or below it.
    """
    from regraft import stages
    from regraft.files import slug

    with _watch() as watch:
        for one in by:
            stages.check_judge(one)
        folder = out or evaluation / stages.VERDICTS
        files = {one: folder / f"{slug(one)}.json" for one in by}
        judged = [
            stages.judge(evaluation, one, file, compute, watch, images)
            for one, file in files.items()
        ]
        show_judged(watch.console, [stages.own(evaluation), *judged])
        found = stages.agreement(evaluation, [*files.values()], folder / "agreement.json")
        show_agreement(watch.console, found)
        watch.note(f"Verdicts with reasons: {folder}")


@app.command(name="judge-bench")
def judge_bench(
    *file: Path,
    by: Judges = tuple(KEYWORD_JUDGES),
    positive: tuple[str, ...] = (),
    question: Literal["refusal", "harm"] = "refusal",
    ids: Literal["all", "even", "odd"] = "all",
    out: MaybeOutFile = None,
    compute: Compute = ComputeSettings(),
) -> None:
    """Measure judges against answers that people labelled: accuracy, precision, recall, kappa.

    Judges that are models need --out: verdicts are kept beside it, and a stopped run goes on.

    Example: regraft judge-bench xstest/completions_*.csv --ids even

    Parameters
    ----------
    file
        CSV with prompt, completion (or answer) and final_label (or label), as XSTest's.
    positive
        Labels that mean yes; XSTest's full and partial refusals, "refused", "yes" ... if not given.
    question
        What the labels say: whether the answer refuses, or whether it does harm.
    ids
        Only rows whose id is even, or odd: regraft-keywords-2 was chosen on XSTest's odd ones.
    """
    from regraft import stages

    with _watch() as watch:
        found = stages.judge_bench(file, by, positive, question, ids, compute, watch, out)
        show_quality(watch.console, found)
        if out is not None:
            watch.note(f"Wrote {out}")


@app.command
def report(*folder: Path, out: MaybeOutFolder = None) -> None:
    """Write a report: JSON, Markdown and one HTML page, of a finished run again or of evaluations.

    Example: regraft report ev-dense ev-pruned --out page

    Parameters
    ----------
    folder
        Of `regraft run`; or one or several of `regraft eval`, on the same prompts by the same
        judge, of any checkpoints. All after the first are compared with it.
    out
        New folder, for evaluations; of a single one `report` in it if not given.
    """
    from regraft import evaluations, pipeline, study

    if not folder:
        raise RegraftError("Name the folder of a run, or folders of evaluations.")
    run = folder[0]
    with _watch() as watch:
        if any(map(evaluations.is_evaluation, folder)):
            if out is None and len(folder) > 1:
                raise RegraftError("Say where the report of several evaluations goes: --out.")
            page = out or run / "report"
            show_report(watch.console, evaluations.report(folder, page))
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
            _show_study(watch, study.report(run), run / "report")
            return
        show_report(watch.console, pipeline.report(run))
        watch.note(f"Report: {pipeline.RunFolder(run).report / 'report.html'}")


@app.command
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

    with _watch() as watch:
        _show_study(watch, compare_folders(run, out, against), out)


@app.command
def run(recipe: Path, *, out: OutFolder) -> None:
    """Run a whole recipe: prune, score heads, realign, evaluate, report. Resumes after a kill.

    With `seeds` in the recipe there is one run for each, and a comparison over them.

    Parameters
    ----------
    recipe
        A YAML file; `regraft recipe` prints one with every setting and its default.
    """
    _run(recipe, out)


@app.command
def demo(*, out: OutFolder = Path("demo-run")) -> None:
    """Run the main job on the bundled model: about six minutes on two CPU cores, no network."""
    from importlib.resources import files

    _run(Path(str(files("regraft"))) / "demo" / "demo.yaml", out)


@app.command
def recipe() -> None:
    """Print a recipe with every setting and its default, to start one's own from."""
    from regraft.recipe_help import explained_recipe

    sys.stdout.write(explained_recipe())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 on bad input, having written nothing."""
    console = Console(stderr=True, emoji=False)
    try:
        with ranks.joined():
            words = _joined(sys.argv[1:] if arguments is None else arguments)
            app(words, exit_on_error=False, print_error=False)
    except RegraftError as error:
        _fail(console, str(error))
    except ValidationError as error:
        _fail(console, explain(error, flags=True))
    except CycloptsError as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            _fail(console, explain(cause, flags=True))
        _fail(console, str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            _crash(console)
        _fail(
            console,
            "The device is out of memory. Lower --batch-size (in a recipe compute.batch_size), in "
            "scoring heads --tokens-per-pass (heads.tokens_per_pass): what is finished stays. Or, "
            "in a new output, keep one layer at a time on the device: --placement streamed "
            "(compute.placement).",
        )
    except KeyboardInterrupt:
        console.print("Interrupted. The same command continues where it stopped.")
        _leave(130)
    except Exception:
        _crash(console)


def _joined(words: Sequence[str]) -> list[str]:
    """The words with `--data NAME PATH` as `--data NAME:PATH`; settings take a flag's one word."""
    found: list[str] = []
    rest = list(words)
    while rest:
        option = found[-1:] in (["--data"], ["--validation"])
        count = words_of_first(rest) if option and not "".join(rest[1:2]).startswith("-") else 1
        found.append(":".join(rest[:count]))
        rest = rest[count:]
    return found


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    ranks.leave(code)


def _crash(console: Console) -> NoReturn:
    """Raise what was not foreseen; one of several processes says it and is gone."""
    if ranks.world() > 1:
        console.print_exception()
        _leave(1)
    raise


def _fail(console: Console, message: str) -> NoReturn:
    console.print("[bold red]Error:[/] ", end="")
    console.print(message.strip(), markup=False, highlight=False, soft_wrap=True)
    _leave(2)


def _run(recipe_file: Path, out: Path) -> None:
    from regraft import pipeline, study

    recipe = read_recipe(recipe_file)
    with _watch() as watch:
        if recipe.seeds:
            _show_study(watch, study.run(recipe, out, watch), out / "report")
            return
        made = pipeline.run(recipe, out, watch)
        show_report(watch.console, made)
        watch.note(f"Report: {(pipeline.RunFolder(out).report / 'report.html').absolute()}")


def _show_study(watch: ConsoleWatch, study: Study, out: Path) -> None:
    show_study(watch.console, study)
    watch.note(f"Comparison: {(out / 'compare.html').absolute()}")


def _patch(
    operation: Operation,
    folder: Path,
    patches: Sequence[Path],
    out: Path | None,
    in_place: bool,
    dry_run: bool,
) -> None:
    from regraft import stages

    if in_place == (out is not None):
        raise RegraftError(
            f"Say where to {operation}: either --out FOLDER for a new folder, or --in-place."
        )
    with _watch() as watch:
        if dry_run:
            _show_preview(
                watch.console, stages.preview(operation, folder, patches, out, watch), out
            )
        elif out is not None:
            if out.exists() and out.resolve() == folder.resolve():
                raise RegraftError(f"{out} is the checkpoint itself: use --in-place to change it.")
            write = stages.apply if operation == "apply" else stages.revert
            write(folder, patches, out, watch)
            watch.note(f"Checkpoint: {out}")
        else:
            change = stages.apply_in_place if operation == "apply" else stages.revert_in_place
            changed = change(folder, patches, watch)
            nothing = f"Nothing to do: {folder} is as it should be."
            watch.note(f"Changed {folder}" if changed else nothing)


def _show_preview(console: Console, preview: Preview, out: Path | None) -> None:
    table = Table("patch", "tensors", "restored weights", "pruned in exchange", "already on")
    for state in preview.plan.states:
        counts = (state.tensors, state.restored, state.removed, state.on)
        table.add_row(Text(state.name), *(f"{count:,}" for count in counts))
    console.print(table)
    shards = len(preview.plan.shards)
    console.print(
        f"{preview.plan.weights:,} weights would change, in {shards} of "
        f"{len(preview.plan.checkpoint.shards)} shards; {preview.bytes:,} bytes would be written "
        f"{'in place' if out is None else f'to {out}'}. Nothing was written.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _open(model: str, trust_remote_code: bool) -> Source:
    return open_source(
        demo_model() if model == "demo" else model, trust_remote_code=trust_remote_code
    )


@contextmanager
def _watch() -> Iterator[ConsoleWatch]:
    width = None if sys.stdout.isatty() else 120
    yield ConsoleWatch(Console(width=width, quiet=not ranks.first(), emoji=False))


def _runs(layers: Sequence[LayerAnatomy]) -> Iterator[tuple[int, int, LayerAnatomy]]:
    """Group neighbouring layers of equal shape: (first index, last index, one of them)."""

    def look(layer: LayerAnatomy) -> Any:
        shapes = tuple((linear.name, linear.shape) for linear in layer.linears)
        return layer.attention, layer.heads, layer.kv_heads, layer.head_dim, shapes

    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or look(layers[i]) != look(layers[start]):
            yield layers[start].index, layers[i - 1].index, layers[start]
            start = i


if __name__ == "__main__":
    main()
