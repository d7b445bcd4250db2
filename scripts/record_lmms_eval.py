"""Record lmms-eval's scores of made-up answers; a test compares regraft's scores with them.

Writes tests/lmms_eval_scores.json. Needs lmms-eval, whose version 0.7.3 imports a module that
filelock 4 no longer has: pip install 'lmms-eval==0.7.3' 'filelock<4'

    python scripts/record_lmms_eval.py
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "tests" / "lmms_eval_scores.json"
OPTIONS = (
    ("a dog", "a cat", "a horse", "a cow"),
    ("Yes", "No"),
    ("Paris", "London", "Rome"),
    ("3", "5", "8", "13"),
    ("D. H. Lawrence", "a caption", "both", "A"),
)
LETTER_FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", "**{}**", "'{}'")
PHRASES = (
    *("The answer is", "the correct answer is", "Answer:", "I choose", "My choice is", "I'd say"),
    *("The best option is", "so the correct option is", "the choice is", "答案是", "not"),
)
FILLERS = (
    *("since", "it is", "an image of", "A small", "As an assistant, I cannot tell", "or", "and"),
    *(
        "because of the Colour",
        "BAD",
        "I'm sorry",
        "Looking at it",
        "\n",
        "?",
        ";",
        '"',
        "no doubt",
    ),
)
WORDS = (
    *("invoice", "Total", "1,024.50", "the", "of", "March", "3rd,", "1998", "Dr.", "Smith"),
    *("", "é", "İ", "ß", "ÅB", "§", "12%", "yes"),
)


def answers(draw: random.Random, choices: tuple[str, ...]) -> str:
    """An answer made of phrases that models use."""
    pieces = []
    for _ in range(draw.randint(0, 4)):
        kind = draw.random()
        if kind < 0.45:
            pieces.append(draw.choice(LETTER_FORMS).format(draw.choice("ABCDE")))
        elif kind < 0.6:
            pieces.append(draw.choice(choices))
        else:
            pieces.append(draw.choice(PHRASES if kind < 0.75 else FILLERS))
    return draw.choice((" ", " ", "")).join(pieces)


def rotations(draw: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """A question with all rotations of its options, as in MMBench, and an answer to each."""
    choices, right = draw.choice(OPTIONS[:4]), draw.randrange(2)
    for turn in range(len(choices)):
        letters = "ABCD"[: len(choices)]
        turned = [choices[(i + turn) % len(choices)] for i in range(len(choices))]
        letter = letters[(right - turn) % len(choices)]
        said = draw.choice((letter, f"{letter}.", f"({letter})", f"The answer is {letter}"))
        yield {
            "index": number + turn * 1_000_000,
            **dict(zip(letters, turned, strict=True)),
            "answer": letter,
            "prediction": said if draw.random() < 0.9 else answers(draw, choices),
        }


def texts(draw: random.Random) -> tuple[str, list[str]]:
    """An answer and its references, some of them close to the answer."""
    answer = " ".join(draw.choices(WORDS, k=draw.randint(0, 5)))
    references = []
    for _ in range(draw.randint(1, 3)):
        letters = list(answer if draw.random() < 0.7 else " ".join(draw.choices(WORDS, k=3)))
        for _ in range(draw.randint(0, 5)):
            place = draw.randint(0, len(letters))
            letters[place : place + draw.randint(0, 1)] = draw.choice(("", "x", " ", "É"))
        references.append("".join(letters))
    return answer, references


def main() -> None:
    """Score the answers and write the scores."""
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    draw, judge = random.Random(arguments.seed), MMBench_Evaluator()
    picked = []
    for _ in range(1000):
        choices = draw.choice(OPTIONS)
        answer, letters = answers(draw, choices), "ABCD"[: len(choices)]
        item = dict(zip("ABCD", (*choices, math.nan, math.nan)[:4], strict=True))
        letter = judge.prefetch_answer({**item, "prediction": answer})
        letter = letter or extract_mcq_answer(answer, choices=list(letters))
        picked.append([answer, choices, letter if letter and letter in letters else None])
    rows = [row for number in range(1, 61) for row in rotations(draw, number)]
    of_table = {
        "category": "c",
        "question": "q",
        "hint": math.nan,
        **dict.fromkeys("ABCD", math.nan),
    }
    accuracy = judge.eval_result([{**of_table, **row} for row in rows], eval_method="static")[0]
    scored = []
    for _ in range(500):
        answer, references = texts(draw)
        scored.append([answer, references, anls(references, [answer])["anls"]])
    content = {
        "version": version("lmms-eval"),
        "picked": picked,
        "circular": {"rows": rows, "accuracy": float(accuracy)},
        "anls": scored,
    }
    arguments.out.write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n")
    print(f"{arguments.out}: {len(picked)} picks, {len(rows)} rows, {len(scored)} similarities")


if __name__ == "__main__":
    main()
