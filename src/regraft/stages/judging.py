"""Judge saved answers again, by other judges; the model that wrote them is not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from regraft import ranks
from regraft.data.collate import batches
from regraft.errors import RegraftError
from regraft.evaluation.degenerate import FRAGMENT, degeneration
from regraft.evaluation.endpoint import FILTERED, parse_endpoint
from regraft.evaluation.guards import READERS, Guard
from regraft.evaluation.keywords import KEYWORD_JUDGES
from regraft.evaluation.labelled import HARMS, REFUSALS, Bench, Question, bench, read_labelled
from regraft.evaluation.pictures import Pictures
from regraft.evaluation.pieces import in_pieces
from regraft.evaluation.results import Answer
from regraft.evaluation.verdicts import (
    Agreement,
    ByKeywords,
    Exchange,
    Judge,
    Judged,
    Verdict,
    agreements,
    own_verdict,
    rate,
    silent,
)
from regraft.files import digest, file_digest, read_json, slug, write_json
from regraft.keys import describe, is_done, working
from regraft.models.load import judge_fingerprint, load_judge
from regraft.settings.compute import ComputeSettings
from regraft.stages.evaluating import Evaluation, read_evaluation
from regraft.watch import Advance, Watch

VERDICTS = "judges"  # the folder of other judges' verdicts in that of an evaluation
_CHUNK = 64  # exchanges after which verdicts are on disk
_ENOUGH = 256  # tokens, as VLGuard evaluates


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
        images: Show the judge the prompts' images, which lie in this folder (see `Pictures`).
        loaded: The judge, if it is in memory.

    Raises:
        RegraftError: no such judge, no answers, answers cut short by the keyword judge, an image
            is missing or another one.
    """
    evaluation = read_evaluation(folder)
    answers = _answers(evaluation)
    if not _in_full(evaluation) and text != evaluation.result.judge:
        raise RegraftError(
            f"{folder}: answers end where {evaluation.result.judge} was certain, too early for "
            "another judge. Evaluate with --full-answers."
        )
    length = evaluation.about.get("settings", {}).get("max_new_tokens", _ENOUGH)
    if length < _ENOUGH and not _reads_the_start(text):
        watch.note(
            f"Answers end after {length} tokens at most, and {text} reads the whole of them: what "
            f"comes later is not judged. Evaluate with --max-new-tokens {_ENOUGH} for it."
        )
    pictures = None if images is None else Pictures(images)
    exchanges = [_exchange(answer, pictures) for answer in answers]
    unasked = sum(bool(a.image) and not a.request for a in answers)
    if images is None and unasked and text not in KEYWORD_JUDGES:
        watch.note(
            f"{unasked} answers do not say what their image asks: the judge is told the words "
            "beside it alone. Give --images to judges that see, or evaluate anew."
        )
    shown = {} if images is None else {"images": _digest_of_images(exchanges)}
    inputs = {"answers": file_digest(folder / "answers.jsonl"), **_of_judge(text), **shown}
    about = describe("judge", inputs, compute=_runs_on(text, compute))

    def content(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        said = zip(answers, verdicts, strict=True)
        return {
            "result": asdict(_judged(name, answers, verdicts)),
            "verdicts": {answer.id: asdict(verdict) for answer, verdict in said},
        }

    _judge_into(out, about, loaded or text, exchanges, compute, watch, content)
    return _judged(read_json(out)["result"]["judge"], answers, read_verdicts(out, answers))


def _judge_into(
    out: Path,
    about: Mapping[str, Any],
    by: Judge | str,
    exchanges: Sequence[Exchange],
    compute: ComputeSettings,
    watch: Watch,
    content: Callable[[str, Sequence[Verdict]], dict[str, Any]],
) -> None:
    """Write what `content` makes of the judge's name and verdicts, unless it is there."""
    if is_done(out, out, about, lambda: read_json(out)["about"]):
        return
    judge = find_judge(by, compute) if isinstance(by, str) else by
    task = watch.task(f"Judging by {judge.name}", len(exchanges), "answers")
    with working(out, about) as work, task as done:
        verdicts = _verdicts(judge, exchanges, work, done)
        if ranks.first():
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


def _of_judge(text: str) -> dict[str, str]:
    """What tells a judge from others."""
    guard = _guard(text)
    return {"judge": text, **({"model": judge_fingerprint(guard[1])} if guard else {})}


def _runs_on(text: str, compute: ComputeSettings) -> ComputeSettings | None:
    """What decides the verdicts of a guard; keywords and endpoints do not run on a device."""
    return compute if _guard(text) else None


def _check_read(name: str, found: Sequence[Verdict]) -> None:
    found = [one for one in found if one.reason != FILTERED]
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
    evaluation = read_evaluation(folder)
    answers = _answers(evaluation)
    return _judged(evaluation.result.judge, answers, [own_verdict(answer) for answer in answers])


def agreement(folder: Path, files: Sequence[Path], out: Path) -> tuple[Agreement, ...]:
    """How far the judges of an evaluation agree, its own among them; writes the JSON file `out`.

    Args:
        folder: Of `evaluate`.
        files: Of `judge`, on its answers.
        out: Written anew, whatever it held.

    Raises:
        RegraftError: see `read_verdicts`.
    """
    evaluation = read_evaluation(folder)
    answers = _answers(evaluation)
    said = [(evaluation.result.judge, [own_verdict(answer) for answer in answers])]
    said += [(read_json(one)["result"]["judge"], read_verdicts(one, answers)) for one in files]
    found = agreements(answers, said)
    if ranks.first():
        write_json(out, {"agreement": [asdict(one) for one in found]})
    return found


def opinions(folder: Path) -> tuple[tuple[Judged, tuple[Agreement, ...]], ...]:
    """What other judges said of an evaluation, each with how far its own judge agrees.

    Those whose verdicts lie where `regraft judge` puts them unless told otherwise.

    Raises:
        RegraftError: see `read_verdicts`; the answers are others now.
    """
    evaluation = read_evaluation(folder)
    answers = _answers(evaluation)
    mine = evaluation.result.judge, [own_verdict(answer) for answer in answers]
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
            found.append((_judged(name, answers, verdicts), pair))
    return tuple(found)


def _in_full(evaluation: Evaluation) -> bool:
    return bool(evaluation.about.get("settings", {}).get("full_answers", True))


def _answers(evaluation: Evaluation) -> tuple[Answer, ...]:
    """The answers; evaluations of before knew fewer kinds of degenerate answers."""
    found = evaluation.result.answers
    if not _in_full(evaluation):
        return found
    cut = evaluation.about.get("settings", {}).get("max_new_tokens", FRAGMENT) < FRAGMENT

    def kind(a: Answer) -> str:
        return degeneration(a.answer, harmful=a.harmful and not (a.refused or cut)) or ""

    return tuple(replace(a, degenerate=kind(a)) for a in found)


def _reads_the_start(text: str) -> bool:
    return text in KEYWORD_JUDGES and KEYWORD_JUDGES[text].window is not None


def _judged(name: str, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> Judged:
    return Judged(
        name,
        rate(answers, verdicts, harmful=True),
        rate(answers, verdicts, harmful=False),
        sum(one.refused is None and one.unsafe is None for one in verdicts),
        silent(answers, verdicts),
    )


def _exchange(answer: Answer, pictures: Pictures | None) -> Exchange:
    image = None if pictures is None else pictures.of(answer)
    asked = answer.request if image is None else None  # an image says it itself
    return Exchange(asked or answer.instruction, answer.answer, image)


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
) -> dict[str, Bench]:
    """Every judge against the labels of every file, and of all together if there are several.

    Verdicts are kept in a folder beside `out`, one file a judge, and a stopped run goes on.

    Args:
        files: See `read_labelled`.
        judges: See `find_judge`.
        positive: Labels that mean yes; the usual ones of the question if empty.
        question: What the labels say.
        ids: Which rows.
        compute: Where models run.
        watch: Progress.
        out: Write the figures here, as JSON; keyword judges alone, which are quick, need none.

    Returns:
        File -> its labels, and one quality a judge; "all" over several.

    Raises:
        RegraftError: bad input; a judge is a model and `out` is missing.
    """
    if not files:
        raise RegraftError("Name at least one CSV with labelled answers.")
    if ranks.decided(lambda: out is not None and out.exists()):
        raise RegraftError(f"{out} exists. Choose another output or remove it.")
    wanted = positive or (REFUSALS if question == "refusal" else HARMS)
    read = {str(path): read_labelled(path, wanted, ids=ids) for path in files}
    given = {one.label for path in files for one in read_labelled(path, wanted)}
    if unknown := [one for one in positive if one.casefold() not in map(str.casefold, given)]:
        raise RegraftError(
            f"No answer is labelled {unknown[0]!r}. Labels found: {', '.join(sorted(given)[:8])}."
        )
    if len(read) > 1:
        read = {**read, "all": tuple(one for rows in read.values() for one in rows)}
    for text in judges:
        check_judge(text)
        if out is None and text not in KEYWORD_JUDGES:
            raise RegraftError(
                f"Name a file for the figures with --out: the verdicts of {text} are kept beside "
                "it, and are not lost where something fails."
            )
    exchanges = list(dict.fromkeys(one.exchange for rows in read.values() for one in rows))
    asked = {"answers": digest(*map(file_digest, files)), "ids": ids}
    said: list[tuple[str, dict[Exchange, Verdict]]] = []
    for text in dict.fromkeys(judges):
        name, verdicts = _bench_verdicts(text, exchanges, asked, out, compute, watch)
        said.append((name, dict(zip(exchanges, verdicts, strict=True))))
    found = {
        file: bench(
            rows, [(name, [by[one.exchange] for one in rows]) for name, by in said], question
        )
        for file, rows in read.items()
    }
    if out is not None and ranks.first():
        settings = {"question": question, "positive": list(wanted), "ids": ids}
        labels = {name: asdict(one) for name, one in found.items()}
        content = {name: one.pop("judges") for name, one in labels.items()}
        write_json(out, {"settings": settings, "labels": labels, "quality": content})
    return found


def _bench_verdicts(
    text: str,
    exchanges: Sequence[Exchange],
    asked: Mapping[str, str],
    out: Path | None,
    compute: ComputeSettings,
    watch: Watch,
) -> tuple[str, list[Verdict]]:
    """(the judge's name, a verdict an exchange)."""
    if out is None:
        judge = find_judge(text, compute)
        with watch.task(f"Judging by {judge.name}", len(exchanges), "answers") as done:
            return judge.name, _verdicts(judge, exchanges, None, done)
    kept = out.with_name(f"{out.name}.verdicts") / f"{slug(text)}.json"
    about = describe("judge-bench", {**asked, **_of_judge(text)}, compute=_runs_on(text, compute))

    def content(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        return {"judge": name, "verdicts": [asdict(one) for one in verdicts]}

    _judge_into(kept, about, text, exchanges, compute, watch, content)
    written = read_json(kept)
    return written["judge"], [Verdict(**one) for one in written["verdicts"]]
