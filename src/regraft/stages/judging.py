"""Judge saved answers by other judges, without the model that wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.data.collate import batches
from regraft.disk.descriptions import about_of
from regraft.disk.files import digest, file_digest, slug, write_json
from regraft.disk.parsing import read_json
from regraft.distributed import resumable_map
from regraft.errors import RegraftError
from regraft.evaluation.guard import Guard
from regraft.evaluation.judges import Exchange, Judge, TextJudge, Verdict, find
from regraft.evaluation.judges.endpoint import UNREAD_FILTERED
from regraft.evaluation.labelled import Bench, Labelled, Labels, bench, read_labelled
from regraft.evaluation.results import Answer
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
from regraft.progress import Progress, expect
from regraft.settings.compute import ComputeSettings
from regraft.stages.evaluating import read_evaluation
from regraft.stages.provenance import describe, is_done, working

VERDICTS = "judges"  # folder of other judges' verdicts, inside that of an evaluation
_CHUNK = 64  # exchanges whose verdicts are saved together
_ENOUGH = 256  # tokens, as VLGuard evaluates


def load_judge(text: str, compute: ComputeSettings) -> Judge:
    """The judge that `text` names (see `judges.find`), in memory.

    Raises:
        RegraftError: there is no such judge, or its model cannot be loaded.
    """
    if compute.trust_remote_code or compute.placement == "streamed":
        raise RegraftError(
            "Judges run whole on the device, and their checkpoints' code is never run: leave out "
            "--trust-remote-code and --placement streamed."
        )
    kind, argument = find(text)
    return kind.load(argument, compute)


@dataclass(frozen=True)
class _Judging:
    """A judge by its name (see `judges.find`), and where it runs if it is a model."""

    by: str
    compute: ComputeSettings
    progress: Progress

    def about(self, stage: str, inputs: Mapping[str, str]) -> dict[str, Any]:
        """Everything that determines the verdicts on `inputs`; see `describe`."""
        kind, argument = find(self.by)
        inputs = {**inputs, "judge": self.by, **kind.inputs(argument)}
        # keywords and endpoints give the same verdicts on any device
        return describe(stage, inputs, compute=self.compute if kind.is_local_model else None)

    def verdicts(
        self, exchanges: Sequence[Exchange], work: Path | None
    ) -> tuple[str, list[Verdict]]:
        """The judge's name and its verdicts; finished ones are kept in the folder `work`."""
        judge = load_judge(self.by, self.compute)
        if isinstance(judge, Guard):
            judge.check(exchanges)
        chunks = list(batches(exchanges, _CHUNK))

        def made(missing: Sequence[Sequence[Exchange]]) -> Iterator[tuple[int, Any]]:
            for place, chunk in enumerate(missing):
                found = judge.verdicts(chunk, done)
                if chunk is chunks[0]:  # a later failure must not cost the verdicts before it
                    _check_read(judge.name, found)
                yield place, [asdict(one) for one in found]

        task = self.progress.task(f"Judging by {judge.name}", len(exchanges), "answers")
        with task as done:
            pieces = resumable_map(
                chunks, made, work, "verdicts", list[Verdict], lambda one: expect(done, -len(one))
            )
        return judge.name, [one for piece in pieces for one in piece]

    def write(
        self,
        out: Path,
        about: Mapping[str, Any],
        exchanges: Mapping[str, Exchange],
        result: Callable[[str, Sequence[Verdict]], dict[str, Any]],
    ) -> tuple[str, list[Verdict]]:
        """The judge's name and verdicts, from the file `out`, which is written if need be.

        `exchanges` are keyed by id. `result` makes a summary, which is written too, from the
        judge's name and its verdicts.
        """
        if not is_done(out, about, lambda: about_of(out)):
            with working(out, about) as work:
                name, found = self.verdicts([*exchanges.values()], work)
                by_id = {i: asdict(verdict) for i, verdict in zip(exchanges, found, strict=True)}
                if distributed.first():
                    content = {"about": about, "result": result(name, found), "verdicts": by_id}
                    write_json(out, content)
        return read_verdicts(out, [*exchanges])


