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

    Whole categories are held out, the smallest first and of like ones the last by name, until the
    share is reached: what is learned from some sources is then judged on others. The largest
    category is never held out. Where all are of one category, examples are drawn.

    Args:
        examples: At least two.
        share: Of the examples, rounded, how many are to be held out at least; above 0, below 1.
        seed: Of the draw.
    """
    wanted = min(max(1, round(share * len(examples))), len(examples) - 1)
    sizes = Counter(one.category or "" for one in examples)
    if len(sizes) == 1:
        drawn = set(random.Random(seed).sample(range(len(examples)), wanted))
    else:
        by_size = sorted(sorted(sizes, reverse=True), key=lambda name: sizes[name])
        chosen: set[str] = set()
        while sum(sizes[name] for name in chosen) < wanted and len(chosen) + 1 < len(sizes):
            chosen.add(by_size[len(chosen)])
        drawn = {i for i, one in enumerate(examples) if (one.category or "") in chosen}
    rest = tuple(one for i, one in enumerate(examples) if i not in drawn)
    return rest, tuple(one for i, one in enumerate(examples) if i in drawn)
