"""Results of an evaluation and their files.

answers.jsonl has one `Answer` per prompt and line, results.json the rest of the `EvalResult`.
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
    """A model's answer to one prompt, judged.

    It refuses, is degenerate (`degenerate`: a `Degeneration`, otherwise ""), or complies; a refusal
    may be degenerate too. `reason` is the phrase in which the judge saw a refusal. `similarity` is
    ANLS against the reference (1 or 0 for a multiple choice), or None. `group` names answers that
    count together, `suite` the suite of the prompt. `scored_by` tells questions of a utility
    benchmark ("choices", "references" or "group", see `Example`) from other prompts (""). If
    perplexity was measured, `nll` is the reference's negative log-likelihood over its `nll_tokens`,
    in nats. `request` is the actual request where the image or a context carries it. `image` is the
    name of the image's file, `image_digest` the SHA-256 of its bytes. `system` is the system
    prompt, "" where none was given.
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
    system: str = ""

    @property
    def complies(self) -> bool:
        """Whether it fulfils the prompt; for a harmful one, a successful attack."""
        return not (self.refused or self.degenerate)

    @property
    def counts_as_degenerate(self) -> bool:
        """Whether it is degenerate and not a refusal."""
        return bool(self.degenerate) and not self.refused

    @property
    def question(self) -> tuple[str, str, str]:
        """Identity of what is scored once: its group or, without one, its prompt."""
        return self.suite, self.group, "" if self.group else self.id

    @property
    def tests_over_refusal(self) -> bool:
        """Whether its prompt is harmless and not a question of a utility benchmark."""
        return not (self.harmful or self.scored_by)


@EXACT
@dataclass(frozen=True)
class Estimate:
    """A rate (Wilson) or a mean (bootstrap) in [0, 1] with n and its 95 % interval.

    `count` is the number of successes of a rate, None for a mean. Utility is a mean, with a rate's
    interval if every answer is right or wrong.
    """

    value: float
    n: Annotated[int, Field(ge=1)]
    low: float
    high: float
    count: Annotated[int, Field(ge=0)] | None = None


def _share(one: Estimate) -> Estimate:
    if not (0 <= one.value <= 1 and one.low <= one.high and (one.count or 0) <= one.n):
        raise ValueError("expected a share from 0 to 1, with a count of at most n")
    return one


Share = Annotated[Estimate, AfterValidator(_share)]  # checked when it is read from a file


@EXACT
@dataclass(frozen=True)
class Rates:
    """Rates of one suite; None where it has no such prompts.

    `over_refusal` is over all harmless prompts, including questions of utility benchmarks.
    """

    asr: Share | None
    over_refusal: Share | None
    utility: Share | None


@EXACT
@dataclass(frozen=True)
class TextResult:
    """How well a model predicts ordinary text.

    `perplexity` and `kl`, the mean KL(dense || model) per token in nats (None without the dense
    model's states), are not rates; their `n` is the number of documents. `tokens` is the number of
    predicted tokens, `documents` the sums of each document: (negative log-likelihood, KL or None,
    tokens).
    """

    perplexity: Estimate
    kl: Estimate | None
    tokens: int
    documents: tuple[tuple[float, float | None, int], ...]


@EXACT
@dataclass(frozen=True)
class EvalResult:
    """Rates and answers of one model on its suites.

    `asr` is over harmful prompts, `over_refusal` and `utility` over harmless ones; None where there
    are no such prompts. Questions of a utility benchmark (`scored_by`) do not count in
    `over_refusal`. `utility` is the mean similarity; a group counts as its worst answer. If suites
    are scored in several ways, it is the mean over suites, each counting the same. `by_suite` has
    the rates of each suite if there are several. `degenerate` counts the degenerate answers by kind
    of prompt ("harmful", "harmless"), if there are any: they are neither refusals nor successful
    attacks. Degenerate refusals, which stay refusals, are counted separately ("harmful refusals",
    "harmless refusals"). `perplexity` is that of the references of harmless prompts, not a rate;
    `text` has the measurements on ordinary text.
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

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(self.by_suite) or (self.suite,)


def result_to_json(result: EvalResult) -> dict[str, Any]:
    """Everything but the answers, which `write_answers` saves, as JSON values."""
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
    """Write one JSON object per line, atomically."""
    lines = (json.dumps(asdict(a), ensure_ascii=False, allow_nan=False) for a in answers)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_answers(path: Path) -> tuple[Answer, ...]:
    """Read what `write_answers` wrote, skipping blank lines.

    Raises:
        RegraftError: the file is missing, or a line is bad or repeats an id; it names the line and
            the field.
    """
    lines = read_text(path, "Answers of an evaluation are needed.").split("\n")
    found: dict[str, Answer] = {}
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {i}"
        answer = from_json(Answer, json_object(line, where), where)
        if answer.id in found:
            raise RegraftError(f"{where}: the id {answer.id!r} occurs more than once.")
        found[answer.id] = answer
    return tuple(found.values())
