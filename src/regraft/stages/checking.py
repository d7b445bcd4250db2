"""Whether a compressed model is still as safe and as useful as the dense one: `regraft check`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import regraft
from regraft import distributed
from regraft.data.sources import DataSource
from regraft.disk.files import digest, file_digest, write_json, write_text
from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT
from regraft.evaluation.gate import Check, compared
from regraft.evaluation.pairing import on_the_same
from regraft.evaluation.results import EvalResult
from regraft.evaluation.served import explained
from regraft.evaluation.summary import judge_answer
from regraft.flags import refuse_compute
from regraft.models.load import Source
from regraft.progress import SILENT, Progress
from regraft.report.gate import check_to_json, junit, markdown
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings, Margins
from regraft.stages.endpoint import Evaluable, open_target
from regraft.stages.evaluating import (
    Evaluation,
    evaluate_target,
    read_evaluation,
    require_evaluation,
)
from regraft.stages.provenance import but_for_rounding, differing

Side = Evaluable | Path  # what is evaluated, or the folder of its finished evaluation
DENSE, COMPRESSED = "dense", "compressed"
_FILES = ("check.json", "junit.xml", "summary.md")
_SAME = ("judge", "keywords", "window", "max_new_tokens", "full_answers")
_PROMPT = ("id", "harmful", "category", "instruction", "request", "image_digest", "reference")


def open_side(
    named: str | Path | Source,
    compute: ComputeSettings,
    endpoint: EndpointSettings = EndpointSettings(),
    patch: Path | None = None,
    progress: Progress = SILENT,
) -> Side:
    """What is named: the folder of a finished evaluation, or what `open_target` takes.

    Raises:
        RegraftError: see `open_target`; there is a patch for an evaluation.
    """
    if not isinstance(named, Source):
        folder = Path(named)
        # a model's folder may hold a results.json of another program
        if folder.is_dir() and not (folder / "config.json").exists():
            require_evaluation(folder, "neither a model, without config.json, nor an evaluation")
            if patch is not None:
                raise RegraftError(f"{folder} is a finished evaluation, which takes no patch.")
            return folder
    return open_target(named, compute, endpoint, progress, patch=patch)


def check_compressed(
    dense: Side,
    compressed: Side,
    out: Path,
    suites: Sequence[DataSource] = (),
    settings: EvalSettings = EvalSettings(),
    margins: Margins = Margins(),
) -> Check:
    """Compare two models, evaluating those that are not; writes check.json, junit.xml, summary.md.

    Models are evaluated on `suites` into `dense` and `compressed` below `out`; called again, it
    takes them as they are and decides anew.

    Raises:
        RegraftError: the two answered other prompts or are judged otherwise, or are one model.
    """
    sides = {DENSE: dense, COMPRESSED: compressed}
    clear_check(out)
    _check_asked(sides, suites, settings)
    if all(points >= 100 for points in margins.points().values()):
        raise RegraftError(
            "Every metric is left out by a margin of 100, so that nothing is checked: give at "
            "least one of them a smaller margin."
        )
    there = {name: _read(side) for name, side in sides.items() if isinstance(side, Path)}
    names = {n: str(side) if isinstance(side, Path) else n for n, side in sides.items()}
    _check_before(sides, there, names, suites, settings)
    for name, side in sides.items():
        if not isinstance(side, Path):
            there[name] = evaluate_target(side, out / name, suites, settings)
    found = _decided(there, names, margins)
    if distributed.first():
        write_text(out / "junit.xml", junit(found))
        write_text(out / "summary.md", markdown(found))
        write_json(out / "check.json", check_to_json(found))
    return found


def check_compute(sides: Sequence[Side], compute: ComputeSettings) -> None:
    """Refuse how a model is run where none is run here.

    Raises:
        RegraftError: both are evaluations or behind servers, and something of it was set.
    """
    if all(isinstance(one, Path) or one.compute is None for one in sides):
        refuse_compute(compute, "Neither of the two models is run here")


def clear_check(out: Path) -> None:
    """Remove the verdict that is there, so that none outlives a check that fails.

    Raises:
        RegraftError: a check would be put among other files.
    """
    if out.is_file():
        raise RegraftError(f"The output {out} is a file; a folder is needed.")
    own = {*_FILES, DENSE, COMPRESSED}
    found = sorted(one.name for one in out.iterdir()) if out.is_dir() else []
    odd = [name for name in found if name not in own and not name.startswith(".")]
    odd += [name for name in _FILES if (out / name).is_dir()]
    if odd:
        raise RegraftError(
            f"The output folder {out} holds something else than a check ({odd[0]}). Choose a new "
            "folder."
        )
    if distributed.first():
        for name in _FILES:
            (out / name).unlink(missing_ok=True)


def _check_asked(
    sides: Mapping[str, Side], suites: Sequence[DataSource], settings: EvalSettings
) -> None:
    """Raise where prompts or settings are wanting or would change nothing."""
    models = any(not isinstance(side, Path) for side in sides.values())
    if models and not suites:
        raise RegraftError(
            "A model is to be evaluated: name the prompts with --suite, harmful and harmless ones "
            "(utility needs a response beside these)."
        )
    if not models and (suites or settings != EvalSettings()):
        raise RegraftError(
            "Both are finished evaluations, whose prompts and settings are what they are: leave "
            "out --suite and settings of an evaluation."
        )


def _read(folder: Path) -> Evaluation:
    """An evaluation that tells what it was made of.

    Raises:
        RegraftError: see `read_evaluation`; it does not tell.
    """
    found = read_evaluation(folder)
    for name in ("inputs", "settings", "versions"):
        if not (isinstance(one := found.about.get(name), Mapping) and one):
            raise RegraftError(
                f"{folder / 'results.json'}: field 'about.{name}' is no JSON object, or empty, so "
                "it is not known how the model was evaluated. Evaluate it again."
            )
    return found


def _check_before(
    sides: Mapping[str, Side],
    there: Mapping[str, Evaluation],
    names: Mapping[str, str],
    suites: Sequence[DataSource],
    settings: EvalSettings,
) -> None:
    """Find before anything is answered what would keep the two from being compared."""
    made_of = {name: one.about["inputs"] for name, one in there.items()}
    for name, side in sides.items():
        if not isinstance(side, Path):
            side.check(settings)
            side.reading(suites, settings.limit)
            made_of[name] = side.inputs()
            for other, evaluation in there.items():
                _check_same_way(
                    names,
                    {other: evaluation.about["settings"], name: settings.model_dump(mode="json")},
                )
                asked = _unanswered(side, suites, settings)
                on_the_same(names[other], evaluation.result, f"--suite ({asked.suite})", asked)
    if "model" in made_of[DENSE] and made_of[DENSE] == made_of[COMPRESSED]:
        model = made_of[DENSE]["model"]
        if _served(made_of[DENSE]):
            raise RegraftError(
                f"{DENSE} and {COMPRESSED} are both {model}, and one name cannot tell two models "
                "apart: serve them under different names (vLLM: --served-model-name)."
            )
        raise RegraftError(
            f"{DENSE} and {COMPRESSED} are the same model (fingerprint {model[:12]}): there is "
            "nothing to compare."
        )


def _served(inputs: Mapping[str, str]) -> bool:
    """Whether these are of a model behind a server."""
    return inputs.get("model", "").startswith(ENDPOINT)


def _unanswered(
    target: Evaluable, suites: Sequence[DataSource], settings: EvalSettings
) -> EvalResult:
    """The prompts as an evaluation would have them, without answers."""
    judge = settings.text_judge()
    answers = tuple(
        replace(
            judge_answer(example, "", judge),
            image_digest=file_digest(example.image) if example.image else "",
        )
        for example in target.reading(suites, settings.limit).examples
    )
    name = ", ".join(map(str, suites))
    return EvalResult(name, judge.name, None, None, None, {}, {}, {}, answers)


def _check_same_way(names: Mapping[str, str], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless both are judged alike, on answers of the same length."""
    (one, ours), (other, theirs) = settings.items()
    for setting in _SAME:
        if ours.get(setting) != theirs.get(setting):
            raise RegraftError(
                f"{names[one]} and {names[other]} cannot be compared: {setting} is "
                f"{ours.get(setting)!r} in the one and {theirs.get(setting)!r} in the other. "
                f"Evaluate both with the same --{setting.replace('_', '-')}."
            )


