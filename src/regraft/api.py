"""The stages as functions: folders or loaded objects and plain settings in, typed results out.

Models are folders, hub ids, "demo" for the bundled model, or what `open_source` has opened. Data
sets are named as on the command line: a .jsonl file, or "NAME:PATH" with a reader's name. Every
stage writes an artifact and, called again with the same, takes it as it is; a killed one goes on.
Other settings are those of the command line under the same names, such as `batch_size`. Those that
would change nothing are refused; bad input raises `RegraftError`. The command line calls these
functions too.

    import regraft

    regraft.prune("demo", "pruned", sparsity=0.6)
    patch = regraft.realign("demo", "pruned", "gain.safetensors")
    result = regraft.evaluate("pruned", "demo:test", "evaluation", patch="gain.safetensors")
    print(result.asr, result.over_refusal)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from regraft import stages
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation.gate import Check
from regraft.evaluation.results import EvalResult
from regraft.flags import (
    DEFAULT_VALIDATION_TOKENS,
    check_endpoint,
    check_inputs,
    check_search,
)
from regraft.heads.score import HeadScores
from regraft.heads.ships import HeadSettings
from regraft.models.load import Source, open_source
from regraft.patch.format import Patch
from regraft.progress import SILENT, Progress
from regraft.pruning.base import PRUNERS
from regraft.restoration.base import DEFAULT, METHODS
from regraft.settings.base import Settings, explain
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, PromptSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings, Margins
from regraft.settings.searching import SearchSettings, with_held_out

if TYPE_CHECKING:
    from regraft.report.study import Study

Model = str | Path | Source
Suites = str | Sequence[str | DataSource]
_DATA = ("data", "validation")  # settings that name a data set


def prune(
    model: Model,
    out: str | Path,
    *,
    method: str = "wanda",
    progress: Progress = SILENT,
    **settings: Any,
) -> Source:
    """Prune a model into the new folder `out`.

    Args:
        model: The dense model.
        out: The folder.
        method: The pruner.
        settings: Of the pruner (`sparsity`, `n_m` ...), the calibration (`data`, `samples`, `seed`)
            and where it runs (`device`, `dtype`, `batch_size`, `placement`).
    """
    blocks = PRUNERS.get(method).settings_type, CalibrationSettings, ComputeSettings
    own, data, compute = _settings({"method": method, **settings}, *blocks)
    if not own.kinds and data != CalibrationSettings():
        raise RegraftError(f"{method} reads no data: settings of it would change nothing.")
    setup = stages.Setup(_opened(model, compute), data, compute, progress)
    return stages.prune_checkpoint(setup, Path(out), own)


def score_heads(
    model: Model, out: str | Path, *, progress: Progress = SILENT, **settings: Any
) -> HeadScores:
    """Score every attention head for safety by Ships and KL; writes the file `out`.

    Args:
        model: The dense model.
        out: The file.
        settings: Of the scoring (`r_max`, `mode` ...), the calibration and where it runs.
    """
    own, data, compute = _settings(settings, HeadSettings, CalibrationSettings, ComputeSettings)
    setup = stages.Setup(_opened(model, compute), data, compute, progress)
    return stages.write_head_scores(setup, Path(out), own)


def realign(
    dense: Model,
    pruned: Model,
    out: str | Path,
    *,
    method: str = DEFAULT,
    search: Mapping[str, Any] | None = None,
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    heads_file: str | Path | None = None,
    statistics_file: str | Path | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> Patch:
    """Restore pruned weights, so that the model refuses as before; writes the patch `out`.

    Args:
        dense: The dense model.
        pruned: The same model pruned, by any tool.
        out: The patch file; what it is made from lies beside it.
        search: Choose how many weights are restored: `validation` prompts, bounds and targets.
            Without such prompts a quarter of the calibration data is held out for it.
        max_new_tokens: Length of an answer to a validation prompt.
        heads_file: From `score_heads`.
        statistics_file: From `regraft analyse statistics`.
        settings: Of the method (`budget`, `swap` ...), the scoring of heads, the calibration and
            where it runs.
    """
    kind = METHODS.get(method)
    responses = kind.needs(kind.settings_type(method=method)).statistics  # alone read any
    prompts = CalibrationSettings if responses else PromptSettings
    blocks = kind.settings_type, HeadSettings, prompts, ComputeSettings
    own, scoring, data, compute = _settings({"method": method, **settings}, *blocks)
    given = stages.Inputs(heads=_path(heads_file), statistics=_path(statistics_file))
    check_search(search is not None, own, max_new_tokens)
    check_inputs(own, scoring, given.heads, given.statistics)
    (answers,) = _settings({"max_new_tokens": max_new_tokens, "full_answers": False}, EvalSettings)
    asked = None if search is None else _settings(search, SearchSettings)[0]
    before, after = _opened(dense, compute), _opened(pruned, compute)
    choice, learnt = None, data.with_responses()
    if asked is not None:
        choice, learnt = with_held_out(asked, before.folder, learnt)
        if learnt.data != data.data:
            progress.note(
                "No validation prompts are given: the search chooses on a quarter of the prompts, "
                "and nothing is learnt from these."
            )
    restoration = stages.Restoration(
        before, learnt, compute, progress, scoring=scoring, evaluation=answers
    )
    return restoration.restore(after, own, stages.ArtifactPaths.beside(Path(out), given), choice)


def apply(pruned: str | Path, patches: str | Path | Sequence[str | Path], out: str | Path) -> Path:
    """Write a pruned checkpoint with one or several patches to the new folder `out`.

    Raises:
        RegraftError: a patch is for another checkpoint, or patches disagree.
    """
    return stages.patch_checkpoint("apply", Path(pruned), _paths(patches), Path(out))


def revert(
    realigned: str | Path, patches: str | Path | Sequence[str | Path], out: str | Path
) -> Path:
    """Write a realigned checkpoint without one or several patches to the new folder `out`.

    Raises:
        RegraftError: a patch is for another checkpoint, or patches disagree.
    """
    return stages.patch_checkpoint("revert", Path(realigned), _paths(patches), Path(out))


def export(
    pruned: str | Path,
    patches: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    to: stages.Tool,
) -> Path:
    """Write patches for another tool to the new folder `out`, with the lines that load it.

    Args:
        pruned: The checkpoint that they are for.
        patches: One or several.
        out: The folder.
        to: "peft" for a SHiRA adapter of PEFT, "vllm" for weight patches of vLLM.

    Raises:
        RegraftError: a patch is for another checkpoint, patches disagree, or the tool cannot have
            these weights.
    """
    return stages.export_patches(pruned, _paths(patches), Path(out), to)


def evaluate(
    model: Model,
    suites: Suites,
    out: str | Path,
    *,
    patch: str | Path | None = None,
    defence: str | Path | None = None,
    text: str | Path | None = None,
    dense: str | Path | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> EvalResult:
    """Answer suites greedily and judge the answers: ASR, over-refusal, utility with intervals.

    Args:
        model: Any model, or "endpoint:URL#MODEL", one behind an OpenAI-compatible server.
        suites: One or several, such as "safebench:FigStep/data" or a .jsonl file.
        out: The new folder, with all answers.
        patch: Put on the model in memory first.
        defence: Answer under this defence at inference, from `regraft analyse defence`.
        text: Measure perplexity on this text file too: documents with blank lines between them.
        dense: With `text`: the folder of the dense model's evaluation on it, to measure KL to it.
        settings: Of the evaluation (`max_new_tokens`, `judge`, `limit` ...), where it runs, and how
            an endpoint is asked (`concurrency`).
    """
    own, compute, endpoint = _settings(settings, EvalSettings, ComputeSettings, EndpointSettings)
    check_endpoint([model], compute, endpoint)
    if dense is not None and text is None:
        raise RegraftError("--dense is for KL on a text: name the text with --text.")
    on_text = None if text is None else stages.OnText(Path(text), _path(dense))
    put_on = _path(patch), _path(defence)
    target = stages.open_target(model, compute, endpoint, progress, *put_on, on_text)
    return stages.evaluate_target(target, Path(out), _suites(suites), own).result


def check(
    dense: Model,
    compressed: Model,
    out: str | Path,
    *,
    suites: Suites = (),
    patch: str | Path | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> Check:
    """Tell whether a compressed model is as safe and as useful as the dense one, within margins.

    Args:
        dense: The dense model as for `evaluate`, or the folder of its finished evaluation.
        compressed: The model made from it, or the folder of its finished evaluation.
        out: The folder, with the verdict as check.json, junit.xml and summary.md.
        suites: The prompts, where a model is to be evaluated.
        patch: Put on the compressed model in memory first.
        settings: The margins (`max_asr_rise` ...), and those of `evaluate`.

    Raises:
        RegraftError: bad input; the two answered other prompts, or are judged otherwise.
    """
    margins, own, compute, endpoint = _settings(
        settings, Margins, EvalSettings, ComputeSettings, EndpointSettings
    )
    check_endpoint([dense, compressed], compute, endpoint)
    named = _suites(suites)
    stages.clear_check(Path(out))
    sides = (
        stages.open_side(dense, compute, endpoint, progress=progress),
        stages.open_side(compressed, compute, endpoint, _path(patch), progress),
    )
    stages.check_compute(sides, compute)
    return stages.check_compressed(*sides, Path(out), named, own, margins)


def compare(
    runs: str | Path | Sequence[str | Path], out: str | Path, *, against: Sequence[str] = ()
) -> Study:
    """Tell methods apart over finished runs of `regraft run`; writes the new folder `out`.

    Args:
        runs: Folders whose recipes differ in the calibration seed alone, or one of a recipe with
            `seeds`.
        out: The folder of the page.
        against: Methods that all others are tested against, besides the pruned model.

    Raises:
        RegraftError: the runs are not alike.
    """
    from regraft.runs.comparing import compare_runs

    return compare_runs(_paths(runs), Path(out), tuple(against))


def _settings(given: Mapping[str, Any], *blocks: type[Settings]) -> list[Any]:
    """Settings by name as the blocks that they belong to.

    Raises:
        RegraftError: a setting is wrong, or belongs to no block.
    """
    left = dict(given)
    for name in _DATA:
        if left.get(name) is not None:
            left[name] = _data(left[name])
    found = []
    for block in blocks:
        own = {name: left.pop(name) for name in block.model_fields if name in left}
        try:
            found.append(block.model_validate(own))
        except ValidationError as error:
            raise RegraftError(f"These settings cannot be:\n{explain(error)}") from error
    if left:
        raise RegraftError(f"There is no setting {next(iter(left))!r} here.")
    return found


def _data(named: Any) -> DataSource:
    if isinstance(named, Path):
        return DataSource(name="jsonl", path=named)
    try:
        return DataSource.model_validate(named)
    except ValidationError as error:
        raise RegraftError(f"There is no data set {named!r}:\n{explain(error)}") from error


def _suites(named: Suites) -> list[DataSource]:
    return [_data(one) for one in ([named] if isinstance(named, str) else named)]


def _opened(model: Model, compute: ComputeSettings) -> Source:
    if isinstance(model, Source):
        return model
    return open_source(model, trust_remote_code=compute.trust_remote_code)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | Path) else [Path(one) for one in given]
