"""Judge saved answers again, by other judges; the model that wrote them is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from regraft import ranks
from regraft.data.collate import batches
from regraft.errors import RegraftError
from regraft.evaluation.degenerate import degeneration
from regraft.evaluation.endpoint import parse_endpoint
from regraft.evaluation.guards import READERS, Guard
from regraft.evaluation.keywords import KEYWORD_JUDGES
from regraft.evaluation.labelled import HARMS, REFUSALS, Quality, Question, quality, read_labelled
from regraft.evaluation.pieces import in_pieces
from regraft.evaluation.results import Answer
from regraft.evaluation.verdicts import (
    ByKeywords,
    Exchange,
    Judge,
    Judged,
    Verdict,
    agreement,
    own_verdict,
    rate,
)
from regraft.files import digest, file_digest, read_json, write_json
from regraft.keys import describe, is_done, working
from regraft.models.load import judge_fingerprint, load_judge
from regraft.settings import ComputeSettings
from regraft.stages.evaluating import read_evaluation
from regraft.watch import Advance, Watch

_CHUNK = 64  # exchanges after which verdicts are on disk


def find_judge(text: str, compute: ComputeSettings) -> Judge:
    """The judge that `text` names, in memory.

    Args:
        text: A keyword judge by name; KIND:MODEL with a kind of guard ("llama-guard",
            "qwen3guard", "harmbench") and a folder or hub id; or endpoint:URL#MODEL.
        compute: Where a model runs.

    Raises:
        RegraftError: there is no such judge, or its model cannot be loaded.
    """
    if compute.trust_remote_code or compute.placement == "streamed":
        raise RegraftError(
            "Judges run whole on the device and no code of theirs: leave out --trust-remote-code "
            "and --placement streamed."
        )
    if text in KEYWORD_JUDGES:
        return ByKeywords(KEYWORD_JUDGES[text])
    if text.startswith("endpoint:"):
        return parse_endpoint(text)
    if guard := _guard(text):
        kind, model = guard
        network, processor = load_judge(model, dtype=compute.dtype, device=compute.device)
        return Guard(kind, f"{kind}:{Path(model).name}", network, processor, compute.batch_size)
    raise _no_judge(text)


def judge(
    folder: Path,
    text: str,
    out: Path,
    compute: ComputeSettings,
    watch: Watch,
    images: Path | None = None,
    loaded: Judge | None = None,
) -> Judged:
    """Judge the answers of an evaluation; writes the file `out`, and resumes after a kill.

    Args:
        folder: Of `evaluate`, with answers.jsonl.
        text: See `find_judge`.
        out: One JSON file with the rates, and a verdict by id.
        compute: Where a model runs.
        watch: Progress.
        images: Show the judge the prompts' images, which lie in this folder by their names.
        loaded: The judge, if it is in memory.

    Raises:
        RegraftError: no such judge, no answers, answers cut short by the keyword judge, an image
            is missing.
    """
    evaluation = read_evaluation(folder)
    answers = evaluation.result.answers
    full = evaluation.about.get("settings", {}).get("full_answers", True)
    if not full and text != evaluation.result.judge:
        raise RegraftError(
            f"{folder}: answers end where {evaluation.result.judge} was certain, too early for "
            "another judge. Evaluate with --full-answers."
        )
    if full:  # older evaluations looked at the first words, and not at those of refusals
        answers = tuple(replace(a, degenerate=degeneration(a.answer) or "") for a in answers)
    exchanges = [_exchange(answer, images) for answer in answers]
    shown = {} if images is None else {"images": _digest_of_images(exchanges)}
    inputs = {"answers": file_digest(folder / "answers.jsonl"), "judge": text, **shown}
    if guard := _guard(text):
        inputs["model"] = judge_fingerprint(guard[1])
    about = describe("judge", inputs, compute=_runs_on(text, compute))
    if not is_done(out, out, about, lambda: read_json(out)["about"]):
        judge = loaded or find_judge(text, compute)
        task = watch.task(f"Judging by {judge.name}", len(exchanges), "answers")
        with working(out, about) as work, task as done:
            verdicts = _verdicts(judge, exchanges, work, done)
            result = _judged(judge.name, answers, verdicts)
            content = {
                "about": about,
                "result": asdict(result),
                "verdicts": {
                    answer.id: asdict(verdict)
                    for answer, verdict in zip(answers, verdicts, strict=True)
                },
            }
            if ranks.first():
                write_json(out, content)
    return _judged(read_json(out)["result"]["judge"], answers, read_verdicts(out, answers))


def _verdicts(
    judge: Judge, exchanges: Sequence[Exchange], work: Path, done: Advance
) -> list[Verdict]:
    if isinstance(judge, Guard):
        judge.check(exchanges)
    chunks = list(batches(exchanges, _CHUNK))

    def made(wanted: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for i in wanted:
            found = judge.verdicts(chunks[i], done)
            if i == 0:  # later ones are not worth those that are there
                _check_read(judge.name, found)
            yield i, [asdict(one) for one in found]

    pieces = in_pieces(len(chunks), made, work, "verdicts", lambda i: done(len(chunks[i])))
    return [Verdict(**one) for piece in pieces for one in piece]


def check_judge(text: str) -> None:
    """Raise unless `text` is written like a judge; nothing is loaded."""
    if text.startswith("endpoint:"):
        parse_endpoint(text)
    elif not (text in KEYWORD_JUDGES or _guard(text)):
        raise _no_judge(text)


def _guard(text: str) -> tuple[str, str] | None:
    """(kind, model) of a judge that is one, as in "qwen3guard:MODEL"."""
    kind, _, model = text.partition(":")
    return (kind, model) if kind in READERS and model else None


def _no_judge(text: str) -> RegraftError:
    return RegraftError(
        f"There is no judge {text!r}; expected {', '.join(KEYWORD_JUDGES)}, "
        f"{', '.join(f'{one}:MODEL' for one in READERS)} or endpoint:URL#MODEL."
    )


def _runs_on(text: str, compute: ComputeSettings) -> ComputeSettings | None:
    """What decides the verdicts of a guard; keywords and endpoints do not run on a device."""
    return compute if _guard(text) else None


def _check_read(name: str, found: Sequence[Verdict]) -> None:
    if len(found) > 1 and all(one.refused is None and one.unsafe is None for one in found):
        raise RegraftError(
            f"{name} gives no verdict on any of {len(found)} answers; the first is "
            f"{found[0].reason!r}. Is it a judge of this kind?"
        )


def read_verdicts(path: Path, answers: Sequence[Answer]) -> list[Verdict]:
    """The verdicts of `judge` on these answers, in their order.

    Raises:
        RegraftError: the file holds none, or those on other answers.
    """
    content = read_json(path)
    try:
        found = {name: Verdict(**one) for name, one in content["verdicts"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise RegraftError(f"{path} holds no verdicts of `regraft judge` ({error!r}).") from error
    if missing := [answer.id for answer in answers if answer.id not in found]:
        raise RegraftError(
            f"{path} has no verdict on {missing[0]!r} and {len(missing) - 1} more answers: it "
            "belongs to another evaluation."
        )
    return [found[answer.id] for answer in answers]


def own(folder: Path) -> Judged:
    """The evaluation's own judge, as one among others."""
    result = read_evaluation(folder).result
    return Judged(result.judge, result.asr, result.over_refusal, 0, None)