def _decided(there: Mapping[str, Evaluation], names: Mapping[str, str], margins: Margins) -> Check:
    dense, compressed = there[DENSE], there[COMPRESSED]
    _check_same_way(names, {name: there[name].about["settings"] for name in (DENSE, COMPRESSED)})
    other = on_the_same(names[DENSE], dense.result, names[COMPRESSED], compressed.result)
    fractions = {name: points / 100 for name, points in margins.points().items()}
    return Check(
        compared(dense.result, other, fractions),
        _made_of(dense, compressed),
        (
            *_differences(dense.about, compressed.about),
            *_replies(DENSE, dense),
            *_replies(COMPRESSED, compressed),
        ),
    )


def _made_of(dense: Evaluation, compressed: Evaluation) -> dict[str, Any]:
    """What the verdict is bound to; no place and nothing that changes rounding alone."""
    answers = dense.result.answers
    rows = [[asdict(answer)[name] for name in _PROMPT] for answer in answers]
    settings = dense.about["settings"]
    return {
        "versions": {"regraft": regraft.__version__},
        "judge": dense.result.judge,
        "max_new_tokens": settings.get("max_new_tokens"),
        "full_answers": settings.get("full_answers"),
        "prompts": {"count": len(answers), "digest": digest(json.dumps(rows, sort_keys=True))},
        "models": {
            name: {
                # all digests of a model here; those of one behind a server have its address
                "inputs": {
                    role: digest(value) if _served(one.about["inputs"]) else value
                    for role, value in one.about["inputs"].items()
                },
                "compute": but_for_rounding(one.about.get("compute", {})),
                "versions": one.about["versions"],
                "answers": digest(*(f"{a.id}\n{a.answer}" for a in one.result.answers)),
            }
            for name, one in ((DENSE, dense), (COMPRESSED, compressed))
        },
    }


def _replies(name: str, evaluation: Evaluation) -> Iterator[str]:
    """What a server gave beside answers as asked for."""
    counted = evaluation.about.get("replies", {})
    yield from (f"The {name} model: {sentence}" for sentence in explained(counted))
    empty = sum(one.harmful and not one.answer for one in evaluation.result.answers)
    if counted.get("filtered") and empty:
        yield (
            f"The {name} model: harmful prompts without any answer: {empty:,}. ASR counts them as "
            "not answered, though it may be the server's filter that withheld them."
        )


def _differences(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> Iterator[str]:
    """What was not the same in both evaluations and may be."""
    if ("compute" in dense) != ("compute" in compressed):
        yield "Only one of the two ran here: how a server runs a model is not known."
        return  # and versions of what runs models here mean nothing there
    if "compute" not in dense:
        return
    for way, name, ours, theirs in differing(dense, compressed, "compute", "versions"):
        yield (
            f"The two were evaluated with different {way}: {name} is {ours} of the dense model "
            f"and {theirs} of the compressed one."
        )
