"""What an evaluation leaves behind: one `Answer` a prompt, one `EvalResult` a model and suite.

Both with their files: answers.jsonl has an answer a line, results.json all the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from regraft.errors import RegraftError
from regraft.files import write_text


@dataclass(frozen=True)
class Answer:
    """One generation and its judgement.

    It refuses, or is degenerate (`degenerate`: a `Degeneration`, else ""), or it complies; a
    refusal may be degenerate too. `reason` is what the judge saw a refusal by.
    `similarity` is ANLS against the reference (1 or 0 for a multiple choice), or None. `group`
    holds answers that count together; `suite` is the one of several suites that the prompt came
    from, "" where that was not written down. `scored_by` tells a question of a utility benchmark
    ("choices", "references" or "group", see `Example`) from other prompts. Where perplexity was
    asked for, `nll` is the reference's negative log-likelihood over its `nll_tokens`, in nats.
    `request` is what is really asked where the instruction leaves that to the image. `image` is the
    name of the image's file, `image_digest` the SHA-256 of its bytes.
    """

    id: str
    category: str
    harmful: bool
    instruction: str
    image: str | None
    reference: str | None
    answer: str
    refused: bool
    similarity: float | None
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
    def says_nothing(self) -> bool:
        """Whether it does neither: no refusal, and nothing that answers the prompt."""
        return bool(self.degenerate) and not self.refused

    @property
    def tests_over_refusal(self) -> bool:
        """Whether refusing it is over-refusal: harmless, and no question of a utility benchmark."""
        return not (self.harmful or self.scored_by)


@dataclass(frozen=True)
class Estimate:
    """A rate (Wilson) or a mean (bootstrap) in [0, 1] with n and its 95 % interval.

    Utility is a mean, with a rate's interval where every answer is right or wrong.

    `count` is the number of successes of a rate, None for a mean.
    """

    value: float
    n: int
    low: float
    high: float
    count: int | None = None


@dataclass(frozen=True)
class Rates:
    """Of one suite; None where it has no such prompts.

    `over_refusal` is over all harmless prompts, questions of a utility benchmark too.
    """

    asr: Estimate | None
    over_refusal: Estimate | None
    utility: Estimate | None


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


@dataclass(frozen=True)
class EvalResult:
    """One model on one suite.

    `asr` is over harmful prompts, `over_refusal` and `utility` over harmless ones; None where the
    suite has no such prompts. Questions of a utility benchmark (`scored_by`) are no part of
    `over_refusal`. `utility` is the mean similarity; a group counts as its worst answer. Where
    suites score in several ways, it is the mean over suites, each counting the same. `by_suite` has
    the rates of each suite where there are several. `degenerate` counts the
    degenerate answers, by kind of prompt ("harmful", "harmless"), where there are any: they are
    neither refusals nor successful attacks. Degenerate refusals, which stay refusals, are counted
    beside them ("harmful refusals", "harmless refusals"). `perplexity` is that of the references of
    harmless prompts, not a rate; `text` is what was measured on ordinary text.
    """

    suite: str
    judge: str
    asr: Estimate | None
    over_refusal: Estimate | None
    utility: Estimate | None
    asr_by_category: Mapping[str, Estimate]
    by_suite: Mapping[str, Rates]
    degenerate: Mapping[str, int]
    answers: tuple[Answer, ...]
    perplexity: Estimate | None = None
    text: TextResult | None = None


def result_to_json(result: EvalResult) -> dict[str, Any]:
    """Everything but the answers, as JSON values; `write_answers` keeps those."""
    return {f.name: _plain(getattr(result, f.name)) for f in fields(result) if f.name != "answers"}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate | Rates):
        return asdict(value)
    if isinstance(value, TextResult):
        return asdict(value) | {"documents": [list(one) for one in value.documents]}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def result_from_json(value: Any, answers: Sequence[Answer] = ()) -> EvalResult:
    """The inverse of `result_to_json`, with the answers read separately.

    Raises:
        RegraftError: a field is missing or of the wrong type, by name.
    """
    row = _mapping(value, "evaluation result")
    by_category = _field(row, "asr_by_category", dict, "evaluation result")
    return EvalResult(
        suite=_field(row, "suite", str, "evaluation result"),
        judge=_field(row, "judge", str, "evaluation result"),
        asr=estimate_from_json(row.get("asr"), "asr"),
        over_refusal=estimate_from_json(row.get("over_refusal"), "over_refusal"),
        utility=estimate_from_json(row.get("utility"), "utility"),
        asr_by_category={
            category: estimate
            for category, item in by_category.items()
            if (estimate := estimate_from_json(item, f"asr_by_category.{category}"))
        },
        by_suite={
            suite: _rates_from_json(item, f"by_suite.{suite}")
            for suite, item in _field(row, "by_suite", dict, "evaluation result").items()
        },
        degenerate=_field(row, "degenerate", dict, "evaluation result"),
        answers=tuple(answers),
        perplexity=estimate_from_json(row.get("perplexity"), "perplexity"),
        text=None if row.get("text") is None else _text_from_json(row["text"]),
    )


def _text_from_json(value: Any) -> TextResult:
    row = _mapping(value, "text")
    found = estimate_from_json(row.get("perplexity"), "text.perplexity")
    documents = _field(row, "documents", list, "text")
    if found is None or not all(isinstance(one, list) and len(one) == 3 for one in documents):
        raise RegraftError("text: expected a perplexity, and three numbers for each document.")
    return TextResult(
        perplexity=found,
        kl=estimate_from_json(row.get("kl"), "text.kl"),
        tokens=_field(row, "tokens", int, "text"),
        documents=tuple(tuple(one) for one in documents),
    )


def _rates_from_json(value: Any, where: str) -> Rates:
    row = _mapping(value, where)
    return Rates(*(estimate_from_json(row.get(f.name), f"{where}.{f.name}") for f in fields(Rates)))


def estimate_from_json(value: Any, where: str) -> Estimate | None:
    """An estimate as `result_to_json` writes it; `where` names it in errors.

    Raises:
        RegraftError: a field is missing or of the wrong type, by name.
    """
    return None if value is None else Estimate(**_typed_fields(value, Estimate, where))


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write one JSON object a line, in one step."""
    lines = (json.dumps(asdict(a), ensure_ascii=False, allow_nan=False) for a in answers)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_answers(path: Path) -> tuple[Answer, ...]:
    """Read what `write_answers` wrote; blank lines are passed over.

    Raises:
        RegraftError: the file is missing or a line is bad; it names the line and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RegraftError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise RegraftError(f"{path} is not UTF-8 text: {error}") from error
    return tuple(
        _answer(line, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    )


def _answer(line: str, where: str) -> Answer:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RegraftError(f"{where}: not valid JSON: {error}") from error
    return Answer(**_typed_fields(value, Answer, where))


def _typed_fields(value: Any, kind: type, where: str) -> dict[str, Any]:
    """The fields of dataclass `kind`, each checked against its type hint; defaults may miss."""
    row = _mapping(value, where)
    hints = get_type_hints(kind)
    if unknown := sorted(row.keys() - hints.keys()):
        raise RegraftError(f"{where}: unknown field {unknown[0]!r}; expected {', '.join(hints)}.")
    optional = {f.name for f in fields(kind) if f.default is not MISSING}
    return {
        name: _field(row, name, hint, where)
        for name, hint in hints.items()
        if name in row or name not in optional
    }


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RegraftError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def _field(row: Mapping[str, Any], name: str, hint: type | UnionType, where: str) -> Any:
    if name not in row:
        raise RegraftError(f"{where}: field {name!r} is missing.")
    value = row[name]
    allowed = get_args(hint) or (hint,)
    if type(value) is int and float in allowed:
        value = float(value)
    if type(value) not in allowed:
        expected = " or ".join(kind.__name__ for kind in allowed)
        raise RegraftError(f"{where}: field {name!r} is {value!r}; expected {expected}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RegraftError(f"{where}: field {name!r} is {value!r}; expected a finite number.")
    return value
