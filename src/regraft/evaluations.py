"""Evaluation folders, of whatever checkpoints, -> one Report; no model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft import ranks, stages
from regraft.checks import join_suites
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation.results import Answer, EvalResult
from regraft.files import file_digest
from regraft.report.model import DataAccount, Opinion, Report, Variant
from regraft.report.write import write_report
from regraft.stages import Evaluation

_ASKED = ("harmful", "category", "instruction", "request", "image", "reference", "scored_by")
_COUNTED = ("source", "read", "used", "skipped")
_WAYS = ("settings", "compute", "versions")


def is_evaluation(folder: Path) -> bool:
    """Whether `regraft eval` wrote this folder."""
    return (folder / "results.json").is_file()


def report(folders: Sequence[Path], out: Path) -> Report:
    """Write report.json, .md and .html on evaluations into `out`, replacing older ones.

    Raises:
        RegraftError: see `read_report`; `out` holds something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists():
        raise RegraftError(
            f"The output folder {out} holds something else than a report. Choose a new folder."
        )
    made = read_report(folders)
    if ranks.first():
        write_report(made, out)
    return made


def read_report(folders: Sequence[Path]) -> Report:
    """One report on evaluations of the same prompts by the same judge; writes nothing.

    All after the first are compared with it.

    Raises:
        RegraftError: a folder holds no evaluation or is named twice, or judge or prompts differ.
    """
    found = dict(zip(_names(folders), map(stages.read_evaluation, folders), strict=True))
    first, *others = found
    results = {first: found[first].result} | {
        name: _on_the_same(first, found[first].result, name, found[name].result) for name in others
    }
    about = found[first].about
    account = about["data"]["suite"]
    return Report(
        title=f"Evaluation{'s' if others else ''}: {', '.join(found)}",
        model="",
        variants=tuple(
            Variant(
                name,
                name,
                results[name],
                base=first if name != first else None,
                sparsity=one.about["zeros"] / one.about["prunable"],
            )
            for name, one in found.items()
        ),
        data=(DataAccount("evaluation", *(account[one] for one in _COUNTED)),),
        recipe={
            "evaluations": {
                name: {"folder": str(folder), **one.about["inputs"]}
                for folder, (name, one) in zip(folders, found.items(), strict=True)
            },
            "suites": _suites(found[first].result),
            **{way: about[way] for way in ("settings", "compute")},
        },
        versions=about["versions"] | {"device": about["compute"]["device"]},
        notes=tuple(
            f"{name} was evaluated in another way than {first}: {', '.join(ways)}."
            for name in others
            if (ways := list(_other_ways(about, found[name].about)))
        ),
        images=_images(found[first]),
        opinions=tuple(
            Opinion(name, *one)
            for folder, name in zip(folders, found, strict=True)
            for one in stages.opinions(folder)
        ),
        unrelated=True,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if twice := [folder for i, folder in enumerate(folders) if parts[i] in parts[:i]]:
        raise RegraftError(f"{twice[0]} is named twice.")
    length = next(n for n in count(1) if len({one[-n:] for one in parts}) == len(parts))
    return ["/".join(one[-length:]) for one in parts]


def _on_the_same(first: str, ours: EvalResult, name: str, theirs: EvalResult) -> EvalResult:
    """The other's result, its suites addressed as the first's, wherever their files lay.

    Raises:
        RegraftError: it is by another judge or on other prompts.
    """
    cannot = f"{name} and {first} cannot be compared"
    if ours.judge != theirs.judge:
        raise RegraftError(
            f"{cannot}: one was judged by {theirs.judge}, the other by {ours.judge}. Evaluate both "
            "with the same --judge."
        )
    asked = {answer.id: answer for answer in ours.answers}
    if odd := sorted(asked.keys() ^ {answer.id for answer in theirs.answers}):
        raise RegraftError(
            f"{cannot}: the prompt {odd[0]!r} ({len(odd)} in all) was answered by only one of "
            f"them. The one is on {theirs.suite}, the other on {ours.suite}."
        )
    for answer in theirs.answers:
        for field in _ASKED:
            said, other = getattr(asked[answer.id], field), getattr(answer, field)
            if said != other:
                raise RegraftError(
                    f"{cannot}: the prompt {answer.id!r} has another {field} in each, {other!r} "
                    f"and {said!r}. Evaluate both on the same data."
                )
        if not _same_image(asked[answer.id], answer):
            raise RegraftError(
                f"{cannot}: the image {answer.image} of the prompt {answer.id!r} is another file "
                "in each. Evaluate both on the same data."
            )
    called = {answer.suite: asked[answer.id].suite for answer in theirs.answers}
    return replace(
        theirs,
        suite=ours.suite,
        by_suite={called.get(suite, suite): rates for suite, rates in theirs.by_suite.items()},
        answers=tuple(replace(a, suite=called[a.suite]) for a in theirs.answers),
    )


def _same_image(one: Answer, other: Answer) -> bool:
    """False only where both digests are known."""
    return one.image_digest == other.image_digest or not (one.image_digest and other.image_digest)


def _other_ways(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Each setting and version that differs, batches aside, which change rounding alone."""
    for way in _WAYS:
        for name in dict.fromkeys([*theirs[way], *ours[way]]):
            there, here = theirs[way].get(name), ours[way].get(name)
            if there != here and name != "batch_size":
                yield f"{name} {there} instead of {here}"


def _suites(result: EvalResult) -> list[str]:
    return list(dict.fromkeys(filter(None, (one.suite for one in result.answers)))) or [
        result.suite
    ]


def _images(evaluation: Evaluation) -> dict[str, Path]:
    """Images by prompt, those that are still what was shown; none where the data has moved."""
    try:
        sources = [DataSource.model_validate(suite) for suite in _suites(evaluation.result)]
        examples = join_suites(sources, evaluation.about["settings"].get("limit")).examples
    except (RegraftError, ValidationError):
        return {}
    shown = {answer.id: answer.image_digest for answer in evaluation.result.answers}
    return {
        one.id: one.image
        for one in examples
        if one.image and one.image.is_file() and shown.get(one.id) == file_digest(one.image)
    }
