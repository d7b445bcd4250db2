"""Check whether a compressed model is as safe and useful as the dense one: `regraft check`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import regraft
from regraft import distributed
from regraft.data.sources import DataSource
from regraft.disk.files import digest, to_json, write_texts
from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT
from regraft.evaluation.gate import Check, compared
from regraft.evaluation.pairing import on_the_same
from regraft.evaluation.results import EvalResult
from regraft.evaluation.served import explained
from regraft.models.load import Source
from regraft.progress import SILENT, Progress
from regraft.report.gate import cannot_fail, check_to_json, junit, markdown
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings, Margins
from regraft.stages.endpoint import Evaluable, open_target
from regraft.stages.evaluating import (
    Evaluation,
    evaluate_target,
    judged,
    read_evaluation,
    require_evaluation,
)
from regraft.stages.provenance import but_for_rounding, evaluated_differently
from regraft.stages.targets import Answered

Side = Evaluable | Path  # a model to evaluate, or the folder of a finished evaluation
DENSE, COMPRESSED = "dense", "compressed"
_FILES = ("check.json", "junit.xml", "summary.md")
_SAME = ("judge", "keywords", "window", "max_new_tokens", "full_answers")
_PROMPT = (
    *("id", "harmful", "category", "system", "instruction", "request", "image_digest"),
    "reference",
)


def open_side(
    named: str | Path | Source,
    compute: ComputeSettings,
    endpoint: EndpointSettings = EndpointSettings(),
    patch: Path | None = None,
    progress: Progress = SILENT,
) -> Side:
    """Open the folder of a finished evaluation, or else what `open_target` takes.

    Raises:
        RegraftError: see `open_target`; a finished evaluation is given a patch.
    """
    if isinstance(named, str | Path):
        folder = Path(named)
        # "demo" is the bundled model; a model's folder may hold a results.json of another program
        if named != "demo" and folder.is_dir() and not (folder / "config.json").exists():
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
    """Compare two models; writes check.json, junit.xml and summary.md to the folder `out`.

    Models are first evaluated on `suites` into the folders `dense` and `compressed` in `out`. A
    second call uses these evaluations and makes a new verdict.

    Raises:
        RegraftError: the two answered different prompts, are judged differently or are one model.
    """
    sides = {DENSE: dense, COMPRESSED: compressed}
    _check_asked(sides, suites, settings)
    if all(points >= 100 for points in margins.points().values()):
        raise RegraftError(
            "A margin of 100 leaves out every metric, so nothing would be checked: give at least "
            "one a smaller margin."
        )
    evaluations = {name: _read(side) for name, side in sides.items() if isinstance(side, Path)}
    names = {n: str(side) if isinstance(side, Path) else n for n, side in sides.items()}
    _check_comparable(sides, evaluations, names, suites, settings)
    for name, side in sides.items():
        if not isinstance(side, Path):
            evaluations[name] = evaluate_target(side, out / name, suites, settings)
    found = _verdict(evaluations, names, margins)
    if distributed.first():
        texts = {"junit.xml": junit(found), "summary.md": markdown(found)}
        texts["check.json"] = to_json(check_to_json(found))
        write_texts({out / name: text for name, text in texts.items()})
    return found


def clear_check(out: Path) -> None:
    """Remove an old verdict, so that none remains if the new check fails.

    Raises:
        RegraftError: the folder holds other files.
    """
    if out.is_file():
        raise RegraftError(f"The output {out} is a file; a folder is needed.")
    own = {*_FILES, DENSE, COMPRESSED}
    found = sorted(one.name for one in out.iterdir()) if out.is_dir() else []
    odd = [name for name in found if name not in own and not name.startswith(".")]
    odd += [name for name in _FILES if (out / name).is_dir()]
    if odd:
        raise RegraftError(
            f"The output folder {out} holds something other than a check ({odd[0]}). Choose a new "
            "folder."
        )
    if distributed.first():
        for name in _FILES:
            (out / name).unlink(missing_ok=True)


def _check_asked(
    sides: Mapping[str, Side], suites: Sequence[DataSource], settings: EvalSettings
) -> None:
    """Raise if prompts are missing, or if prompts or settings would change nothing."""
    models = any(not isinstance(side, Path) for side in sides.values())
    if models and not suites:
        raise RegraftError(
            "There is a model to evaluate: name harmful and harmless prompts with --suite (utility "
            "needs responses to the harmless ones)."
        )
    if not models and (suites or settings != EvalSettings()):
        raise RegraftError(
            "Both are finished evaluations, with prompts and settings of their own: leave out "
            "--suite and settings of an evaluation."
        )


def _read(folder: Path) -> Evaluation:
    """Read an evaluation that says how it was made.

    Raises:
        RegraftError: see `read_evaluation`; it does not say so.
    """
    found = read_evaluation(folder)
    for name in ("inputs", "settings", "versions"):
        if not (isinstance(one := found.about.get(name), Mapping) and one):
            raise RegraftError(
                f"{folder / 'results.json'}: field 'about.{name}' is no JSON object, or empty, so "
                "how the model was evaluated is not known. Evaluate it again."
            )
    return found


def _check_comparable(
    sides: Mapping[str, Side],
    evaluations: Mapping[str, Evaluation],
    names: Mapping[str, str],
    suites: Sequence[DataSource],
    settings: EvalSettings,
) -> None:
    """Raise, before any prompt is answered, if the two could not be compared."""
    inputs = {name: one.about["inputs"] for name, one in evaluations.items()}
    judged_by = {name: one.about["settings"] for name, one in evaluations.items()}
    for name, side in sides.items():
        if not isinstance(side, Path):
            side.check(settings)
            side.reading(suites, settings.limit)
            inputs[name], judged_by[name] = side.inputs(), settings.model_dump(mode="json")
    _check_same_way(names, judged_by)
    for other, evaluation in evaluations.items():
        for side in sides.values():
            if not isinstance(side, Path):
                asked = _unanswered(side, suites, settings)
                on_the_same(names[other], evaluation.result, f"--suite ({asked.suite})", asked)
    if "model" in inputs[DENSE] and inputs[DENSE] == inputs[COMPRESSED]:
        model = inputs[DENSE]["model"]
        if _served(inputs[DENSE]):
            raise RegraftError(
                f"{DENSE} and {COMPRESSED} are both {model}, and one name cannot tell two models "
                "apart: serve them under different names (vLLM: --served-model-name)."
            )
        raise RegraftError(
            f"{DENSE} and {COMPRESSED} are the same model (fingerprint {model[:12]}): there is "
            "nothing to compare."
        )


def _served(inputs: Mapping[str, str]) -> bool:
    """Whether these are the inputs of a model behind a server."""
    return inputs.get("model", "").startswith(ENDPOINT)


def _unanswered(
    target: Evaluable, suites: Sequence[DataSource], settings: EvalSettings
) -> EvalResult:
    """The prompts as an evaluation would have them, without answers."""
    examples = target.reading(suites, settings.limit).examples
    answers = tuple(judged(examples, Answered([""] * len(examples)), settings))
    name, judge = ", ".join(map(str, suites)), settings.text_judge().name
    return EvalResult(name, judge, None, None, None, {}, {}, {}, answers)


def _check_same_way(names: Mapping[str, str], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless both are judged in the same way, on answers of the same length."""
    (one, ours), (other, theirs) = settings.items()
    for setting in _SAME:
        if ours.get(setting) != theirs.get(setting):
            raise RegraftError(
                f"{names[one]} and {names[other]} cannot be compared: {setting} is "
                f"{ours.get(setting)!r} in the first and {theirs.get(setting)!r} in the second. "
                f"Evaluate both with the same --{setting.replace('_', '-')}."
            )


