"""Pairs of which compression changed every weight: told from pruned ones, ranked, patched."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pico
import truth
from commands import exit_code
from disk import equal_bytes, shards
from methods import method, restored
from regraft import stages
from regraft.disk.artifact import read_artifact
from regraft.errors import RegraftError
from regraft.models.checkpoint_copy import write_edited
from regraft.models.load import Source, load_model, open_source
from regraft.patch.apply import make_plan, patched, write_plan, zeros_filled
from regraft.patch.format import FORMAT, Patch, TensorPatch, load_patch, merge, save_patch
from regraft.patch.pair import _Differences, is_changed, restorable, survey
from regraft.pruning.masks import Pattern
from regraft.pruning.pruners.sparsegpt import PLUGIN as SPARSEGPT
from regraft.pruning.pruners.sparsegpt import InverseFactor, inverse_factor, sparsegpt_prune
from regraft.restoration.base import MethodSettings
from regraft.restoration.methods.gain import step as gain_step
from regraft.restoration.ranking import KEPT, Edits, Ranking, load_ranking
from regraft.stages.ranking import check_restorable
from regraft.stages.restoring import plan_restoration

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from quantise import quantised

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF = math.inf


def rounded(dense: Source, target: Path, bits: int = 4, dtype: torch.dtype | None = None) -> Source:
    """Every prunable weight rounded to nearest; `dtype` is what it is made in and kept as."""
    edits = {
        linear.tensor: lambda weight: quantised(weight.to(dtype or weight.dtype), bits, 32)
        for linear in dense.architecture.linears
    }
    write_edited(dense.checkpoint, target, edits)
    return open_source(target)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(
        pico.save("llama", tmp_path_factory.mktemp("pair") / "dense", torch.bfloat16)
    )


@pytest.fixture(scope="module")
def changed(dense: Source) -> Source:
    return rounded(dense, dense.folder.with_name("changed"))


@pytest.fixture(scope="module")
def pruned(dense: Source) -> Source:
    return truth.pruned_at_random(dense, dense.folder.with_name("pruned"), 0.5)[0]


# Rounding to nearest


def by_the_book(weight: list[float], bits: int) -> list[float]:
    """One group, number by number: the level nearest to it of those that the definition gives."""
    low, high = min(0.0, *weight), max(0.0, *weight)
    step = (high - low) / (2**bits - 1)
    if not step:
        return [0.0] * len(weight)
    zero = round(-low / step)
    levels = [(q - zero) * step for q in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - one)) for one in weight]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([4, 7, 16, 40]))
def test_rounding_takes_the_nearest_level(seed: int, bits: int, group: int) -> None:
    """Groups of rows, the last shorter; also all of one sign, and zeros."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    weight[1].abs_()
    weight[2] = 0
    found = quantised(weight, bits, group)
    assert found.dtype == torch.float32 and (found[2] == 0).all()
    for row, values in zip(weight.tolist(), found.tolist(), strict=True):
        for start in range(0, 20, group):
            part, own = row[start : start + group], values[start : start + group]
            wanted = by_the_book(part, bits)
            step = (max(0, *part) - min(0, *part)) / (2**bits - 1)
            halfway = [
                abs(abs(w - o) - abs(w - b)) < 1e-4 * step
                for w, o, b in zip(part, own, wanted, strict=True)
            ]
            assert own == pytest.approx(wanted, rel=1e-4, abs=1e-5 * step + 1e-30) or all(halfway)
            assert len(set(own)) <= 2**bits


# The kind of a pair


