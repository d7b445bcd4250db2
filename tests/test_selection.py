"""HSR's selection against algebra on Python sets, and the memory that it may take."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import truth
from regraft.errors import RegraftError
from regraft.models.architecture import Block
from regraft.patch.pair import check_pair, restorable, restored_by_module, survey
from regraft.progress import Progress
from regraft.pruning.pruners.wanda import PLUGIN as WANDA
from regraft.pruning.statistics import SavedStatistics
from regraft.restoration.base import Context
from regraft.restoration.importance import (
    Band,
    best_in_regions,
    hsr_scores,
    kept_share,
    rank_share,
    top,
)
from regraft.restoration.methods.hsr_a import everything
from regraft.restoration.ranking import Best, patch_of
from regraft.restoration.selection import (
    all_heads,
    blocks_of,
    inside,
    random_heads,
    random_scores,
    regions_of,
    ties_drawn,
)
from regraft.settings.compute import ComputeSettings

SCOPES = ("row", "matrix", "head")
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
LAYER = truth.layer_architecture(heads=4, kv_heads=2, head_dim=2, hidden=5)


# Set algebra


def positions(shape):
    """All (row, column)."""
    return set(product(range(shape[0]), range(shape[1])))


def region(role, head, shape):
    """What the paper says belongs to `head`; LAYER has 4 heads of 2 rows, in 2 groups."""
    if role == "q_proj":
        return {(i, j) for i, j in positions(shape) if i // 2 == head}
    if role in ("k_proj", "v_proj"):
        return {(i, j) for i, j in positions(shape) if i // 2 == head // 2}
    if role == "o_proj":
        return {(i, j) for i, j in positions(shape) if j // 2 == head}
    return set()


def competing(scope, role, heads, shape):
    """The sets of positions within which scores are ranked."""
    if scope == "row":
        return [{(i, j) for j in range(shape[1])} for i in range(shape[0])]
    if scope == "matrix":
        return [positions(shape)]
    return [region(role, head, shape) for head in heads]


def top_set(score, share, sets):
    """Of each set all but the floor((1 - share) * n) smallest; of equal ones the first goes."""
    kept = set()
    for group in sets:
        order = sorted(group, key=lambda at: (score[at], at))
        kept |= set(order[int((1 - share) * len(order)) :])
    return kept


@st.composite
def cases(draw):
    role = draw(st.sampled_from(ROLES))
    linear = LAYER.linear(role)
    columns = linear.shape[1]
    few = st.sampled_from([-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0])  # ties and dead weights
    dense = draw(hnp.arrays(np.float32, linear.shape, elements=few | st.floats(-9, 9, width=32)))
    kept = draw(hnp.arrays(np.bool_, linear.shape))
    squares = hnp.arrays(
        np.float32,
        columns,
        elements=st.sampled_from([0.0, 1.0, 4.0, 9.0]) | st.floats(0, 9, width=32),
    )
    shares = draw(st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True).map(sorted))
    return {
        "linear": linear,
        "heads": draw(st.lists(st.integers(0, 3), unique=True)),
        "scope": draw(st.sampled_from(SCOPES)),
        "dense": dense,
        "pruned": np.where(kept, dense, 0).astype(np.float32),
        "safety": draw(squares),
        "utility": draw(squares),
        "q": Fraction(draw(st.integers(1, 20)), 20),
        "p": Fraction(shares[0], 20),
        "p_max": Fraction(shares[1], 20),
    }


def tensors(case, *names):
    return [torch.from_numpy(case[name]) for name in names]


def by_wanda(weight, squares):
    """Wanda's importance of some rows."""
    return lambda rows: WANDA.score(weight[rows], squares)


def scored(scores):
    """Flat positions of the weights that have a score, ascending."""
    return (scores > -torch.inf).flatten().nonzero().flatten()


def select_hsr(*given):
    """HSR's set."""
    return scored(hsr_scores(*given))


