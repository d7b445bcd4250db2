"""Reports on evaluations of any checkpoints, and over finished runs; no model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from regraft import stages
from regraft.disk.paths import real
from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT
from regraft.evaluation.pairing import on_the_same
from regraft.evaluation.results import EvalResult
from regraft.evaluation.served import explained
from regraft.report.pooling import study_of
from regraft.report.run import Opinion, Run, Variant
from regraft.report.study import Study
from regraft.report.write import check_report_folder, write_report
from regraft.restoration.base import settings_in
from regraft.runs.reporting import accounts_of, images_of, open_run, read_run, run_folders
from regraft.stages import Evaluation
from regraft.stages.judging import opinions
from regraft.stages.provenance import but_for_rounding, difference, evaluated_differently

_CONDITIONS = ("settings", "compute", "versions")  # under which models are evaluated
_SERVER = {"device": "a server's"}  # all that is known of how an endpoint ran


def is_evaluation(folder: Path) -> bool:
    """Whether `regraft eval` wrote this folder."""
    return any((folder / name).is_file() for name in ("results.json", "answers.jsonl"))


Pair = tuple[Path, Path]
"""The evaluations of a dense model and of the pruned model that others were made from."""


def report_evaluations(folders: Sequence[Path], out: Path, pair: Pair | None = None) -> Study:
    """Write report.json, .md and .html on evaluations to the folder `out`, replacing older ones.

    Raises:
        RegraftError: see `run_of_evaluations`; `out` holds something else.
    """
    check_report_folder(out)
    made = study_of([run_of_evaluations(folders, pair)])
    write_report(made, out)
    return made


def run_of_evaluations(folders: Sequence[Path], pair: Pair | None = None) -> Run:
    """Read evaluations of the same prompts by the same judge as one run.

    The others are compared with the first. With `pair` the pruned model is compared with the dense
    one and all others with the pruned one, with their RSR; `folders` may include the pair.

    Raises:
        RegraftError: a folder holds no evaluation or is named twice, judge or prompts differ, or
            the recorded models contradict `pair`.
    """
    if pair is not None:
        named = [*map(real, pair)]
        folders = [*pair, *(folder for folder in folders if real(folder) not in named)]
    found = dict(zip(_names(folders), map(stages.read_evaluation, folders), strict=True))
    if pair is not None:
        _check_pair(found)
    first, *names = found
    results = {first: found[first].result} | {
        name: on_the_same(first, found[first].result, name, found[name].result) for name in names
    }
    about = found[first].about
    return Run(
        title=f"Evaluation{'s' if names else ''}: {', '.join(found)}",
        model="",
        variants=tuple(_variants(found, results, related=pair is not None)),
        data=tuple(accounts_of([about])),
        recipe={
            "evaluations": {
                name: {"folder": str(folder), **one.about["inputs"]}
                for folder, (name, one) in zip(folders, found.items(), strict=True)
            },
            "suites": found[first].result.suites,
            **{way: about[way] for way in ("settings", "compute") if way in about},
        },
        versions=about["versions"] | {"device": about.get("compute", _SERVER)["device"]},
        notes=(*_differences(found), *_replies(found)),
        images=partial(images_of, found[first]),
        opinions=tuple(
            Opinion(name, *one)
            for folder, name in zip(folders, found, strict=True)
            for one in opinions(folder)
        ),
        unrelated=pair is None,
    )


def _variants(
    found: Mapping[str, Evaluation], results: Mapping[str, EvalResult], *, related: bool
) -> Iterator[Variant]:
    """The models; with `related` the first is the dense one and the second the pruned one."""
    first, *names = found
    pruned = names[0] if related else first
    # Only patches record what compression changed: zeros may come from rounding too.
    zeroed, changed = (
        max(one.about.get(kind, 0) for one in found.values()) * related
        for kind in ("pruned", "changed")
    )
    for name, one in found.items():
        yield Variant(
            name,
            results[name],
            base=None if name == first else first if name == pruned else pruned,
            sparsity=one.about.get("zeros", 0) / one.about.get("prunable", 1),
            restored=one.about.get("restored") if related else None,
            pruned=0 if name == first else changed or zeroed,
            changed=name != first and bool(changed),
            inference_time=related and "defence" in one.about["inputs"],
        )


def _check_pair(found: Mapping[str, Evaluation]) -> None:
    """Raise RegraftError if what was recorded about the models contradicts their roles.

    Without a patch only the checkpoint's digest is recorded; it may have been made from the pair.
    """
    dense, pruned, *others = found
    about = {name: one.about for name, one in found.items()}
    if about[dense]["inputs"] == about[pruned]["inputs"]:
        raise RegraftError(
            f"{dense} and {pruned} are evaluations of the same model "
            f"({_model(about[dense]['inputs'])}). Name the pruned model's by --pruned."
        )
    ours, theirs = about[dense], about[pruned]
    if "prunable" in ours and "prunable" in theirs:
        if theirs["prunable"] != ours["prunable"]:
            raise RegraftError(
                f"{pruned} has {theirs['prunable']:,} prunable weights and {dense} "
                f"{ours['prunable']:,}: one was not made from the other."
            )
        if theirs["zeros"] < ours["zeros"]:  # equal if weights were changed, not pruned
            raise RegraftError(
                f"The model of {pruned} has {theirs['zeros']:,} zero weights and that of {dense} "
                f"{ours['zeros']:,}: it was not pruned from it. Are --dense and --pruned swapped?"
            )
    for name in others:
        inputs = about[name]["inputs"]
        changed = inputs.keys() & {"patch", "defence"}
        if changed and inputs["model"] != about[pruned]["inputs"]["model"]:
            raise RegraftError(
                f"{name} is an evaluation of another model with a {changed.pop()} "
                f"({_model(inputs)}), not of {pruned}'s. Leave it out, or name its pruned "
                "model's evaluation by --pruned."
            )


def _model(inputs: Mapping[str, str]) -> str:
    """How an error names the model of an evaluation."""
    model = inputs["model"]
    return model if model.startswith(ENDPOINT) else f"fingerprint {model[:12]}"


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest path suffixes that differ from each other."""
    parts = [real(folder).parts for folder in folders]
    if twice := [folder for i, folder in enumerate(folders) if parts[i] in parts[:i]]:
        raise RegraftError(f"{twice[0]} is named twice.")
    length = next(n for n in count(1) if len({one[-n:] for one in parts}) == len(parts))
    return ["/".join(one[-length:]) for one in parts]


