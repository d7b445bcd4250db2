"""Which option an answer to a multiple-choice question picks."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTERS = "ABCDEFGH"
_MARKS = ((r"", r"[.,:)]?\.?"), (r"\(", r"\)\.?"), (r":", r"[,.)]?\.?"))
_SAID = re.compile(
    r"\b(?:answer|option|choice) is:?\s*(?:option\s*)?\(?([A-H])\b"
    r"|\b[Ii] (?:choose|select|pick) (?:option\s*)?\(?([A-H])\b"
)


def picked(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `answer` picks, or None where that cannot be told.

    By the rules of MMBench's own evaluation: a letter that stands alone, with or without a mark
    such as "B." or "(B)", if no other does; a lone A among more than three words is an article.
    Then the option whose text stands in the answer, if no other's does. Beyond these rules, a
    letter after "the answer is" comes before texts, and one with a mark at the start or end of a
    longer answer after them.

    Args:
        answer: What the model wrote.
        choices: The texts of the options, A first.
    """
    letters, answer = _LETTERS[: len(choices)], answer.replace("*", " ")  # Markdown's bold
    return (
        _alone(answer, letters)
        or _said(answer, letters)
        or _by_text(answer, choices)
        or _at_an_end(answer, letters)
    )


def _alone(answer: str, letters: str) -> str | None:
    words = answer.split()
    plain = [letter for letter in letters if letter in words]
    if len(plain) == 1 and not ("A" in words and len(words) > 3):
        return plain[0]
    for before, after in _MARKS:
        pattern = re.compile(rf"{before}([{letters}]){after}")
        marked = {m[1] for word in words if (m := pattern.fullmatch(word)) and len(word) > 1}
        if len(marked) == 1:
            return marked.pop()
    return None


def _by_text(answer: str, choices: Sequence[str]) -> str | None:
    text = answer.lower()
    found = [i for i, choice in enumerate(choices) if choice.lower() in text]
    return _LETTERS[found[0]] if len(found) == 1 else None


def _said(answer: str, letters: str) -> str | None:
    said = [one or other for one, other in _SAID.findall(answer)]
    return said[-1] if said and said[-1] in letters else None


def _at_an_end(answer: str, letters: str) -> str | None:
    start = re.match(rf"\(?([{letters}])[.:)]", answer.strip())
    end = re.search(rf"\(?\b([{letters}])\)?[.!]?$", answer.strip())
    found = {match[1] for match in (start, end) if match}
    others = found.union(word for word in answer.split() if word in letters)
    return found.pop() if len(found) == len(others) == 1 else None
