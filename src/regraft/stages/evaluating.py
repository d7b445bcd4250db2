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
from regraft.evaluation.perplexity import Teacher, save_teacher
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
from regraft.stages.endpoint import Evaluable
from regraft.stages.evaluation_cache import Prompts
from regraft.stages.provenance import describe, is_done, working
from regraft.stages.targets import STATES, Answered


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its result, and what it was made from."""

    result: EvalResult
    about: Mapping[str, Any]


def evaluate_target(
    target: Evaluable, out: Path, suites: Sequence[DataSource], settings: EvalSettings
) -> Evaluation:
    """Evaluate on all suites as one; writes answers.jsonl and results.json in the folder `out`.

    Raises:
        RegraftError: see the data readers, `predict`, and `check` and `inputs` of the target.
    """
    target.check(settings)
    reading = target.reading(suites, settings.limit)
    about = describe("evaluate", target.inputs(), settings, target.compute, {"suite": reading})
    if not is_done(out, about, lambda: _read_results(out)["about"], "results.json"):
        with working(out, about) as work:
            target.warn(suites)
            target.progress.note(reading.describe("Prompts"))
            name, content = ", ".join(map(str, suites)), about["data"]["suite"]["digest"]
            prompts = Prompts(name, target.defended(reading.examples), content)
            found = target.answered(prompts, settings, work)
            answers = tuple(judged(reading.examples, found, settings))
            result = replace(summarise(name, settings.text_judge(), answers), text=found.text)
            provenance = {"about": {**about, **found.more}, "sizes": target.sizes()}
            if distributed.first():
                write_evaluation(out, provenance, result, found.teacher)
    if not target.cache.keeps:  # nothing else uses the model, but the target may live on
        target.cache.unload()
    return read_evaluation(out)


def judged(
    examples: Sequence[Example], found: Answered, settings: EvalSettings
) -> Iterator[Answer]:
    """Judge the answers to examples."""
    judge = settings.text_judge()
    for example, text in zip(examples, found.texts, strict=True):
        answer = judge_answer(
            example,
            text,
            judge,
            full_answers=settings.full_answers,
            max_new_tokens=settings.max_new_tokens,
        )
        nll, tokens = found.references.get(example.id, (None, None))
        image = file_digest(example.image) if example.image else ""
        yield replace(answer, nll=nll, nll_tokens=tokens, image_digest=image)


def write_evaluation(
    out: Path, provenance: Mapping[str, Any], result: EvalResult, teacher: Teacher | None = None
) -> None:
    """Write the folder `out`; `provenance` has the fields `about` and `sizes` of results.json."""
    with atomic_folder(out) as folder:
        answers = folder / "answers.jsonl"
        write_answers(answers, result.answers)
        if teacher is not None:
            save_teacher(folder / STATES, teacher)
        own = {"result": result_to_json(result), "answers": file_digest(answers)}
        write_json(folder / "results.json", {**provenance, **own})


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `evaluate_target` wrote.

    Raises:
        RegraftError: the folder holds no evaluation, or its results are of other answers.
    """
    content = _read_results(folder)
    path = folder / "answers.jsonl"
    result = result_from_json(content["result"], read_answers(path), str(folder / "results.json"))
    if content["answers"] != file_digest(path):
        raise RegraftError(
            f"{path} does not hold the answers that {folder / 'results.json'} is about: it was "
            "changed, cut short or copied from another evaluation. Put the right file there, or "
            "remove the folder and evaluate again."
        )
    where = folder / "results.json"
    return Evaluation(
        result, described({**content["about"], **content["sizes"]}, f"{where}: about or sizes")
    )


def require_evaluation(folder: Path, what: str = "no evaluation") -> None:
    """Raise if an existing folder has no results.json; the error says that it is `what`."""
    if folder.is_dir() and not (folder / "results.json").exists():
        below = sorted(str(one.parent) for one in folder.glob("**/results.json"))[:5]
        hint = f" Evaluations in it: {', '.join(below)}." if below else ""
        raise RegraftError(f"{folder} is {what}: it holds no results.json.{hint}")


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    require_evaluation(folder)
    content = fields_of(path, "evaluation", "about", "sizes", "result", "answers")
    parts = {name: described(content[name], f"{path}: {name}") for name in ("about", "sizes")}
    return {**content, **parts}
