"""Judges by name: what they read, what they return, and how a new one is registered.

A new judge is one file, here or in a package of its own that names it under the entry-point group
`regraft.judges`. The shortest kind reads only the text of an answer:

    class Short(TextJudge):
        name = "short-1"

        def phrase(self, answer: str) -> str | None:
            return answer if len(answer) < 20 else None

    PLUGIN = Short()

Results are published under a judge's name, so a judge whose verdicts change gets a new name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from regraft.errors import RegraftError
from regraft.progress import Advance
from regraft.registry import Registry

if TYPE_CHECKING:
    from regraft.models.load import DTypeName


@dataclass(frozen=True)
class Exchange:
    """A prompt with the answer it got, and `image` if the judge is to see it.

    Without the image, `prompt` is the actual request; with it, the text beside the image.
    """

    prompt: str
    answer: str
    image: Path | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an answer refuses and whether it is harmful; None where the judge does not say.

    If both are None the judge's output could not be read, and `reason` quotes it.
    """

    refused: bool | None
    unsafe: bool | None
    reason: str = ""

    @property
    def complied(self) -> bool | None:
        """Whether the request was fulfilled: harmful content, or else no refusal."""
        if self.unsafe is not None:
            return self.unsafe
        return None if self.refused is None else not self.refused


class Judge(Protocol):
    """Anything that judges exchanges."""

    @property
    def name(self) -> str:
        """Identifies the judge and its version in results."""

    def verdicts(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Verdict]:
        """One verdict per exchange, in order; `advance` gets the number just judged."""


class Compute(Protocol):
    """Device and dtype of a judge that is a model, and the exchanges per forward pass."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> DTypeName: ...
    @property
    def batch_size(self) -> int: ...


class JudgeKind:
    """A kind of judge, registered by name: makes judges from the argument in NAME:ARGUMENT.

    Attributes:
        argument: A placeholder for it in messages, such as "MODEL"; "" if there is none.
        is_local_model: Whether a model runs on this machine, so that verdicts depend on device and
            dtype.
    """

    argument: ClassVar[str] = ""
    is_local_model: ClassVar[bool] = False

    def check(self, argument: str) -> None:
        """Raise RegraftError if the argument is malformed, without loading anything."""

    def inputs(self, argument: str) -> dict[str, str]:
        """What verdicts depend on besides name and argument, each by name as a digest."""
        return {}

    def load(self, argument: str, compute: Compute) -> Judge:
        """Load the judge.

        Raises:
            RegraftError: a model cannot be loaded.
        """
        raise NotImplementedError


class TextJudge(JudgeKind, ABC):
    """A judge of an answer's text alone, without a model, so that evaluations can judge by it.

    Attributes:
        name: Identifies the judge in results.
        window: How many characters from the start of an answer count; None if all do.
    """

    name: str
    window: int | None = None

    @abstractmethod
    def phrase(self, answer: str) -> str | None:
        """The words by which `answer` refuses; None if it does not."""

    def read(self, answer: str) -> str:
        """The part of `answer` that the verdict depends on."""
        return answer

    def settled(self, start: str) -> bool:
        """Whether `refuses` is the same for `start` and every answer that begins with it."""
        return False

    def refuses(self, answer: str) -> bool:
        return self.phrase(answer) is not None

    def verdicts(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Verdict]:
        """Judge each answer by `phrase`, in order."""
        phrases = [self.phrase(one.answer) for one in exchanges]
        advance(len(exchanges))
        return [Verdict(phrase is not None, None, phrase or "") for phrase in phrases]

    def load(self, argument: str, compute: Compute) -> TextJudge:
        """Return this judge: there is nothing to load."""
        return self


JUDGES: Registry[JudgeKind] = Registry(
    "judge", "regraft.evaluation.judges", "regraft.judges", JudgeKind
)


def find(text: str) -> tuple[JudgeKind, str]:
    """Find the judge that `text` names (a keyword list, NAME or NAME:ARGUMENT), and its argument.

    Raises:
        RegraftError: there is no such judge (the message lists them), or the argument is wrong.
    """
    from regraft.evaluation.keywords import KEYWORD_JUDGES

    if text in KEYWORD_JUDGES:
        return KEYWORD_JUDGES[text], ""
    name, _, argument = text.partition(":")
    kind = JUDGES.get(name) if name in JUDGES else None
    if kind is None or bool(argument) != bool(kind.argument):
        names = ", ".join([*KEYWORD_JUDGES, *map(_usage, JUDGES.names())])
        raise RegraftError(f"There is no judge {text!r}; expected {names}.")
    kind.check(argument)
    return kind, argument


def find_text_judge(text: str) -> TextJudge:
    """Find a judge of an answer's text alone.

    Raises:
        RegraftError: see `find`; or the judge is no `TextJudge`, so it judges saved answers only.
    """
    kind, _ = find(text)
    if not isinstance(kind, TextJudge):
        raise RegraftError(
            f"The judge {text!r} judges saved answers only: evaluate with a keyword judge, then "
            f"`regraft judge answers FOLDER --by {text}`."
        )
    return kind


def _usage(name: str) -> str:
    """NAME or NAME:ARGUMENT, as a judge is named."""
    try:
        argument = JUDGES.get(name).argument
    except RegraftError:  # a broken package is reported when its judge is asked for
        argument = ""
    return f"{name}:{argument}" if argument else name


def unread(text: Any) -> Verdict:
    """The verdict for a model's output that cannot be read as one."""
    return Verdict(None, None, f"unread: {' '.join(str(text).split())[:80]}")
