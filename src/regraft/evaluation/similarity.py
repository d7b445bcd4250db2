"""Score answers: ANLS against references, and the option picked in a multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regraft.data.example import Example

_LETTERS = "ABCDEFGH"
_ALWAYS = 5  # letters that are recognised even if there are fewer options
_MARKED = (
    *("{}.", "{},", "{}:", "{})", "{}).", "({})", "({})."),
    *(":{}", ":{},", ":{}.", ":{})", ":{})."),
)
_TRIMMED = ",.!?;:'\""
_START, _END, _AFTER_A_PHRASE = 10, 9, 7  # weights of places, the most telling first
_WITHIN = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_PHRASES = (
    *(f"{the}{best}answer is" for the in ("the ", "") for best in ("", "correct ", "best ")),
    *(f"{the}{best}option is" for the in ("the ", "") for best in ("correct ", "best ")),
    *(f"{the}{best}choice is" for the in ("the ", "") for best in ("", "correct ")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def similarity(example: Example, text: str) -> float:
    """Score an answer to an example with a reference, in [0, 1].

    1 or 0 for a multiple choice, otherwise ANLS; with `content`, of the content alone.
    """
    if example.choices:
        return float(picked(text, example.choices) == example.response)
    if example.content:
        return anls(unframed(text, example.response or "", example.content), [example.content])
    return anls(text, example.references or [example.response or ""])


def unframed(text: str, response: str, content: str) -> str:
    """Remove the fixed wording that `response` puts around `content` from an answer.

    The wording before the content is removed if the answer begins with it. The answer ends where
    the wording after the content begins; if it was cut off, a part of that at its end is enough.
    """
    before, _, after = response.partition(content)
    text = text.strip().removeprefix(before)
    if after and after in text:
        return text[: text.index(after)]
    partial = next((n for n in range(len(after), 0, -1) if text.endswith(after[:n])), 0)
    return text[: len(text) - partial]


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, in [0, 1] (Biten et al. 2019).

    The maximum over `references` of `1 - distance / length of the longer text`: the distance after
    lower-casing and collapsing whitespace, the length in upper case, both like the benchmark's own
    script and lmms-eval. A similarity below 0.5 counts as 0. Two empty texts have similarity 1.
    """
    best = max(_closeness(answer, text) for text in references)
    return best if best >= 0.5 else 0.0


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _closeness(a: str, b: str) -> float:
    longer = max(len(a.upper()), len(b.upper()))
    return 1 - levenshtein(_normalise(a), _normalise(b)) / longer if longer else 1.0


def levenshtein(a: str, b: str) -> int:
    """Edit distance: the fewest insertions, deletions and substitutions that turn `a` into `b`.

    Myers' bit-vector algorithm (1999) in Hyyrö's form: one column of the table is two integers with
    a bit for each letter of the shorter text, the places where it steps up and where it steps down.
    """
    a, b = sorted((a, b), key=len)  # a server's answer may have millions of letters
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for letter in b:
        match = places.get(letter, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right_up = down | ~(diagonal | up)
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = right_up << 1 | 1
        up = (right_down << 1 | ~(diagonal | right_up)) & every
        down = right_up & diagonal & every
    return distance


def picked(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `answer` picks, A for the first; None where it picks none.

    The rules of lmms-eval 0.7 for `mmbench_en_dev_static`, so that scores agree with its scores:

    1. MMBench's own (Liu et al. 2024): a letter that stands alone, if no other does (a lone A among
       more than three words is an article); then a letter with a mark such as "B." or "(B)", one
       mark after another, if no other letter has the same mark.
    2. The option whose text is in the answer, if no other option's is.
    3. The letter in the most telling place: at the start, at the end, after a phrase such as "the
       answer is", with a mark, before a space, anywhere; the last one among equal places.
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
    """(weight of a place, its index in `text`, the letter there)."""
    lower, bare = text.lower(), text.strip()
    for letter in letters:
        for form, weight in _WITHIN.items():
            if (index := text.rfind(form.format(letter))) >= 0:
                yield weight, index, letter
        for phrase in _PHRASES:
            start = lower.find(phrase)
            if start >= 0 and (index := text.find(letter, start + len(phrase))) >= 0:
                yield _AFTER_A_PHRASE, index, letter
        if bare.startswith(letter) and not bare[1:2].isalpha():
            yield _START, 0, letter
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            yield _END, len(text) - 1, letter
