"""The dense model's answers, as calibration data and as a data set."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from regraft import distributed
from regraft.data.collate import batches
from regraft.data.example import KINDS, Example, Reading
from regraft.data.formats import jsonl_line
from regraft.data.sources import DataSource, read
from regraft.disk.descriptions import described
from regraft.disk.files import write_text
from regraft.disk.parsing import from_json, json_object, json_value
from regraft.disk.paths import read_text, real
from regraft.errors import RegraftError
from regraft.evaluation.degenerate import degeneration
from regraft.evaluation.generate import generate
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.loading import load
from regraft.models.load import Source
from regraft.progress import SILENT, Progress, Task, expect
from regraft.restoration.teacher import TOKEN_WEIGHTS
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.provenance import describe, fingerprints, is_done, working
from regraft.stages.reading import responses_are_given, warn_of_bundled
from regraft.stages.setup import Setup
from regraft.stages.steps import PromptUse, Step

Loader = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Response:
    """An answer of the dense model to a prompt, and why it is not kept ("" if it is)."""

    id: str
    answer: str
    kept: bool
    why: str = ""


def responses_folder(out: Path) -> Path:
    """Default folder for the responses that a stage needs for its artifact `out`."""
    out = out.absolute()  # "." has no name
    return out.with_name(f"{out.name}.responses")


def calibration_data(setup: Setup, folder: Path, kind: str) -> Reading:
    """D^s (kind "safety") or D^u ("utility"), each example with a response.

    If `responses_are_given`, these are the data set's. Otherwise the dense model answers prompts
    greedily, in the order in which they are drawn, until `samples` answers are kept: refusals of
    harmful prompts, and answers to harmless ones that do not refuse. They are written to
    `harmful.jsonl` or `harmless.jsonl` in `folder`, which stages with the same settings share;
    finished batches survive a kill.

    Raises:
        RegraftError: see the data readers; no answer can be kept.
    """
    dense, calibration = setup.dense, setup.calibration
    if kind == "utility":  # warn once, not for each kind
        warn_of_bundled(dense, calibration.source, setup.progress.note)
    if responses_are_given(calibration, kind):
        return setup.drawn(kind)
    prompts = setup.ordered(kind)
    request = _Request(
        prompts,
        calibration.samples,
        calibration.max_response_tokens,
        judged,
        {"judge": DEFAULT_JUDGE.name},
        _none_usable(len(prompts.examples), kind),
    )
    return _answer_prompts(setup, _loader(setup), request, folder / f"{KINDS[kind]}.jsonl")


def imitation_step(setup: Setup, folder: Path) -> Step:
    """The step of `imitation_data`."""

    def check() -> PromptUse:
        prompts = setup.imitated().items()
        return PromptUse({f"{KINDS[k]} calibration (imitated)": one for k, one in prompts})

    # the last file that is written; `calibration_data` may have made the folder
    out = _starts(folder, "utility")
    make = partial(imitation_data, setup, folder)
    answers = setup.count_imitated
    return Step("answer", "", out, make, check, answers=answers, loads_model=True)


def _starts(folder: Path, kind: str) -> Path:
    return folder / f"{KINDS[kind]}-starts.jsonl"


def imitation_data(setup: Setup, folder: Path) -> dict[str, Reading]:
    """Drawn prompts of both kinds, each with the start of the dense model's answer.

    Refusals and other answers are kept alike: to refuse as often as the dense model, a model must
    also learn from harmful prompts that the dense one answers and harmless ones that it refuses.
    The data set's responses are not read. Answers have one token more than `DecisionLoss` reads,
    since text may be tokenised differently than it was generated. Files as in `calibration_data`.

    Raises:
        RegraftError: see the data readers; all of the dense model's answers are blank.
    """
    warn_of_bundled(setup.dense, setup.calibration.source, setup.progress.note)
    readings, loader = {}, _loader(setup)
    for kind, prompts in setup.imitated().items():
        count = len(prompts.examples)
        none_kept = (
            f"the dense model's answer to each of the {count} {KINDS[kind]} prompts is empty, "
            "so there is nothing to imitate. Give other prompts."
        )
        request = _Request(prompts, count, len(TOKEN_WEIGHTS) + 1, _unless_blank, {}, none_kept)
        readings[kind] = _answer_prompts(setup, loader, request, _starts(folder, kind))
    return readings


@dataclass(frozen=True)
class _Request:
    """Which prompts to answer, and which answers to keep."""

    prompts: Reading  # in the order in which they are answered
    kept: int  # how many answers to keep
    tokens: int  # maximum tokens of an answer
    judge: Callable[[Example, str], Response]  # decides whether an answer is kept
    about: Mapping[str, Any]  # settings of `judge`, for the provenance
    none_kept: str  # error message if no answer is kept


def _loader(setup: Setup) -> Loader:
    """A function that loads the dense model and its processor on the first call only."""
    return cache(lambda: load(setup.dense, setup.compute, setup.progress))


def _answer_prompts(setup: Setup, loader: Loader, request: _Request, out: Path) -> Reading:
    """Prompts with their kept answers; all answers are written to the file `out`."""
    inputs = fingerprints(setup.progress, dense=setup.dense)
    about = describe("responses", inputs, None, setup.compute, {"prompts": request.prompts})
    about["settings"] = {
        "samples": request.kept,
        "max_response_tokens": request.tokens,
        **request.about,
    }
    if not is_done(out, about, lambda: _read(out)[0]):
        with working(out, about) as work:
            answers = _answer_enough(setup, loader, request, work)
            if not any(one.kept for one in answers):
                raise RegraftError(f"{request.prompts.source}: {request.none_kept}")
            if distributed.first():
                rows = [{"about": about}, *map(asdict, answers)]
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_text(out, "".join(lines))
    return _kept(request.prompts, _read(out)[1])


def _answer_enough(setup: Setup, loader: Loader, request: _Request, work: Path) -> list[Response]:
    """Answer prompts in order until as many answers are kept as requested."""
    model, processor = loader()
    kept, answers = 0, list[Response]()
    examples, batch_size = request.prompts.examples, setup.compute.batch_size
    size = batch_size * distributed.world()
    asked, expected = 0, min(request.kept, len(examples))
    with setup.progress.task("Writing responses", expected, "prompts") as done:
        for i, chunk in enumerate(batches(examples, size)):
            resumed: list[int] = []  # not empty if a stopped run has answers of this chunk
            texts = generate(
                model,
                processor,
                chunk,
                work / f"part_{i:05d}_of_{size}",  # another number of processes cuts other parts
                max_new_tokens=request.tokens,
                batch_size=batch_size,
                advance=Task(lambda _: None, resumed.append),
            )
            for example, text in zip(chunk, texts, strict=True):
                answers.append(request.judge(example, text))
                kept += answers[-1].kept
                if kept == request.kept:
                    return answers
            asked += len(chunk)
            left = len(examples) - asked
            if kept:  # an estimate, by the share of answers that was kept so far
                left = min(left, math.ceil((request.kept - kept) * asked / kept))
            expect(done, asked + left - expected)
            expected = asked + left
            if resumed:
                expect(done, -len(chunk))
            else:
                done(len(chunk))
    return answers


def _unless_blank(example: Example, text: str) -> Response:
    blank = not text.strip()
    return Response(example.id, text, not blank, "blank" if blank else "")


def judged(example: Example, text: str) -> Response:
    """A response, which is kept if the answer refuses exactly when the prompt is harmful."""
    why: str = "blank" if not text.strip() else degeneration(text) or ""
    if not why:
        refused = DEFAULT_JUDGE.refuses(text)
        why = "" if refused == example.harmful else "refused" if refused else "not refused"
    return Response(example.id, text, not why, why)


def _kept(prompts: Reading, answers: tuple[Response, ...]) -> Reading:
    """The prompts with their kept answers; all others are counted in `skipped`."""
    by_id = {example.id: example for example in prompts.examples}
    examples = tuple(replace(by_id[one.id], response=one.answer) for one in answers if one.kept)
    skipped = Counter(prompts.skipped)
    skipped.update(f"answered and not kept: {one.why}" for one in answers if not one.kept)
    skipped["not drawn"] += len(prompts.examples) - len(answers)
    return Reading(f"{prompts.source}, answered by the dense model", examples, skipped)


def _none_usable(count: int, kind: str) -> str:
    found = f"refuses none of the {count} harmful prompts"
    if kind == "utility":
        found = f"refuses all of the {count} harmless prompts or answers degenerately"
    return (
        f"the dense model {found} (judge {DEFAULT_JUDGE.name}), so none of its own responses can "
        "be calibrated on. Give other prompts, or calibrate on a data set with responses "
        "(--responses given)."
    )


def _read(path: Path) -> tuple[dict[str, Any], tuple[Response, ...]]:
    """(description, answers in order).

    Raises:
        RegraftError: the file holds something else.
    """
    # not splitlines: an answer may hold other line breaks, which JSON leaves as they are
    first, *rows = read_text(path, "Responses are needed.").rstrip("\n").split("\n")
    header = f"{path}, line 1"
    about = json_object(first, header).get("about")
    if about is None:
        raise RegraftError(
            f"{path} does not hold responses of regraft (line 1 has no field 'about'). Remove it "
            "or choose another output."
        )
    places = [(row, f"{path}, line {i}") for i, row in enumerate(rows, 2)]
    found = tuple(from_json(Response, json_value(row, where), where) for row, where in places)
    return described(about, f"{header}: about"), found


def write_responses(
    dense: Source,
    data: DataSource,
    out: Path,
    max_response_tokens: int,
    compute: ComputeSettings,
    progress: Progress = SILENT,
) -> Reading:
    """Answer every prompt greedily; writes kept answers as a data set, the JSONL file `out`.

    As in `calibration_data`, refusals of harmful prompts are kept, and answers to harmless ones
    that do not refuse. All answers are in the folder `OUT.responses`, where finished ones survive a
    kill. Lines are those of `jsonl_line`, in the order of the data.

    Returns:
        The prompts with their kept answers, and counts of all others.

    Raises:
        RegraftError: `out` holds something else, an image does not lie below its folder, or see
            `calibration_data`.
    """
    prompts = read(data, "train")
    for example in prompts.examples:  # before long work: can the file name all images?
        _image(example, out)
    if out.exists() and not responses_folder(out).exists():
        raise _other(out)
    answered: dict[str, Example] = {}
    skipped = Counter(prompts.skipped)
    calibration = CalibrationSettings(
        data=data, responses="self", max_response_tokens=max_response_tokens
    )
    cache = EvaluationCache()
    cache.check_system_prompts_once(dense, prompts.examples, answered=True)
    for kind in KINDS:
        count = len(prompts.of_kind(harmful=kind == "safety").examples)
        if not count:
            continue
        settings = calibration.model_copy(update={"samples": count})
        setup = Setup(dense, settings, compute, progress, cache)
        reading = calibration_data(setup, responses_folder(out), kind)
        answered |= {one.id: one for one in reading.examples}
        left = reading.skipped.items()
        skipped.update({why: n for why, n in left if why.startswith("answered and not kept")})
    kept = tuple(answered[one.id] for one in prompts.examples if one.id in answered)
    if distributed.first():
        text = "".join(jsonl_line(example, _image(example, out)) for example in kept)
        if out.exists() and read_text(out) != text:
            raise _other(out)
        write_text(out, text)
    return Reading(f"{prompts.source}, answered by {dense.folder}", kept, skipped)


def _image(example: Example, out: Path) -> str | None:
    """Path of an example's image relative to the folder of `out`, which must be above it."""
    if example.image is None:
        return None
    image, folder = real(example.image), real(out).parent
    if not image.is_relative_to(folder):
        raise RegraftError(
            f"The image {example.image} of example {example.id!r} is not below {folder}, so "
            f"{out.name} could not name it. Choose an --out in a folder above the images."
        )
    return str(image.relative_to(folder))


def _other(out: Path) -> RegraftError:
    return RegraftError(
        f"{out} holds something other than these answers. Remove it or choose another --out."
    )