def weight(seed: int = 0) -> Tensor:
    """Like a trained one: rows of different scales, and a few outliers."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(96, 1, generator=draw) + 0.5
    outliers = (torch.rand(96, 256, generator=draw) < 0.002) * 6.0 + 1
    return (0.02 * scale * outliers * torch.randn(96, 256, generator=draw)).bfloat16()


def factor() -> InverseFactor:
    draw = torch.Generator().manual_seed(5)
    mixed = torch.randn(256, 256, generator=draw) * torch.linspace(1, 0.05, 256)[:, None]
    inputs = torch.randn(900, 256, generator=draw) @ mixed
    inputs += 0.3 * torch.randn(900, 256, generator=draw)
    return inverse_factor(SPARSEGPT.accumulate(inputs), 900)


def symmetric(one: Tensor, bits: int, group: int = 64) -> Tensor:
    groups = one.float().reshape(len(one), -1, group)
    scale = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / scale).round() * scale).reshape(one.shape).to(one.dtype)


def gptq(one: Tensor, bits: int, group: int = 64) -> Tensor:
    """Column by column, columns to the right make up for each error (Frantar et al. 2023)."""
    upper, left = factor().upper, one.float().clone()
    out = torch.empty_like(left)
    for j in range(left.shape[1]):
        if j % group == 0:
            scale = left[:, j : j + group].abs().amax(1) / (2 ** (bits - 1) - 1)
        out[:, j] = (left[:, j] / scale).round().clamp(
            1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
        ) * scale
        left[:, j:] -= ((left[:, j] - out[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return out.to(one.dtype)


def ternary(one: Tensor) -> Tensor:
    scale = one.float().abs().mean(1, keepdim=True)
    return ((one.float() / scale).round().clamp(-1, 1) * scale).to(one.dtype)


def noisy(one: Tensor, amount: float) -> Tensor:
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(9))
    return (one.float() * (1 + amount * noise)).to(one.dtype)


def by_magnitude(one: Tensor, share: float) -> Tensor:
    return one.masked_fill(Pattern(share).mask(one.float().abs()), 0)


def wanda_like(one: Tensor, share: float) -> Tensor:
    norms = torch.rand(one.shape[1], generator=torch.Generator().manual_seed(2)) + 0.2
    return one.masked_fill(Pattern(share).mask(one.float().abs() * norms), 0)


def sparsegpt(one: Tensor, pattern: Pattern) -> Tensor:
    return sparsegpt_prune(one, factor(), pattern).to(one.dtype)


def sparse_and_rounded(one: Tensor) -> Tensor:
    sparse = sparsegpt(one, Pattern(0.5, n_m=(2, 4)))
    return quantised(sparse, 4).masked_fill(sparse == 0, 0)


CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"nearest, {b} bits": lambda one, b=b: quantised(one, b) for b in (2, 3, 4, 5, 6, 8)},
    **{f"symmetric, {b} bits": lambda one, b=b: symmetric(one, b) for b in (3, 4, 5, 8)},
    **{f"a row, {b} bits": lambda one, b=b: symmetric(one, b, 256) for b in (3, 4, 8)},
    **{f"gptq, {b} bits": lambda one, b=b: gptq(one, b) for b in (3, 4, 8)},
    "ternary": ternary,
    "eight-bit floats": lambda one: one.to(torch.float8_e4m3fn).to(one.dtype),
    "fine-tuned": lambda one: noisy(one, 0.01),
}
PRUNED: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"magnitude, {s}": lambda one, s=s: by_magnitude(one, s) for s in (0.01, 0.1, 0.5, 0.9)},
    **{f"wanda, {s}": lambda one, s=s: wanda_like(one, s) for s in (0.01, 0.5, 0.9)},
    **{f"sparsegpt, {s}": lambda one, s=s: sparsegpt(one, Pattern(s)) for s in (0.3, 0.5, 0.8)},
    "sparsegpt, 2:4": lambda one: sparsegpt(one, Pattern(0.5, n_m=(2, 4))),
    "sparsegpt, 2:4, then 4 bits": sparse_and_rounded,
    "magnitude, then trained": lambda one: noisy(by_magnitude(one, 0.5), 0.05),
    "whole rows": lambda one: one * (torch.arange(len(one)) % 4 > 0)[:, None],
    "one row": lambda one: one * (torch.arange(len(one)) != 1)[:, None],
}


@pytest.mark.parametrize("kind", ["changed", "pruned"])
def test_kinds(kind: str) -> None:
    wrong = []
    for name, compress in (CHANGED if kind == "changed" else PRUNED).items():
        for seed in range(3):
            found = _Differences()
            found.add(weight(seed), compress(weight(seed)))
            if found.pruned != (kind == "pruned") or found.reversed:
                wrong.append((name, found))
    assert not wrong


def test_kind_on_disk(dense: Source, changed: Source, pruned: Source) -> None:
    """All that a survey counts, by brute force."""
    weights = [
        [one.checkpoint.read(linear.tensor).double() for linear in dense.architecture.linears]
        for one in (dense, changed, pruned)
    ]
    looked = survey(dense, changed)
    assert looked.kind == "changed" and looked.grouping is None and looked.doubt is None
    assert looked.restorable == sum(
        int(((a != b) & (a != 0)).sum()) for a, b in zip(*weights[:2], strict=True)
    )
    assert looked.kept == sum(int((b != 0).sum()) for b in weights[1])
    looked = survey(dense, pruned)
    assert looked.kind == "pruned" and looked.doubt is None
    assert looked.restorable == sum(
        int(((b == 0) & (a != 0)).sum()) for a, b in zip(weights[0], weights[2], strict=True)
    )


def test_wrong_order(dense: Source, pruned: Source, tmp_path: Path) -> None:
    """Also where kept weights were updated, so that every weight differs."""
    write_edited(
        pruned.checkpoint,
        tmp_path / "updated",
        {one.tensor: lambda old: noisy(old, 0.05) for one in pruned.architecture.linears},
    )
    updated = open_source(tmp_path / "updated")
    assert survey(dense, updated).kind == "pruned"
    with pytest.raises(RegraftError, match=r"updated is pruned where .*dense is not. Give the den"):
        survey(updated, dense)
    with pytest.raises(RegraftError, match=r"pruned is pruned where .*dense is not"):
        restored(pruned, dense, tmp_path / "patch", method("random", count=9))


def test_another_fine_tune(dense: Source, changed: Source, tmp_path: Path) -> None:
    """Quantised from it: what quantisation leaves alone tells."""
    prunable = {one.tensor for one in dense.architecture.linears}
    edits = {
        name: lambda old: noisy(old, 0.05) for name in set(changed.checkpoint.tensors) - prunable
    }
    write_edited(changed.checkpoint, tmp_path / "tuned", edits)
    doubt = survey(dense, open_source(tmp_path / "tuned")).doubt
    assert doubt is not None and "embeddings, norms) are not the dense model's" in doubt


# What can be restored


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_candidates_are_weights_that_differ(
    seed: int, one: torch.dtype, other: torch.dtype
) -> None:
    """In the compressed dtype, finite and not 0 in it."""
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(5, 7, generator=draw).to(one)
    before[0, :3] = torch.tensor([0.0, 1e-30, 70_000.0]).to(one)
    after = before.to(other)
    after = torch.where(torch.rand(5, 7, generator=draw) < 0.5, after, after * 1.25)
    after[1, :2] = 0
    after[0, :3] = 3
    found = restorable(before, after, "changed")
    for i in range(5):
        for j in range(7):
            new, old = float(before[i, j].to(other)), float(after[i, j])
            assert bool(found[i, j]) == (math.isfinite(new) and new != 0 and new != old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_worth_of_changed_weights(dense: Source, dtype: torch.dtype, tmp_path: Path) -> None:
    """Gradient times the difference, one by one; no weight that a step before restored."""
    draw = torch.Generator().manual_seed(3)
    single = open_source(pico.save("llama", tmp_path / "dense", torch.float32))
    folder = pico.save("llama", tmp_path / "half", torch.bfloat16)
    pair = single, rounded(open_source(folder), tmp_path / "changed")
    linear, index = list(single.architecture.linears)[2], 2
    current = pair[1].checkpoint.read(linear.tensor).to(dtype)
    problem = gain_step.Problem(None, *pair, (), tmp_path, kind="changed")  # type: ignore[arg-type]
    value = problem.dense_weight(linear, list(pair[1].architecture.linears)[index]).to(dtype)
    back = restorable(value, current, "changed").flatten().nonzero().flatten()[::7]
    # as restored in memory: not rounded to the checkpoint's dtype, so that a difference is left
    current.view(-1)[back] = single.checkpoint.read(linear.tensor).to(dtype).reshape(-1)[back]
    none = torch.full_like(back, KEPT)
    taken = Ranking(torch.full_like(back, index), back, none, torch.ones(len(back)))
    gradients = [torch.randn(linear.shape, generator=draw) for _ in range(2)]
    found, removed = gain_step._worth(problem, linear, value, current, taken, gradients)
    assert removed is None
    safety, utility = (
        (-g.double() * (value.double() - current.double())).flatten().tolist() for g in gradients
    )
    stored = pair[1].checkpoint.read(linear.tensor).flatten()
    original = single.checkpoint.read(linear.tensor).flatten()
    wanted = torch.full((current.numel(),), -INF)
    for i in set(range(current.numel())) - set(back.tolist()):
        differs = float(original[i].to(stored.dtype)) != float(stored[i]) and float(original[i])
        if differs and utility[i] >= 0 and safety[i] + utility[i] > 0:
            wanted[i] = safety[i] + utility[i]
    assert (wanted > 0).sum() > 100
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "chosen",
    [
        method("random", budget=40),
        method("hsr-a", heads="random", top_heads=2),
        method("hsr", heads="all", score="magnitude", p=0.5, budget=40),
    ],
    ids=["random", "hsr-a", "hsr"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_methods_restore_changed_weights(
    chosen: MethodSettings, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Dense values where they say, in the compressed dtype; as budgeted; off again to the byte."""
    dense = open_source(pico.save("llama", tmp_path / "dense", torch.bfloat16))
    compressed = rounded(open_source(pico.save("llama", tmp_path / "m", dtype)), tmp_path / "c")
    patch = restored(dense, compressed, tmp_path / "patch", chosen)
    assert is_changed(patch) and patch.about["pruned"] == survey(dense, compressed).restorable
    assert patch.restored > 20 and patch.removed == 0
    if (count := chosen.how_many(patch.about["pruned"])) is not None:
        assert patch.restored == count
    on = write_plan(make_plan(compressed.checkpoint, patch, "apply"), tmp_path / "on")
    for linear in dense.architecture.linears:
        before, after, now = (
            one.read(linear.tensor).flatten()
            for one in (dense.checkpoint, compressed.checkpoint, on)
        )
        part = patch.tensors.get(linear.tensor)
        at = torch.empty(0, dtype=torch.int64) if part is None else part.positions
        assert (before.to(dtype)[at] != after[at]).all(), "nothing was changed there"
        after[at] = before.to(dtype)[at]
        assert equal_bytes(now, after)
    assert zeros_filled(compressed.checkpoint, patch) == sum(
        int((compressed.checkpoint.read(n).flatten()[t.positions] == 0).sum())
        for n, t in patch.tensors.items()
    )
    write_plan(make_plan(on, load_patch(tmp_path / "patch"), "revert"), tmp_path / "off")
    assert shards(tmp_path / "off") == shards(compressed.folder)
    network = load_model(compressed)
    weights = dict(network.named_modules())
    with patched(network, compressed.architecture, patch):
        for linear in compressed.architecture.linears:
            held = weights[linear.module].weight.data
            assert equal_bytes(held, on.read(linear.tensor).to(held.dtype))


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (method("gain", swap=True), "a swap prunes a weight that pruning kept. Leave out --swap"),
        (method("hsr", heads="all"), "is what pruning kept. Give --p"),
        (method("hsr-released", heads="all"), "is what pruning kept. Give --p"),
        (method("set-difference"), "is what pruning kept. Give --p"),
    ],
    ids=lambda one: getattr(one, "method", ""),
)
def test_what_needs_a_pruned_model(
    chosen: MethodSettings, why: str, dense: Source, changed: Source, pruned: Source, tmp_path: Path
) -> None:
    """Refused before any work; not where the model is pruned, nor with p."""
    check_restorable(chosen, survey(dense, pruned))
    with pytest.raises(RegraftError, match=rf"needs a pruned model, .* are changed, not .*{why}"):
        check_restorable(chosen, survey(dense, changed))
    setup, paths = stages.Setup(dense), stages.ArtifactPaths.beside(tmp_path / "patch")
    with pytest.raises(RegraftError, match=why):
        plan_restoration(setup, changed, chosen, paths)
    assert not list(tmp_path.iterdir())
    if "p" in type(chosen).model_fields:
        check_restorable(method(chosen.method, p=0.5), survey(dense, changed))


