"""Work in pieces against a plain list: finished ones are kept, all come back in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from regraft.evaluation.resumable_map import resumable_map


def squares(wanted: Sequence[int]) -> Iterator[tuple[int, int]]:
    yield from ((i, i * i) for i in reversed(wanted))


@pytest.mark.parametrize("keeps", [False, True])
def test_pieces_come_in_order(tmp_path: Path, keeps: bool) -> None:
    assert resumable_map(5, squares, tmp_path if keeps else None, "n") == [0, 1, 4, 9, 16]
    assert resumable_map(0, squares, tmp_path if keeps else None, "none") == []
    assert len(list(tmp_path.iterdir())) == 5 * keeps


def test_what_was_made_before_a_stop_is_kept(tmp_path: Path) -> None:
    asked: list[int] = []

    def stops(wanted: Sequence[int]) -> Iterator[tuple[int, int]]:
        for i in wanted:
            asked.append(i)
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield i, i * i

    with pytest.raises(KeyboardInterrupt):
        resumable_map(5, stops, tmp_path, "n")
    kept: list[int] = []
    found = resumable_map(5, squares, tmp_path, "n", kept.append)
    assert (kept, found) == ([0, 1], [0, 1, 4, 9, 16])
