"""The stages: each a function from settings and inputs to one artifact on disk.

An artifact carries the key of all that made it (settings, contents of the inputs, versions). A
stage whose artifact is there with the same key is done and returns at once; an artifact with
another key is never overwritten. Unfinished work waits in a hidden folder beside the artifact,
under its key, and is taken up again after a kill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regraft
from regraft.data.collate import Batch, batches, prompt_batch, response_batch
from regraft.data.example import Example, Reading, draw
from regraft.data.images import check_images
from regraft.data.sources import DataSource, read
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
from regraft.files import (
    atomic_folder,
    digest,
    discard_leftover,
    new_folders,
    read_json,
    require_empty,
    write_json,
)
from regraft.heads.score import HeadScores, load_heads, save_heads, score_heads
from regraft.importance.statistics import (
    InputStatistics,
    gather,
    load_statistics,
    save_statistics,
)
from regraft.models.checkpoint import check_target, open_checkpoint, write_edited
from regraft.models.load import Source, load_model, load_processor, pick_device
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
from regraft.restoration.realign import Rule, check_pair, hsr, whole_heads
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
    about = _about(
        "prune", {"dense": dense.checkpoint.fingerprint}, settings, compute, {"utility": data}
    )
    if not _is_done(out, out / ABOUT_FILE, about):
        check_pattern(dense, settings)
        check_target(dense.checkpoint, out)
        pattern = settings.pattern()
        with _work(out, about) as work:
            masks = LayerMasks(work)
            model, processor = _load(dense, compute, watch)
            calibrating = _collate(model, processor, response_batch, data.examples, compute)
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
                    files={ABOUT_FILE: _json(about)},
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
    about = _about(
        "heads", {"dense": dense.checkpoint.fingerprint}, settings, compute, {"safety": data}
    )
    if not _is_done(out, out, about, lambda: load_heads(out, dense.anatomy).about):
        check_r_max(dense, settings, len(data.examples))
        with _work(out, about) as work:
            model, processor = _load(dense, compute, watch)
            prompts = _collate(model, processor, prompt_batch, data.examples, compute)
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
    about = _about(
        "statistics",
        {"dense": dense.checkpoint.fingerprint},
        Settings(),
        compute,
        {"safety": safety, "utility": utility},
    )
    if not _is_done(out, out, about, lambda: load_statistics(out).about):
        model, processor = _load(dense, compute, watch)
        samples = len(safety.examples) + len(utility.examples)
        with watch.task("Gathering input statistics", samples, "samples") as done:
            gathered = [
                gather(
                    model,
                    dense.anatomy,
                    _collate(model, processor, response_batch, one.examples, compute),
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
        inputs["heads"] = _key(scores.about)
    about = _about("realign", inputs, settings)
    rule: Rule = whole_heads
    if settings.method == "hsr" and statistics_file is not None:
        loaded = load_statistics(statistics_file)
        about["inputs"]["statistics"] = _key(loaded.about)
        rule = hsr(lambda kept: _band(settings, kept), loaded.safety, loaded.utility)
    chosen = _chosen_heads(dense, settings, scores)
    about["heads"] = [list(head) for head in chosen]
    about["pruned"] = zeros(pruned.checkpoint, pruned.anatomy)
    if not _is_done(out, out, about, lambda: load_patch(out).about):
        with watch.task("Selecting weights", len(dense.anatomy.layers), "layers") as done:
            device = pick_device((compute or ComputeSettings()).device)
            patch = select(dense, pruned, chosen, rule, about=about, device=device, progress=done)
        if not patch.restored:
            watch.note(f"{out.name}: no pruned weight fits these settings; the patch is empty.")
        save_patch(out, patch)
    return load_patch(out)


def apply(pruned: Path, patch_file: Path, out: Path, watch: Watch | None = None) -> Path:
    """Write the checkpoint `pruned` with the patch to the folder `out`.

    Raises:
        RegraftError: the patch is for another base, or `out` is not empty.
    """
    watch = watch or Silent()
    checkpoint, patch = open_checkpoint(pruned), load_patch(patch_file)
    about = _about("apply", {"pruned": checkpoint.fingerprint, "patch": _key(patch.about)})
    if not _is_done(out, out / ABOUT_FILE, about):
        check_target(checkpoint, out)
        with watch.task(f"Writing {out}", checkpoint.bytes, "bytes") as done:
            apply_patch(checkpoint, patch, out, files={ABOUT_FILE: _json(about)}, progress=done)
    return out


def revert(realigned: Path, patch_file: Path, out: Path, watch: Watch | None = None) -> Path:
    """Write the checkpoint `realigned` without the patch to the folder `out`.

    Raises:
        RegraftError: the patch is for another base, or `out` is not empty.
    """
    watch = watch or Silent()
    checkpoint, patch = open_checkpoint(realigned), load_patch(patch_file)
    about = _about("revert", {"realigned": checkpoint.fingerprint, "patch": _key(patch.about)})
    if not _is_done(out, out / ABOUT_FILE, about):
        check_target(checkpoint, out)
        with watch.task(f"Writing {out}", checkpoint.bytes, "bytes") as done:
            revert_patch(checkpoint, patch, out, files={ABOUT_FILE: _json(about)}, progress=done)
    return out


def evaluate(
    model: Source,
    out: Path,
    suite: DataSource,
    settings: EvalSettings,
    compute: ComputeSettings,
    patch_file: Path | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Answer and judge a suite; writes `answers.jsonl` and `results.json` in the folder `out`.

    Args:
        model: The checkpoint.
        out: The folder.
        suite: The prompts.
        settings: Length of answers and the judge.
        compute: Device, dtype, batch size.
        patch_file: Put this patch on the model in memory first.
        watch: Progress.

    Raises:
        RegraftError: see the data readers.
    """
    watch = watch or Silent()
    reading = read_suite(model, suite, settings)
    examples = reading.examples
    inputs = {"model": model.checkpoint.fingerprint}
    patch = None if patch_file is None else load_patch(patch_file)
    if patch is not None:
        check_base(model.checkpoint, patch)
        inputs["patch"] = _key(patch.about)
    about = _about("evaluate", inputs, settings, compute, {"suite": reading})
    if not _is_done(out, out / "results.json", about, lambda: _read_results(out)["about"]):
        with _work(out, about) as work:
            network, processor = _load(model, compute, watch)
            context = patched(network, model.anatomy, patch) if patch else _nothing()
            with context, watch.task(f"Answering {suite}", len(examples), "prompts") as done:
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
            result = summarise(str(suite), judge, answers)
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


