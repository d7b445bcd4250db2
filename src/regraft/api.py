"""The stages as functions: folders or loaded objects and plain settings in, typed results out.

Models are folders, hub ids, "demo" for the bundled model, or a `Source` from `open_source`; patches
are files, or a `Patch` that `realign` returned. Data sets are named as on the command line: a
.jsonl file, or "NAME:PATH" with a reader's name. Every stage writes an artifact. Called again with
the same arguments it reuses the artifact, and a killed stage resumes. `progress=True` prints the
command line's progress and notes; otherwise nothing is printed. All other settings have the names
of the command line's flags, such as `batch_size`; a setting that would have no effect is refused.
Bad input raises `RegraftError`.

    import regraft

    regraft.prune("demo", "pruned", sparsity=0.6)
    patch = regraft.realign("demo", "pruned", "gain.safetensors")
    result = regraft.evaluate("pruned", "demo:test", "evaluation", patch=patch)
    print(result.asr, result.over_refusal)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft import stages
from regraft.arguments import (
    Model,
    OnePatch,
    Patches,
    Runs,
    Suites,
    folder_of,
    listed,
    patch_of,
    patches_of,
    path_of,
    path_or_none,
    progress_of,
    settings_of,
    suites_of,
)
from regraft.errors import RegraftError
from regraft.evaluation.gate import Check
from regraft.evaluation.results import EvalResult
from regraft.flags import (
    DEFAULT_VALIDATION_TOKENS,
    check_endpoint,
    check_pruning,
    check_realign,
    refuse_compute,
)
from regraft.heads.score import HeadScores, load_heads
from regraft.heads.ships import HeadSettings
from regraft.models.load import Source
from regraft.models.load import open_source as open_source  # exported
from regraft.patch.format import Patch, load_patch
from regraft.progress import Progress
from regraft.pruning.base import PRUNERS
from regraft.restoration.base import DEFAULT, METHODS
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings, PromptSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings, Margins
from regraft.settings.searching import SearchSettings
from regraft.stages.checking import check_compressed, clear_check, open_side
from regraft.stages.endpoint import open_target
from regraft.stages.gathering import heads_step
from regraft.stages.patching import Tool, export_patches
from regraft.stages.pruning import prune_step
from regraft.stages.restoring import plan_restoration
from regraft.stages.steps import plan_steps

if TYPE_CHECKING:
    from regraft.report.study import Study


def prune(
    model: Model,
    out: str | Path,
    *,
    method: str = "wanda",
    progress: bool | Progress = False,
    **settings: Any,
) -> Source:
    """Prune a model into the new folder `out`.

    Args:
        model: The dense model.
        out: The folder of the pruned checkpoint.
        method: Name of the pruner.
        settings: Settings of the pruner (`sparsity`, `n_m` ...), of the calibration (`data`,
            `samples`, `seed`) and of the compute (`device`, `dtype`, `batch_size`, `placement`).
    """
    blocks = PRUNERS.get(method).settings_type, CalibrationSettings, ComputeSettings
    own, data, compute = settings_of({"method": method, **settings}, *blocks)
    check_pruning(own, data)
    setup = stages.Setup(compute.opened(model), data, compute, progress_of(progress))
    plan_steps(setup, [prune_step(setup, own, path_of(out))]).carry_out()
    return open_source(path_of(out), trust_remote_code=setup.dense.trust_remote_code)


def score_heads(
    model: Model, out: str | Path, *, progress: bool | Progress = False, **settings: Any
) -> HeadScores:
    """Score every attention head for safety by Ships and KL; write the scores to the file `out`.

    Args:
        model: The dense model.
        out: The file of scores.
        settings: Settings of the scoring (`r_max`, `mode` ...), the calibration and the compute.
    """
    own, data, compute = settings_of(settings, HeadSettings, CalibrationSettings, ComputeSettings)
    setup = stages.Setup(compute.opened(model), data, compute, progress_of(progress), scoring=own)
    plan_steps(setup, [heads_step(setup, path_of(out))]).carry_out()
    return load_heads(path_of(out), setup.dense.architecture)


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
    progress: bool | Progress = False,
    **settings: Any,
) -> Patch:
    """Restore pruned weights so that the model refuses as before; write them to the patch `out`.

    Args:
        dense: The dense model.
        pruned: The same model, pruned by any tool.
        out: The patch file; intermediate artifacts are written beside it.
        search: Settings of a search for the number of weights: `validation` prompts, bounds and
            targets. Without such prompts a quarter of the calibration data is held out for it.
        max_new_tokens: Maximum length of an answer to a validation prompt.
        heads_file: Scores from `score_heads`.
        statistics_file: Statistics from `regraft analyse statistics`.
        settings: Settings of the method (`budget`, `swap` ...), the scoring of heads, the
            calibration and the compute.
    """
    kind = METHODS.get(method)
    needs = kind.needs(kind.settings_type(method=method))
    # Only statistics are gathered over responses of the data.
    prompts = CalibrationSettings if needs.statistics else PromptSettings
    blocks = kind.settings_type, HeadSettings, prompts, ComputeSettings
    own, scoring, data, compute = settings_of({"method": method, **settings}, *blocks)
    choice = None if search is None else settings_of(search, SearchSettings)[0]
    answering = {"max_new_tokens": max_new_tokens, "full_answers": False}
    (answers,) = settings_of(answering, EvalSettings)
    given = stages.Inputs(heads=path_or_none(heads_file), statistics=path_or_none(statistics_file))
    files, searched = (given.heads, given.statistics), search is not None
    check_realign(own, scoring, *files, search=searched, max_new_tokens=max_new_tokens)
    setup = stages.Setup(
        compute.opened(dense),
        data.with_responses(),
        compute,
        progress_of(progress),
        scoring=scoring,
        evaluation=answers,
    )
    paths = stages.ArtifactPaths.beside(path_of(out), given)
    plan_restoration(setup, compute.opened(pruned), own, paths, choice).carry_out()
    return load_patch(path_of(out))


def apply(
    pruned: Model, patches: Patches, out: str | Path, *, progress: bool | Progress = False
) -> Path:
    """Apply one or more patches to a pruned checkpoint; write the result to the new folder `out`.

    Raises:
        RegraftError: a patch is for another checkpoint, or patches disagree.
    """
    where = folder_of(pruned), patches_of(patches), path_of(out)
    return stages.patch_checkpoint("apply", *where, progress_of(progress))


def revert(
    realigned: Model, patches: Patches, out: str | Path, *, progress: bool | Progress = False
) -> Path:
    """Remove one or more patches from a realigned checkpoint, into the new folder `out`.

    Raises:
        RegraftError: a patch is for another checkpoint, or patches disagree.
    """
    where = folder_of(realigned), patches_of(patches), path_of(out)
    return stages.patch_checkpoint("revert", *where, progress_of(progress))


def export(
    pruned: Model,
    patches: Patches,
    out: str | Path,
    *,
    to: Tool,
    progress: bool | Progress = False,
) -> Path:
    """Convert patches for another tool, into the new folder `out`, with the code that loads them.

    Args:
        pruned: The checkpoint that the patches are for.
        patches: One or more patches.
        out: The folder of the converted patches.
        to: "peft" for a SHiRA adapter of PEFT, "vllm" for weight patches of vLLM.

    Raises:
        RegraftError: a patch is for another checkpoint, patches disagree, or the tool cannot change
            these weights.
    """
    where = folder_of(pruned), patches_of(patches), path_of(out)
    return export_patches(*where, to, progress_of(progress))


def evaluate(
    model: Model,
    suites: Suites,
    out: str | Path,
    *,
    patch: OnePatch | None = None,
    defence: str | Path | None = None,
    text: str | Path | None = None,
    dense: str | Path | None = None,
    progress: bool | Progress = False,
    **settings: Any,
) -> EvalResult:
    """Answer test suites greedily and judge the answers: ASR, over-refusal, utility, intervals.

    Args:
        model: Any model, or "endpoint:URL#MODEL" for one behind an OpenAI-compatible server.
        suites: One or more, such as "safebench:FigStep/data" or a .jsonl file.
        out: A new folder for the results and all answers.
        patch: A patch to apply to the model in memory first.
        defence: An inference-time defence to answer under, from `regraft analyse defence`.
        text: A text file to measure perplexity on: documents separated by blank lines.
        dense: With `text`: the folder of the dense model's evaluation on it, to measure KL to it.
        settings: Settings of the evaluation (`max_new_tokens`, `judge`, `limit` ...), of the
            compute and of an endpoint (`concurrency`).
    """
    own, compute, endpoint = settings_of(settings, EvalSettings, ComputeSettings, EndpointSettings)
    check_endpoint([model], compute, endpoint)
    if dense is not None and text is None:
        raise RegraftError("--dense is for measuring KL on a text: name the text with --text.")
    on_text = None if text is None else stages.OnText(path_of(text), path_or_none(dense))
    put_on = None if patch is None else patch_of(patch), path_or_none(defence)
    target = open_target(model, compute, endpoint, progress_of(progress), *put_on, on_text)
    return stages.evaluate_target(target, path_of(out), suites_of(suites), own).result


def check(
    dense: Model,
    compressed: Model,
    out: str | Path,
    *,
    suites: Suites = (),
    patch: OnePatch | None = None,
    progress: bool | Progress = False,
    **settings: Any,
) -> Check:
    """Check whether a compressed model is as safe and as useful as the dense one, within margins.

    Args:
        dense: The dense model as for `evaluate`, or the folder of its finished evaluation.
        compressed: The model made from it, or the folder of its finished evaluation.
        out: The folder for the verdict as check.json, junit.xml and summary.md.
        suites: The test suites, unless both evaluations are finished.
        patch: A patch to apply to the compressed model in memory first.
        settings: The margins (`max_asr_rise` ...), and the settings of `evaluate`.

    Raises:
        RegraftError: bad input, or the two evaluations differ in prompts or judge.
    """
    margins, own, compute, endpoint = settings_of(
        settings, Margins, EvalSettings, ComputeSettings, EndpointSettings
    )
    check_endpoint([dense, compressed], compute, endpoint)
    named = suites_of(suites)
    patch_file = None if patch is None else patch_of(patch)
    shown = progress_of(progress)
    clear_check(path_of(out))
    sides = (
        open_side(dense, compute, endpoint, progress=shown),
        open_side(compressed, compute, endpoint, patch_file, shown),
    )
    if all(isinstance(one, Path) or one.compute is None for one in sides):
        refuse_compute(compute, "Neither of the two models is run here")
    return check_compressed(*sides, path_of(out), named, own, margins)


def compare(runs: Runs, out: str | Path, *, against: str | Sequence[str] = ()) -> Study:
    """Compare the methods of finished runs of `regraft run`; write a report to the folder `out`.

    Args:
        runs: Folders of runs whose recipes differ only in the calibration seed, or the folder of a
            recipe with `seeds`.
        out: The folder of the report.
        against: Methods that all others are tested against, besides the pruned model.

    Raises:
        RegraftError: the runs cannot be compared.
    """
    from regraft.runs.comparing import compare_runs

    return compare_runs([path_of(one) for one in listed(runs)], path_of(out), listed(against))