def test_edits_put_on_and_off(dense: Source, changed: Source) -> None:
    linears = list(dense.architecture.linears)
    weights = [changed.checkpoint.read(one.tensor) for one in linears]
    before = [one.clone() for one in weights]
    at = torch.tensor([5, 900, 17])
    ranking = Ranking(torch.tensor([0, 1, 0]), at, torch.full((3,), KEPT), torch.ones(3))
    edits = Edits(ranking, weights, dense)
    for count in (3, 1, 2, 0):
        edits.put(count)
        for index, weight in enumerate(weights):
            wanted = before[index].flatten().clone()
            for i in range(count):
                if int(ranking.linear[i]) == index:
                    original = dense.checkpoint.read(linears[index].tensor).flatten()
                    wanted[at[i]] = original[at[i]]
            assert equal_bytes(weight.flatten(), wanted)


# The patch


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.booleans())
def test_patch_file_keeps_what_was_there(seed: int, dtype: torch.dtype, zeros: bool) -> None:
    """Of any values, zeros of both signs among them."""
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(8, 9, generator=draw).to(dtype)
    if zeros:
        before *= torch.rand(8, 9, generator=draw) < 0.5
    positions = torch.randperm(72, generator=draw)[:20].sort().values
    values = (torch.randn(20, generator=draw) + 9).to(dtype)
    patch = Patch({"a.weight": TensorPatch.of(before, positions, values)}, {"kind": "changed"})
    with TemporaryDirectory() as folder:
        save_patch(Path(folder) / "patch", patch)
        found = load_patch(Path(folder) / "patch").tensors["a.weight"]
    assert equal_bytes(found.before, before.flatten()[positions])
    assert equal_bytes(found.values, values) and torch.equal(found.positions, positions)
    assert found.restored == 20