def judge_answers(
    folder: Path,
    text: str,
    out: Path,
    compute: ComputeSettings,
    progress: Progress,
    images: Path | None = None,
) -> Judged:
    """Judge the answers of an evaluation; writes the file `out`, and resumes after a kill.

    Args:
        folder: Of `evaluate_target`, with answers.jsonl.
        text: See `judges.find`.
        out: One JSON file with the rates, and a verdict by id.
        images: Show the judge the prompts' images, which lie in this folder (see `Pictures`).

    Raises:
        RegraftError: no such judge, no answers, answers cut short by the keyword judge, or an
            image is missing or differs.
    """
    evaluation = read_evaluation(folder)
    answers, settings = evaluation.result.answers, evaluation.about["settings"]
    if text != evaluation.result.judge and not settings["full_answers"]:
        raise RegraftError(
            f"{folder}: answers end where {evaluation.result.judge} was certain, too early for "
            "another judge. Evaluate with --full-answers."
        )
    _note_gaps(text, answers, settings["max_new_tokens"], progress, seen=images is not None)
    pictures = None if images is None else Pictures(images)
    exchanges = {answer.id: exchange(answer, pictures) for answer in answers}
    inputs = {"answers": file_digest(folder / "answers.jsonl")}
    if images is not None:
        shown = [one.image for one in exchanges.values() if one.image]
        inputs["images"] = digest(*map(file_digest, shown))
    judging = _Judging(text, compute, progress)

    def result(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        return asdict(judged(name, answers, verdicts))

    name, verdicts = judging.write(out, judging.about("judge", inputs), exchanges, result)
    return judged(name, answers, verdicts)


def _note_gaps(
    text: str, answers: Sequence[Answer], length: int, progress: Progress, *, seen: bool
) -> None:
    """Note if a judge would read the end of answers or an image, but does not get it."""
    kind, _ = find(text)
    words = kind if isinstance(kind, TextJudge) else None
    if length < _ENOUGH and not (words and words.window):
        progress.note(
            f"Answers have at most {length} tokens, and {text} reads all of an answer: what would "
            f"come later is not judged. Evaluate with --max-new-tokens {_ENOUGH} to have it."
        )
    unasked = sum(bool(a.image) and not a.request for a in answers)
    if unasked and not (seen or words):
        progress.note(
            f"{unasked} answers do not record what their image asks: the judge gets only the "
            "prompt's text. Give --images to judges that see images, or evaluate again."
        )


def _check_read(name: str, found: Sequence[Verdict]) -> None:
    found = [one for one in found if one.reason != UNREAD_FILTERED]
    if len(found) > 1 and all(one.refused is None and one.unsafe is None for one in found):
        raise RegraftError(
            f"{name} gives no verdict on any of {len(found)} answers; the first is "
            f"{found[0].reason!r}. Is it a judge of this kind?"
        )


def own_judge(folder: Path) -> Judged:
    """Verdicts of the evaluation's own judge, in the form of other judges'."""
    result = read_evaluation(folder).result
    name, verdicts = own_verdicts(result)
    return judged(name, result.answers, verdicts)


def agreement(folder: Path, files: Sequence[Path], out: Path) -> tuple[Agreement, ...]:
    """How far the judges of an evaluation agree, its own among them; writes the JSON file `out`."""
    result = read_evaluation(folder).result
    ids = [answer.id for answer in result.answers]
    others = [read_verdicts(one, ids) for one in files]
    found = agreements(result.answers, [own_verdicts(result), *others])
    if distributed.first():
        write_json(out, {"agreement": [asdict(one) for one in found]})
    return found


def opinions(folder: Path) -> tuple[tuple[Judged, tuple[Agreement, ...]], ...]:
    """Verdicts of other judges on an evaluation, and their agreement with its own judge.

    They are read from the default output folder of `regraft judge`.

    Raises:
        RegraftError: see `read_verdicts`; the answers have changed since.
    """
    result = read_evaluation(folder).result
    answers, judged_now = result.answers, file_digest(folder / "answers.jsonl")
    found = []
    for file in sorted((folder / VERDICTS).glob("*.json")):
        content = read_json(file)
        if not isinstance(content, dict):
            raise RegraftError(f"{file} holds no verdicts of `regraft judge answers`.")
        if "verdicts" not in content:  # what `agreement` wrote
            continue
        if about_of(file)["inputs"]["answers"] != judged_now:
            raise RegraftError(
                f"{file} judges other answers than {folder} holds now. Remove it, or judge "
                "again with `regraft judge answers`."
            )
        other = read_verdicts(file, [answer.id for answer in answers])
        pair = agreements(answers, [own_verdicts(result), other])
        found.append((judged(other[0], answers, other[1]), pair))
    return tuple(found)


def measure_judges(
    files: Sequence[Path],
    judges: Sequence[str],
    labels: Labels,
    compute: ComputeSettings,
    progress: Progress,
    out: Path | None = None,
) -> dict[str, Bench]:
    """Compare judges with the labels of every file, and of all together if there are several.

    Verdicts are kept in a folder next to `out`, one file per judge, so a stopped run can go on.

    Args:
        files: See `read_labelled`.
        judges: By name, see `judges.find`.
        out: JSON file for the figures; may be left out if all judges are keyword judges.

    Returns:
        File -> its labels and the quality of each judge; "all" for several files together.

    Raises:
        RegraftError: bad input; a judge is a model and `out` is missing.
    """
    if distributed.decided(lambda: out is not None and out.exists()):
        raise RegraftError(f"{out} exists. Choose another output or remove it.")
    read = _read_labelled(files, labels)
    models = [text for text in judges if not isinstance(find(text)[0], TextJudge)]
    if models and out is None:
        raise RegraftError(
            f"Name a file for the figures with --out: the verdicts of {models[0]} are kept next to "
            "it, so that none is lost if something fails."
        )
    exchanges = list(dict.fromkeys(one.exchange for rows in read.values() for one in rows))
    inputs = {"answers": digest(*map(file_digest, files)), "ids": labels.ids}
    judged_by = [
        _bench_verdicts(_Judging(text, compute, progress), exchanges, inputs, out)
        for text in dict.fromkeys(judges)
    ]
    place = {exchange: i for i, exchange in enumerate(exchanges)}
    found = {}
    for file, rows in read.items():
        places = [place[one.exchange] for one in rows]
        by_judge = [(name, [verdicts[i] for i in places]) for name, verdicts in judged_by]
        found[file] = bench(rows, by_judge, labels.question)
    if out is not None and distributed.first():
        _write_bench(out, labels, found)
    return found


def _bench_verdicts(
    judging: _Judging, exchanges: Sequence[Exchange], inputs: Mapping[str, str], out: Path | None
) -> tuple[str, list[Verdict]]:
    """The judge's name and one verdict per exchange, kept in a file next to `out`."""
    if out is None:
        return judging.verdicts(exchanges, None)
    kept = out.with_name(f"{out.name}.verdicts") / f"{slug(judging.by)}.json"
    by_number = {str(i): one for i, one in enumerate(exchanges)}

    def result(name: str, _: Sequence[Verdict]) -> dict[str, Any]:
        return {"judge": name}

    return judging.write(kept, judging.about("judge-bench", inputs), by_number, result)


def _write_bench(out: Path, labels: Labels, found: Mapping[str, Bench]) -> None:
    figures = {name: asdict(one) for name, one in found.items()}
    quality = {name: one.pop("judges") for name, one in figures.items()}
    settings = {**asdict(labels), "positive": list(labels.positives)}
    write_json(out, {"settings": settings, "labels": figures, "quality": quality})


def _read_labelled(files: Sequence[Path], labels: Labels) -> dict[str, tuple[Labelled, ...]]:
    """Rows by file, and if there are several all of them as "all"."""
    if not files:
        raise RegraftError("Name at least one CSV with labelled answers.")
    read = {str(path): read_labelled(path, labels) for path in files}
    given = {one.label for path in files for one in read_labelled(path, replace(labels, ids="all"))}
    known = set(map(str.casefold, given))
    if unknown := [one for one in labels.positive if one.casefold() not in known]:
        raise RegraftError(
            f"No answer is labelled {unknown[0]!r}. Labels found: {', '.join(sorted(given)[:8])}."
        )
    if len(read) > 1:
        read["all"] = tuple(one for rows in read.values() for one in rows)
    return read