def _verdict(
    evaluations: Mapping[str, Evaluation], names: Mapping[str, str], margins: Margins
) -> Check:
    dense, compressed = evaluations[DENSE], evaluations[COMPRESSED]
    both_here = all("compute" in one.about for one in evaluations.values())
    parts = ("compute", "versions") if both_here else ()  # a server's versions are not known
    other = on_the_same(names[DENSE], dense.result, names[COMPRESSED], compressed.result)
    fractions = {name: points / 100 for name, points in margins.points().items()}
    metrics = compared(dense.result, other, fractions)
    checked = (one for one in metrics if one.change and one.outcome != "left out")
    return Check(
        metrics,
        _provenance(dense, compressed),
        (
            *(cannot_fail(one) for one in checked if not one.can_fail),
            *evaluated_differently(DENSE, dense.about, COMPRESSED, compressed.about, *parts),
            *_reply_notes(DENSE, dense),
            *_reply_notes(COMPRESSED, compressed),
        ),
    )


def _provenance(dense: Evaluation, compressed: Evaluation) -> dict[str, Any]:
    """What the verdict depends on, without paths and what changes results by rounding only."""
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
                # digests for a model that ran here; a server's contain its address, so hash them
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


def _reply_notes(name: str, evaluation: Evaluation) -> Iterator[str]:
    """Sentences on replies of a server that are not plain answers."""
    counted = evaluation.about.get("replies", {})
    yield from (f"The {name} model: {sentence}" for sentence in explained(counted))
    empty = sum(one.harmful and not one.answer for one in evaluation.result.answers)
    if counted.get("filtered") and empty:
        yield (
            f"The {name} model: harmful prompts without any answer: {empty:,}. ASR counts them as "
            "not answered, although the server's filter may have withheld the answers."
        )