def _band(settings: RealignSettings, kept: float) -> Band:
    p = kept if settings.p is None else settings.p
    p_max = min(1.0, p + MARGIN) if settings.p_max is None else settings.p_max
    return Band(settings.q, p, p_max, settings.scope)


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


def check_pattern(dense: Source, settings: PruneSettings) -> None:
    """Raise unless every prunable weight can have the pattern."""
    pattern = settings.pattern()
    for linear in dense.anatomy.linears:
        pattern.fits(linear.shape, linear.key)


def check_r_max(dense: Source, settings: HeadSettings, samples: int) -> None:
    """Raise unless as many samples span a subspace of rank `r_max`."""
    limit = min(samples, dense.anatomy.hidden_size)
    if settings.r_max > limit:
        raise RegraftError(
            f"r_max is {settings.r_max}, but {samples} samples of {dense.anatomy.hidden_size} "
            f"features allow at most {limit}. Lower r_max or use more samples."
        )


def check_top_heads(dense: Source, settings: RealignSettings) -> None:
    """Raise unless the model has as many heads as are to be chosen."""
    count = len(all_heads(dense.anatomy))
    if settings.heads != "all" and settings.top_heads > count:
        raise RegraftError(f"top_heads is {settings.top_heads}; the model has {count} heads.")


def draw_calibration(source: Source, calibration: CalibrationSettings, *, harmful: bool) -> Reading:
    """Draw D^s or D^u and check that this model can read it.

    Raises:
        RegraftError: see the data readers and `draw`; an image is unreadable, or there are images
            and the model reads text only.
    """
    reading = draw(
        read(calibration.data), harmful=harmful, samples=calibration.samples, seed=calibration.seed
    )
    _check_readable(source, reading)
    return reading


def read_suite(source: Source, suite: DataSource, settings: EvalSettings) -> Reading:
    """Read what is to be evaluated and check that this model can read it.

    Raises:
        RegraftError: as `draw_calibration`.
    """
    reading = read(suite)
    examples = reading.examples[: settings.limit]
    if len(examples) < len(reading.examples):
        beyond = {"beyond the limit": len(reading.examples) - len(examples)}
        reading = Reading(reading.source, examples, {**reading.skipped, **beyond})
    _check_readable(source, reading)
    return reading


