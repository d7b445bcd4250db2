"""Judge saved answers again, by other judges; the model that wrote them is not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.data.collate import batches
from regraft.errors import RegraftError
from regraft.evaluation.guard import Guard
from regraft.evaluation.judges import Exchange, Judge, TextJudge, Verdict, find
from regraft.evaluation.judges.endpoint import FILTERED
from regraft.evaluation.labelled import Bench, Labelled, Labels, bench, read_labelled
from regraft.evaluation.results import Answer
from regraft.evaluation.resumable_map import resumable_map
from regraft.evaluation.verdicts import (
    Agreement,
    Judged,
    Pictures,
    agreements,
    exchange,
    judged,
    own_verdicts,
    read_verdicts,
)
from regraft.files import digest, file_digest, read_json, slug, write_json
from regraft.progress import Advance, Progress
from regraft.provenance import describe, is_done, working
from regraft.settings.compute import ComputeSettings
from regraft.stages.evaluating import read_evaluation

VERDICTS = "judges"  # the folder of other judges' verdicts in that of an evaluation
_CHUNK = 64  # exchanges after which verdicts are on disk
_ENOUGH = 256  # tokens, as VLGuard evaluates


def load_judge(text: str, compute: ComputeSettings) -> Judge:
    """The judge that `text` names (see `judges.find`), in memory.

    Raises:
        RegraftError: there is no such judge, or its model cannot be loaded.
    """
    if compute.trust_remote_code or compute.placement == "streamed":
        raise RegraftError(
            "Judges run whole on the device and no code of theirs: leave out --trust-remote-code "
            "and --placement streamed."
        )
    kind, argument = find(text)
    return kind.load(argument, compute)


def judge(
    folder: Path,
    text: str,
    out: Path,
    compute: ComputeSettings,
    progress: Progress,
    images: Path | None = None,
    loaded: Judge | None = None,
) -> Judged:
    """Judge the answers of an evaluation; writes the file `out`, and resumes after a kill.

    Args:
        folder: Of `evaluate`, with answers.jsonl.
        text: See `judges.find`.
        out: One JSON file with the rates, and a verdict by id.
        compute: Where a model runs.
        progress: Progress.
        images: Show the judge the prompts' images, which lie in this folder (see `Pictures`).
        loaded: The judge, if it is in memory.

    Raises:
        RegraftError: no such judge, no answers, answers cut short by the keyword judge, an image
            is missing or another one.
    """
    evaluation = read_evaluation(folder)
    answers = evaluation.result.answers
    settings = evaluation.about.get("settings", {})
    if text != evaluation.result.judge and not settings.get("full_answers", True):
        raise RegraftError(
            f"{folder}: answers end where {evaluation.result.judge} was certain, too early for "
            "another judge. Evaluate with --full-answers."
        )
    _note_gaps(
        text, answers, settings.get("max_new_tokens", _ENOUGH), progress, seen=images is not None
    )
    pictures = None if images is None else Pictures(images)
    exchanges = [exchange(answer, pictures) for answer in answers]
    inputs = {"answers": file_digest(folder / "answers.jsonl"), **_of_judge(text)}
    if images is not None:
        inputs["images"] = digest(*(file_digest(one.image) for one in exchanges if one.image))
    about = describe("judge", inputs, compute=_runs_on(text, compute))

    def content(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        return {
            "result": asdict(judged(name, answers, verdicts)),
            "verdicts": {a.id: asdict(one) for a, one in zip(answers, verdicts, strict=True)},
        }

    _judge_into(out, about, loaded or text, exchanges, compute, progress, content)
    return judged(read_json(out)["result"]["judge"], answers, read_verdicts(out, answers))


def _note_gaps(
    text: str, answers: Sequence[Answer], length: int, progress: Progress, *, seen: bool
) -> None:
    """Note where a judge would read the end of answers or an image, and gets neither."""
    kind, _ = find(text)
    words = kind if isinstance(kind, TextJudge) else None
    if length < _ENOUGH and not (words and words.window):
        progress.note(
            f"Answers end after {length} tokens at most, and {text} reads the whole of them: what "
            f"comes later is not judged. Evaluate with --max-new-tokens {_ENOUGH} for it."
        )
    unasked = sum(bool(a.image) and not a.request for a in answers)
    if unasked and not (seen or words):
        progress.note(
            f"{unasked} answers do not say what their image asks: the judge gets only the "
            "words beside it. Give --images to judges that see, or evaluate anew."
        )


def _judge_into(
    out: Path,
    about: Mapping[str, Any],
    by: Judge | str,
    exchanges: Sequence[Exchange],
    compute: ComputeSettings,
    progress: Progress,
    content: Callable[[str, Sequence[Verdict]], dict[str, Any]],
) -> None:
    """Write what `content` makes of the judge's name and verdicts, unless it is there."""
    if is_done(out, out, about, lambda: read_json(out)["about"]):
        return
    judge = load_judge(by, compute) if isinstance(by, str) else by
    task = progress.task(f"Judging by {judge.name}", len(exchanges), "answers")
    with working(out, about) as work, task as done:
        verdicts = _verdicts(judge, exchanges, work, done)
        if distributed.first():
            write_json(out, {"about": about, **content(judge.name, verdicts)})


