"""Judges by name: what they read, what they say, and how a new one is registered.

A new judge is one file, here or in a package of its own that names it under the entry-point group
`regraft.judges`. One that reads the words of an answer is the shortest:

    class Short(TextJudge):
        name = "short-1"

        def phrase(self, answer: str) -> str | None:
            return answer if len(answer) < 20 else None

    PLUGIN = Short()

A name stands for figures that were published by it: a judge that judges differently gets another.
"""

from __future__ import annotations

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
    """A prompt with the answer it got; `image` only where the judge is to see it.

    Without the image, `prompt` is what is really asked; with it, the words beside the image.
    """

    prompt: str
    answer: str
    image: Path | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an answer refuses and whether it does harm; None where the judge does not say.

    A judge that says neither could not be understood; `reason` is then what it wrote instead.
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
    """Anything that judges exchanges; `name` tells it and its version from others."""

    @property
    def name(self) -> str:
        """Written into results."""

    def verdicts(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Verdict]:
        """One verdict an exchange, in order; `advance` gets the number just judged."""


class Compute(Protocol):
    """Where a judge that is a model runs, and how many exchanges are in one forward pass."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> DTypeName: ...
    @property
    def batch_size(self) -> int: ...


class JudgeKind:
    """What is registered under a name: it makes judges from what follows the name and a colon.

    Attributes:
        argument: What follows, in a word for messages, as "MODEL"; "" where nothing does.
        is_local_model: Whether a model is run here, so that device and dtype decide verdicts.
    """

    argument: ClassVar[str] = ""
    is_local_model: ClassVar[bool] = False

    def check(self, argument: str) -> None:
        """Raise RegraftError where the argument is not well written; nothing is loaded."""

    def inputs(self, argument: str) -> dict[str, str]:
        """What decides verdicts besides the name and the argument, as digests by what they are."""
        return {}

    def load(self, argument: str, compute: Compute) -> Judge:
        """The judge, ready to judge.

        Raises:
            RegraftError: a model cannot be loaded.
        """
        raise NotImplementedError


class TextJudge(JudgeKind):
    """A judge that reads an answer alone, without any model, so that evaluations judge by it.

    Attributes:
        name: Written into results.
        window: How many first characters of an answer count; None where all do.
    """

    name: str
    window: int | None = None

    def phrase(self, answer: str) -> str | None:
        """The words of `answer` by which it refuses; None where it does not."""
        raise NotImplementedError

    def read(self, answer: str) -> str:
        """The part of `answer` that decides."""
        return answer

    def settled(self, start: str) -> bool:
        """Whether `refuses` says the same of every answer that begins with `start`, itself too."""
        return False

    def refuses(self, answer: str) -> bool:
        return self.phrase(answer) is not None

    def verdicts(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Verdict]:
        """Of each answer by `phrase`, in order."""
        phrases = [self.phrase(one.answer) for one in exchanges]
        advance(len(exchanges))
        return [Verdict(phrase is not None, None, phrase or "") for phrase in phrases]

    def load(self, argument: str, compute: Compute | None = None) -> TextJudge:
        """This very judge: there is nothing to load."""
        return self


JUDGES: Registry[JudgeKind] = Registry(
    "judge", "regraft.evaluation.judges", "regraft.judges", JudgeKind
)


def find(text: str) -> tuple[JudgeKind, str]:
    """The judge that `text` names (a keyword list, NAME or NAME:ARGUMENT) and the argument.

    Raises:
        RegraftError: there is no such judge (the message lists them), or the argument is wrong.
    """
    from regraft.evaluation.keywords import KEYWORD_JUDGES

    if text in KEYWORD_JUDGES:
        return KEYWORD_JUDGES[text], ""
    name, _, argument = text.partition(":")
    kind = JUDGES.get(name) if name in JUDGES else None
    if kind is None or bool(argument) != bool(kind.argument):
        names = ", ".join([*KEYWORD_JUDGES, *map(_spelled, JUDGES.names())])
        raise RegraftError(f"There is no judge {text!r}; expected {names}.")
    kind.check(argument)
    return kind, argument


def find_text_judge(text: str) -> TextJudge:
    """The judge of that name, which reads answers alone.

    Raises:
        RegraftError: see `find`; it is a model, which judges saved answers only.
    """
    kind, argument = find(text)
    if not isinstance(kind, TextJudge):
        raise RegraftError(
            f"The judge {text!r} is a model: evaluate by a judge of words, then judge the saved "
            f"answers by it (`regraft judge answers FOLDER --by {text}`)."
        )
    return kind.load(argument)


def _spelled(name: str) -> str:
    try:
        argument = JUDGES.get(name).argument
    except RegraftError:  # a broken package: what is wrong with it is not the question here
        argument = ""
    return f"{name}:{argument}" if argument else name


def unread(text: Any) -> Verdict:
    """The verdict where what a model wrote cannot be read as one."""
    return Verdict(None, None, f"unread: {' '.join(str(text).split())[:80]}")
