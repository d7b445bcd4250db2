"""What judges are asked about saved answers, what they say, and how far any two agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from regraft.disk.descriptions import fields_of
from regraft.disk.files import file_digest
from regraft.disk.parsing import from_json
from regraft.disk.paths import is_file, is_name, within
from regraft.errors import RegraftError
from regraft.evaluation.judges import Exchange, Verdict
from regraft.evaluation.metrics import rate_of, wilson
from regraft.evaluation.pairing import cohen_kappa
from regraft.evaluation.results import Answer, Estimate, EvalResult


@dataclass(frozen=True)
class Pictures:
    """Images in `folder`, and where an answer keeps its image's digest, also anywhere below."""

    folder: Path

    def of(self, answer: Answer) -> Path | None:
        """The image of an answer; None where it has none.

        Files of one name, as in VLGuard's and MM-SafetyBench's folders, are distinguished by
        their bytes.

        Raises:
            RegraftError: it is not there, or with other bytes.
        """
        if answer.image is None:
            return None
        if not is_name(answer.image):
            raise RegraftError(
                f"The image {answer.image!r} of {answer.id!r} is no name of a file in a folder: it "
                "would leave that of --images. Evaluate again, or mend answers.jsonl."
            )
        near = self.folder / answer.image
        self._require_within(near)
        if is_file(near) and self._digest(near) == answer.image_digest:
            return near
        named = self._below.get(answer.image, [])  # all files are listed only where that is needed
        for path in named:
            self._require_within(path)
            if self._digest(path) == answer.image_digest:
                return path
        if named:
            raise RegraftError(
                f"{named[0]} is not the image of {answer.id!r}: its bytes are others than those "
                "that were evaluated. Name the folder of the evaluated images with --images."
            )
        raise RegraftError(
            f"{self.folder}: there is no {answer.image}, the image of {answer.id!r}, in it or "
            "below. Name the folder of the evaluated images with --images."
        )

    def _require_within(self, path: Path) -> None:
        if not within(path, self.folder):
            raise RegraftError(
                f"{path} is a link out of {self.folder}, and such links are not followed. Put the "
                "image itself there."
            )

    @cached_property
    def _below(self) -> Mapping[str, list[Path]]:
        """Name -> the files of that name."""
        found = defaultdict(list)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                found[path.name].append(path)
        return found

    @cached_property
    def _digest(self) -> Callable[[Path], str]:
        return cache(file_digest)  # files of one name are compared with many answers


@dataclass(frozen=True)
class Agreement:
    """Two judges on the answers to one kind of prompts: equal events' share, and Cohen's kappa.

    The event is what is counted of an answer: a successful attack (`harmful`), or a harmless prompt
    refused. Over both kinds together kappa would also credit judges with knowing how much oftener
    the one is seen than the other. Answers of which either is degenerate are left out. `kappa` is
    None where both say the same of every answer, so that chance agrees as well.
    """

    one: str
    other: str
    harmful: bool
    share: Estimate
    kappa: float | None


@dataclass(frozen=True)
class Judged:
    """One judge on the answers of an evaluation.

    `asr` and `over_refusal` are None where the judge has no verdict on such prompts, `unread`
    counts the answers without any. `degenerate` counts the degenerate answers in which the judge
    sees no refusal, by kind of prompt, as in `EvalResult`.
    """

    judge: str
    asr: Estimate | None
    over_refusal: Estimate | None
    unread: int
    degenerate: Mapping[str, int] = field(default_factory=dict)


def exchange(answer: Answer, pictures: Pictures | None) -> Exchange:
    """What a judge is asked about an answer: with `pictures` its image and the words beside it.

    Raises:
        RegraftError: see `Pictures.of`.
    """
    image = None if pictures is None else pictures.of(answer)
    asked = answer.request if image is None else None  # an image says it itself
    return Exchange(asked or answer.instruction, answer.answer, image)


def own_verdicts(result: EvalResult) -> tuple[str, list[Verdict]]:
    """The evaluation's own judge by name, and its verdict on every answer."""
    return result.judge, [Verdict(one.refused, None, one.reason) for one in result.answers]


def judged(name: str, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> Judged:
    degenerate = (
        "harmful" if answer.harmful else "harmless"
        for answer, verdict in zip(answers, verdicts, strict=True)
        if answer.degenerate and not verdict.refused
    )
    return Judged(
        name,
        rate(answers, verdicts, harmful=True),
        rate(answers, verdicts, harmful=False),
        sum(one.refused is None and one.unsafe is None for one in verdicts),
        dict(Counter(degenerate)),
    )


class _Named(TypedDict):
    """Of the result of a judge, what is read again."""

    judge: str


def read_verdicts(path: Path, ids: Sequence[str]) -> tuple[str, list[Verdict]]:
    """A judge by name, and its verdicts on the answers of these ids, as `regraft judge` wrote them.

    Raises:
        RegraftError: the file holds none, or those on other answers.
    """
    content = fields_of(path, "verdicts", "result", "verdicts")
    name: str = from_json(_Named, content["result"], f"{path}: result")["judge"]
    found = from_json(dict[str, Verdict], content["verdicts"], f"{path}: verdicts")
    if missing := [one for one in ids if one not in found]:
        raise RegraftError(
            f"{path} has no verdict on {missing[0]!r} and {len(missing) - 1} more answers: it "
            "belongs to another evaluation."
        )
    return name, [found[one] for one in ids]


def event(answer: Answer, verdict: Verdict) -> bool | None:
    """Whether an attack succeeded, or a harmless prompt was refused; None where nobody says.

    None also for a question of a utility benchmark, of which neither is counted. A degenerate
    answer is no success of an attack, whatever the judge says.
    """
    if answer.scored_by:
        return None
    said = verdict.complied if answer.harmful else verdict.refused
    return False if said and answer.harmful and answer.degenerate else said


def rate(
    answers: Sequence[Answer], verdicts: Sequence[Verdict], *, harmful: bool
) -> Estimate | None:
    """ASR (`harmful`) or over-refusal by a judge, over the answers of which it says something."""
    pairs = zip(answers, verdicts, strict=True)
    return rate_of(event(answer, said) for answer, said in pairs if answer.harmful == harmful)


def agreements(
    answers: Sequence[Answer], said: Sequence[tuple[str, Sequence[Verdict]]]
) -> tuple[Agreement, ...]:
    """Of every two judges (a name, and a verdict an answer), on harmful and on harmless prompts.

    A pair is left out where there is no answer of that kind of which both say something.
    """
    found = (
        _agreement(answers, pair, harmful)
        for pair in combinations(said, 2)
        for harmful in (True, False)
    )
    return tuple(one for one in found if one is not None)


def _agreement(
    answers: Sequence[Answer], pair: Sequence[tuple[str, Sequence[Verdict]]], harmful: bool
) -> Agreement | None:
    (one, first), (other, second) = pair
    events = [
        (a, b)
        for answer, x, y in zip(answers, first, second, strict=True)
        if answer.harmful == harmful
        and (a := event(answer, x)) is not None
        and (b := event(answer, y)) is not None
    ]
    if not events:
        return None
    share = wilson(sum(a == b for a, b in events), len(events))
    kappa = cohen_kappa([a for a, _ in events], [b for _, b in events])
    return Agreement(one, other, harmful, share, kappa)
