"""Answer and judge suites."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft import costs, distributed
from regraft.checks import warn_of_bundled
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.defence.artifact import (
    Defence,
    Direction,
    acting,
    asked,
    check_fits,
    load_defence,
)
from regraft.errors import RegraftError
from regraft.evaluation.perplexity import Nll, Teacher, response_nlls
from regraft.evaluation.results import (
    Answer,
    EvalResult,
    TextResult,
    read_answers,
    result_from_json,
    result_to_json,
    write_answers,
)
from regraft.evaluation.summary import is_compared, judge_answer, summarise
from regraft.evaluation.vllm import Engine, vllm_version
from regraft.files import atomic_folder, file_digest, read_json, write_json
from regraft.loading import patch_in_memory
from regraft.models.load import Source, has_processor, load_processor, stored_dtype
from regraft.patch.apply import (
    patched,
    zeros_filled,
)
from regraft.patch.format import Patch
from regraft.progress import Progress, Silent
from regraft.provenance import describe, is_done, working
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.text import OnText


@dataclass(frozen=True)
class Evaluation:
    """One model on one suite: the result and what it was made of."""

    result: EvalResult
    about: Mapping[str, Any]


def evaluate(
    model: Source,
    out: Path,
    suites: Sequence[DataSource],
    settings: EvalSettings,
    compute: ComputeSettings,
    patch_file: Path | None = None,
    processor_from: Source | None = None,
    progress: Progress | None = None,
    cache: EvaluationCache | None = None,
    defence_file: Path | None = None,
    text: OnText | None = None,
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
        progress: Progress.
        cache: Shared with the other evaluations of a run, which saves work and changes nothing.
        defence_file: Answer under this defence at inference, from `defend`.
        text: Measure perplexity on ordinary text too, and KL to the dense model.

    Raises:
        RegraftError: see the data readers, `check_for_vllm` and `predict`.
    """
    if settings.backend == "vllm":
        check_for_vllm(model, compute)
    progress = progress or Silent()
    cache = cache or EvaluationCache(memo_bytes=0)
    reading = cache.reading(model, suites, settings.limit)
    name = ", ".join(str(suite) for suite in suites)
    examples = reading.examples
    patch, inputs = patch_in_memory(model, patch_file)
    defence = None if defence_file is None else load_defence(defence_file)
    if settings.backend == "vllm":
        _check_outside(patch, defence)
        if text is not None:
            raise RegraftError("Text is measured by the transformers backend only, not by vLLM.")
    if defence is not None and defence_file is not None:
        check_fits(defence, model.architecture, defence_file)
        inputs["defence"] = file_digest(defence_file)
    about = describe("evaluate", inputs, settings, compute, {"suite": reading})
    if text is not None:
        about["inputs"] |= text.digests()
    if settings.full_answers:  # as in evaluations from before there was a choice
        del about["settings"]["full_answers"]
    if settings.backend == "vllm":
        about["versions"]["vllm"] = vllm_version()
    if not is_done(out, out / "results.json", about, lambda: _read_results(out)["about"]):
        with working(out, about) as work:
            for suite in suites if processor_from is None else ():  # a run says it once
                warn_of_bundled(model, suite, progress.note)
            progress.note(reading.describe("Prompts"))
            prompts = asked(defence, examples)
            nlls: Mapping[str, Nll] = {}
            on_text: tuple[TextResult, Teacher] | None = None
            if settings.backend == "vllm":
                texts = _by_vllm(model, prompts, settings, compute, work, progress, cache)
            else:
                network, processor = cache.load(model, compute, progress, processor_from)
                content = about["data"]["suite"]["digest"]
                answerer = cache.answerer(
                    model, processor, prompts, content, settings, compute, processor_from
                )
                context = patched(network, model.architecture, patch) if patch else nullcontext()
                answering = progress.task(f"Answering {name}", len(examples), "prompts")
                with context, acting(defence, network), answering as done:
                    nlls = _nlls(network, processor, prompts, settings, compute, work, progress)
                    if text is not None:
                        on_text = text.predicted(network, processor, progress)
                    texts = answerer.answers(
                        network,
                        max_new_tokens=settings.max_new_tokens,
                        partial=work,
                        advance=done,
                    )
            judge = settings.text_judge()
            answers = [
                judge_answer(
                    example,
                    text,
                    judge,
                    full_answers=settings.full_answers,
                    max_new_tokens=settings.max_new_tokens,
                )
                for example, text in zip(examples, texts, strict=True)
            ]
            answers = [_with_nll(answer, nlls.get(answer.id)) for answer in answers]
            answers = [_with_digest(a, e.image) for a, e in zip(answers, examples, strict=True)]
            result = summarise(name, judge, answers)
            if on_text is not None:
                result = replace(result, text=on_text[0])
            sizes = {
                "zeros": cache.zeros(model)
                - (zeros_filled(model.checkpoint, patch) if patch else 0),
                "prunable": model.architecture.prunable,
            }
            if distributed.first():
                with atomic_folder(out) as folder:
                    write_answers(folder / "answers.jsonl", answers)
                    if text is not None and on_text is not None:
                        text.keep(on_text[1], folder)
                    content = {
                        "about": about,
                        "sizes": sizes,
                        "result": result_to_json(result),
                        "answers": file_digest(folder / "answers.jsonl"),
                    }
                    write_json(folder / "results.json", content)
    return read_evaluation(out)


