"""Which option an answer to a multiple-choice question picks, by the rules of lmms-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_LETTERS = "ABCDEFGH"
_ALWAYS = 5  # letters that may stand alone, also where there are fewer options
_MARKED = (
    *("{}.", "{},", "{}:", "{})", "{}).", "({})", "({})."),
    *(":{}", ":{},", ":{}.", ":{})", ":{})."),
)
_TRIMMED = ",.!?;:'\""
_START, _END, _AFTER_A_PHRASE = 10, 9, 7
_WITHIN = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_PHRASES = (
    *(f"{the}{best}answer is" for the in ("the ", "") for best in ("", "correct ", "best ")),
    *(f"{the}{best}option is" for the in ("the ", "") for best in ("correct ", "best ")),
    *(f"{the}{best}choice is" for the in ("the ", "") for best in ("", "correct ")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def picked(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `answer` picks, or None where it picks none.

    The rules of lmms-eval 0.7 for `mmbench_en_dev_static`, so that figures agree with its:

    1. MMBench's own (Liu et al. 2024): a letter that stands alone, if no other does, where a lone A
       among more than three words is an article; then one with a mark such as "B." or "(B)", the
       marks one after another, if no other letter has the same mark.
    2. The option whose text stands in the answer, if no other's does.
    3. The letter in the place that tells most: at the start, at the end, after a phrase such as
       "the answer is", with a mark, before a space, anywhere; the last one of equal places.

    Args:
        answer: What the model wrote.
        choices: The texts of the options, A first.
    """
    letters = _LETTERS[: len(choices)]
    letter = _alone(answer, _LETTERS[: max(_ALWAYS, len(choices))])
    letter = letter or _by_text(answer, choices) or _most_telling(answer, letters)
    return letter if letter and letter in letters else None


def _alone(answer: str, letters: str) -> str | None:
    words = answer.split()
    for form in ("{}", *_MARKED):
        found = [letter for letter in letters if form.format(letter) in words]
        article = form == "{}" and "A" in words and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    return None


def _by_text(answer: str, choices: Sequence[str]) -> str | None:
    text = answer.lower()
    found = [i for i, choice in enumerate(choices) if choice.lower() in text]
    return _LETTERS[found[0]] if len(found) == 1 else None


def _most_telling(answer: str, letters: str) -> str | None:
    text = answer.strip()
    for mark in _TRIMMED:
        text = text.strip(mark)
    places = list(_places(f" {text} ", letters))
    if not places:
        places = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(places, key=lambda place: place[:2])[2] if places else None


def _places(text: str, letters: str) -> Iterator[tuple[int, int, str]]:
    """How telling a place is, where it is in `text`, and the letter there."""
    lower, bare = text.lower(), text.strip()
    for letter in letters:
        for form, weight in _WITHIN.items():
            if (at := text.rfind(form.format(letter))) >= 0:
                yield weight, at, letter
        for phrase in _PHRASES:
            after = lower.find(phrase)
            if after >= 0 and (at := text.find(letter, after + len(phrase))) >= 0:
                yield _AFTER_A_PHRASE, at, letter
        if bare.startswith(letter) and not bare[1:2].isalpha():
            yield _START, 0, letter
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            yield _END, len(text) - 1, letter
