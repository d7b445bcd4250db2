"""Part of a data set set aside, of other sources than the rest where there are several."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from regraft.data.example import Example


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split examples into (the rest, those held out), both in their order and neither empty.

    Whole categories are held out, the smallest first and of like ones the last by name, as long as
    they are together at most half as many again as wanted: what is learned from some sources is
    then judged on others. What is wanting is drawn from the rest.

    Args:
        examples: At least two.
        share: Of the examples that are to be held out, above 0 and at most a half.
        seed: Of the draw.
    """
    wanted = min(max(1, round(share * len(examples))), len(examples) - 1)
    sizes = Counter(one.category or "" for one in examples)
    names = sorted(sorted(sizes, reverse=True), key=sizes.__getitem__)
    whole: set[str] = set()
    held: list[int] = []
    for name in names[:-1]:  # never all of them
        if len(held) < wanted and 2 * (len(held) + sizes[name]) <= 3 * wanted:
            whole.add(name)
            held += [i for i, one in enumerate(examples) if (one.category or "") == name]
    rest = [i for i, one in enumerate(examples) if (one.category or "") not in whole]
    missing = max(0, wanted - len(held))
    chosen = {*held, *random.Random(seed).sample(rest, missing)}
    return (
        tuple(one for i, one in enumerate(examples) if i not in chosen),
        tuple(one for i, one in enumerate(examples) if i in chosen),
    )