def test_two_patches_that_share_weights(dense: Source, changed: Source, tmp_path: Path) -> None:
    """On in any order, off one after the other, to the byte."""
    patches = []
    for seed in (0, 1):
        chosen = method("random", budget=3000, draw_seed=seed)
        patches.append(restored(dense, changed, tmp_path / f"patch-{seed}", chosen))
    shared = [
        torch.isin(patches[0].tensors[name].positions, patches[1].tensors[name].positions).sum()
        for name in patches[0].tensors.keys() & patches[1].tensors.keys()
    ]
    assert sum(shared) > 100 and len(merge(patches)) == len(shared)
    both = write_plan(make_plan(changed.checkpoint, patches, "apply"), tmp_path / "both")
    write_plan(make_plan(both, patches[::-1], "revert"), tmp_path / "off")
    assert shards(tmp_path / "off") == shards(changed.folder)
    with pytest.raises(RegraftError, match="is not the base of this patch"):
        make_plan(both, patches[0], "revert")


def test_not_for_another_rounding(dense: Source, changed: Source, tmp_path: Path) -> None:
    patch = restored(dense, changed, tmp_path / "patch", method("random", budget=40))
    other = rounded(dense, tmp_path / "other", bits=3)
    with pytest.raises(RegraftError, match="is not the base of this patch"):
        make_plan(other.checkpoint, patch, "apply")


