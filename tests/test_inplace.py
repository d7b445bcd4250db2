"""Patching in place: the bytes of a new folder, refused where it would harm, killed anywhere."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import killed_in_place
import pico
import truth
from disk import shards, tree
from regraft import stages
from regraft.errors import RegraftError
from regraft.files import locked, write_json
from regraft.models.checkpoint import JOURNAL, open_checkpoint, write_edited
from regraft.models.load import open_source
from regraft.restoration.apply import apply_patch, make_plan
from regraft.restoration.inplace import read_journal, write_in_place, write_journal
from regraft.restoration.patch import Patch, TensorPatch, load_patch, save_patch
from test_patch import graft, prune_at_random


@dataclass(frozen=True)
class Place:
    """A pruned checkpoint with -0.0 among its zeros, two patches, and both put on elsewhere."""

    root: Path

    @property
    def pruned(self) -> Path:
        return self.root / "pruned"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def patches(self) -> list[Path]:
        return [self.root / "one", self.root / "two"]

    def copy(self, to: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        return Path(shutil.copytree(self.pruned, to))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("place"))
    dense = open_source(pico.save("llava", made.root / "dense", torch.bfloat16, "100KB"))
    pruned = prune_at_random(dense, made.pruned, minus=True)
    write_json(made.pruned / stages.ABOUT_FILE, {"stage": "prune", "data": {}})
    for seed, path in enumerate(made.patches):
        save_patch(path, graft(dense, pruned, share=0.1, seed=seed))
    stages.apply(made.pruned, made.patches, made.out)
    return made


def test_same_bytes_as_a_new_folder_and_back(place: Place, tmp_path: Path) -> None:
    folder = place.copy(tmp_path / "x")
    assert stages.apply_in_place(folder, place.patches)
    assert tree(folder) == tree(place.out)
    assert not stages.apply_in_place(folder, place.patches), "it was on already"
    assert stages.revert_in_place(folder, place.patches)
    assert tree(folder) == tree(place.pruned)
    assert not stages.revert_in_place(folder, place.patches), "it was off already"
    assert tree(tmp_path).keys() == {"x"} | {f"x/{name}" for name in tree(place.pruned)}


@pytest.mark.parametrize("first", [0, 1])
def test_one_after_the_other(place: Place, tmp_path: Path, first: int) -> None:
    """Any order on, any order off; the description goes back with the bytes."""
    folder = place.copy(tmp_path / "x")
    one, two = place.patches[first], place.patches[1 - first]
    stages.apply_in_place(folder, [one])
    after_one = tree(folder)
    with pytest.raises(RegraftError, match="name them too"):
        stages.apply_in_place(folder, [two])
    assert tree(folder) == after_one
    stages.apply_in_place(folder, [two, one])
    assert shards(folder) == shards(place.out)
    stages.revert_in_place(folder, [one, two])
    assert tree(folder) == tree(place.pruned)


def test_no_description_before_none_after(place: Place, tmp_path: Path) -> None:
    folder = place.copy(tmp_path / "x")
    (folder / stages.ABOUT_FILE).unlink()
    before = tree(folder)
    stages.apply_in_place(folder, place.patches)
    assert (folder / stages.ABOUT_FILE).exists()
    stages.revert_in_place(folder, place.patches)
    assert tree(folder) == before


def test_taken_off_what_was_put_on_elsewhere(place: Place, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.out, tmp_path / "x"))
    stages.revert_in_place(folder, place.patches)
    assert tree(folder) == tree(place.pruned)


def _begin(folder: Path, operation: str, patches: list[Path]) -> None:
    """As a run killed after its journal and a part of its writes."""
    plan = make_plan(open_checkpoint(folder), [load_patch(path) for path in patches], "apply")
    write_journal(folder, "apply" if operation == "apply" else "revert", None, patches)
    half = type(plan)(plan.checkpoint, plan.operation, plan.states, plan.changes[::2])
    write_in_place(half)


def test_unfinished_folder_is_refused(place: Place, tmp_path: Path) -> None:
    folder = place.copy(tmp_path / "x")
    _begin(folder, "apply", place.patches)
    before = tree(folder)
    calls: list[Callable[[], object]] = [
        lambda: open_checkpoint(folder),
        lambda: open_source(folder),
        lambda: stages.apply(folder, place.patches, tmp_path / "out"),
        lambda: stages.preview("apply", folder, place.patches, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(RegraftError, match="is patched only in part") as caught:
            call()
        assert f"regraft apply {folder} --in-place" in str(caught.value)
        assert f"regraft revert {folder} --in-place" in str(caught.value)
    with pytest.raises(RegraftError, match="with other patches"):
        stages.apply_in_place(folder, place.patches[:1])
    with pytest.raises(RegraftError, match=r"gone does not exist.*without any patch"):
        stages.apply_in_place(folder, [tmp_path / "gone"])
    assert tree(folder) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("operation", ["apply", "revert"])
def test_patch_file_is_gone(place: Place, tmp_path: Path, operation: str) -> None:
    folder = place.copy(tmp_path / "x")
    copies = [Path(shutil.copy(path, tmp_path)) for path in place.patches]
    _begin(folder, "apply", copies)
    for path in copies:
        path.unlink()
    run = stages.apply_in_place if operation == "apply" else stages.revert_in_place
    assert run(folder, [])
    assert shards(folder) == shards(place.out if operation == "apply" else place.pruned)
    open_checkpoint(folder)
    with pytest.raises(RegraftError, match="No patch is named"):
        run(folder, [])


def test_damaged_journal(place: Place, tmp_path: Path) -> None:
    folder = place.copy(tmp_path / "x")
    _begin(folder, "apply", place.patches)
    copy = folder / JOURNAL / "2.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1])
    before = tree(folder)
    with pytest.raises(RegraftError, match=r"2\.safetensors is damaged"):
        stages.apply_in_place(folder, [])
    assert tree(folder) == before
    assert stages.apply_in_place(folder, place.patches), "the patches themselves are whole"
    assert shards(folder) == shards(place.out)
    _begin(folder, "apply", place.patches)
    (folder / JOURNAL / "journal.json").write_text('{"operation": "apply"}')
    with pytest.raises(RegraftError, match=r"journal\.json is damaged"):
        read_journal(folder)


@pytest.mark.parametrize("link", ["symlink", "hard link"])
def test_links_are_refused(place: Place, tmp_path: Path, link: str) -> None:
    """A hub cache must not change with a folder made of links into it."""
    cache, folder = place.copy(tmp_path / "cache"), place.copy(tmp_path / "x")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    if link == "symlink":
        shard.symlink_to(cache / shard.name)
    else:
        os.link(cache / shard.name, shard)
    before = tree(tmp_path)
    for call in (
        lambda: stages.apply_in_place(folder, place.patches),
        lambda: stages.preview("apply", folder, place.patches, None),
    ):
        with pytest.raises(RegraftError, match=r"link.*Use --out") as caught:
            call()
        assert shard.name in str(caught.value)
    assert tree(tmp_path) == before


def test_one_process_at_a_time(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no such locks")
    folder = place.copy(tmp_path / "x")
    before = tree(folder)
    shard = folder / open_checkpoint(folder).shards[0]
    with (
        locked(shard, folder),
        pytest.raises(RegraftError, match=f"Another regraft process is writing {folder}"),
    ):
        stages.apply_in_place(folder, place.patches)
    assert tree(folder) == before


def test_no_write_without_a_journal(place: Place, tmp_path: Path) -> None:
    folder = place.copy(tmp_path / "x")
    plan = make_plan(open_checkpoint(folder), load_patch(place.patches[0]), "apply")
    with pytest.raises(RegraftError, match="has no journal"):
        write_in_place(plan)
    assert tree(folder) == tree(place.pruned)


def test_a_failing_disk_is_told(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.copy(tmp_path / "x")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("regraft.restoration.apply.write_at", fail)
        with pytest.raises(RegraftError, match=r"Input/output error.*same command finishes"):
            stages.apply_in_place(folder, place.patches)
    stages.apply_in_place(folder, place.patches)
    assert tree(folder) == tree(place.out)


# Dry run


def test_preview_writes_nothing_and_tells_the_truth(place: Place, tmp_path: Path) -> None:
    folder, out = place.copy(tmp_path / "x"), tmp_path / "out"
    (tmp_path / ".out.regraft-tmp").mkdir()
    before = tree(tmp_path)
    new = stages.preview("apply", folder, place.patches, out)
    here = stages.preview("apply", folder, place.patches, None)
    assert tree(tmp_path) == before
    counts = [load_patch(path).restored for path in place.patches]
    assert [state.weights for state in here.plan.states] == counts
    assert [state.on for state in here.plan.states] == [0, 0]
    assert (new.bytes, new.done) == (open_checkpoint(folder).bytes, False)
    stages.apply_in_place(folder, place.patches)
    stages.apply(place.pruned, place.patches, out)
    old, changed = shards(place.pruned), shards(folder)
    assert set(here.plan.shards) == {name for name in old if old[name] != changed[name]}
    copies = sum(path.stat().st_size for path in place.patches)
    assert 2 * here.plan.weights <= here.bytes - copies <= open_checkpoint(folder).bytes
    again = stages.preview("apply", folder, place.patches, None)
    assert [state.on for state in again.plan.states] == counts
    assert (again.bytes, again.done, again.plan.weights) == (0, True, 0)
    assert stages.preview("apply", place.pruned, place.patches, out).done
    back = stages.preview("revert", folder, place.patches, None)
    assert (back.plan.weights, back.done) == (here.plan.weights, False)


def test_preview_of_a_finish(place: Place, tmp_path: Path) -> None:
    folder = place.copy(tmp_path / "x")
    _begin(folder, "apply", place.patches)
    before = tree(folder)
    found = stages.preview("apply", folder, [], None)
    assert not found.done
    assert sum(state.on for state in found.plan.states) > 0
    assert 0 < found.bytes == found.plan.bytes
    assert tree(folder) == before


def test_preview_refuses_what_the_command_refuses(place: Place, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    dense = place.root / "dense"
    for out in (tmp_path / "new", None):
        with pytest.raises(RegraftError, match="is not the base of this patch"):
            stages.preview("apply", dense, place.patches, out)
    with pytest.raises(RegraftError, match="taken is not empty"):
        stages.preview("apply", place.pruned, place.patches, tmp_path / "taken")


# Killed

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def _refused_or_whole(folder: Path, place: Place) -> None:
    """Nobody may take a half-patched folder for a checkpoint."""
    if (folder / JOURNAL).exists():
        with pytest.raises(RegraftError, match="is patched only in part"):
            open_checkpoint(folder)
    else:
        assert shards(folder) in (shards(place.pruned), shards(place.out))


@needs_fork
@pytest.mark.parametrize("operation", ["apply", "revert"])
def test_killed_anywhere_then_finished_or_undone(
    place: Place, tmp_path: Path, operation: str
) -> None:
    start, end = place.pruned, place.out
    if operation == "revert":
        start, end = end, start
    finish, undo = stages.apply_in_place, stages.revert_in_place
    if operation == "revert":
        finish, undo = undo, finish
    folder = Path(shutil.copytree(start, tmp_path / "x"))
    status, steps = killed_in_place.change(operation, folder, place.patches)
    assert (status, tree(folder)) == (0, tree(end))
    assert steps > 30, "the moments are not seen"
    draw = random.Random(16104)
    for moment in {1, 2, steps, *draw.sample(range(1, steps + 1), 20)}:
        when = f"killed at step {moment} of {steps}"
        for then, expected in ((finish, end), (undo, start)):
            shutil.rmtree(folder)
            shutil.copytree(start, folder)
            status, _ = killed_in_place.change(operation, folder, place.patches, moment)
            assert status == -signal.SIGKILL, when
            _refused_or_whole(folder, place)
            then(folder, place.patches)
            assert tree(folder) == tree(expected), when
    assert tree(tmp_path).keys() == {"x"} | {f"x/{name}" for name in tree(end)}


@needs_fork
def test_killed_again_and_again(place: Place, tmp_path: Path) -> None:
    """Either command, killed at any moment, on what the last one left; then one to its end."""
    draw = random.Random(2505)
    folder = place.copy(tmp_path / "x")
    for _ in range(6):
        statuses = [
            killed_in_place.change(
                draw.choice(["apply", "revert"]), folder, place.patches, draw.randint(1, 60)
            )[0]
            for _ in range(4)
        ]
        assert set(statuses) <= {0, -signal.SIGKILL}
        _refused_or_whole(folder, place)
        stages.apply_in_place(folder, place.patches)
        assert tree(folder) == tree(place.out)
        stages.revert_in_place(folder, place.patches)
        assert tree(folder) == tree(place.pruned)


def test_after_an_unfinished_write_every_target_is_written_again(tmp_path: Path, pico_dir) -> None:
    """What a read shows may never have reached the disk, and half a weight may be there."""
    dense = truth.opened(pico_dir("qwen2_vl")).source
    pruned, _ = truth.pruned_at_random(dense, tmp_path / "pruned", 0.5)
    linear = dense.anatomy.layers[0].linear("q_proj")
    before = pruned.checkpoint.read(linear.tensor)
    at = (before.flatten() == 0).nonzero().flatten()[:7]
    values = dense.checkpoint.read(linear.tensor).flatten()[at]
    patch = Patch({linear.tensor: TensorPatch.of(before, at, values)}, {})
    apply_patch(pruned.checkpoint, patch, tmp_path / "on")
    on = open_checkpoint(tmp_path / "on")
    assert not make_plan(on, patch, "apply").changes
    (change,) = make_plan(on, patch, "apply", unfinished=True).changes
    assert torch.equal(change.positions, at) and torch.equal(change.values, values)
    torn = write_edited(
        on,
        tmp_path / "torn",
        {linear.tensor: lambda w: w.flatten().index_fill(0, at[:1], 99.0).view(w.shape)},
    )
    with pytest.raises(RegraftError, match="holds other values"):
        make_plan(torn, patch, "apply")
    (change,) = make_plan(torn, patch, "apply", unfinished=True).changes
    assert torch.equal(change.values, values)


def test_a_source_that_changes_while_it_is_copied_is_told(tmp_path: Path, pico_dir) -> None:
    source = truth.opened(pico_dir("qwen2_vl")).source.checkpoint

    def meddle(weight: torch.Tensor) -> torch.Tensor:
        shard = tmp_path / "source" / source.shards[0]
        shard.touch()
        return weight

    shutil.copytree(source.folder, tmp_path / "source")
    copied = open_checkpoint(tmp_path / "source")
    name = next(iter(copied.tensors))
    with pytest.raises(RegraftError, match="was changed while it was copied"):
        write_edited(copied, tmp_path / "out", {name: meddle})
    assert not (tmp_path / "out").exists()