def _verdicts(
    judge: Judge, exchanges: Sequence[Exchange], work: Path | None, done: Advance
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

    pieces = resumable_map(len(chunks), made, work, "verdicts", lambda i: done(len(chunks[i])))
    return [Verdict(**one) for piece in pieces for one in piece]


def _of_judge(text: str) -> dict[str, str]:
    """What tells a judge from others."""
    kind, argument = find(text)
    return {"judge": text, **kind.inputs(argument)}


def _runs_on(text: str, compute: ComputeSettings) -> ComputeSettings | None:
    """What decides the verdicts of a model run here; words and endpoints need no device."""
    return compute if find(text)[0].is_local_model else None


def _check_read(name: str, found: Sequence[Verdict]) -> None:
    found = [one for one in found if one.reason != FILTERED]
    if len(found) > 1 and all(one.refused is None and one.unsafe is None for one in found):
        raise RegraftError(
            f"{name} gives no verdict on any of {len(found)} answers; the first is "
            f"{found[0].reason!r}. Is it a judge of this kind?"
        )


def own(folder: Path) -> Judged:
    """The evaluation's own judge, as one among others."""
    result = read_evaluation(folder).result
    name, verdicts = own_verdicts(result)
    return judged(name, result.answers, verdicts)


def agreement(folder: Path, files: Sequence[Path], out: Path) -> tuple[Agreement, ...]:
    """How far the judges of an evaluation agree, its own among them; writes the JSON file `out`.

    Args:
        folder: Of `evaluate`.
        files: Of `judge`, on its answers.
        out: Written anew, whatever it held.

    Raises:
        RegraftError: see `read_verdicts`.
    """
    result = read_evaluation(folder).result
    answers = result.answers
    said = [own_verdicts(result)]
    said += [(read_json(one)["result"]["judge"], read_verdicts(one, answers)) for one in files]
    found = agreements(answers, said)
    if distributed.first():
        write_json(out, {"agreement": [asdict(one) for one in found]})
    return found


def opinions(folder: Path) -> tuple[tuple[Judged, tuple[Agreement, ...]], ...]:
    """The verdicts of other judges on an evaluation, each with how far its own judge agrees.

    Read from the folder in which `regraft judge` leaves verdicts where no other is named.

    Raises:
        RegraftError: see `read_verdicts`; the answers are others now.
    """
    result = read_evaluation(folder).result
    answers, mine = result.answers, own_verdicts(result)
    judged_now = file_digest(folder / "answers.jsonl")
    found = []
    for file in sorted((folder / VERDICTS).glob("*.json")):
        content = read_json(file)
        if "verdicts" in content:
            if content["about"]["inputs"]["answers"] != judged_now:
                raise RegraftError(
                    f"{file} judges other answers than {folder} holds now. Remove it, or judge "
                    "anew with `regraft judge`."
                )
            name, verdicts = content["result"]["judge"], read_verdicts(file, answers)
            pair = agreements(answers, [mine, (name, verdicts)])
            found.append((judged(name, answers, verdicts), pair))
    return tuple(found)


def judge_bench(
    files: Sequence[Path],
    judges: Sequence[str],
    labels: Labels,
    compute: ComputeSettings,
    progress: Progress,
    out: Path | None = None,
) -> dict[str, Bench]:
    """Every judge against the labels of every file, and of all together if there are several.

    Verdicts are kept in a folder beside `out`, one file a judge, and a stopped run goes on.

    Args:
        files: See `read_labelled`.
        judges: By name, see `judges.find`.
        labels: Which rows, and what their labels say.
        compute: Where models run.
        progress: Progress.
        out: The figures as JSON; judges of words, which are quick, need none.

    Returns:
        File -> its labels, and one quality a judge; "all" over several.

    Raises:
        RegraftError: bad input; a judge is a model and `out` is missing.
    """
    if distributed.decided(lambda: out is not None and out.exists()):
        raise RegraftError(f"{out} exists. Choose another output or remove it.")
    read = _read_labelled(files, labels)
    models = [text for text in judges if not isinstance(find(text)[0], TextJudge)]
    if models and out is None:
        raise RegraftError(
            f"Name a file for the figures with --out: the verdicts of {models[0]} are kept beside "
            "it, and are not lost where something fails."
        )
    exchanges = list(dict.fromkeys(one.exchange for rows in read.values() for one in rows))
    asked = {"answers": digest(*map(file_digest, files)), "ids": labels.ids}
    said = [
        _bench_verdicts(text, exchanges, asked, out, compute, progress)
        for text in dict.fromkeys(judges)
    ]
    place = {exchange: i for i, exchange in enumerate(exchanges)}
    found = {}
    for file, rows in read.items():
        places = [place[one.exchange] for one in rows]
        by_judge = [(name, [verdicts[i] for i in places]) for name, verdicts in said]
        found[file] = bench(rows, by_judge, labels.question)
    if out is not None and distributed.first():
        _write_bench(out, labels, found)
    return found


def _write_bench(out: Path, labels: Labels, found: Mapping[str, Bench]) -> None:
    figures = {name: asdict(one) for name, one in found.items()}
    quality = {name: one.pop("judges") for name, one in figures.items()}
    settings = {**asdict(labels), "positive": list(labels.wanted)}
    write_json(out, {"settings": settings, "labels": figures, "quality": quality})


def _read_labelled(files: Sequence[Path], labels: Labels) -> dict[str, tuple[Labelled, ...]]:
    """The rows by file, and under "all" those of several."""
    if not files:
        raise RegraftError("Name at least one CSV with labelled answers.")
    read = {str(path): read_labelled(path, labels.wanted, ids=labels.ids) for path in files}
    given = {one.label for path in files for one in read_labelled(path, labels.wanted)}
    known = set(map(str.casefold, given))
    if unknown := [one for one in labels.positive if one.casefold() not in known]:
        raise RegraftError(
            f"No answer is labelled {unknown[0]!r}. Labels found: {', '.join(sorted(given)[:8])}."
        )
    if len(read) > 1:
        read["all"] = tuple(one for rows in read.values() for one in rows)
    return read


def _bench_verdicts(
    text: str,
    exchanges: Sequence[Exchange],
    asked: Mapping[str, str],
    out: Path | None,
    compute: ComputeSettings,
    progress: Progress,
) -> tuple[str, list[Verdict]]:
    """(the judge's name, a verdict an exchange)."""
    if out is None:
        judge = load_judge(text, compute)
        with progress.task(f"Judging by {judge.name}", len(exchanges), "answers") as done:
            return judge.name, _verdicts(judge, exchanges, None, done)
    kept = out.with_name(f"{out.name}.verdicts") / f"{slug(text)}.json"
    about = describe("judge-bench", {**asked, **_of_judge(text)}, compute=_runs_on(text, compute))

    def content(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        return {"judge": name, "verdicts": [asdict(one) for one in verdicts]}

    _judge_into(kept, about, text, exchanges, compute, progress, content)
    written = read_json(kept)
    return written["judge"], [Verdict(**one) for one in written["verdicts"]]