# What the user is told


def test_it_is_told(dense: Source, changed: Source, tmp_path: Path, capsys: Any) -> None:
    def run(*words: object) -> str:
        assert exit_code(*words) == 0
        return " ".join(capsys.readouterr().out.split())

    count = survey(dense, changed).restorable
    kind = f"changed: {count:,} weights differ from the dense model's"
    assert kind in run("analyse", "model", changed.folder, "--dense", dense.folder)
    random = ("realign", "random", dense.folder, changed.folder, "--budget", 40)
    found = run(*random, "--out", tmp_path / "patch.safetensors")
    assert f"The model is {kind}" in found
    assert f"{int(40 * count / 10_000):,} weights restored" in found
    assert f"per 10,000 of {count:,} changed weights" in found
    assert load_ranking(tmp_path / "patch.ranking.safetensors").about["kind"] == "changed"


def test_pruned_pairs_say_nothing_new(dense: Source, pruned: Source, tmp_path: Path) -> None:
    """Their artifacts are those of earlier versions."""
    patch = restored(dense, pruned, tmp_path / "patch", method("random", budget=40))
    assert "kind" not in patch.about and not is_changed(patch)
    _, stored = read_artifact(tmp_path / "patch", FORMAT, "a patch")
    assert {name.rpartition(".")[2] for name in stored} <= {"positions", "values", "minus"}
