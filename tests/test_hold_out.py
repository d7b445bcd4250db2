"""Prompts held out: properties of the split, whatever the categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from regraft.data.example import Example, hold_out

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
    wanted = min(max(1, round(share * len(names))), len(names) - 1)
    assert wanted <= len(held) <= 1.5 * wanted
    split = {one.category for one in held} & {one.category for one in rest}
    if split:
        assert len(held) == wanted, "drawn, although whole categories were enough"


def test_small_categories_are_held_out_whole_and_of_equal_ones_the_last_by_name() -> None:
    names = ["big"] * 6 + ["a", "a", "ab", "ab", "b", "b", "b"]
    held = {share: hold_out(examples(names), share, 0)[1] for share in (0.15, 0.25, 0.4)}
    found = {share: Counter(one.category for one in part) for share, part in held.items()}
    assert found == {
        0.15: {"ab": 2},
        0.25: {"ab": 2, "a": 2},
        0.4: {"ab": 2, "a": 2, "b": 3},
    }


def test_large_categories_are_split_and_not_held_out_whole() -> None:
    names = ["everyday"] * 37 + ["borderline"] * 27
    rest, held = hold_out(examples(names), 0.25, 0)
    assert len(held) == 16
    assert len({one.category for one in rest}) == 2


def test_of_one_category_the_seed_draws() -> None:
    one = examples(["a"] * 20)
    drawn = {tuple(e.id for e in hold_out(one, 0.25, seed)[1]) for seed in range(5)}
    assert len(drawn) > 1 and all(len(ids) == 5 for ids in drawn)
