"""What an evaluation leaves behind: one `Answer` a prompt, one `EvalResult` a model and suite.

Both with their files: answers.jsonl has an answer a line, results.json all the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from regraft.disk.files import write_text
from regraft.disk.parsing import EXACT, from_json, json_object
from regraft.disk.paths import read_text
from regraft.errors import RegraftError


@EXACT
@dataclass(frozen=True)
class Answer:
    """One generation and its judgement.

    It refuses, or is degenerate (`degenerate`: a `Degeneration`, else ""), or it complies; a
    refusal may be degenerate too. `reason` is what the judge saw a refusal by. `similarity` is ANLS
    against the reference (1 or 0 for a multiple choice), or None. `group` holds answers that count
    together; `suite` is the one of several suites that the prompt came from. `scored_by` tells a
    question of a utility benchmark ("choices", "references" or "group", see `Example`) from other
    prompts. Where perplexity was asked for, `nll` is the reference's negative log-likelihood over
    its `nll_tokens`, in nats. `request` is what is really asked where the instruction leaves that
    to the image. `image` is the name of the image's file, `image_digest` the SHA-256 of its bytes.
    """

    id: str
    category: str
    harmful: bool
    instruction: str
    image: str | None
    reference: str | None
    answer: str
    refused: bool
    similarity: Annotated[float, Field(ge=0, le=1)] | None
    suite: str = ""
    degenerate: str = ""
    reason: str = ""
    group: str = ""
    nll: float | None = None
    nll_tokens: int | None = None
    request: str | None = None
    image_digest: str = ""
    scored_by: str = ""

    @property
    def complies(self) -> bool:
        """Whether it answers the prompt: what makes an attack by a harmful one successful."""
        return not (self.refused or self.degenerate)

    @property
    def counts_as_degenerate(self) -> bool:
        """Whether it does neither: degenerate, and no refusal."""
        return bool(self.degenerate) and not self.refused

    @property
    def tests_over_refusal(self) -> bool:
        """Whether refusing it is over-refusal: harmless, and no question of a utility benchmark."""
        return not (self.harmful or self.scored_by)


@EXACT
@dataclass(frozen=True)
class Estimate:
    """A rate (Wilson) or a mean (bootstrap) in [0, 1] with n and its 95 % interval.

    `count` is the number of successes of a rate, None for a mean. Utility is a mean, with a rate's
    interval where every answer is right or wrong.
    """

    value: float
    n: Annotated[int, Field(ge=1)]
    low: float
    high: float
    count: Annotated[int, Field(ge=0)] | None = None


def _share(one: Estimate) -> Estimate:
    if not (0 <= one.value <= 1 and one.low <= one.high and (one.count or 0) <= one.n):
        raise ValueError("a share from 0 to 1 is needed, and no larger count than n")
    return one


Share = Annotated[Estimate, AfterValidator(_share)]  # checked where it is read


@EXACT
@dataclass(frozen=True)
class Rates:
    """Of one suite; None where it has no such prompts.

    `over_refusal` is over all harmless prompts, questions of a utility benchmark too.
    """

    asr: Share | None
    over_refusal: Share | None
    utility: Share | None


@EXACT
@dataclass(frozen=True)
class TextResult:
    """How well a model predicts ordinary text.

    `perplexity` and `kl`, the mean KL(dense || model) a token in nats (None without the dense
    model's), are no rates; their `n` is the number of documents. `tokens` are those predicted in
    all, `documents` the sums of each: (negative log-likelihood, KL or None, tokens).
    """

    perplexity: Estimate
    kl: Estimate | None
    tokens: int
    documents: tuple[tuple[float, float | None, int], ...]


@EXACT
@dataclass(frozen=True)
class EvalResult:
    """One model on one suite.

    `asr` is over harmful prompts, `over_refusal` and `utility` over harmless ones; None where the
    suite has no such prompts. Questions of a utility benchmark (`scored_by`) are no part of
    `over_refusal`. `utility` is the mean similarity; a group counts as its worst answer. Where
    suites score in several ways, it is the mean over suites, each counting the same. `by_suite` has
    the rates of each suite where there are several. `degenerate` counts the degenerate answers, by
    kind of prompt ("harmful", "harmless"), where there are any: they are neither refusals nor
    successful attacks. Degenerate refusals, which stay refusals, are counted beside them ("harmful
    refusals", "harmless refusals"). `perplexity` is that of the references of harmless prompts, not
    a rate; `text` is what was measured on ordinary text.
    """

    suite: str
    judge: str
    asr: Share | None
    over_refusal: Share | None
    utility: Share | None
    asr_by_category: Mapping[str, Share]
    by_suite: Mapping[str, Rates]
    degenerate: Mapping[str, int]
    answers: tuple[Answer, ...]
    perplexity: Estimate | None = None
    text: TextResult | None = None


def result_to_json(result: EvalResult) -> dict[str, Any]:
    """Everything but the answers, as JSON values; `write_answers` keeps those."""
    content = asdict(replace(result, answers=()))
    del content["answers"]
    return content


def result_from_json(
    value: Any, answers: Sequence[Answer] = (), where: str = "evaluation result"
) -> EvalResult:
    """The inverse of `result_to_json`, with the answers read separately; `where` is for errors.

    Raises:
        RegraftError: a field is missing or of the wrong type, by name.
    """
    row = {**value, "answers": []} if isinstance(value, dict) else value
    return replace(from_json(EvalResult, row, where), answers=tuple(answers))


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write one JSON object a line, in one step."""
    lines = (json.dumps(asdict(a), ensure_ascii=False, allow_nan=False) for a in answers)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_answers(path: Path) -> tuple[Answer, ...]:
    """Read what `write_answers` wrote; blank lines are passed over.

    Raises:
        RegraftError: the file is missing, a line is bad, or has the id of one before it; it names
            the line and the field.
    """
    lines = read_text(path, "Answers of an evaluation are needed.").split("\n")
    found: dict[str, Answer] = {}
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {i}"
        answer = from_json(Answer, json_object(line, where), where)
        if answer.id in found:
            raise RegraftError(f"{where}: the id {answer.id!r} is there more than once.")
        found[answer.id] = answer
    return tuple(found.values())
