"""Atomic files and folders, leftovers of killed runs, digests, artifacts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from disk import tree
from regraft.disk.artifact import read_artifact, write_artifact
from regraft.disk.files import (
    WORKERS,
    atomic_file,
    atomic_folder,
    digest,
    disk_errors,
    in_threads,
    read_at,
    require_empty,
    require_new,
    require_space,
    size_of,
    slug,
    write_json,
    write_text,
    write_texts,
)
from regraft.disk.locks import locked
from regraft.disk.parsing import read_json
from regraft.errors import PassingError, RegraftError
from regraft.stages.provenance import working


def test_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}, "a failed write left something behind"
    write_text(target, "one")
    with pytest.raises(ZeroDivisionError), atomic_file(target) as temporary:
        temporary.write_text("two")
        raise ZeroDivisionError
    assert target.read_text() == "one", "a failed write replaced the file"
    write_text(target, "two")
    assert target.read_text() == "two"
    assert tree(tmp_path).keys() == {"a", "a/b.txt"}


def test_several_files_are_written_or_none(tmp_path: Path) -> None:
    (tmp_path / "b.md").mkdir()
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(PassingError, match=r"b\.md cannot be written: .* a folder where a file"):
        write_texts({tmp_path / "a.json": "new", tmp_path / "b.md": "new"})
    assert (tmp_path / "a.json").read_text() == "old"
    assert tree(tmp_path).keys() == {"a.json", "b.md"}


def test_two_writers_of_one_file_do_not_end_in_a_traceback(tmp_path: Path) -> None:
    target = tmp_path / "b.txt"
    said = pytest.raises(PassingError, match=r"b\.txt was not written: .* another regraft process")
    with said, atomic_file(target) as temporary:
        temporary.write_text("one")
        write_text(target, "two")  # as another process would
    assert target.read_text() == "two"
    with pytest.raises(FileNotFoundError), atomic_file(target):
        (tmp_path / "missing").read_text()


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:
        (temporary / "x").write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}
    with atomic_folder(target) as temporary:
        (temporary / "c").mkdir()
        (temporary / "c" / "x").write_text("whole")
        assert not target.exists()
    assert tree(tmp_path).keys() == {"a", "a/b", "a/b/c", "a/b/c/x"}


def test_empty_folder_may_be_filled_and_a_full_one_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "x").write_text("1")
    with pytest.raises(RegraftError, match="out is not empty"), atomic_folder(target):
        pass
    with pytest.raises(RegraftError, match="x is a file"):
        require_empty(target / "x")
    assert tree(tmp_path).keys() == {"out", "out/x"}


def test_leftovers_of_a_killed_run_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".a.regraft-tmp").write_text("half")
    (tmp_path / ".b.regraft-tmp").mkdir()
    (tmp_path / ".b.regraft-tmp" / "x").write_text("half")
    write_text(tmp_path / "a", "whole")
    with atomic_folder(tmp_path / "b") as temporary:
        assert not any(temporary.iterdir())
    assert tree(tmp_path).keys() == {"a", "b"}


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    reader = os.open(tmp_path / "lock", os.O_RDONLY | os.O_NONBLOCK)  # else a fault would hang here
    with (
        pytest.raises(RegraftError, match="lock is a device, a pipe or a socket"),
        locked(tmp_path / "lock", tmp_path / "out"),
    ):
        pass
    os.close(reader)


def test_a_link_under_the_name_of_a_leftover_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("kept")
    (tmp_path / ".a.regraft-tmp").symlink_to("mine")
    write_text(tmp_path / "a", "whole")
    assert tree(tmp_path).keys() == {"a", "mine", "mine/x"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "x"), "disk is full"),
        (OSError(errno.EDQUOT, "x"), "disk is full"),
        (OSError(errno.EFBIG, "x"), "disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (OSError(errno.EROFS, "x"), "No permission"),
        (OSError(errno.EACCES, "x"), "No permission"),
        (OSError(errno.ENOTDIR, "x"), "there is a file where a folder is needed"),
    ],
)
def test_disk_errors_are_told(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(RegraftError, match=f"{message}.*") as caught, disk_errors(tmp_path / "out"):
        raise error
    assert "out" in str(caught.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "x"), SafetensorError("x"), ValueError("x")):
        with pytest.raises(type(error)), disk_errors(tmp_path):
            raise error


@pytest.mark.skipif(os.name != "posix", reason="folders can be opened for writing elsewhere")
def test_output_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(RegraftError, match="file where a folder is needed"):
        write_text(tmp_path / "file" / "out", "x")
    with pytest.raises(RegraftError, match="folder where a file is"):
        write_text(tmp_path / "folder", "x")
    assert tree(tmp_path).keys() == {"file", "folder", "folder/x"}


def test_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a disk even removing a file that does not exist is an error."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("unlink", "mkdir"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(RegraftError, match=r"No permission to write .*out"):
        write_text(tmp_path / "out", "x")
    folder = atomic_folder(tmp_path / "out")
    with pytest.raises(RegraftError, match=r"No permission to write .*out"), folder:
        pass


def test_only_a_new_folder_can_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_new(tmp_path / "new")
    empty = tmp_path / "empty"
    empty.mkdir()
    require_new(empty)
    (tmp_path / "link").symlink_to(empty)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(RegraftError, match=rf"{name} is a link, .* such as .*{name}/out"):
            require_new(tmp_path / name)
    monkeypatch.chdir(empty)
    for here in (Path(), empty):
        with pytest.raises(RegraftError, match="is the current folder, which a finished"):
            require_new(here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with pytest.raises(RegraftError, match="is a mount point"):
        require_new(empty)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    locking = locked(tmp_path / "lock", tmp_path / "out")
    with pytest.raises(RegraftError, match=r"file system without file locks .* elsewhere"), locking:
        pass


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_bytes(bytes(3))
    (tmp_path / "in" / "b").write_bytes(bytes(4))
    assert [size_of(tmp_path / name) for name in ("a", "in", ".", "none")] == [3, 4, 7, 0]


def test_what_another_process_removes_has_no_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "a").write_bytes(bytes(3))
    listed = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "gone":
            Path(folder).rmdir()
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert size_of(tmp_path) == 3


def test_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(RegraftError, match=r"out needs 1048576.00 GiB and .* free") as caught:
        require_space(tmp_path / "out", 2**50)
    assert "choose another folder" in str(caught.value)


def test_threads_give_results_in_order_and_stop_at_an_error() -> None:
    assert in_threads(lambda n: n * n, range(50)) == [n * n for n in range(50)]
    stop, begun = Event(), []

    def fail(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ZeroDivisionError
        assert stop.wait(30), "nobody told the others"

    with pytest.raises(ZeroDivisionError):
        in_threads(fail, range(500), stop)
    assert len(begun) <= WORKERS + 1, "the error stopped nothing"


def test_a_lock_on_a_file_that_its_last_holder_removes_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no such locks")
    lock, flock = tmp_path / "lock", fcntl.flock

    def removed_before(*words: Any) -> None:
        lock.unlink()
        flock(*words)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with pytest.raises(RegraftError, match="has just written"), locked(lock, tmp_path / "out"):
        raise AssertionError


@pytest.mark.parametrize("folder", [True, False])
def test_what_was_finished_before_the_lock_was_free_is_not_begun_again(
    tmp_path: Path, folder: bool
) -> None:
    out = tmp_path / "out"
    if folder:
        out.mkdir()
        with working(out, {}):  # an empty folder is as good as none
            pass
    write_text(out / "results.json" if folder else out, "theirs")
    with pytest.raises(PassingError, match="just finished"), working(out, {}):
        raise AssertionError
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_lock(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no such locks")
    path = tmp_path / "file"
    path.write_text("kept")
    with (
        locked(path, tmp_path / "out"),
        pytest.raises(RegraftError, match=r"is writing .*out"),
        locked(path, tmp_path / "out"),
    ):
        pass
    with locked(path, tmp_path / "out"):
        assert path.read_text() == "kept"


def test_file_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    data = memoryview(bytearray(3))
    with (tmp_path / "x").open("rb", buffering=0) as handle:
        read_at(handle, 1, data)
        assert bytes(data) == b"234"
        with pytest.raises(RegraftError, match="x became shorter"):
            read_at(handle, 3, data)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, "ü"], "a": None})
    assert (
        path.read_text(encoding="utf-8") == '{\n  "b": [\n    1,\n    "ü"\n  ],\n  "a": null\n}\n'
    )
    assert read_json(path) == {"b": [1, "ü"], "a": None}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    with pytest.raises(RegraftError, match=r"b.json does not exist"):
        read_json(tmp_path / "b.json")
    with pytest.raises(RegraftError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(RegraftError, match=r"a\.json is a file; a folder that holds x.y\.json is"):
        read_json(path / "x" / "y.json")
    for bad in (b"{", b"\xff", b""):
        path.write_bytes(bad)
        with pytest.raises(RegraftError, match=r"a.json(: not valid JSON| is not UTF-8 text)"):
            read_json(path)


def test_digest_knows_where_a_part_ends() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab") == digest(b"ab")


TENSORS = {"b": torch.arange(6).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}


def test_artifact_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    header = {"z": 1, "a": {"y": 2, "b": 3}}
    for name in ("one", "two"):
        write_artifact(tmp_path / name, "kind-1", header, TENSORS)
    write_artifact(tmp_path / "three", "kind-1", dict(reversed(header.items())), TENSORS)
    assert len(set(tree(tmp_path).values())) == 1
    found, tensors = read_artifact(tmp_path / "one", "kind-1", "a thing")
    assert found == header
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_damaged_artifacts(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_artifact(path, "kind-1", {}, TENSORS)
    whole = path.read_bytes()
    for bad in (b"", whole[:5], whole[:-1], whole + b"x", b"PK\x03\x04" * 50):
        path.write_bytes(bad)
        with pytest.raises(RegraftError, match=r"x is damaged and cannot be read \(a thing\)"):
            read_artifact(path, "kind-1", "a thing")
    for position in (len(whole) - 1, len(whole) - 20):
        flipped = bytearray(whole)
        flipped[position] ^= 64
        path.write_bytes(flipped)
        with pytest.raises(RegraftError, match="x is damaged"):
            read_artifact(path, "kind-1", "a thing")
    path.write_bytes(whole)
    with pytest.raises(RegraftError, match="x does not hold a thing"):
        read_artifact(path, "kind-2", "a thing")
    with pytest.raises(RegraftError, match="is a folder"):
        read_artifact(tmp_path, "kind-1", "a thing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RegraftError, match="pipe is a device, a pipe or a socket"):
        read_artifact(tmp_path / "pipe", "kind-1", "a thing")


def test_slugs_are_short_and_differ(tmp_path: Path) -> None:
    assert slug("a-1_b.c") == "a-1_b.c"
    names = [slug(text) for text in ("p" * 60, "p" * 300, "p" * 301, "p/" * 150)]
    assert len(set(names)) == 4
    for name in names:
        write_text(tmp_path / f"{name}.json", "")


def test_names_of_files_that_are_no_text_have_digests() -> None:
    assert digest("\udcff.txt") == digest(b"\xff.txt") != digest("ff.txt")
