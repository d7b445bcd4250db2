"""Answer and judge suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.disk.descriptions import described, fields_of
from regraft.disk.files import atomic_folder, file_digest, write_json
from regraft.errors import RegraftError
from regraft.evaluation.perplexity import Nll, save_teacher
from regraft.evaluation.results import (
    Answer,
    EvalResult,
    read_answers,
    result_from_json,
    result_to_json,
    write_answers,
)
from regraft.evaluation.summary import judge_answer, summarise
from regraft.settings.evaluating import EvalSettings
from regraft.stages.evaluation_cache import Prompts
from regraft.stages.provenance import describe, is_done, working
from regraft.stages.targets import STATES, Evaluable, Likelihoods


@dataclass(frozen=True)
class Evaluation:
    """One model on its suites: the result and what it was made of."""

    result: EvalResult
    about: Mapping[str, Any]


def evaluate(
    target: Evaluable, out: Path, suites: Sequence[DataSource], settings: EvalSettings
) -> Evaluation:
    """Answer and judge suites; writes `answers.jsonl` and `results.json` in the folder `out`.

    Args:
        target: What answers.
        out: The folder.
        suites: The prompts; one result over all of them.
        settings: Length of answers and the judge.

    Raises:
        RegraftError: see the data readers, `predict`, and `backend` and `inputs` of the target.
    """
    backend = target.backend(settings)
    reading = target.reading(suites, settings.limit)
    about = describe("evaluate", target.inputs(), settings, target.compute, {"suite": reading})
    if not is_done(out, out / "results.json", about, lambda: _read_results(out)["about"]):
        backend.check(target.asked(reading.examples))
        with working(out, about) as work:
            target.announce(suites, reading)
            name, content = ", ".join(map(str, suites)), about["data"]["suite"]["digest"]
            prompts = Prompts(name, target.asked(reading.examples), content)
            likelihoods = backend.likelihoods(prompts, work)
            texts = backend.answers(prompts, work)
            answers = _judged(reading.examples, texts, likelihoods.references, settings)
            result = summarise(name, settings.text_judge(), list(answers))
            made_of = {"about": about | backend.outcome(), "sizes": target.sizes()}
            if distributed.first():
                _write(out, made_of, replace(result, text=likelihoods.text), likelihoods)
    if not target.cache.keeps:  # nobody shares the model; a target outlives its evaluation
        target.cache.unload()
    return read_evaluation(out)


def _judged(
    examples: Sequence[Example],
    texts: Sequence[str],
    references: Mapping[str, Nll],
    settings: EvalSettings,
) -> Iterator[Answer]:
    judge = settings.text_judge()
    for example, text in zip(examples, texts, strict=True):
        answer = judge_answer(
            example,
            text,
            judge,
            full_answers=settings.full_answers,
            max_new_tokens=settings.max_new_tokens,
        )
        nll, tokens = references.get(example.id, (None, None))
        image = file_digest(example.image) if example.image else ""
        yield replace(answer, nll=nll, nll_tokens=tokens, image_digest=image)


def _write(
    out: Path, made_of: Mapping[str, Any], result: EvalResult, likelihoods: Likelihoods
) -> None:
    with atomic_folder(out) as folder:
        answers = folder / "answers.jsonl"
        write_answers(answers, result.answers)
        if likelihoods.teacher is not None:
            save_teacher(folder / STATES, likelihoods.teacher)
        own = {"result": result_to_json(result), "answers": file_digest(answers)}
        write_json(folder / "results.json", {**made_of, **own})


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `evaluate` wrote.

    Raises:
        RegraftError: the folder holds no evaluation, or answers that its results are not of.
    """
    content = _read_results(folder)
    path = folder / "answers.jsonl"
    result = result_from_json(content["result"], read_answers(path), str(folder / "results.json"))
    if content["answers"] != file_digest(path):
        raise RegraftError(
            f"{path} does not hold the answers that {folder / 'results.json'} was made of: it was "
            "changed, cut short or copied from another evaluation. Put the right file there, or "
            "remove the folder and evaluate again."
        )
    where = folder / "results.json"
    return Evaluation(
        result, described({**content["about"], **content["sizes"]}, f"{where}: about or sizes")
    )


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if folder.is_dir() and not path.exists():
        below = sorted(str(one.parent) for one in folder.glob("**/results.json"))[:5]
        there = f" Those in it: {', '.join(below)}." if below else ""
        raise RegraftError(f"{folder} is no evaluation: it holds no results.json.{there}")
    content = fields_of(path, "evaluation", "about", "sizes", "result", "answers")
    parts = {name: described(content[name], f"{path}: {name}") for name in ("about", "sizes")}
    return {**content, **parts}
