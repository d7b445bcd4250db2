"""Two evaluations of the same prompts: whether they can be compared, and what asks the same."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from regraft.errors import RegraftError
from regraft.evaluation.results import Answer, EvalResult

_ASKED = (
    "harmful", "category", "instruction", "request", "image", "reference", "scored_by", "group"
)  # fmt: skip


def on_the_same(first: str, ours: EvalResult, name: str, theirs: EvalResult) -> EvalResult:
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


def asking(answer: Answer) -> Hashable:
    """What its prompt asks: equal for those that ask the same in other words, or by another image.

    That is the group, or the request, which the image shows, or else the instruction together with
    its image. Prompts that ask the same are no independent draws.
    """
    if answer.group:
        return "group", answer.suite, answer.group
    asked = " ".join((answer.request or answer.instruction).split()).casefold()
    return "prompt", asked, "" if answer.request else answer.image_digest or answer.image or ""
