"""Patches: the file, applying, reverting, refusing, and the same in memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise, permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import pico
from disk import differing, equal_bytes, shards, tree
from methods import method, restored
from regraft.data.collate import prompt_batch
from regraft.disk.artifact import read_artifact, write_artifact
from regraft.errors import RegraftError
from regraft.models.checkpoint import Checkpoint, open_checkpoint
from regraft.models.checkpoint_copy import Edit, write_edited
from regraft.models.load import Source, load_model, load_processor, open_source
from regraft.patch import apply as apply_module
from regraft.patch import format as patch_module
from regraft.patch.apply import (
    Change,
    make_plan,
    patched,
    write_plan,
    zeros_filled,
)
from regraft.patch.format import (
    FORMAT,
    Patch,
    TensorPatch,
    base_digest,
    chunks,
    load_patch,
    merge,
    save_patch,
    stored_positions,
)


def apply_patch(checkpoint: Checkpoint, patches: Any, target: Path) -> Checkpoint:
    return write_plan(make_plan(checkpoint, patches, "apply"), target)


def revert_patch(checkpoint: Checkpoint, patches: Any, target: Path) -> Checkpoint:
    return write_plan(make_plan(checkpoint, patches, "revert"), target)


def zero_at_random(seed: int, *, minus: bool = False) -> Edit:
    """Zero about half of a weight; with `minus` by multiplying, which makes -0.0 of negatives."""
    generator = torch.Generator().manual_seed(seed)

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(tensor.shape, generator=generator) < 0.5
        return tensor * mask.to(tensor.dtype) if minus else tensor.masked_fill_(~mask, 0)

    return edit


def prune_at_random(source: Source, out: Path, seed: int = 0, *, minus: bool = False) -> Source:
    edits = {
        linear.tensor: zero_at_random(seed + i, minus=minus)
        for i, linear in enumerate(source.architecture.linears)
    }
    write_edited(source.checkpoint, out, edits)
    return open_source(out)


def graft(dense: Source, pruned: Source, *, share: float = 0.3, seed: int = 1000) -> Patch:
    """Restore a random share of what was pruned in every other weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in list(dense.architecture.linears)[::2]:
        before, after = (one.checkpoint.read(linear.tensor) for one in (dense, pruned))
        chosen = (after == 0) & (torch.rand(after.shape, generator=generator) < share)
        positions = chosen.reshape(-1).nonzero().flatten()
        values = before.reshape(-1)[positions]
        tensors[linear.tensor] = TensorPatch.of(after, positions, values)
    return Patch(tensors, {"seed": seed})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Source, Source]:
    dense = open_source(pico.save("llava", tmp_path / "dense", torch.bfloat16, "100KB"))
    return dense, prune_at_random(dense, tmp_path / "pruned")


@pytest.mark.parametrize("minus", [False, True], ids=["plus zero", "minus zero"])
def test_apply_then_revert_gives_back_the_bytes(
    tmp_path: Path, paper_family: str, minus: bool
) -> None:
    folder = pico.save(paper_family, tmp_path / "dense", torch.bfloat16, "100KB")
    dense = open_source(folder)
    pruned = prune_at_random(dense, tmp_path / "pruned", minus=minus)
    save_patch(tmp_path / "patch", graft(dense, pruned))
    patch = load_patch(tmp_path / "patch")
    on = apply_patch(pruned.checkpoint, patch, tmp_path / "on")
    off = revert_patch(on, patch, tmp_path / "off")
    assert len(on.shards) > 3
    assert shards(tmp_path / "off") == shards(tmp_path / "pruned"), "revert gave other bytes"
    assert tree(tmp_path / "off") == tree(tmp_path / "pruned")
    assert differing(pruned.checkpoint, on) == patch.tensors.keys()
    for name, tensor in patch.tensors.items():
        expected = pruned.checkpoint.read(name).reshape(-1)
        original = dense.checkpoint.read(name).reshape(-1)
        expected[tensor.positions] = original[tensor.positions]
        assert equal_bytes(on.read(name).reshape(-1), expected), f"{name} holds other values"
    again = apply_patch(on, patch, tmp_path / "again")
    assert shards(again.folder) == shards(on.folder), "applying twice is not applying once"
    twice_off = revert_patch(off, patch, tmp_path / "twice-off")
    assert shards(twice_off.folder) == shards(off.folder), "reverting twice changed something"


