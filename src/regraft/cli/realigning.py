"""A dense and a pruned model to a patch: `regraft realign METHOD`, a command for each method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from pydantic import create_model

from regraft.cli.flags import (
    DEFAULT_VALIDATION_TOKENS,
    check_answers,
    check_inputs,
    check_search,
    refuse_unread,
)
from regraft.cli.options import (
    Flat,
    Model,
    OutFile,
    open_model,
    watching,
)
from regraft.console import ConsoleWatch, show_search
from regraft.data.sources import split_off
from regraft.heads.ships import HeadSettings
from regraft.patch.format import Patch
from regraft.restoration.base import METHODS, MethodSettings
from regraft.restoration.methods.fine_tune.adam import TRAINED_VALUES, is_trained
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, PromptSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings
from regraft.settings.validation import with_validation

_create_model: Any = create_model
SEARCH = Group("Search for a number of weights", sort_key=2)
SCORING = Group("Scoring of heads", sort_key=3)
DATA = Group("Calibration prompts", sort_key=1)
COMPUTE = Group("Where it runs", sort_key=4)


def grouped(group: Group) -> Parameter:
    """Flags of their own for the fields of settings, under a heading of the help."""
    return Parameter(name="*", group=group)


def flags_of(name: str) -> type[MethodSettings]:
    """A method's settings, without a flag for its name."""
    own = METHODS.get(name).Settings
    hidden = Annotated[Literal[name], Parameter(show=False, parse=False)]  # type: ignore[valid-type]
    flags: type[MethodSettings] = _create_model(own.__name__, __base__=own, method=(hidden, name))
    return flags


def keyword(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    """A parameter of a command."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def pair() -> list[inspect.Parameter]:
    """The two models that a restoration is of."""
    said = {"dense": "The dense checkpoint", "pruned": "The same model pruned, by any tool"}
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Annotated[Model, Parameter(help=f"{text}: folder or hub id.")],
        )
        for name, text in said.items()
    ]


def calibrated(name: str) -> inspect.Parameter:
    """Prompts, and responses where the method may read some."""
    own = CalibrationSettings if METHODS.get(name).reads_responses else PromptSettings
    return keyword("calibration", Annotated[own, grouped(DATA)], own())


def scored() -> inspect.Parameter:
    """How heads are scored."""
    return keyword("scoring", Annotated[HeadSettings, grouped(SCORING)], HeadSettings())


def searched() -> list[inspect.Parameter]:
    """How points are answered on validation prompts, and which is taken."""
    length = Parameter(help="Length of an answer to a validation prompt.", group=SEARCH)
    return [
        keyword("max_new_tokens", Annotated[int, length], DEFAULT_VALIDATION_TOKENS),
        keyword("choice", Annotated[SearchSettings, grouped(SEARCH)], SearchSettings()),
    ]


def computed() -> inspect.Parameter:
    """Where it runs."""
    return keyword("compute", Annotated[ComputeSettings, grouped(COMPUTE)], ComputeSettings())


def command(
    name: str, parameters: list[inspect.Parameter], run: Callable[..., None], text: str
) -> Callable[..., None]:
    """A function whose parameters are put together, as `cyclopts` reads them."""

    def made(*args: Any, **given: Any) -> None:
        run(name, *args, **given)

    made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made.__annotations__ = {one.name: one.annotation for one in parameters}
    made.__doc__ = text
    made.__name__ = name
    return made


def _parameters(name: str) -> list[inspect.Parameter]:
    method, own = METHODS.get(name), flags_of(name)
    found = [*pair(), keyword("out", OutFile)]
    found.append(keyword("settings", Annotated[own, Flat], None))
    if method.reads_heads:
        said = Parameter(
            help="From `regraft analyse heads`, instead of scoring them here.", group=SCORING
        )
        found.append(keyword("heads_file", Annotated[Path | None, said], None))
        found.append(scored())
    if method.reads_responses:
        said = Parameter(help="From `regraft analyse statistics`, instead of gathering them here.")
        found.append(keyword("statistics_file", Annotated[Path | None, said], None))
    if "budget" in own.model_fields and method.searches:
        said = Parameter(
            help="Choose how many weights of the budget are restored, on validation prompts.",
            group=SEARCH,
        )
        found.append(keyword("search", Annotated[bool, said], False))
        found += searched()
    return [*found, calibrated(name), computed()]


def realign(
    name: str,
    dense: str,
    pruned: str,
    *,
    out: Path,
    settings: MethodSettings | None = None,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    search: bool = False,
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    choice: SearchSettings = SearchSettings(),
    scoring: HeadSettings = HeadSettings(),
    calibration: PromptSettings = CalibrationSettings(),
    compute: ComputeSettings = ComputeSettings(),
) -> None:
    """Rank pruned weights by a method and write the dense values of the first as a patch."""
    from regraft import stages

    settings = settings or METHODS.get(name).Settings(method=name)
    calibration = calibration.with_responses()
    with watching() as progress:
        refuse_unread(calibration)
        check_search(search, settings, choice)
        check_inputs(settings, scoring, heads_file, statistics_file)
        check_answers(search, max_new_tokens)
        source = open_model(dense, compute.trust_remote_code)
        other = open_model(pruned, compute.trust_remote_code)
        found = with_validation(choice, source.folder, calibration) if search else None
        if found is not None and found.validation is None:
            rest, held_out = split_off(calibration.data)
            calibration = calibration.model_copy(update={"data": rest})
            found = found.model_copy(update={"validation": held_out})
            progress.note(
                "No --validation is given: the search chooses on a quarter of the prompts, and "
                "nothing is learnt from these."
            )
        given = stages.Inputs(heads=heads_file, statistics=statistics_file)
        paths = stages.ArtifactPaths.beside(out, given)
        restoration = stages.Restoration(
            source,
            calibration,
            compute,
            progress,
            scoring=scoring,
            evaluation=EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
        )
        patch = restoration.restore(other, settings, paths, found)
        if search:
            show_search(progress.console, stages.read_curve(paths.curve))
            progress.note(f"All points: {paths.curve}")
        _describe(progress, out, patch)


def _describe(progress: ConsoleWatch, out: Path, patch: Patch) -> None:
    pruned = patch.about["pruned"]
    exchanged = f" and {patch.removed:,} kept ones go in exchange" if patch.removed else ""
    progress.note(
        f"{out}: {patch.restored:,} weights are restored{exchanged}, "
        f"{10_000 * patch.restored / pruned:.3f} per 10,000 of {pruned:,} zeros."
    )
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


def by_method(name: str, text: str) -> App:
    """A command with one below it for each method."""
    return App(name=name, help=text)


app = by_method(
    "realign",
    "Restore the pruned weights that carried safety: write their dense values as a patch.\n\n"
    "Take gain unless you compare methods: regraft realign gain MODEL pruned --data "
    "prompts.jsonl --out gain.safetensors",
)
for _name in METHODS.working():
    _text = (METHODS.get(_name).Settings.__doc__ or "").strip()
    app.command(command(_name, _parameters(_name), realign, _text), name=_name)