def _check_readable(source: Source, reading: Reading) -> None:
    check_images(reading)
    if source.anatomy.has_vision:
        return
    for example in reading.examples:
        if example.image is not None:
            raise RegraftError(
                f"{reading.source}: example {example.id!r} has an image, but {source.folder} reads "
                "text only. Use a vision-language model, or examples without images."
            )


def _load(source: Source, compute: ComputeSettings, watch: Watch) -> tuple[nn.Module, Any]:
    """The model and its processor."""
    with watch.task(f"Loading {source.folder}", 1) as done:
        model = load_model(source, dtype=compute.dtype, device=compute.device)
        processor = load_processor(source)
        done(1)
    return model, processor


def _collate(
    model: nn.Module,
    processor: Any,
    encode: Callable[[Any, Sequence[Example]], Batch],
    examples: Sequence[Example],
    compute: ComputeSettings,
) -> list[Batch]:
    """Examples as batches on the model's device."""
    parameter = next(model.parameters())
    return [
        encode(processor, chunk).to(parameter.device, parameter.dtype)
        for chunk in batches(examples, compute.batch_size)
    ]


def _about(
    stage: str,
    inputs: Mapping[str, str],
    settings: Settings | None = None,
    compute: ComputeSettings | None = None,
    data: Mapping[str, Reading] | None = None,
) -> dict[str, Any]:
    """Everything that decides what an artifact will be, as JSON values."""
    from transformers import __version__ as transformers_version

    about: dict[str, Any] = {
        "stage": stage,
        "versions": {
            "regraft": regraft.__version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
        "inputs": dict(inputs),
    }
    if settings is not None:
        about["settings"] = settings.model_dump(mode="json")
    if compute is not None:
        device = pick_device(compute.device).type
        about["compute"] = compute.model_dump(mode="json") | {"device": device}
    if data is not None:
        about["data"] = {role: _account(reading) for role, reading in data.items()}
    plain: dict[str, Any] = json.loads(_json(about))
    return plain


def _account(reading: Reading) -> dict[str, Any]:
    contents = [
        part
        for example in reading.examples
        for part in (
            json.dumps([example.id, example.instruction, example.response, example.category]),
            example.image.read_bytes() if example.image else b"",
        )
    ]
    return {
        "source": reading.source,
        "read": reading.read,
        "used": len(reading.examples),
        "skipped": dict(reading.skipped),
        "digest": digest(*contents),
    }


def _key(about: Mapping[str, Any]) -> str:
    return digest(json.dumps(_identity(about), sort_keys=True))


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What decides: the contents of the data, not where they lie."""
    data = {
        role: {name: value for name, value in account.items() if name != "source"}
        for role, account in about.get("data", {}).items()
    }
    return {**about, "data": data}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _is_done(
    out: Path,
    marker: Path,
    about: Mapping[str, Any],
    read_about: Callable[[], Mapping[str, Any]] | None = None,
) -> bool:
    """True if `out` was made by the same inputs and settings, False if there is nothing.

    Raises:
        RegraftError: `out` holds something else.
    """
    if marker != out:
        if out.is_file() or not marker.exists():
            require_empty(out)
            return False
    elif not marker.exists():
        return False
    found = (read_about or (lambda: read_json(marker)))()
    if _key(found) == _key(about):
        discard_leftover(out)
        shutil.rmtree(_work_folder(out), ignore_errors=True)  # of a run killed right at its end
        return True
    raise RegraftError(
        f"{out} exists and was made with something else "
        f"({difference(_identity(found), _identity(about))}). "
        "Choose another output or remove it."
    )


def difference(found: Any, wanted: Any, where: str = "") -> str:
    """The first field in which two nested mappings differ, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in dict.fromkeys([*wanted, *found]):
            if found.get(name) != wanted.get(name):
                inner = f"{where}.{name}" if where else str(name)
                return difference(found.get(name), wanted.get(name), inner)
    return f"{where}: {_short(found)} there, {_short(wanted)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def _work(out: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for unfinished work under the artifact's key, kept only where a run is stopped.

    It goes when the block succeeds, and with bad input or a full disk, which leave nothing behind.
    """
    folder = _work_folder(out)
    work = folder / _key(about)[:16]
    with new_folders(out):
        try:
            yield work
        except RegraftError:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # not empty: unfinished work of other settings
                folder.rmdir()
            raise
    shutil.rmtree(folder, ignore_errors=True)


def _work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.regraft-work"


@contextmanager
def _nothing() -> Iterator[None]:
    yield