def test_base_digest_is_the_same_before_and_after(pair: tuple[Source, Source]) -> None:
    dense, pruned = pair
    for name, tensor in graft(dense, pruned).tensors.items():
        before = pruned.checkpoint.read(name)
        after = before.clone()
        after.view(-1)[tensor.positions] = tensor.values
        assert base_digest(before, tensor.positions) == base_digest(after, tensor.positions)
        assert tensor.base == base_digest(before, tensor.positions)
        after.view(-1)[tensor.positions[0] - 1] += 1
        assert base_digest(after, tensor.positions) != tensor.base


def test_zeros_filled(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    dense, pruned = pair
    patch = graft(dense, pruned)
    assert zeros_filled(pruned.checkpoint, patch) == patch.restored
    assert zeros_filled(apply_patch(pruned.checkpoint, patch, tmp_path / "on"), patch) == 0


def test_file_is_small_and_always_the_same(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    patch = graft(*pair)
    save_patch(tmp_path / "one", patch)
    save_patch(tmp_path / "two", Patch(dict(reversed(patch.tensors.items())), patch.about))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_patch(tmp_path / "one")
    save_patch(tmp_path / "three", loaded)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()
    assert loaded.about == patch.about
    assert loaded.restored == patch.restored > 1000
    overhead = 400 * len(patch.tensors) + 400
    assert (tmp_path / "one").stat().st_size <= 6 * patch.restored + overhead
    with pytest.raises(RegraftError, match="one exists already"):
        save_patch(tmp_path / "one", patch)


def test_empty_patch(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    save_patch(tmp_path / "patch", Patch({}, {}))
    patch = load_patch(tmp_path / "patch")
    assert patch.restored == 0
    out = apply_patch(pair[1].checkpoint, patch, tmp_path / "out")
    assert tree(out.folder) == tree(pair[1].folder)


def _single(patch: Patch) -> tuple[str, TensorPatch]:
    return next(iter(patch.tensors.items()))


def _refused(checkpoint: Checkpoint, patch: Patch, out: Path, message: str) -> None:
    before = tree(out.parent)
    for action in (apply_patch, revert_patch):
        with pytest.raises(RegraftError, match=message) as caught:
            action(checkpoint, patch, out)
        assert str(checkpoint.folder) in str(caught.value)
        assert tree(out.parent) == before, "something was written"
    with pytest.raises(RegraftError, match=message):
        make_plan(checkpoint, patch, "apply")


def test_other_bases_are_refused(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    dense, pruned = pair
    patch = graft(dense, pruned)
    name, tensor = _single(patch)
    out = tmp_path / "out"
    other = prune_at_random(dense, tmp_path / "other", seed=100)
    _refused(other.checkpoint, patch, out, "holds other values|weights of .* differ")
    _refused(dense.checkpoint, patch, out, "weights of .* differ")
    wider = open_source(pico.save("llava", tmp_path / "wider", torch.float32))
    _refused(wider.checkpoint, patch, out, r"torch.float32, the patch is for .*torch.bfloat16")
    foreign = open_source(pico.save("qwen2_vl", tmp_path / "foreign", torch.bfloat16))
    _refused(foreign.checkpoint, patch, out, "it has no tensor")
    reshaped = replace(tensor, shape=(tensor.shape[1], tensor.shape[0] * 2))
    _refused(pruned.checkpoint, Patch({name: reshaped}, {}), out, "the patch is for")

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[tensor.positions[0]] = 3
        return weight

    spoilt = write_edited(pruned.checkpoint, tmp_path / "spoilt", {name: spoil})
    _refused(spoilt, patch, out, "holds other values where the patch restores weights")


def test_one_bad_tensor_stops_all(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    """Everything is checked before anything is written."""
    dense, pruned = pair
    patch = graft(dense, pruned)
    last = list(patch.tensors)[-1]
    tensors = {**patch.tensors, last: replace(patch.tensors[last], base="0" * 64)}
    _refused(pruned.checkpoint, Patch(tensors, {}), tmp_path / "out", "differ")


def _write(path: Path, patch: Patch, **changes: torch.Tensor) -> None:
    name, tensor = _single(patch)
    tensors = {f"{name}.positions": tensor.positions.int(), f"{name}.values": tensor.values}
    tensors |= {f"{name}.{key}": value for key, value in changes.items()}
    layout = {name: {"shape": list(tensor.shape), "base": tensor.base}}
    write_artifact(path, FORMAT, {"about": {}, "tensors": layout}, tensors)


@pytest.mark.parametrize("field", ["positions", "values", "minus", "removed"])
def test_inconsistent_files(tmp_path: Path, pair: tuple[Source, Source], field: str) -> None:
    patch = graft(*pair)
    _, tensor = _single(patch)
    positions, size = tensor.positions.int(), torch.Size(tensor.shape).numel()
    cases = {
        "positions": [
            positions.flip(0),
            positions.clone().index_fill_(0, torch.tensor([0]), -1),
            positions.clone().index_fill_(0, torch.tensor([-1]), size),
            positions[:-1],
            positions[None],
        ],
        "values": [tensor.values[:-1], tensor.values[None]],
        "minus": [torch.tensor([len(positions)]), torch.tensor([3, 3]), torch.tensor([-1])],
        "removed": [torch.tensor([0]), torch.tensor([len(positions)])],  # and no values
    }
    for i, value in enumerate(cases[field]):
        _write(tmp_path / f"{i}", patch, **{field: value})
        with pytest.raises(
            RegraftError, match=r"positions and .* not valid|do not match|a list of"
        ):
            load_patch(tmp_path / f"{i}")


def test_swaps_go_on_and_off_and_keep_the_number_of_zeros(
    tmp_path: Path, pair: tuple[Source, Source]
) -> None:
    dense, pruned = pair
    linear = next(iter(dense.architecture.linears))
    after = pruned.checkpoint.read(linear.tensor).reshape(-1)
    back = (after == 0).nonzero().flatten()[:5]
    gone = (after != 0).nonzero().flatten()[:5]
    positions = torch.cat([back, gone]).sort().values
    values = dense.checkpoint.read(linear.tensor).reshape(-1)[positions]
    values[torch.isin(positions, gone)] = 0
    patch = Patch(
        {linear.tensor: TensorPatch.of(after.view(linear.shape), positions, values)}, {"a": 1}
    )
    assert (patch.restored, patch.removed) == (5, 5)
    save_patch(tmp_path / "swap", patch)
    loaded = load_patch(tmp_path / "swap")
    assert equal_bytes(loaded.tensors[linear.tensor].before, after[positions])
    on = apply_patch(pruned.checkpoint, loaded, tmp_path / "on")
    expected = after.clone()
    expected[positions] = values
    assert equal_bytes(on.read(linear.tensor).reshape(-1), expected)
    assert zeros_filled(pruned.checkpoint, loaded) == zeros_filled(on, loaded) == 0
    off = revert_patch(on, loaded, tmp_path / "off")
    assert not differing(pruned.checkpoint, off)
    assert (
        apply_patch(on, loaded, tmp_path / "again")
        .read(linear.tensor)
        .equal(on.read(linear.tensor))
    )


def test_missing_parts(tmp_path: Path) -> None:
    layout = {"x": {"shape": [2, 2], "base": ""}}
    write_artifact(tmp_path / "a", FORMAT, {"about": {}, "tensors": layout}, {})
    with pytest.raises(RegraftError, match=r"a is damaged: 'x.positions' is missing"):
        load_patch(tmp_path / "a")
    write_artifact(tmp_path / "b", FORMAT, {"tensors": {}}, {})
    with pytest.raises(RegraftError, match="b: its header: the field 'about' is missing"):
        load_patch(tmp_path / "b")
    more = {"x.values": torch.ones(1)}
    write_artifact(tmp_path / "c", FORMAT, {"about": {}, "tensors": {}}, more)
    with pytest.raises(RegraftError, match=r"c is damaged: .* does not name the tensor x.values"):
        load_patch(tmp_path / "c")


def test_shape_beyond_int64(tmp_path: Path) -> None:
    shape = (2**62, 2**62)
    tensors = {"x.positions": torch.tensor([0, 2**62]), "x.values": torch.ones(2)}
    layout = {"x": {"shape": list(shape), "base": ""}}
    write_artifact(tmp_path / "a", FORMAT, {"about": {}, "tensors": layout}, tensors)
    assert load_patch(tmp_path / "a").tensors["x"].shape == shape


@pytest.mark.parametrize(("last", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_positions_are_stored_in_32_bits_where_they_fit(last: int, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, last])
    found = stored_positions(positions)
    assert found.dtype == dtype
    assert torch.equal(found.long(), positions)


def test_foreign_files(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    write_artifact(tmp_path / "heads.safetensors", "regraft-heads-1", {}, {})
    for name in ("weights.safetensors", "heads.safetensors"):
        with pytest.raises(RegraftError, match=f"{name} does not hold a patch of regraft"):
            load_patch(tmp_path / name)
    save_file({"x": torch.zeros(2)}, tmp_path / "odd", metadata={"regraft": "[1]"})
    with pytest.raises(RegraftError, match="odd does not hold a patch"):
        read_artifact(tmp_path / "odd", FORMAT, "a patch")
    save_file({"x": torch.zeros(2)}, tmp_path / "odd", metadata={"regraft": "{"})
    with pytest.raises(RegraftError, match="odd is damaged"):
        read_artifact(tmp_path / "odd", FORMAT, "a patch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patched_model_is_the_applied_checkpoint(
    tmp_path: Path, paper_family: str, dtype: str
) -> None:
    folder = pico.save(paper_family, tmp_path / "dense", torch.bfloat16)
    dense = open_source(folder)
    pruned = prune_at_random(dense, tmp_path / "pruned", minus=True)
    patch = graft(dense, pruned)
    apply_patch(pruned.checkpoint, patch, tmp_path / "on")
    model = load_model(pruned, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    other = load_model(open_source(tmp_path / "on"), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    examples = pico.write_examples(tmp_path / "images", 2)
    batch = prompt_batch(load_processor(pruned), examples).to("cpu", getattr(torch, dtype))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with patched(model, pruned.architecture, patch):
            for name, weight in other.state_dict().items():
                assert torch.equal(model.state_dict()[name], weight), f"{name} differs"
            logits = model(**batch.inputs).logits
        assert torch.equal(logits, other(**batch.inputs).logits)
        assert not torch.equal(logits, plain), "the patch made no difference"
        assert torch.equal(model(**batch.inputs).logits, plain)
    with pytest.raises(ZeroDivisionError), patched(model, pruned.architecture, patch):
        raise ZeroDivisionError
    for name, weight in model.state_dict().items():
        assert equal_bytes(weight, before[name]), f"{name} was not put back"


def test_patch_of_another_model_in_memory(pair: tuple[Source, Source], tmp_path: Path) -> None:
    dense, pruned = pair
    patch = graft(dense, pruned)
    name, tensor = _single(patch)
    model = load_model(pruned, device="cpu")
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    for other, message in (
        (Patch({**patch.tensors, "nothing.weight": tensor}, {}), "this one has no weight nothing"),
        (Patch({name: replace(tensor, shape=(1, 8192))}, {}), "the patch is for"),
    ):
        with pytest.raises(RegraftError, match=message), patched(model, pruned.architecture, other):
            pass
    assert all(equal_bytes(weight, before[key]) for key, weight in model.state_dict().items())


def test_realigned_minus_zeros_are_reverted(tmp_path: Path) -> None:
    """torch's own pruning multiplies by a mask, which leaves -0.0 where weights were negative."""
    dense = open_source(pico.save("qwen2_vl", tmp_path / "dense", torch.bfloat16))
    pruned = prune_at_random(dense, tmp_path / "pruned", minus=True)
    heads = method("hsr-a", heads="random", top_heads=3)
    patch = restored(dense, pruned, tmp_path / "patch", heads)
    on = apply_patch(pruned.checkpoint, patch, tmp_path / "on")
    revert_patch(on, patch, tmp_path / "off")
    assert shards(open_checkpoint(tmp_path / "off").folder) == shards(pruned.folder)


# Several patches at once


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few weights a chunk, a few of them apart make two writes: every seam is in the tests."""
    for module in (patch_module, apply_module):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(apply_module, "_GAP", 6)


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("0-xyz"), min_size=1, max_size=40),
    chosen=st.lists(st.sets(st.integers(0, 39)), min_size=1, max_size=3),
    on=st.sets(st.integers(0, 2)),
    operation=st.sampled_from(["apply", "revert"]),
)
def test_several_patches_are_their_union(
    kinds: list[str], chosen: list[set[int]], on: set[int], operation: str
) -> None:
    """In any order, with any of them on, over 0 and -0.0: what assigning by hand gives.

    `kinds` are the pruned weights: zero, minus zero, or kept; a patch prunes those of its kept ones
    that it names, as in a swap.
    """
    pruned = torch.tensor([{"0": 0.0, "-": -0.0}.get(kind, 1.0) for kind in kinds]).bfloat16()
    dense = (torch.arange(len(kinds)) + 2).bfloat16() * torch.where(pruned.signbit(), -1, 1)
    dense[pruned != 0] = 0
    patches, united = [], torch.zeros(len(kinds), dtype=torch.bool)
    for number, wanted in enumerate(chosen):
        positions = [p for p in sorted(wanted) if p < len(kinds)]
        place = torch.tensor(positions, dtype=torch.int64)
        united[place] = True
        tensor = TensorPatch.of(pruned[None], place, dense[place])
        patches.append(Patch({"x": tensor}, {}, f"patch {number}"))
    now = pruned.clone()
    for number in on & set(range(len(patches))):
        now[patches[number].tensors["x"].positions] = patches[number].tensors["x"].values
    expected = torch.where(united, dense, pruned) if operation == "apply" else pruned
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        save_file({"x": now[None], "y": torch.ones(3)}, folder / "model.safetensors")
        before = open_checkpoint(folder)
        write = apply_patch if operation == "apply" else revert_patch
        for number, order in enumerate(permutations(patches)):
            written = write(before, order, Path(scratch) / f"{number}")
            assert equal_bytes(written.read("x")[0], expected)
            assert not differing(before, written) - {"x"}
        plan = make_plan(before, patches, operation)  # type: ignore[arg-type]
        bits = (now.view(torch.int16) != expected.view(torch.int16)).nonzero().flatten()
        assert plan.weights == len(bits)
        assert torch.equal(torch.cat([c.positions for c in plan.changes] or [bits]), bits)
        assert plan.patches == tuple(patches)
        for patch, applied in zip(patches, plan.applied, strict=True):
            held = patch.tensors["x"]
            assert applied == int((now[held.positions] == held.values).sum())
            assert patch.restored == int((pruned[held.positions] == 0).sum())
            assert patch.removed == len(held.positions) - patch.restored


def test_one_patch_is_planned_without_copies(tmp_path: Path) -> None:
    """It may be as large as a tenth of a model."""
    pruned = torch.zeros(2, 8)
    held = TensorPatch.of(pruned, torch.tensor([1, 4, 9]), torch.ones(3))
    save_file({"x": pruned}, tmp_path / "model.safetensors")
    base = open_checkpoint(tmp_path)
    (change,) = make_plan(base, Patch({"x": held}, {}), "apply").changes
    assert change.positions.data_ptr() == held.positions.data_ptr()
    assert change.values.data_ptr() == held.values.data_ptr()


@settings(max_examples=200, deadline=None)
@given(
    positions=st.sets(st.integers(0, 5000), min_size=1, max_size=60),
    item=st.sampled_from([1, 2, 4, 8]),
    chunk=st.sampled_from([8, 64, 4096]),
    gap=st.sampled_from([0, 16, 100]),
)
def test_spans(positions: set[int], item: int, chunk: int, gap: int) -> None:
    """They cover all positions once, cross no seam between chunks and bridge no wide gap."""
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[item]
    place = torch.tensor(sorted(positions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply_module, "CHUNK", chunk)
        patch.setattr(apply_module, "_GAP", gap)
        change = Change(None, place, torch.zeros(len(place), dtype=dtype))  # type: ignore[arg-type]
        spans = [place[span].tolist() for span in change.spans()]
        assert list(chain.from_iterable(spans)) == place.tolist()
        per_chunk = chunk // item
        for span in spans:
            assert span[0] // per_chunk == span[-1] // per_chunk
            assert all((b - a) * item <= gap for a, b in pairwise(span))
        for a, b in pairwise(spans):
            apart = (b[0] - a[-1]) * item > gap
            assert apart or a[-1] // per_chunk != b[0] // per_chunk, "one write would do"


@given(
    size=st.integers(0, 200), item=st.sampled_from([1, 2, 4, 8]), positions=st.sets(st.integers(0))
)
def test_chunks(size: int, item: int, positions: set[int]) -> None:
    place = torch.tensor(sorted(p for p in positions if p < size), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patch_module, "CHUNK", 64)
        found = list(chunks(size, item, place))
    covered = [i for start, stop, _ in found for i in range(start, stop)]
    assert covered == list(range(size))
    assert all((stop - start) * item <= 64 for start, stop, _ in found)
    for start, stop, inside in found:
        assert place[inside].tolist() == [p for p in place.tolist() if start <= p < stop]


def test_patches_that_disagree(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    dense, pruned = pair
    one = graft(dense, pruned)
    name, tensor = _single(one)
    values = tensor.values.clone()
    values[[0, 3]] += 1
    before_too = tensor.before.clone()
    before_too[1] = -0.0
    minus = replace(tensor, before=before_too)
    others = {
        "2 of the .* weights": replace(tensor, values=values),
        "1 of the .* weights": minus,
        "is .* in the first and": replace(tensor, shape=(*tensor.shape, 1)),
    }
    before = tree(tmp_path)
    for message, other in others.items():
        named = [replace(one, file=Path("a.st")), Patch({name: other}, {}, Path("b.st"))]
        for order in (named, named[::-1]):
            with pytest.raises(RegraftError, match=message) as caught:
                apply_patch(pruned.checkpoint, order, tmp_path / "out")
            assert all(word in str(caught.value) for word in ("a.st", "b.st", name))
    assert tree(tmp_path) == before
    assert merge([one, one])[name].positions.equal(tensor.positions)


def test_the_wrong_one_of_several_is_named(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    dense, pruned = pair
    good = graft(dense, pruned)
    name, tensor = _single(good)
    bad = Patch({name: replace(tensor, base="0" * 64)}, {}, "bad.st")
    with pytest.raises(RegraftError, match=r"not the base of this patch \(bad.st\).* differ"):
        make_plan(pruned.checkpoint, [good, bad], "apply")


def test_another_patch_underneath_is_no_base(tmp_path: Path, pair: tuple[Source, Source]) -> None:
    """Unless it is named: then its weights are taken for the zeros they were."""
    dense, pruned = pair
    one, two = graft(dense, pruned, share=0.1, seed=1), graft(dense, pruned, share=0.1, seed=2)
    with_one = apply_patch(pruned.checkpoint, one, tmp_path / "one")
    with pytest.raises(
        RegraftError, match=r"differ.*other patches are applied to it, name them too"
    ):
        apply_patch(with_one, two, tmp_path / "out")
    both = apply_patch(with_one, [two, one], tmp_path / "both")
    together = apply_patch(pruned.checkpoint, [one, two], tmp_path / "together")
    assert shards(both.folder) == shards(together.folder)
    off = revert_patch(both, [one, two], tmp_path / "off")
    assert shards(off.folder) == shards(pruned.folder)
