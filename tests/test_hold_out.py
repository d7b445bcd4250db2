"""Prompts held out: properties of the split, whatever the categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from regraft.data.example import Example
from regraft.data.hold_out import hold_out

categories = st.lists(st.sampled_from(["", "a", "ab", "b", "c"]), min_size=2, max_size=30)
shares = st.sampled_from([0.05, 0.25, 0.5, 0.9])


def examples(names: Sequence[str]) -> list[Example]:
    return [Example(str(i), f"prompt {i}", True, name) for i, name in enumerate(names)]


@given(categories, shares, st.integers(0, 3))
def test_the_split(names: list[str], share: float, seed: int) -> None:
    given_ = examples(names)
    rest, held = hold_out(given_, share, seed)
    assert rest and held
    assert sorted([*rest, *held], key=lambda one: int(one.id)) == given_, "disjoint and complete"
    for part in (rest, held):
        assert [int(one.id) for one in part] == sorted(int(one.id) for one in part)
    assert hold_out(given_, share, seed) == (rest, held)
    sizes = Counter(names)
    out = {one.category for one in held}
    wanted = max(1, round(share * len(names)))
    if len(sizes) == 1:
        assert len(held) == min(wanted, len(names) - 1)
        return
    assert not out & {one.category for one in rest}, "a category is on both sides"
    kept = sizes.keys() - out
    assert max(sizes.values()) in {sizes[name] for name in kept}, "the largest is held out"
    assert max(sizes[name] for name in out) <= min(sizes[name] for name in kept)
    assert len(held) >= wanted or len(kept) == 1
    assert len(held) - max(sizes[name] for name in out) < wanted, "a category more than needed"


def test_small_categories_go_first_and_of_equal_ones_the_last_by_name() -> None:
    names = ["big"] * 6 + ["a", "a", "ab", "ab", "b", "b", "b"]
    held = {share: hold_out(examples(names), share, 0)[1] for share in (0.1, 0.25, 0.4, 0.9)}
    found = {share: {one.category for one in part} for share, part in held.items()}
    assert found == {0.1: {"ab"}, 0.25: {"a", "ab"}, 0.4: {"a", "ab", "b"}, 0.9: {"a", "ab", "b"}}


def test_of_one_category_the_seed_draws() -> None:
    one = examples(["a"] * 20)
    drawn = {tuple(e.id for e in hold_out(one, 0.25, seed)[1]) for seed in range(5)}
    assert len(drawn) > 1 and all(len(ids) == 5 for ids in drawn)
