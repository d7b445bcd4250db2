"""Rankings: the best of all matrices, patches of them, their file, and methods under one budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

import pico
import truth
from disk import differing, equal_bytes, shards, write_data
from methods import method, restored
from regraft import stages
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import Source, open_source
from regraft.patch.apply import patched
from regraft.patch.format import load_patch
from regraft.patch.pair import restorable
from regraft.pruning.prune import zeros
from regraft.pruning.statistics import (
    ImportanceStatistics,
    SavedStatistics,
    load_statistics,
    save_statistics,
)
from regraft.restoration.base import MethodSettings
from regraft.restoration.methods.gain.step import weights_of
from regraft.restoration.ranking import (
    KEPT,
    Best,
    Edits,
    Ranking,
    empty,
    joined,
    load_ranking,
    patch_of,
    save_ranking,
)
from regraft.restoration.selection import blocks_of, inside
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages import evaluation_cache

NONE = -math.inf
matrices = st.lists(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements=st.sampled_from([NONE, NONE, -2.0, -0.0, 0.0, 0.5, 0.5, 3.0, math.inf])
        | st.floats(-9, 9, width=32),
    ),
    max_size=5,
)


@given(matrices, st.integers(0, 40), st.booleans(), st.booleans())
def test_the_best_of_all_equal_one_sort(
    keys: list[Any], count: int, swaps: bool, backwards: bool
) -> None:
    """Ties go to the earlier matrix and position; a score of -inf is no candidate.

    Gain comes by the last layer first.
    """
    best = Best(count)
    candidates = []
    for index, matrix in sorted(enumerate(keys), reverse=backwards, key=lambda one: one[0]):
        removed = torch.arange(matrix.size).flip(0).view(matrix.shape) if swaps else None
        best.add(index, torch.from_numpy(matrix), removed)
        for position, key in enumerate(matrix.flatten()):
            gone = matrix.size - 1 - position if swaps else KEPT
            if key > NONE:
                candidates.append((float(key), index, position, gone))
    expected = sorted(candidates, key=lambda one: (-one[0], one[1], one[2]))[:count]
    found = best.ranked()
    assert len(found) == len(expected)
    columns = (found.score, found.linear, found.position, found.removed)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert found.score.dtype == torch.float32
    assert {column.dtype for column in columns[1:]} == {torch.int64}


@pytest.mark.parametrize("count", [None, 3])
def test_a_score_that_is_no_number_is_refused(count: int | None) -> None:
    """As the highest of all it would take the place of the best candidates."""
    best = Best(count)
    best.add(0, torch.tensor([[1.0, 2.0, NONE]]))
    with pytest.raises(RegraftError, match=r"A score of matrix 1 is NaN"):
        best.add(1, torch.tensor([[math.nan, 2.0, 3.0]]))


# Patches of a ranking


@dataclass(frozen=True)
class Pair:
    dense: Source
    pruned: Source


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("ranking")
    dense = open_source(pico.save("llava", root / "dense", torch.bfloat16, "100KB"))
    return Pair(dense, truth.pruned_at_random(dense, root / "pruned", 0.5)[0])


def drawn(pair: Pair, count: int, *, swaps: bool) -> Ranking:
    """Random pruned weights of some matrices, every other one for a kept weight if `swaps`."""
    draw = torch.Generator().manual_seed(count)
    parts = []
    for index, linear in list(enumerate(pair.pruned.architecture.linears))[::3]:
        after = pair.pruned.checkpoint.read(linear.tensor)
        before = pair.dense.checkpoint.read(linear.tensor)
        back, kept = (
            at[torch.randperm(len(at), generator=draw)[:count]]
            for at in (
                restorable(before, after).flatten().nonzero().flatten(),
                (after != 0).flatten().nonzero().flatten(),
            )
        )
        gone = torch.full_like(back, KEPT)
        if swaps:
            gone[::2] = kept[::2]
        parts.append(torch.stack([torch.full_like(back, index), back, gone]))
    rows = torch.cat(parts, dim=1)
    linear, position, removed = rows[:, torch.randperm(rows.shape[1], generator=draw)]
    return Ranking(linear, position, removed, torch.arange(rows.shape[1], 0, -1).float())


def by_hand(pair: Pair, ranking: Ranking) -> dict[str, torch.Tensor]:
    """Every matrix that changes, weight by weight."""
    names = [linear.tensor for linear in pair.pruned.architecture.linears]
    changed: dict[str, torch.Tensor] = {}
    for index, back, gone in zip(
        *(x.tolist() for x in (ranking.linear, ranking.position, ranking.removed)), strict=True
    ):
        name = names[index]
        matrix = changed.setdefault(name, pair.pruned.checkpoint.read(name).clone())
        row, column = divmod(back, matrix.shape[1])
        matrix[row, column] = pair.dense.checkpoint.read(name)[row, column]
        if gone != KEPT:
            matrix[divmod(gone, matrix.shape[1])] = 0
    return changed


@pytest.mark.parametrize("swaps", [False, True])
def test_patch_and_put_are_the_ranking_by_hand(pair: Pair, swaps: bool, tmp_path: Path) -> None:
    ranking = drawn(pair, 9, swaps=swaps)
    gone = int((ranking.removed != KEPT).sum())
    assert bool(gone) == swaps
    expected = by_hand(pair, ranking)
    patch = patch_of(ranking, pair.dense, pair.pruned, {"a": 1})
    assert (patch.restored, patch.removed, patch.about) == (len(ranking), gone, {"a": 1})
    assert patch.tensors.keys() == expected.keys()
    for name, tensor in patch.tensors.items():
        whole = pair.pruned.checkpoint.read(name)
        whole.view(-1)[tensor.positions] = tensor.values
        assert equal_bytes(whole, expected[name])
    opened = truth.opened(pair.pruned.folder)
    with truth.unchanged(opened.model), patched(opened.model, pair.pruned.architecture, patch):
        by_patch = {n: t.clone() for n, t in opened.model.state_dict().items()}
    model = copy.deepcopy(opened.model)
    Edits(ranking, weights_of(model, pair.dense.architecture), pair.dense).put(len(ranking))
    assert all(torch.equal(t, by_patch[name]) for name, t in model.state_dict().items())
    for linear in pair.pruned.architecture.linears:
        weight = dict(model.named_modules())[linear.module].weight
        wanted = expected.get(linear.tensor, pair.pruned.checkpoint.read(linear.tensor))
        assert torch.equal(weight, wanted.float())


def test_weights_that_were_not_pruned_are_no_restored_ones(pair: Pair) -> None:
    """A method that forgets which weights are restorable would count them as restored."""
    first = pair.pruned.architecture.layers[0].linears[0]
    kept = pair.pruned.checkpoint.read(first.tensor).flatten().nonzero()[0]
    pruned = drawn(pair, 9, swaps=False)
    wrong = Ranking(torch.zeros(1, dtype=torch.int64), kept, torch.tensor([KEPT]), torch.ones(1))
    message = rf"{first.tensor}: 1 of the ranking's weights already .* position {int(kept)}\."
    with pytest.raises(RegraftError, match=message):
        patch_of(joined([pruned, wrong]), pair.dense, pair.pruned)


@pytest.mark.parametrize("swaps", [False, True])
def test_any_first_part_is_put_in_and_taken_out(pair: Pair, swaps: bool) -> None:
    """In any order, as if each were put into the pruned weights alone."""
    ranking = drawn(pair, 9, swaps=swaps)
    model = copy.deepcopy(truth.opened(pair.pruned.folder).model)
    weights = weights_of(model, pair.dense.architecture)
    edits = Edits(ranking, weights, pair.dense)
    for count in (len(ranking), 7, 0, 20, 1, len(ranking), 0):
        edits.put(count)
        expected = by_hand(pair, ranking.first(count))
        for linear, weight in zip(pair.pruned.architecture.linears, weights, strict=True):
            wanted = expected.get(linear.tensor, pair.pruned.checkpoint.read(linear.tensor))
            assert torch.equal(weight, wanted.float()), (count, linear.tensor)


def test_first_and_joined(pair: Pair) -> None:
    ranking = drawn(pair, 5, swaps=True)
    assert len(ranking.first(0)) == 0
    assert len(ranking.first(10**6)) == len(ranking)
    rest = Ranking(*(getattr(ranking, n)[7:] for n in ("linear", "position", "removed", "score")))
    both = joined([replace(ranking, about={"a": 1}).first(7), rest])
    assert both.about == {"a": 1}
    for name in ("linear", "position", "removed", "score"):
        assert torch.equal(getattr(both, name), getattr(ranking, name))
    assert not patch_of(empty(), pair.dense, pair.pruned).tensors


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_values_that_the_pruned_dtype_cannot_hold(
    value: float, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """Too small ones stay pruned and make no room; too large ones are an error."""
    linear, other = list(open_source(pico_dir("llama")).architecture.linears)[:2]
    dense, half = tmp_path / "dense", tmp_path / "half"
    pico.save("llama", dense)
    pico.save("llama", half, torch.float16)
    for folder in (dense, half):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name in (linear.tensor, other.tensor):
            tensors[name].view(-1)[:4] = 0 if folder == half else value
        save_file(tensors, path, metadata={"format": "pt"})
    pair = Pair(open_source(dense), open_source(half))
    ranking = Ranking(
        torch.tensor([0, 0, 1]),
        torch.tensor([2, 1, 0]),
        torch.tensor([50, KEPT, 60]),
        torch.ones(3),
    )
    if value > 1:
        with pytest.raises(RegraftError, match=r"do not fit .* torch.float16. Give a dense"):
            patch_of(ranking, pair.dense, pair.pruned)
        return
    patch = patch_of(ranking, pair.dense, pair.pruned)
    assert (patch.restored, patch.removed) == (0, 0)


# The file


def test_ranking_file(pair: Pair, tmp_path: Path) -> None:
    ranking = replace(drawn(pair, 4, swaps=True), about={"stage": "rank", "heads": [[0, 1]]})
    ranking = replace(ranking, position=ranking.position + 2**33)
    save_ranking(tmp_path / "a", ranking)
    save_ranking(tmp_path / "b", ranking)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = load_ranking(tmp_path / "a")
    assert found.about == ranking.about
    for name in ("linear", "position", "removed", "score"):
        one, other = getattr(found, name), getattr(ranking, name)
        assert one.dtype == other.dtype and torch.equal(one, other)
    save_ranking(tmp_path / "none", empty())
    assert len(load_ranking(tmp_path / "none")) == 0


def test_damaged_ranking_files(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "ranking"
    save_ranking(path, drawn(pair, 4, swaps=False))
    whole = path.read_bytes()
    changes = {
        "cut off": whole[:-5],
        "a bit": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        "empty": b"",
    }
    for name, content in changes.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RegraftError, match=f"{name} is damaged"):
            load_ranking(tmp_path / name)
    with pytest.raises(RegraftError, match=r"nowhere does not exist\. It should hold a ranking"):
        load_ranking(tmp_path / "nowhere")
    patch = next(iter(pair.dense.folder.glob("*.safetensors")))
    with pytest.raises(RegraftError, match="does not hold a ranking of weights"):
        load_ranking(patch)
    twice = drawn(pair, 4, swaps=False).position.clone()
    twice[:] = twice[0]
    same = torch.zeros_like(twice)
    save_ranking(
        tmp_path / "twice", replace(drawn(pair, 4, swaps=False), linear=same, position=twice)
    )
    with pytest.raises(RegraftError, match="twice: linear and position name a weight twice"):
        load_ranking(tmp_path / "twice")


def test_statistics_of_no_sample(tmp_path: Path) -> None:
    kept, none = (ImportanceStatistics("wanda", {"a": torch.ones(2)}, n) for n in (3, 0))
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, SavedStatistics(kept, none, {"inputs": {}}))
    with pytest.raises(RegraftError, match="samples: field 'utility' is 0"):
        load_statistics(path)


def test_a_statistic_may_be_negative_but_no_score(pair: Pair, tmp_path: Path) -> None:
    """A plug-in may keep signed sums, and the file holds them."""
    linear = next(iter(pair.dense.architecture.linears))
    signed = -torch.ones(linear.shape)
    kinds = [ImportanceStatistics("snip", {linear.key: signed.clone()}, 3) for _ in range(2)]
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, SavedStatistics(*kinds, {"inputs": {}}))
    loaded = load_statistics(path).utility
    assert torch.equal(loaded.of(linear), signed)
    with pytest.raises(RegraftError, match=r"layers.0.*: a score of snip is negative or NaN"):
        loaded.scorer(linear, pair.dense.weight(linear))(slice(0, 2))


# Methods under one budget, through the stages

COMPUTE = ComputeSettings(device="cpu", batch_size=4)


@dataclass(frozen=True)
class Bench:
    root: Path

    @property
    def dense(self) -> Source:
        return open_source(self.root / "dense")

    @property
    def pruned(self) -> Source:
        return open_source(self.root / "pruned")

    @property
    def calibration(self) -> CalibrationSettings:
        data = DataSource(name="jsonl", path=self.root / "data" / "data.jsonl")
        return CalibrationSettings(data=data, samples=4)

    def rank(
        self,
        out: Path,
        settings: MethodSettings,
        calibration: CalibrationSettings | None = None,
        **changes: Path | None,
    ) -> Ranking:
        files = {"heads": self.root / "heads", "statistics": self.root / "statistics"} | changes
        inputs, data = stages.Inputs(**files), calibration or self.calibration
        return stages.write_ranking(
            stages.Setup(self.dense, data, COMPUTE), self.pruned, out, settings, inputs
        )

    def pruned_weights(self) -> int:
        pairs = zip(self.dense.architecture.linears, self.pruned.architecture.linears, strict=True)
        return sum(
            int(
                restorable(
                    self.dense.checkpoint.read(a.tensor), self.pruned.checkpoint.read(b.tensor)
                ).sum()
            )
            for a, b in pairs
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("budget")
    dense = open_source(pico.save("qwen2_vl", root / "dense", torch.bfloat16, "100KB"))
    truth.pruned_at_random(dense, root / "pruned", 0.5)
    write_data(root / "data", 4)
    made = Bench(root)
    stages.write_head_scores(
        stages.Setup(dense, made.calibration, COMPUTE, scoring=HeadSettings(r_max=2)),
        root / "heads",
    )
    stages.write_statistics(stages.Setup(dense, made.calibration, COMPUTE), root / "statistics")
    return made


def importance(bench: Bench, kind: str, linear: Any) -> Any:
    squares = getattr(load_statistics(bench.root / "statistics"), kind).of(linear)
    weight = bench.dense.checkpoint.read(linear.tensor).float()
    return (weight.abs() * squares.sqrt()).numpy()


def test_both_checkpoints_are_surveyed_once_for_all_methods(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    own = evaluation_cache.survey
    monkeypatch.setattr(
        evaluation_cache, "survey", lambda *pair: (calls.append(pair), own(*pair))[1]
    )
    setup = stages.Setup(bench.dense, bench.calibration, COMPUTE)
    for count in (5, 9):
        settings = method(method="random", count=count)
        stages.write_ranking(setup, bench.pruned, tmp_path / f"ranking-{count}", settings)
    assert len(calls) == 1


def test_set_difference_is_set_algebra(bench: Bench, tmp_path: Path) -> None:
    """Top q by safety minus top p by utility, on Python sets, for the q that the budget allows.

    Of the weights that come in at the last q, a draw takes as many as there is room for.
    """
    budget = 30
    count = budget * bench.pruned_weights() // 10_000
    settings = method(method="set-difference", budget=budget)
    ranking = bench.rank(tmp_path / "ranking", settings)
    wanted = []
    for index, linear in enumerate(bench.dense.architecture.linears):
        before = bench.dense.checkpoint.read(linear.tensor)
        after = bench.pruned.checkpoint.read(linear.tensor)
        free = ((after == 0) & (before != 0)).numpy()
        rows, columns = linear.shape
        kept = 1 - free.sum() / free.size  # p
        safety, utility = (importance(bench, kind, linear) for kind in ("safety", "utility"))
        for row in range(rows):
            by_safety, by_utility = (
                sorted(range(columns), key=lambda j: (score[row, j], j))
                for score in (safety, utility)
            )
            top_p = set(by_utility[math.floor(round((1 - kept) * columns, 6)) :])
            for place, column in enumerate(by_safety):
                if free[row, column] and column not in top_p:
                    share = np.float32((place + 1) / columns)
                    wanted.append((-share, index, row * columns + column))
    wanted.sort()
    assert 0 < count < len(wanted)
    share = {(index, position): -share for share, index, position in wanted}
    found = list(zip(ranking.linear.tolist(), ranking.position.tolist(), strict=True))
    assert len(set(found)) == count
    assert [share[one] for one in found] == [-share for share, _, _ in wanted[:count]]
    last = [one for one in share if share[one] == share[found[-1]]]
    taken = [one in found for one in sorted(last)]
    assert 0 < sum(taken) < len(taken)
    assert taken != sorted(taken, reverse=True), "the first layers and rows are preferred"
    assert (ranking.removed == KEPT).all()
    again = bench.rank(tmp_path / "again", settings)
    assert torch.equal(again.position, ranking.position)


def test_hsr_under_a_budget_stays_in_its_heads_and_band(bench: Bench, tmp_path: Path) -> None:
    heads = bench.root / "heads"
    settings = method(method="hsr", budget=25, top_heads=3)
    ranking = bench.rank(tmp_path / "ranking", settings)
    assert len(ranking) == 25 * bench.pruned_weights() // 10_000
    chosen = [tuple(head) for head in ranking.about["heads"]]
    unbounded = restored(
        bench.dense,
        bench.pruned,
        tmp_path / "q1",
        method(q=1, top_heads=3),
        heads,
        bench.root / "statistics",
    )
    linears = dict(enumerate(bench.dense.architecture.linears))
    layers = {li.key: layer for layer in bench.dense.architecture.layers for li in layer.linears}
    for index in ranking.linear.unique().tolist():
        linear, own = linears[index], ranking.position[ranking.linear == index]
        layer = layers[linear.key]
        blocks = blocks_of(layer, linear, [h for i, h in chosen if i == layer.index])
        assert inside(linear.shape, blocks, torch.device("cpu")).flatten()[own].all()
        assert set(own.tolist()) <= set(unbounded.tensors[linear.tensor].positions.tolist())
    everything = bench.rank(tmp_path / "all", settings.model_copy(update={"budget": 9999.0}))
    assert len(everything) == unbounded.restored


@pytest.mark.parametrize(
    ("called", "fields"), [("hsr", {"top_heads": 4}), ("set-difference", {}), ("random", {})]
)
def test_the_number_restored_is_the_budget(
    bench: Bench, called: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """On disk: so many zeros less, and no other weight touched; shorter is a prefix."""
    pruned = bench.pruned_weights()
    settings = method(called, budget=20, **fields)
    expected = 20 * pruned // 10_000
    ranking = bench.rank(tmp_path / "ranking", settings)
    assert len(ranking) == expected > 10
    assert ranking.about["pruned"] == pruned
    assert (ranking.score.diff() <= 0).all()
    by_count = bench.rank(tmp_path / "count", method(called, count=expected, **fields))
    assert torch.equal(by_count.position, ranking.position)
    again = bench.rank(tmp_path / "ranking", settings)
    assert torch.equal(again.position, ranking.position)
    source = bench.pruned.checkpoint
    for name, count in (("whole", None), ("few", 7), ("none", 0)):
        patch = stages.write_patch(
            bench.dense, bench.pruned, tmp_path / name, settings, tmp_path / "ranking", count
        )
        assert patch.restored == (expected if count is None else count)
        assert patch.about["heads"] == ranking.about["heads"]
        expected_bytes = by_hand(Pair(bench.dense, bench.pruned), ranking.first(patch.restored))
        stages.patch_checkpoint(
            "apply", bench.pruned.folder, tmp_path / name, tmp_path / f"{name}-applied"
        )
        realigned = open_checkpoint(tmp_path / f"{name}-applied")
        assert differing(source, realigned) == expected_bytes.keys()
        for tensor, wanted in expected_bytes.items():
            assert equal_bytes(realigned.read(tensor), wanted)
        architecture = bench.pruned.architecture
        assert zeros(source, architecture) - zeros(realigned, architecture) == patch.restored
    stages.patch_checkpoint(
        "revert", tmp_path / "whole-applied", tmp_path / "whole", tmp_path / "off"
    )
    assert shards(tmp_path / "off") == shards(bench.pruned.folder)


def test_random_draws_differ_by_both_seeds(bench: Bench, tmp_path: Path) -> None:
    settings = method(method="random", count=200)
    drawn = [
        bench.rank(
            tmp_path / f"{draw_seed}-{seed}",
            settings.model_copy(update={"draw_seed": draw_seed}),
            calibration=bench.calibration.model_copy(update={"seed": seed}),
        )
        for draw_seed, seed in ((0, 0), (1, 0), (0, 1))
    ]
    sets = [set(zip(r.linear.tolist(), r.position.tolist(), strict=True)) for r in drawn]
    assert all(len(one & other) < 20 for one, other in zip(sets, sets[1:] + sets[:1], strict=True))
    sizes = torch.tensor([math.prod(li.shape) for li in bench.dense.architecture.linears])
    shares = drawn[0].linear.bincount(minlength=len(sizes)) / 200 - sizes / sizes.sum()
    assert shares.abs().max() < 0.06, "some matrices are preferred"
    with pytest.raises(RegraftError, match=r"made with something else \(seed: 0 there, 5 now\)"):
        bench.rank(
            tmp_path / "0-0",
            settings,
            calibration=bench.calibration.model_copy(update={"seed": 5}),
        )


def test_what_a_ranking_asks_for(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "ranking"
    least = 10_000 / bench.pruned_weights()
    with pytest.raises(RegraftError, match=r"less than one weight. Raise it, or give a count"):
        bench.rank(out, method(method="random", budget=0.9 * least))
    assert len(bench.rank(tmp_path / "one", method(method="random", budget=1.1 * least)))
    hsr = method(budget=20, top_heads=2)
    with pytest.raises(RegraftError, match="run `regraft analyse heads` first"):
        bench.rank(out, hsr, heads=None)
    with pytest.raises(RegraftError, match="by wanda needs statistics: run `regraft analyse stat"):
        bench.rank(out, hsr, statistics=None)
    with pytest.raises(RegraftError, match="Importance by wanda needs statistics"):
        bench.rank(out, method(method="set-difference", budget=9), statistics=None)
    with pytest.raises(RegraftError, match="holds statistics of wanda, and importance by snip is"):
        bench.rank(out, method(budget=9, top_heads=2, score="snip"))
    with pytest.raises(RegraftError, match="top_heads is 99, but only 16 heads were scored"):
        bench.rank(out, method(budget=20, top_heads=99))
    for swapped, share in (("dense", 0.2), ("pruned", 0.6)):
        pair = {"dense": bench.dense, "pruned": bench.pruned}
        other = truth.pruned_at_random(pair[swapped], tmp_path / swapped, share)[0]
        if swapped == "dense":
            with pytest.raises(RegraftError, match="Make it again with `regraft analyse heads`"):
                stages.write_ranking(
                    stages.Setup(other, bench.calibration, COMPUTE),
                    bench.pruned,
                    out,
                    hsr,
                    stages.Inputs(heads=bench.root / "heads"),
                )
        pair[swapped] = other
        with pytest.raises(RegraftError, match=f"was made from another {swapped} checkpoint"):
            stages.write_patch(**pair, out=out, settings=hsr, ranking_file=tmp_path / "one")
    assert not out.exists()
    assert not list(tmp_path.glob(".*")), "unfinished work is left behind"


def test_a_patch_is_not_a_ranking(bench: Bench, tmp_path: Path) -> None:
    settings = method(method="random", count=3)
    bench.rank(tmp_path / "ranking", settings)
    patch = tmp_path / "patch"
    stages.write_patch(
        bench.dense, bench.pruned, patch, settings, ranking_file=tmp_path / "ranking"
    )
    with pytest.raises(RegraftError, match="does not hold a ranking of weights"):
        stages.write_patch(bench.dense, bench.pruned, tmp_path / "x", settings, ranking_file=patch)
    with pytest.raises(RegraftError, match="does not hold a patch"):
        load_patch(tmp_path / "ranking")