def _differences(found: Mapping[str, Evaluation]) -> Iterator[str]:
    """Sentences on settings, compute and versions that differ from the first evaluation's."""
    first, *names = found
    for name in names:
        ours, theirs = found[first].about, found[name].about
        yield from evaluated_differently(first, ours, name, theirs, *_CONDITIONS)


def _replies(found: Mapping[str, Evaluation]) -> Iterator[str]:
    """Sentences on replies of endpoints that were not plain answers."""
    for name, one in found.items():
        for sentence in explained(one.about.get("replies", {})):
            yield f"{name}: {sentence}"


def compare_runs(folders: Sequence[Path], out: Path, against: Sequence[str] = ()) -> Study:
    """Compare the methods of finished runs; write report.json, .md, .html and figures.

    Args:
        folders: Folders of runs whose recipes differ only in the calibration seed, or of a recipe
            with `seeds`, which stands for all its runs.
        out: The folder of the report; an older one in it is replaced.
        against: Methods that all others are tested against, besides the pruned model.

    Raises:
        RegraftError: a run is not finished, or they cannot be compared.
    """
    check_report_folder(out)
    run_dirs = [run for folder in folders for run in run_folders(folder, open_run(folder)[1])]
    runs = {run_dir: read_run(run_dir) for run_dir in run_dirs}
    _check_same_recipe(runs)
    study = study_of(list(runs.values()), against)
    write_report(study, out)
    return study


def _check_same_recipe(runs: Mapping[Path, Run]) -> None:
    for (first, one), (run_dir, other) in pairwise(runs.items()):
        wanted, found = (_without_seed(run.recipe) for run in (one, other))
        if found != wanted:
            raise RegraftError(
                f"{run_dir} and {first} are runs of recipes that differ in more than the "
                f"calibration seed ({difference(found, wanted)}). Compare runs of one recipe."
            )


def _without_seed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the calibration seed and the draw seeds, which follow from it."""
    calibration = {name: value for name, value in recipe["calibration"].items() if name != "seed"}
    realign = {
        one["name"]: {
            k: v for k, v in one.items() if k != "draw_seed" or not settings_in(one).drawn
        }
        for one in recipe["realign"]
    }
    prune = {one["name"]: one for one in recipe["prune"]}
    rest = {**recipe, "calibration": calibration, "prune": prune, "realign": realign}
    comparable: dict[str, Any] = but_for_rounding(rest)
    return comparable