def _judged(name: str, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> Judged:
    first = [own_verdict(answer) for answer in answers]
    return Judged(
        name,
        rate(answers, verdicts, harmful=True),
        rate(answers, verdicts, harmful=False),
        sum(one.refused is None and one.unsafe is None for one in verdicts),
        agreement(answers, verdicts, first),
    )


def _exchange(answer: Answer, images: Path | None) -> Exchange:
    if images is None or answer.image is None:
        return Exchange(answer.instruction, answer.answer)
    image = images / answer.image
    if not image.is_file():
        raise RegraftError(f"{image}, the image of {answer.id!r}, does not exist.")
    return Exchange(answer.instruction, answer.answer, image)


def _digest_of_images(exchanges: Sequence[Exchange]) -> str:
    return digest(*(file_digest(one.image) for one in exchanges if one.image is not None))


def judge_bench(
    files: Sequence[Path],
    judges: Sequence[str],
    positive: Sequence[str],
    question: Question,
    ids: Literal["all", "even", "odd"],
    compute: ComputeSettings,
    watch: Watch,
    out: Path | None = None,
) -> dict[str, list[Quality]]:
    """Every judge against the labels of every file, and of all together if there are several.

    Args:
        files: See `read_labelled`.
        judges: See `find_judge`.
        positive: Labels that mean yes; the usual ones of the question if empty.
        question: What the labels say.
        ids: Which rows.
        compute: Where models run.
        watch: Progress.
        out: Write the figures here, as JSON.

    Returns:
        File -> one quality a judge; "all" over several.

    Raises:
        RegraftError: bad input.
    """
    if not files:
        raise RegraftError("Name at least one CSV with labelled answers.")
    if ranks.decided(lambda: out is not None and out.exists()):
        raise RegraftError(f"{out} exists. Choose another output or remove it.")
    wanted = positive or (REFUSALS if question == "refusal" else HARMS)
    read = {str(path): read_labelled(path, wanted, ids=ids) for path in files}
    if len(read) > 1:
        read = {**read, "all": tuple(one for rows in read.values() for one in rows)}
    found: dict[str, list[Quality]] = {name: [] for name in read}
    for text in judges:
        check_judge(text)
    for text in judges:
        judge = find_judge(text, compute)
        said: dict[Exchange, Verdict] = {}
        exchanges = list(dict.fromkeys(one.exchange for rows in read.values() for one in rows))
        with watch.task(f"Judging by {judge.name}", len(exchanges), "answers") as done:
            said |= dict(zip(exchanges, judge.verdicts(exchanges, done), strict=True))
        for name, rows in read.items():
            verdicts = [said[one.exchange] for one in rows]
            found[name].append(quality(judge.name, rows, verdicts, question))
    if out is not None and ranks.first():
        settings = {"question": question, "positive": list(wanted), "ids": ids}
        content = {name: [asdict(one) for one in rows] for name, rows in found.items()}
        write_json(out, {"settings": settings, "quality": content})
    return found
