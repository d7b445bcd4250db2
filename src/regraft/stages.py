"""The stages: each a function from settings and inputs to one artifact on disk.

An artifact carries the key of all that made it (settings, contents of the inputs, versions). A
stage whose artifact is there with the same key is done and returns at once; an artifact with
another key is never overwritten. Unfinished work waits in a hidden folder beside the artifact,
under its key, and is taken up again after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from regraft.checks import (
    check_pattern,
    check_r_max,
    check_top_heads,
    draw_calibration,
    read_suites,
    told,
)
from regraft.data.collate import Batch, batches, prompt_batch, response_batch
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation.generate import generate
from regraft.evaluation.results import EvalResult
from regraft.evaluation.summary import (
    judge_answer,
    read_answers,
    result_from_json,
    result_to_json,
    summarise,
    write_answers,
)
from regraft.files import atomic_folder, file_digest, read_json, write_json
from regraft.heads.score import HeadScores, load_heads, save_heads, score_heads
from regraft.importance.statistics import (
    InputStatistics,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.keys import describe, is_done, to_json, working
from regraft.models.checkpoint import Checkpoint, check_target, open_checkpoint, write_edited
from regraft.models.load import Source, has_processor, load_model, load_processor, pick_device
from regraft.pruning.pruner import LayerMasks, prune_wanda, zeros
from regraft.recipe import (
    CalibrationSettings,
    ComputeSettings,
    EvalSettings,
    HeadSettings,
    PruneSettings,
    RealignSettings,
    Settings,
)
from regraft.restoration.apply import (
    apply_patch,
    check_base,
    patched,
    revert_patch,
    zeros_filled,
)
from regraft.restoration.patch import Patch, load_patch, save_patch
from regraft.restoration.realign import Rule, check_pair, count_restorable, hsr, whole_heads
from regraft.restoration.realign import realign as select
from regraft.restoration.selection import Band, Head, all_heads, random_heads
from regraft.watch import Silent, Watch

ABOUT_FILE = "regraft.json"
MARGIN = 0.2  # p_max - p in the paper


@dataclass(frozen=True)
class Evaluation:
    """One model on one suite: the result and what it was made of."""

    result: EvalResult
    about: Mapping[str, Any]


def prune(
    dense: Source,
    out: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
) -> Source:
    """Prune a checkpoint with Wanda, calibrated on D^u; writes the folder `out`.

    Raises:
        RegraftError: see `prune_wanda`, the data readers and `write_edited`.
    """
    watch = watch or Silent()
    data = draw_calibration(dense, calibration, harmful=False)
    about = describe(
        "prune", {"dense": dense.checkpoint.fingerprint}, settings, compute, {"utility": data}
    )
    if not is_done(out, out / ABOUT_FILE, about):
        check_pattern(dense, settings)
        check_target(dense.checkpoint, out)
        watch.note(told("D^u", data))
        pattern = settings.pattern()
        with working(out, about) as work:
            masks = LayerMasks(work)
            model, processor = _load(dense, compute, watch)
            calibrating = _collate(processor, response_batch, data.examples, compute)
            total = len(data.examples) * len(dense.anatomy.layers)
            if settings.order == "one-shot":
                total = len(data.examples)
            with watch.task("Pruning, layer by layer", total, "samples") as done:
                prune_wanda(
                    model,
                    dense.anatomy,
                    calibrating,
                    pattern,
                    masks,
                    order=settings.order,
                    progress=done,
                )
            del model
            with watch.task(f"Writing {out}", dense.checkpoint.bytes, "bytes") as done:
                write_edited(
                    dense.checkpoint,
                    out,
                    masks.edits(dense.anatomy),
                    files={ABOUT_FILE: to_json(about)},
                    progress=done,
                )
    return Source(open_checkpoint(out), dense.anatomy, dense.trust_remote_code)


def heads(
    dense: Source,
    out: Path,
    settings: HeadSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
) -> HeadScores:
    """Score every attention head by Ships and KL on D^s prompts; writes the file `out`.

    Raises:
        RegraftError: see `score_heads` and the data readers.
    """
    watch = watch or Silent()
    data = draw_calibration(dense, calibration, harmful=True)
    about = describe(
        "heads", {"dense": dense.checkpoint.fingerprint}, settings, compute, {"safety": data}
    )
    if not is_done(out, out, about, lambda: load_heads(out, dense.anatomy).about):
        check_r_max(dense, settings, len(data.examples))
        watch.note(told("D^s", data))
        with working(out, about) as work:
            model, processor = _load(dense, compute, watch)
            prompts = _collate(processor, prompt_batch, data.examples, compute)
            total = len(prompts) * len(dense.anatomy.layers)
            with watch.task("Scoring heads", total, "layers") as done:
                scores = score_heads(
                    model,
                    dense.anatomy,
                    prompts,
                    work,
                    **settings.model_dump(),
                    about=about,
                    progress=done,
                )
            save_heads(out, scores)
    return load_heads(out, dense.anatomy)


def statistics(
    dense: Source,
    out: Path,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    watch: Watch | None = None,
) -> tuple[InputStatistics, InputStatistics]:
    """Gather input statistics of the dense model on D^s and D^u; writes the file `out`.

    Returns:
        (safety, utility).
    """
    watch = watch or Silent()
    safety = draw_calibration(dense, calibration, harmful=True)
    utility = draw_calibration(dense, calibration, harmful=False)
    about = describe(
        "statistics",
        {"dense": dense.checkpoint.fingerprint},
        Settings(),
        compute,
        {"safety": safety, "utility": utility},
    )
    if not is_done(out, out, about, lambda: load_statistics(out).about):
        for role, one in (("D^s", safety), ("D^u", utility)):
            watch.note(told(role, one))
        model, processor = _load(dense, compute, watch)
        samples = len(safety.examples) + len(utility.examples)
        gathering = watch.task("Gathering input statistics", samples, "samples")
        with working(out, about), gathering as done:
            gathered = [
                gather(
                    model,
                    dense.anatomy,
                    _collate(processor, response_batch, one.examples, compute),
                    done,
                )
                for one in (safety, utility)
            ]
            save_statistics(out, gathered[0], gathered[1], about)
    loaded = load_statistics(out)
    return loaded.safety, loaded.utility


def realign(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: RealignSettings,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    compute: ComputeSettings | None = None,
    watch: Watch | None = None,
) -> Patch:
    """Select the weights that come back; writes the patch `out`.

    Args:
        dense: The dense checkpoint.
        pruned: The same network pruned, by whomever.
        out: The patch file.
        settings: The method.
        heads_file: From `heads`; needed to rank heads.
        statistics_file: From `statistics`; needed by "hsr".
        compute: Only the device counts, for ranking.
        watch: Progress.

    Raises:
        RegraftError: an input is missing or does not fit.
    """
    watch = watch or Silent()
    check_pair(dense, pruned)
    check_top_heads(dense, settings)
    if settings.heads == "top" and heads_file is None:
        raise RegraftError("Ranking heads needs their scores: run `regraft heads` first.")
    if settings.method == "hsr" and statistics_file is None:
        raise RegraftError("HSR needs input statistics: run `regraft statistics` first.")
    inputs = {
        "dense": dense.checkpoint.fingerprint,
        "pruned": pruned.checkpoint.fingerprint,
    }
    scores = None
    if settings.heads == "top" and heads_file is not None:
        scores = load_heads(heads_file, dense.anatomy)
        _require_made_from(dense, heads_file, scores.about)
        inputs["heads"] = file_digest(heads_file)
    about = describe("realign", inputs, settings)
    rule: Rule = whole_heads
    if settings.method == "hsr" and statistics_file is not None:
        loaded = load_statistics(statistics_file)
        _require_made_from(dense, statistics_file, loaded.about)
        about["inputs"]["statistics"] = file_digest(statistics_file)
        rule = hsr(lambda kept: _band(settings, kept), loaded.safety, loaded.utility)
    chosen = _chosen_heads(dense, settings, scores)
    about["heads"] = [list(head) for head in chosen]
    about["pruned"] = count_restorable(dense, pruned)
    if not is_done(out, out, about, lambda: load_patch(out).about):
        device = pick_device((compute or ComputeSettings()).device)
        selecting = watch.task("Selecting weights", len(dense.anatomy.layers), "layers")
        with working(out, about), selecting as done:
            patch = select(dense, pruned, chosen, rule, about=about, device=device, progress=done)
            save_patch(out, patch)
        if not patch.restored:
            watch.note(f"{out.name}: no pruned weight fits these settings; the patch is empty.")
    return load_patch(out)


def apply(pruned: Path, patch_file: Path, out: Path, watch: Watch | None = None) -> Path:
    """Write the checkpoint `pruned` with the patch to the folder `out`.

    Raises:
        RegraftError: the patch is for another base, or `out` is not empty.
    """
    return _write_with(apply_patch, "apply", "pruned", pruned, patch_file, out, watch)


def revert(realigned: Path, patch_file: Path, out: Path, watch: Watch | None = None) -> Path:
    """Write the checkpoint `realigned` without the patch to the folder `out`.

    Raises:
        RegraftError: the patch is for another base, or `out` is not empty.
    """
    return _write_with(revert_patch, "revert", "realigned", realigned, patch_file, out, watch)


def _write_with(
    write: Callable[..., Checkpoint],
    stage: str,
    role: str,
    folder: Path,
    patch_file: Path,
    out: Path,
    watch: Watch | None,
) -> Path:
    watch = watch or Silent()
    checkpoint, patch = open_checkpoint(folder), load_patch(patch_file)
    inputs = {role: checkpoint.fingerprint, "patch": file_digest(patch_file)}
    about = describe(stage, inputs)
    if not is_done(out, out / ABOUT_FILE, about):
        check_target(checkpoint, out)
        writing = watch.task(f"Writing {out}", checkpoint.bytes, "bytes")
        with working(out, about), writing as done:
            write(checkpoint, patch, out, files={ABOUT_FILE: to_json(about)}, progress=done)
    return out


def evaluate(
    model: Source,
    out: Path,
    suites: Sequence[DataSource],
    settings: EvalSettings,
    compute: ComputeSettings,
    patch_file: Path | None = None,
    processor_from: Source | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Answer and judge suites; writes `answers.jsonl` and `results.json` in the folder `out`.

    Args:
        model: The checkpoint.
        out: The folder.
        suites: The prompts; one result over all of them.
        settings: Length of answers and the judge.
        compute: Device, dtype, batch size.
        patch_file: Put this patch on the model in memory first.
        processor_from: Take the processor from there if the checkpoint comes without one.
        watch: Progress.

    Raises:
        RegraftError: see the data readers.
    """
    watch = watch or Silent()
    reading = read_suites(model, suites, settings.limit)
    name = ", ".join(str(suite) for suite in suites)
    examples = reading.examples
    inputs = {"model": model.checkpoint.fingerprint}
    patch = None if patch_file is None else load_patch(patch_file)
    if patch is not None and patch_file is not None:
        check_base(model.checkpoint, patch)
        inputs["patch"] = file_digest(patch_file)
    about = describe("evaluate", inputs, settings, compute, {"suite": reading})
    if not is_done(out, out / "results.json", about, lambda: _read_results(out)["about"]):
        with working(out, about) as work:
            watch.note(told("Prompts", reading))
            network, processor = _load(model, compute, watch, processor_from)
            context = patched(network, model.anatomy, patch) if patch else nullcontext()
            with context, watch.task(f"Answering {name}", len(examples), "prompts") as done:
                texts = generate(
                    network,
                    processor,
                    examples,
                    work / "answers.jsonl",
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=compute.batch_size,
                    progress=done,
                )
            judge = settings.judge()
            answers = [judge_answer(e, t, judge) for e, t in zip(examples, texts, strict=True)]
            result = summarise(name, judge, answers)
            sizes = {
                "zeros": zeros(model.checkpoint, model.anatomy)
                - (zeros_filled(model.checkpoint, patch) if patch else 0),
                "prunable": model.anatomy.prunable,
            }
            with atomic_folder(out) as folder:
                write_answers(folder / "answers.jsonl", answers)
                content = {"about": about, "sizes": sizes, "result": result_to_json(result)}
                write_json(folder / "results.json", content)
    return read_evaluation(out)


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `evaluate` wrote.

    Raises:
        RegraftError: the folder holds no evaluation.
    """
    content = _read_results(folder)
    result = result_from_json(content["result"], read_answers(folder / "answers.jsonl"))
    return Evaluation(result, {**content["about"], **content["sizes"]})


def _read_results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / "results.json")
    if not isinstance(content, dict) or not {"about", "sizes", "result"} <= content.keys():
        raise RegraftError(f"{folder / 'results.json'} holds no evaluation of regraft.")
    return content


def _band(settings: RealignSettings, kept: float) -> Band | None:
    """Thresholds for a matrix of which pruning kept this share; None where they are empty."""
    p = kept if settings.p is None else settings.p
    p_max = min(1.0, p + MARGIN) if settings.p_max is None else settings.p_max
    return Band(settings.q, p, p_max, settings.scope) if p < p_max else None


def _require_made_from(dense: Source, path: Path, about: Mapping[str, Any]) -> None:
    if about["inputs"]["dense"] != dense.checkpoint.fingerprint:
        raise RegraftError(
            f"{path} was made from another checkpoint than {dense.folder}. Make it again with "
            f"`regraft {about['stage']}` from this one."
        )


def _chosen_heads(
    dense: Source, settings: RealignSettings, scores: HeadScores | None
) -> list[Head]:
    if settings.heads == "all":
        return all_heads(dense.anatomy)
    if settings.heads == "random":
        return random_heads(dense.anatomy, settings.top_heads, settings.head_seed)
    assert scores is not None
    ranked = scores.ranked(settings.criterion)
    if settings.top_heads > len(ranked):
        raise RegraftError(
            f"top_heads is {settings.top_heads}, but only {len(ranked)} heads were scored."
        )
    return ranked[: settings.top_heads]


def _load(
    source: Source, compute: ComputeSettings, watch: Watch, processor_from: Source | None = None
) -> tuple[nn.Module, Any]:
    """The model and its processor."""
    own = processor_from is None or has_processor(source)
    with watch.task(f"Loading {source.folder}", 1) as done:
        processor = load_processor(source if own else processor_from or source)
        model = load_model(source, dtype=compute.dtype, device=compute.device)
        done(1)
    return model, processor


def _collate(
    processor: Any,
    encode: Callable[[Any, Sequence[Example]], Batch],
    examples: Sequence[Example],
    compute: ComputeSettings,
) -> list[Batch]:
    """Examples as batches in host memory."""
    return [encode(processor, chunk) for chunk in batches(examples, compute.batch_size)]
