"""Work in pieces against a plain list: finished ones are kept, all are returned in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from regraft import distributed
from regraft.distributed import resumable_map

PIECES = [(i,) * (i + 1) for i in range(5)]


def squares(pieces: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    return ((place, piece[0] ** 2) for place, piece in enumerate(pieces))


@pytest.mark.parametrize("keeps", [False, True])
def test_pieces_come_in_order(tmp_path: Path, keeps: bool) -> None:
    assert resumable_map(PIECES, squares, tmp_path if keeps else None, "n", int) == [0, 1, 4, 9, 16]
    assert resumable_map([], squares, tmp_path if keeps else None, "none", int) == []
    assert len(list(tmp_path.iterdir())) == 5 * keeps


def test_what_was_made_before_a_stop_is_kept(tmp_path: Path) -> None:
    asked: list[int] = []

    def stops(pieces: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
        for place, piece in enumerate(pieces):
            asked.append(piece[0])
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield place, piece[0] ** 2

    with pytest.raises(KeyboardInterrupt):
        resumable_map(PIECES, stops, tmp_path, "n", int)
    assert (asked, len(list(tmp_path.iterdir()))) == ([0, 1, 2], 2)
    told: list[tuple[int, ...]] = []
    found = resumable_map(PIECES, squares, tmp_path, "n", int, told.append)
    assert (told, found) == (PIECES[:2], [0, 1, 4, 9, 16])


def test_a_kept_result_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumable_map(PIECES, squares, tmp_path, "n", int)
    read: list[Path] = []
    own = distributed.read_json
    monkeypatch.setattr(distributed, "read_json", lambda file: read.append(file) or own(file))
    resumable_map(PIECES, squares, tmp_path, "n", int)
    assert read == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"[4", b"null", b'"4"', b'{"a": 4}'])
def test_what_was_damaged_is_made_again_and_costs_nothing_else(
    tmp_path: Path, content: bytes
) -> None:
    resumable_map(PIECES, squares, tmp_path, "n", int)
    (tmp_path / "n_000002.json").write_bytes(content)
    told: list[tuple[int, ...]] = []
    found = resumable_map(PIECES, squares, tmp_path, "n", int, told.append)
    assert (told, found) == ([*PIECES[:2], *PIECES[3:]], [0, 1, 4, 9, 16])