def as_pairs(flat, shape):
    return [(int(i) // shape[1], int(i) % shape[1]) for i in flat]


@pytest.mark.parametrize("chunk", [2**22, 7])
@settings(max_examples=250)
@given(case=cases())
def test_selection_equals_set_algebra(chunk, case):
    linear, shape, role = case["linear"], case["linear"].shape, case["linear"].role
    dense, pruned, safety, utility = tensors(case, "dense", "pruned", "safety", "utility")
    blocks = blocks_of(LAYER, linear, case["heads"])
    band = Band(float(case["q"]), float(case["p"]), float(case["p_max"]), case["scope"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regraft.restoration.importance._CHUNK", chunk)
        free = restorable(dense, pruned)
        scorers = by_wanda(dense, safety), by_wanda(dense, utility)
        found = as_pairs(select_hsr(free, *scorers, blocks, band), shape)

    score_s, score_u = (np.abs(case["dense"]) * np.sqrt(case[n]) for n in ("safety", "utility"))
    sets = competing(case["scope"], role, case["heads"], shape)
    at_zero = {at for at in positions(shape) if case["pruned"][at] == 0 != case["dense"][at]}
    in_heads = set().union(*(region(role, head, shape) for head in case["heads"]))
    edge = top_set(score_u, case["p_max"], sets) - top_set(score_u, case["p"], sets)
    wanted = top_set(score_s, case["q"], sets) & edge & at_zero & in_heads
    assert found == sorted(wanted), "flat positions in row-major order"

    whole = as_pairs(scored(everything(free, blocks)), shape)
    assert whole == sorted(at_zero & in_heads), "HSR-a"


@given(cases(), st.integers(0, 20))
def test_top_marks_as_many_as_promised(case, twentieths):
    """All but floor((1 - share) * n) of each scope, and none outside the heads for "head"."""
    linear, share = case["linear"], Fraction(twentieths, 20)
    blocks = blocks_of(LAYER, linear, case["heads"])
    score = torch.from_numpy(case["dense"]).abs()
    mask = top(score, float(share), case["scope"], blocks)
    if case["scope"] == "row":
        kept = linear.shape[1] - int((1 - share) * linear.shape[1])
        assert (mask.sum(dim=1) == kept).all()
    elif case["scope"] == "matrix":
        assert mask.sum() == mask.numel() - int((1 - share) * mask.numel())
    else:
        sizes = [(b.row_stop - b.row_start) * (b.col_stop - b.col_start) for b in blocks]
        assert mask.sum() == sum(n - int((1 - share) * n) for n in sizes)
        assert not (mask & ~inside(linear.shape, blocks, mask.device)).any()


# The same with q left open


@pytest.mark.parametrize("chunk", [2**22, 7])
@settings(max_examples=150)
@given(case=cases())
def test_scores_are_selections_for_every_q(chunk, case):
    """What q selects are the first weights by score, and q bounds the scores."""
    linear, scope = case["linear"], case["scope"]
    dense, pruned, safety, utility = tensors(case, "dense", "pruned", "safety", "utility")
    blocks = blocks_of(LAYER, linear, case["heads"])
    given = (
        restorable(dense, pruned),
        by_wanda(dense, safety),
        by_wanda(dense, utility),
        blocks,
    )
    edge = float(case["p"]), float(case["p_max"]), scope
    size = linear.shape[1] if scope == "row" else dense.numel()
    if scope == "head" and blocks:
        size = inside(linear.shape, blocks[:1], dense.device).count_nonzero()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regraft.restoration.importance._CHUNK", chunk)
        scores = hsr_scores(*given, Band(1, *edge))
        assert scores.shape == dense.shape and scores.dtype == torch.float32
        order = scores.flatten().argsort(descending=True, stable=True)
        for count in range(1, int(size) + 1):
            q = Fraction(count, int(size))
            chosen = select_hsr(*given, Band(float(q), *edge)).tolist()
            assert sorted(order[: len(chosen)].tolist()) == chosen
        q = float(case["q"])
        bounded = hsr_scores(*given, Band(q, *edge))
    taken = scored(bounded)
    assert torch.equal(bounded.flatten()[taken], scores.flatten()[taken])


@given(cases())
def test_rank_share_counts_what_matters_less(case):
    linear, shape, scope = case["linear"], case["linear"].shape, case["scope"]
    blocks = blocks_of(LAYER, linear, case["heads"])
    score = np.abs(case["dense"])
    share = rank_share(torch.from_numpy(score), scope, blocks)
    expected = np.zeros(shape, np.float32)
    for group in competing(scope, linear.role, case["heads"], shape):
        for at in group:
            expected[at] = sum((score[x], x) <= (score[at], at) for x in group) / len(group)
    assert share.dtype == torch.float32
    np.testing.assert_allclose(share.numpy(), expected, rtol=1e-6)


def test_ties_are_drawn_and_nothing_else_moves():
    generator = torch.Generator().manual_seed(2)
    share = torch.randint(1, 2**15, (64, 9), generator=generator) / 2**15
    share[:, 0], share[0, 0] = 1.0, -torch.inf  # the best of every row but one
    scores = ties_drawn(share, 3, 1)
    assert torch.equal(scores, ties_drawn(share, 3, 1))
    by_score = share.flatten()[scores.flatten().argsort(descending=True)]
    assert torch.equal(by_score, share.flatten().sort(descending=True).values)
    firsts = [int(ties_drawn(share, seed, 0)[:, 0].argmax()) for seed in range(600)]
    counts = torch.tensor(firsts).bincount(minlength=64)
    assert counts[0] == 0 and counts[1:].min() > 0
    assert abs(sum(firsts) / 600 - 32) < 3, "first rows are preferred"


def test_random_scores_are_a_fair_seeded_order():
    free = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    n = int(free.sum())
    scores = random_scores(free, 3, 1)
    assert torch.equal(scores, random_scores(free, 3, 1))
    assert torch.equal(scores > -torch.inf, free)
    assert scores[free].unique().numel() == n
    for other in (random_scores(free, 4, 1), random_scores(free, 3, 2), random_scores(free, -3, 1)):
        assert not torch.equal(scores[free].argsort(), other[free].argsort())
    wider = random_scores(torch.ones_like(free), 3, 1)
    assert torch.equal(wider[free], scores[free]), "the order depends on what else is free"
    draws = 1200
    firsts = torch.stack([random_scores(free, seed, 0)[free].argmax() for seed in range(draws)])
    counts = firsts.bincount(minlength=n)
    chi_squared = float(((counts - draws / n) ** 2 / (draws / n)).sum())
    assert chi_squared < n + 5 * (2 * n) ** 0.5, "some weights come first more often"


def test_paper_thresholds_by_hand():
    """Ten weights a row, half pruned, p = 0.5, p_max = 0.7, q = 0.3: the seventh and sixth best."""
    dense = torch.arange(1.0, 11)[None].repeat(2, 1)
    pruned = torch.where(dense > 5, dense, 0)
    utility, safety = torch.ones(10), torch.ones(10)
    safety[3] = 100.0  # weight 4 is one of the three best for safety, weight 5 is not
    blocks = [Block(0, 2, 0, 10)]
    found = select_hsr(
        restorable(dense, pruned),
        by_wanda(dense, safety),
        by_wanda(dense, utility),
        blocks,
        Band(0.3, 0.5, 0.7),
    )
    assert found.tolist() == [3, 13]
    assert found.dtype == torch.int64


def test_what_was_zero_before_was_not_kept():
    """A dense model may have zeros, and a pruner takes them first."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(40, 50, generator=generator) + 0.1
    dense[torch.rand(40, 50, generator=generator) < 0.2] = 0
    pruned = dense.masked_fill(dense < dense.median(), 0)
    free = restorable(dense, pruned)
    kept = int((pruned != 0).sum()) / dense.numel()
    assert kept_share(dense, free) == kept < 1 - int(free.sum()) / dense.numel()


def test_seeds_of_any_size_draw():
    free = torch.ones(4, 4, dtype=torch.bool)
    milliseconds = 1000 * 1_764_133_478_000
    large = random_scores(free, milliseconds, 3)
    assert not torch.equal(large, random_scores(free, milliseconds + 1, 3))


def test_no_heads_restore_nothing():
    free = torch.ones(4, 4, dtype=torch.bool)
    ones = by_wanda(torch.ones(4, 4), torch.ones(4))
    assert not len(select_hsr(free, ones, ones, [], Band(1, 0, 1)))
    assert not len(scored(everything(free, [])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_rank_as_their_float32_values(dtype):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(8, 16, generator=generator).to(dtype)
    free = torch.rand(8, 16, generator=generator) < 0.5
    squares = torch.rand(2, 16, generator=generator)
    blocks, band = [Block(2, 6, 0, 16)], Band(0.8, 0.2, 0.9)
    before = dense.clone()
    found, exact = (
        select_hsr(free, by_wanda(weight, squares[0]), by_wanda(weight, squares[1]), blocks, band)
        for weight in (dense, dense.float())
    )
    assert len(found) and torch.equal(found, exact)
    assert torch.equal(dense, before)


# Blocks and heads


def test_heads_of_one_group_share_a_block():
    counts = {role: len(blocks_of(LAYER, LAYER.linear(role), [3, 2, 0])) for role in ROLES}
    assert counts == {"q_proj": 3, "k_proj": 2, "v_proj": 2, "o_proj": 3, "down_proj": 0}
    assert blocks_of(LAYER, LAYER.linear("k_proj"), [3, 2]) == [Block(2, 4, 0, 5)]


def test_random_heads_are_seeded_distinct_and_of_the_model(pico_dir):
    architecture = truth.opened(pico_dir("mllama")).architecture
    heads = all_heads(architecture)
    assert heads == [(layer, head) for layer in range(5) for head in range(4)]
    draws = [random_heads(architecture, 6, seed) for seed in range(40)]
    assert draws == [random_heads(architecture, 6, seed) for seed in range(40)]
    assert all(len(set(draw)) == 6 and draw == sorted(draw) for draw in draws)
    assert set().union(*draws) == set(heads), "every head can be drawn"
    assert random_heads(architecture, 20, 0) == heads
    for count in (0, 21):
        with pytest.raises(RegraftError, match=f"top_heads is {count}; the model has 1 to 20"):
            random_heads(architecture, count, 0)


# From checkpoints to positions


def compared(dense, pruned, statistics, tmp_path):
    """What a method gets of two checkpoints."""
    return Context(
        dense,
        pruned,
        survey(dense, pruned),
        count=None,
        seed=0,
        compute=ComputeSettings(device="cpu"),
        progress=Progress(),
        work=tmp_path,
        statistics=statistics,
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next-vicuna", "mllama", "gemma3"])
def test_rankings_find_the_mask_regions_and_thresholds(family, pico_dir, tmp_path):
    """On two checkpoints, every pruned weight by its own: who pruned does not matter."""
    dense = truth.opened(pico_dir(family)).source
    pruned, masks = truth.pruned_at_random(dense, tmp_path / "pruned", share=0.4)
    generator = torch.Generator().manual_seed(1)
    safety, utility = (truth.random_statistics(dense.architecture, generator) for _ in range(2))
    heads, shares = [(0, 1), (1, 0), (1, 1), (3, 2)], []

    def band(share):
        shares.append(share)
        return Band(0.5, share, share + 0.2)

    context = compared(dense, pruned, SavedStatistics(safety, utility, {}), tmp_path)
    regions = regions_of(dense, heads)
    ranking = best_in_regions(context, regions, band, "wanda", hsr_scores).ranked(heads)
    assert ranking.about["heads"] == [list(head) for head in heads]
    patch = patch_of(ranking, dense, pruned)
    all_of_them = Best(None)
    for one in context.matrices():
        all_of_them.add(one.index, everything(one.free, regions(one.linear)))
    whole = patch_of(all_of_them.ranked(), dense, pruned)
    layers = pruned.architecture.layers
    places = {li.tensor: (layer, li) for layer in layers for li in layer.linears}
    assert {places[name][0].index for name in whole.tensors} == {0, 1, 3}
    roles = {places[name][1].role for name in whole.tensors}
    assert roles == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for (name, one), kept in zip(whole.tensors.items(), shares, strict=True):
        layer, linear = places[name]
        assert kept == pytest.approx(1 - masks[linear.key].float().mean())
        weight = dense.checkpoint.read(linear.tensor)
        mask = masks[linear.key] & (weight != 0)
        blocks = blocks_of(layer, linear, [h for i, h in heads if i == layer.index])
        assert torch.equal(one.positions, scored(everything(mask, blocks)))
        assert torch.equal(one.values, weight.flatten()[one.positions])
        share = int(((weight != 0) & ~mask).sum()) / mask.numel()
        importance = (by_wanda(weight, one.of(linear)) for one in (safety, utility))
        expected = select_hsr(mask, *importance, blocks, Band(0.5, share, share + 0.2))
        assert len(expected), f"{name}: nothing to compare"
        assert torch.equal(patch.tensors[name].positions, expected)
        assert torch.equal(patch.tensors[name].values, weight.flatten()[expected])
    counts = restored_by_module(whole, layers)
    restored = [len(one.positions) for one in whole.tensors.values()]
    assert sum(map(sum, counts.values())) == sum(restored)
    assert not any(counts["mlp.down_proj"])


def test_nothing_pruned_is_told(pico_dir):
    dense = truth.opened(pico_dir("llama")).source
    with pytest.raises(RegraftError, match="nothing was pruned or changed, so there is nothing"):
        check_pair(dense, dense)


# Memory

_PEAK = '''
import os, resource, sys
import torch
from regraft.pruning.pruners.wanda import PLUGIN as WANDA
from regraft.models.architecture import Block
from regraft.restoration.importance import Band, hsr_scores

def peak():
    """Bytes. Linux hands ru_maxrss of a large parent down to its child; VmHWM starts anew."""
    try:
        lines = open("/proc/self/status").read().splitlines()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def measure(scope, ties, out):
    columns, head = 11008, 128
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator)
    if ties:
        weight.sign_()
    squares = [torch.ones(columns) if ties else torch.rand(columns) for _ in range(2)]
    free = torch.zeros(out, columns, dtype=torch.bool).bernoulli_(0.5, generator=generator)
    blocks = [Block(0, out, h * head, (h + 1) * head) for h in range(columns // head)]
    scorers = [lambda rows, s=s: WANDA.score(weight[rows], s) for s in squares]
    small = [lambda rows, s=s: WANDA.score(weight[:8][rows], s) for s in squares]
    tiny = Band(0.5, 0.5, 0.7, scope)
    hsr_scores(free[:8].clone(), *small, [Block(0, 8, 0, columns)], tiny)  # warm up
    before = peak()
    found = hsr_scores(free, *scorers, blocks, Band(0.9, 0.5, 0.7, scope))
    growth = (peak() - before) / (4 * weight.numel())
    print(scope, growth, int((found > -torch.inf).count_nonzero()), flush=True)

torch.set_num_threads(1)  # a process that has used torch's threads must not be forked
for case in sys.argv[1:]:
    scope, weights, out = case.split()
    if os.fork():
        assert os.wait()[1] == 0
    else:
        measure(scope, weights == "ties", int(out))
        os._exit(0)
'''


@pytest.mark.slow
def test_the_memory_that_selection_takes():
    """A 7B model's largest matrix, 180 MB, or half of it: growth of the resident peak of a process
    of its own."""
    cases = ["row random 4096", "head random 4096", "matrix random 4096", "matrix ties 2048"]
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, *cases], capture_output=True, text=True, check=True
    )
    found = [line.split() for line in result.stdout.splitlines()]
    assert len(found) == len(cases)
    for scope, growth, count in found:
        assert int(count) > 0
        limit = {"row": 3, "head": 5, "matrix": 9}[scope]
        assert 0 < float(growth) <= limit, f"by {scope}: {growth} times the matrix"
