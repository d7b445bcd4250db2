"""Restore pruned weights and tune how: `regraft realign`, `regraft tune`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter
from pydantic import ValidationError

from regraft.cli.options import DryRun, OutFile, OutFolder, as_command
from regraft.console import ConsoleProgress, live_progress, show_preview, show_search, show_tuned
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import read_curve
from regraft.flags import DEFAULT_VALIDATION_TOKENS, check_realign, check_tuning
from regraft.heads.ships import HeadSettings
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import is_changed
from regraft.restoration.base import METHODS, Budgeted, MethodSettings
from regraft.restoration.methods.fine_tune import TRAINED_VALUES, is_trained
from regraft.restoration.methods.gain.path import read_path, short_of
from regraft.settings.base import EXPERT, explain
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, PromptSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import BoundSettings, SearchSettings, TuneSettings

if TYPE_CHECKING:
    from regraft.stages import Setup

_SEARCH = Group("Search for the number of weights", sort_key=2)
_DATA = Parameter(name="*", group=Group("Calibration prompts", sort_key=1))
Dense = Annotated[str, Parameter(help="Dense checkpoint: a folder or hub id.")]
Pruned = Annotated[str, Parameter(help="The same model, pruned or dequantised.")]
Prompts = Annotated[PromptSettings, _DATA]
Choice = Annotated[SearchSettings, Parameter(name="*", group=_SEARCH)]
Bounds = Annotated[BoundSettings, Parameter(name="*", group=_SEARCH)]
AnswerLength = Annotated[int, Parameter(help="Maximum length of an answer.", group=_SEARCH)]
Search = Annotated[bool, Parameter(help="Choose it on validation prompts.", group=_SEARCH)]
HeadsFile = Annotated[Path | None, Parameter(help="Scores from regraft analyse heads."), EXPERT]
StatisticsFile = Annotated[
    Path | None, Parameter(help="Statistics from regraft analyse statistics."), EXPERT
]
Scoring = Annotated[HeadSettings, Parameter(name="*", group=Group("Scoring of heads", sort_key=3))]
Where = Annotated[ComputeSettings, Parameter(name="*", group=Group("Where it runs", sort_key=4))]
Trials = Annotated[TuneSettings, Parameter(name="*", group=Group("Trials", sort_key=0))]
_ABOUT_TUNING = (
    "Search for a method's settings that give the lowest ASR within bounds, on validation "
    "prompts.\n\n"
    "Uses constrained TPE (Optuna: pip install 'regraft[tune]'). The same command resumes after a "
    "kill, continues with more --trials, and shares the trials if started several times at once. A "
    "trial is rated by its best number of weights within the bounds. Settings that are not tuned "
    "stay as given, such as the budget. Writes tuned.json and best.yaml, an item for a recipe's "
    "`realign`.\n\n"
    "Example: regraft tune hsr MODEL pruned --budget 2 --data vlguard VLGuard/train.json "
    "--validation validation.jsonl --trials 40 --points 3 --out tuned"
)


def for_method(
    run: Callable[..., None], name: str, text: str, without: Collection[str] = ()
) -> Callable[..., None]:
    """Turn `run` into the command of a restoration method; see `as_command`.

    There are flags for heads and statistics if the method needs these by default.
    """
    method = METHODS.get(name)
    needs = method.needs(method.settings_type(method=name))
    unread = {*without}
    unread |= set() if needs.heads else {"scoring", "heads_file"}
    unread |= set() if needs.statistics else {"statistics_file"}
    # Only statistics use the data's responses: for other methods the dense model answers.
    prompts = CalibrationSettings if needs.statistics else PromptSettings
    special = {"calibration": {"annotation": Annotated[prompts, _DATA], "default": prompts()}}
    return as_command(run, name, method.settings_type, text, unread, special)


def run_method(
    name: str,
    dense: Dense,
    pruned: Pruned,
    *,
    out: OutFile,
    settings: MethodSettings,
    calibration: Prompts = CalibrationSettings(),
    search: Search = False,
    choice: Choice = SearchSettings(),
    max_new_tokens: AnswerLength = DEFAULT_VALIDATION_TOKENS,
    scoring: Scoring = HeadSettings(),
    compute: Where = ComputeSettings(),
    heads_file: HeadsFile = None,
    statistics_file: StatisticsFile = None,
    dry_run: DryRun = False,
) -> None:
    """Rank weights by a method and write the dense values of the first ones as a patch."""
    from regraft import stages
    from regraft.stages.restoring import plan_restoration

    if not search and choice != SearchSettings():
        raise RegraftError("Bounds, targets and points are for a search: add --search.")
    files = heads_file, statistics_file
    check_realign(settings, scoring, *files, search=search, max_new_tokens=max_new_tokens)
    progress = live_progress()
    setup = _setup(dense, calibration, max_new_tokens, scoring, compute, progress)
    given = stages.Inputs(heads=heads_file, statistics=statistics_file)
    paths = stages.ArtifactPaths.beside(out, given)
    chosen = choice if search else None
    plan = plan_restoration(setup, compute.opened(pruned), settings, paths, chosen)
    if dry_run:
        show_preview(progress.console, out, plan)
        return
    plan.carry_out()
    if search:
        show_search(progress.console, read_curve(paths.curve))
        progress.note(f"All points: {paths.curve}")
    _describe(progress, out, load_patch(out), settings)


def _setup(
    dense: str,
    calibration: PromptSettings,
    max_new_tokens: int,
    scoring: HeadSettings,
    compute: ComputeSettings,
    progress: ConsoleProgress,
) -> Setup:
    from regraft.stages import Setup

    data = calibration.with_responses()
    answers = EvalSettings(max_new_tokens=max_new_tokens, full_answers=False)
    model = compute.opened(dense)
    return Setup(model, data, compute, progress, scoring=scoring, evaluation=answers)


def _broken(name: str, error: Exception) -> Callable[..., None]:
    """The command of another package's method that cannot be used: it says why."""
    why = f"The method {name!r} cannot be used: {type(error).__name__}: {error}"
    if isinstance(error, RegraftError):
        why = str(error)
    elif isinstance(error, ValidationError):
        why = f"The method {name!r} needs settings with valid defaults:\n{explain(error)}"

    def command(*_words: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
        raise RegraftError(why)

    command.__doc__ = "Cannot be used; call it to see why."
    return command


def _without_method(group: App) -> Callable[..., None]:
    """What a command does without a method: show its help, or refuse another word."""
    name = group.name[0]

    def command(
        *words: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    ) -> None:
        if words:
            methods = [one for one in group if not one.startswith("-")]
            raise RegraftError(
                f"{words[0]!r} is no method of `regraft {name}`. Name one of these first: "
                f"{', '.join(methods)}."
            )
        from regraft.cli import application

        application(listed=False)([name, "--help"])

    return command


def _describe(progress: ConsoleProgress, out: Path, patch: Patch, settings: MethodSettings) -> None:
    pruned = patch.about["pruned"]
    exchanged = f" and {patch.removed:,} pruned in exchange" if patch.removed else ""
    progress.note(
        f"{out}: {patch.restored:,} weights restored{exchanged}, "
        f"{10_000 * patch.restored / pruned:.3f} per 10,000 of {pruned:,} "
        f"{'changed weights' if is_changed(patch) else 'zeros'}."
    )
    if below := _below_budget(patch, settings):
        progress.note(f"{out}: {below}.")
    if is_trained(patch):
        progress.note(f"{out}: {TRAINED_VALUES}")
    if "n_m" in patch.about:
        progress.note(
            f"{patch.about['violated_groups']:,} of {patch.about['groups']:,} "
            f"{patch.about['n_m']} groups are violated: kernels for {patch.about['n_m']} "
            "sparsity cannot run the realigned checkpoint."
            if patch.about["violated_groups"]
            else f"All {patch.about['groups']:,} {patch.about['n_m']} groups are kept."
        )


def _below_budget(patch: Patch, settings: MethodSettings) -> str:
    """Why gain stopped below its budget; "" if it did not, or if a search chose the number."""
    path = read_path(patch.about)
    if path is None or patch.about.get("count") is not None:
        return ""
    return short_of(path, patch.restored, settings.how_many(patch.about["pruned"]))


app = App(
    name="realign",
    help="Restore pruned weights so that the model refuses as before; writes a patch.\n\n"
    "Use gain unless you want to compare methods:\n\n"
    "regraft realign gain DENSE PRUNED --data prompts.jsonl --out gain.safetensors",
)


app.default(_without_method(app))
for _name in METHODS.names():
    try:
        _settings = METHODS.get(_name).settings_type
        _unread = () if issubclass(_settings, Budgeted) else ("search", "choice", "max_new_tokens")
        _text = (_settings.__doc__ or "").strip()
        app.command(for_method(run_method, _name, _text, _unread), name=_name)
    except Exception as _error:  # another package's method must not break the others
        app.command(_broken(_name, _error), name=_name)


def tune(
    name: str,
    dense: Dense,
    pruned: Pruned,
    *,
    out: OutFolder,
    settings: MethodSettings,
    tuning: Trials = TuneSettings(),
    calibration: Prompts = CalibrationSettings(),
    bounds: Bounds = BoundSettings(),
    max_new_tokens: AnswerLength = DEFAULT_VALIDATION_TOKENS,
    scoring: Scoring = HeadSettings(),
    compute: Where = ComputeSettings(),
) -> None:
    from regraft.stages.tuning import tune_method

    progress = live_progress()
    check_tuning(settings, bounds, scoring)
    setup = _setup(dense, calibration, max_new_tokens, scoring, compute, progress)
    tuned = tune_method(setup, compute.opened(pruned), out, settings, tuning, bounds)
    show_tuned(progress.console, tuned)
    progress.note(f"All trials: {out / 'tuned.json'}")
    if tuned.best is not None:
        progress.note(f"The best settings, for a recipe: {out / 'best.yaml'}")


tune_app = App(name="tune", help=_ABOUT_TUNING)
tune_app.default(_without_method(tune_app))
for _name in METHODS.working():
    if METHODS.get(_name).tunes:
        _text = (METHODS.get(_name).settings_type.__doc__ or "").strip()
        with suppress(Exception):  # a package's method; `realign` says what is wrong with it
            tune_app.command(for_method(tune, _name, _text), name=_name)