def check_for_vllm(model: Source, compute: ComputeSettings) -> None:
    """Find before long work starts what would keep vLLM from a model.

    Raises:
        RegraftError: it is not installed, would be started by several processes, is asked for a
            device, or the folder lacks the processor.
    """
    vllm_version()
    if distributed.world() > 1:
        raise RegraftError(
            "vLLM shares accelerators by itself: start it without torchrun, with --tensor-parallel."
        )
    if compute.device not in ("auto", "cuda"):
        raise RegraftError(
            f"vLLM takes the first accelerators that it sees, not --device {compute.device}. Leave "
            "it at auto and name them in CUDA_VISIBLE_DEVICES, or use --backend transformers."
        )
    if not has_processor(model):
        raise RegraftError(
            f"{model.folder} comes without the files of its processor, which vLLM reads from the "
            "folder itself: copy tokenizer and processor files of the base model there."
        )


def _check_outside(patch: Patch | None, defence: Defence | None) -> None:
    """Nothing may act inside of a model that vLLM runs."""
    if patch is not None:
        raise RegraftError(
            "vLLM reads checkpoints and takes no patch in memory. Write the checkpoint with "
            "`regraft apply` and evaluate that, or use --backend transformers."
        )
    if isinstance(defence, Direction):
        raise RegraftError(
            "A refusal direction acts inside the model, which vLLM does not let it: use --backend "
            "transformers. (A defence prompt works with both.)"
        )


def _by_vllm(
    model: Source,
    prompts: Sequence[Example],
    settings: EvalSettings,
    compute: ComputeSettings,
    work: Path,
    progress: Progress,
    cache: EvaluationCache,
) -> list[str]:
    cache.unload()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    costs.elsewhere(progress)
    processor = load_processor(model)
    with progress.task(f"Loading {model.folder} into vLLM", 1) as done:
        engine = Engine(
            model.folder,
            processor,
            dtype=stored_dtype(model) if compute.dtype == "auto" else compute.dtype,
            tensor_parallel=settings.tensor_parallel,
            max_length=settings.max_length,
            sees=model.architecture.has_vision,
            trust_remote_code=compute.trust_remote_code,
        )
        done(1)
    try:
        with progress.task("Answering by vLLM", len(prompts), "prompts") as done:
            return engine.answers(prompts, settings.max_new_tokens, work, done)
    finally:
        engine.close()


def _nlls(
    network: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    settings: EvalSettings,
    compute: ComputeSettings,
    work: Path,
    progress: Progress,
) -> dict[str, Nll]:
    """Of the references that answers are compared with, by id, if they are asked for."""
    wanted = [
        one
        for one in examples
        if is_compared(one) and not one.choices and (one.response or "").strip()
    ]
    if not (settings.perplexity and wanted):
        return {}
    with progress.task("Reading the references", len(wanted), "responses") as done:
        size = compute.batch_size
        found = response_nlls(network, processor, wanted, size, partial=work, advance=done)
    return {example.id: nll for example, nll in zip(wanted, found, strict=True)}


def _with_nll(answer: Answer, nll: Nll | None) -> Answer:
    return answer if nll is None else replace(answer, nll=nll[0], nll_tokens=nll[1])


def _with_digest(answer: Answer, image: Path | None) -> Answer:
    return answer if image is None else replace(answer, image_digest=file_digest(image))


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `evaluate` wrote.

    Raises:
        RegraftError: the folder holds no evaluation, or answers that its results are not of.
    """
    content = _read_results(folder)
    path = folder / "answers.jsonl"
    result = result_from_json(content["result"], read_answers(path))
    written = content.get("answers")  # by no version before there were digests
    if not (_counts_fit(result) if written is None else written == file_digest(path)):
        raise RegraftError(
            f"{path} does not hold the answers that {folder / 'results.json'} was made of: it was "
            "changed, cut short or copied from another evaluation. Put the right file there, or "
            "remove the folder and evaluate again."
        )
    return Evaluation(result, {**content["about"], **content["sizes"]})


def _counts_fit(result: EvalResult) -> bool:
    """Whether there are as many answers of each kind as rates without digest were taken over."""
    harmful = sum(answer.harmful for answer in result.answers)
    rates = ((result.asr, harmful), (result.over_refusal, len(result.answers) - harmful))
    return all((0 if rate is None else rate.n) == n for rate, n in rates)


def _read_results(folder: Path) -> dict[str, Any]:
    if folder.is_dir() and not (folder / "results.json").exists():
        below = sorted(str(one.parent) for one in folder.glob("**/results.json"))[:5]
        there = f" Those in it: {', '.join(below)}." if below else ""
        raise RegraftError(f"{folder} is no evaluation: it holds no results.json.{there}")
    content: dict[str, Any] = read_json(folder / "results.json")
    if not isinstance(content, dict) or not {"about", "sizes", "result"} <= content.keys():
        raise RegraftError(f"{folder / 'results.json'} holds no evaluation of regraft.")
    return content
