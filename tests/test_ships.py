"""Ships and KL against scipy, and the batched scoring of heads against one forward per head."""

from __future__ import annotations

import argparse
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.special import log_softmax, rel_entr
from transformers import Gemma2Config, Gemma2ForCausalLM

import pico
import truth
from regraft.data.collate import batches, prompt_batch
from regraft.data.example import Reading
from regraft.errors import RegraftError
from regraft.heads.score import (
    HeadScores,
    load_heads,
    save_heads,
    score_heads,
)
from regraft.heads.ships import (
    HeadSettings,
    kl_divergence,
    most_rank,
    principal_angles,
    replay_ablated,
    ships,
)
from regraft.heads.states import layers_run, rounded_again
from regraft.models.load import open_source
from regraft.models.replay import logits_of
from regraft.stages.gathering import check_r_max

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from head_agreement import largest_difference, recall
from measuring import whole
from naive_heads import naive

HALF_PI = math.pi / 2


def orthonormal(n, r, seed):
    """Random orthonormal columns, [n, r] float64."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, r)))[0]


def angles(a, b):
    return principal_angles(torch.from_numpy(a), torch.from_numpy(b)).numpy()


# Angles


@given(st.integers(1, 6), st.integers(0, 14), st.integers(0, 10**6), st.floats(-12, 0))
def test_angles_equal_scipy(r, more, seed, size):
    """Random subspaces, and those a perturbation of 1e-12 to 1 apart."""
    a, other = orthonormal(r + more, r, seed), orthonormal(r + more, r, seed + 1)
    near = np.linalg.qr(a + 10**size * other)[0]
    for b in (other, near):
        found = angles(a, b)
        assert (np.diff(found) >= 0).all(), "angles must ascend"
        # scipy takes arccos for small angles wherever large ones are beside them
        one_form = (found < math.pi / 4).all() or (found > math.pi / 4).all()
        atol = 1e-14 if one_form else 5e-8
        np.testing.assert_allclose(found, subspace_angles(a, b)[::-1], rtol=1e-7, atol=atol)


@given(
    st.lists(st.sampled_from([0.0, 1e-10, 1e-6, 0.1, 0.7853, 0.7855, 1.5, HALF_PI]), min_size=1),
    st.integers(0, 10**6),
)
def test_angles_of_known_rotations(wanted, seed):
    """Each column is turned by its own angle into its own direction; bases are rotated within."""
    r = len(wanted)
    frame = orthonormal(2 * r, 2 * r, seed)
    a, free = frame[:, :r], frame[:, r:]
    b = a * np.cos(wanted) + free * np.sin(wanted)
    found = angles(a @ orthonormal(r, r, seed + 1), b @ orthonormal(r, r, seed + 2))
    np.testing.assert_allclose(found, np.sort(wanted), rtol=1e-5, atol=2e-15)


def test_tiny_angle_keeps_its_digits():
    """arccos would give 0 for 1e-10; the sine form keeps six digits."""
    a, b = np.array([[1.0], [0.0]]), np.array([[math.cos(1e-10)], [math.sin(1e-10)]])
    np.testing.assert_allclose(angles(a, b), [1e-10], rtol=1e-9)
    assert angles(a, a) == 0 and angles(a, -a) == 0
    np.testing.assert_allclose(angles(a, np.array([[0.0], [1.0]])), [HALF_PI])


@given(st.integers(2, 8), st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6), st.data())
def test_ships_equals_the_definition(samples, hidden, heads, seed, data):
    """numpy's singular vectors and scipy's angles, one head at a time."""
    r_max = data.draw(st.integers(1, min(samples, hidden)))
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((samples, hidden))
    ablated = base + rng.standard_normal((heads, samples, hidden)) * [[[0.3]]]
    found = ships(torch.from_numpy(base), torch.from_numpy(ablated), r_max).numpy()
    np.testing.assert_allclose(found, [naive_ships(base, m, r_max) for m in ablated], atol=1e-8)
    assert (found >= 0).all() and (found <= r_max * HALF_PI + 1e-12).all()


def naive_ships(base, ablated, r_max):
    """Equation 10 for one head: [samples, hidden] twice."""
    u, v = (np.linalg.svd(m.astype(np.float64))[0][:, :r_max] for m in (base, ablated))
    return subspace_angles(u, v).sum()


def test_ships_ignores_signs_and_scale():
    base = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    variants = torch.stack([base, -base, 3 * base, base.flip(1)])  # same left singular vectors
    assert ships(base, variants, 3).max() < 1e-12


def test_ships_stays_in_range_without_change_in_float32():
    base = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert 0 <= float(ships(base, base[None], 6)) < 1e-12


# KL


@given(st.integers(1, 4), st.integers(2, 30), st.floats(0.1, 30), st.integers(0, 10**6))
def test_kl_equals_scipy(samples, vocabulary, scale, seed):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((samples, vocabulary)) * scale
    ablated = rng.standard_normal((3, samples, vocabulary)) * scale
    found = kl_divergence(torch.from_numpy(base), torch.from_numpy(ablated))
    assert found.shape == (3, samples)
    np.testing.assert_allclose(found, naive_kl(base, ablated), rtol=1e-4, atol=1e-5)
    same = kl_divergence(torch.from_numpy(base), torch.from_numpy(base))
    assert same.abs().max() < 1e-6


def naive_kl(base, ablated):
    """KL(p_base || p_ablated) in float64, [..., samples]."""
    p, q = (np.exp(log_softmax(np.asarray(x, np.float64), axis=-1)) for x in (base, ablated))
    return rel_entr(p, q).sum(axis=-1)


# All heads of a model


def every_head(architecture: Any) -> dict[int, range]:
    return {layer.index: range(layer.heads) for layer in architecture.layers}


def naive_scores(model, processor, architecture, examples, r_max, target, eps):
    """One unbatched forward, pixels to logits, per head and sample: two arrays [layers, heads]."""
    rows = [prompt_batch(processor, [example]).inputs for example in examples]

    def last(states):
        return states.final[0, -1].numpy(), states.logits[0, -1].numpy()

    base, base_logits = zip(*(last(truth.full_forward(model, row)) for row in rows), strict=True)
    shape = len(architecture.layers), max(layer.heads for layer in architecture.layers)
    angle, kl = np.full(shape, np.nan), np.full(shape, np.nan)
    for layer in architecture.layers:
        for head in range(layer.heads):
            with truth.ablated(model, layer.index, head, target, eps):
                pairs = [last(truth.full_forward(model, row)) for row in rows]
            states, logits = zip(*pairs, strict=True)
            at = layer.index, head
            angle[at] = naive_ships(np.stack(base), np.stack(states), r_max)
            kl[at] = naive_kl(np.stack(base_logits), np.stack(logits)).mean()
    return angle, kl


def assert_scores(found, expected, atol, what):
    for name, tensor, array in zip(("ships", "kl"), (found.ships, found.kl), expected, strict=True):
        np.testing.assert_allclose(
            tensor.numpy(), array, rtol=1e-3, atol=atol, err_msg=f"{what}: {name}"
        )


def test_scores_equal_one_forward_per_head(family, pico_dir, tmp_path):
    """Batches of two and one, padded on the left, against single rows; vision included."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    examples = truth.examples(family, tmp_path, 3)
    cut = [prompt_batch(processor, rows) for rows in batches(examples, 2)]
    ticks = []
    with truth.unchanged(model):
        found = score_heads(
            model,
            architecture,
            cut,
            tmp_path / "partial",
            HeadSettings(r_max=2),
            advance=ticks.append,
        )
    expected = naive_scores(model, processor, architecture, examples, 2, "all", 1e-5)
    assert_scores(found, expected, 2e-5, family)
    layers = len(architecture.layers)
    costs = [one.heads * (layers - one.index) for one in architecture.layers]  # one of each: a row
    assert ticks == [rows * cost for rows in (2, 1) for cost in costs]
    assert found.ships.dtype == found.kl.dtype == torch.float64
    assert found.ships.std() > 1e-2 and found.kl.std() > 1e-2, "heads must differ"


@pytest.mark.parametrize(("target", "eps"), [("q", 1e-5), ("k", 0.2), ("v", 1e-5), ("all", 0.2)])
def test_scores_of_each_target(target, eps, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir("qwen2_5_vl"))
    examples = truth.examples("qwen2_5_vl", tmp_path, 3)
    cut = [prompt_batch(processor, examples)]
    scoring = HeadSettings(r_max=2, target=target, eps=eps)
    found = score_heads(model, architecture, cut, tmp_path / "p", scoring)
    expected = naive_scores(model, processor, architecture, examples, 2, target, eps)
    assert_scores(found, expected, 2e-5, target)
    assert found.ships.nan_to_num().max() > 1e-3


def test_as_many_vectors_as_samples_cannot_turn():
    """They span all of R^samples, so that every angle would be rounding noise."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 4, 64, generator=generator)
    assert ships(states[0], states[1:], 4).max() < 1e-12
    assert ships(states[0], states[1:], most_rank(4, 64)).min() > 0.1


@pytest.mark.parametrize("family", ["qwen3_vl", "mllama", "llava_next-vicuna"])
def test_size_of_a_pass_does_not_matter(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    batch = prompt_batch(processor, truth.examples(family, tmp_path, 3))
    tokens = batch.inputs["input_ids"].numel()
    scores = [
        score_heads(
            model,
            architecture,
            [batch],
            tmp_path / str(t),
            HeadSettings(r_max=2, tokens_per_pass=t),
        )
        for t in (1, 2 * tokens, 3 * tokens, 100 * tokens)  # 1, 2, 2 + 2 and all 4 heads a pass
    ]
    for other in scores[1:]:
        assert_scores(other, (scores[0].ships.numpy(), scores[0].kl.numpy()), 1e-5, family)


def test_only_the_last_position_of_a_pass_is_kept(pico_dir, tmp_path, monkeypatch):
    """However many passes a layer takes, one of them holds the states of all positions."""
    _, model, processor, architecture = truth.opened(pico_dir("llava"))
    batch = prompt_batch(processor, truth.examples("llava", tmp_path, 3))
    before = []

    def watched(*args):
        assert all(one() is None for one in before)
        held = replay_ablated(*args).numpy().copy()
        before.append(weakref.ref(held))
        return torch.from_numpy(held)

    monkeypatch.setattr("regraft.heads.states.replay_ablated", watched)
    how = HeadSettings(mode="screened", r_max=2, window=4, candidates=1, tokens_per_pass=1)
    score_heads(model, architecture, [batch], tmp_path, how)
    assert len(before) > sum(layer.heads for layer in architecture.layers)


def test_benchmark_compares_replay_with_naive_forwards(pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir("llava"))
    cut = [prompt_batch(processor, truth.examples("llava", tmp_path, 3))]
    how = HeadSettings(r_max=2, target="v")
    score_heads(model, architecture, cut, tmp_path, how)
    found = naive(model, architecture, cut, [(0, 1), (1, 0)], how.eps)
    assert largest_difference(found, tmp_path / "exact") < 1e-5
    found[0, 1] += 0.25
    assert largest_difference(found, tmp_path / "exact") == pytest.approx(0.25, abs=1e-5)


def test_recall_counts_the_best_heads_that_an_estimate_finds():
    exact = torch.tensor([[4.0, 3.0], [math.nan, 1.0]])
    assert recall(torch.tensor([[9.0, 1.0], [math.nan, 5.0]]), exact, 2) == 0.5
    assert recall(torch.tensor([[9.0, 1.0], [math.nan, 5.0]]), exact, 10) == 1


def test_an_ablation_counts_as_half_a_pass_and_no_head_is_ablated_twice():
    screened = HeadSettings(mode="screened", candidates=16)
    assert HeadSettings().passes(600) == 300
    assert screened.passes(600) == 600 / 12 + 16 / 2
    assert screened.passes(6) == 6 / 12 + 6 / 2


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_benchmarks_count_from_one(text):
    assert whole("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number of at least 1"):
        whole(text)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_finished_layers_are_not_run_again(pico_dir, tmp_path):
    """A killed run loses at most the layer it was running; resumed, it writes the same bytes."""
    _, model, processor, architecture = truth.opened(pico_dir("llava"))
    examples = truth.examples("llava", tmp_path, 5)
    cut = [prompt_batch(processor, rows) for rows in batches(examples, 2)]
    layers, partial, how = len(architecture.layers), tmp_path / "partial", HeadSettings(r_max=2)
    first = score_heads(model, architecture, cut, partial, how)
    content = contents(partial)
    assert len(content) == 3 * (layers + 1)

    ticks = []

    def kill(step):
        ticks.append(step)
        if len(ticks) == layers + 2:  # two layers into the second batch
            raise KeyboardInterrupt

    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        score_heads(model, architecture, cut, killed, how, advance=kill)
    left = contents(killed)
    assert len(left) == (layers + 1) + (1 + 2), "all finished layers must be there"
    assert left.items() <= content.items()
    written = {name: (killed / name).stat().st_mtime_ns for name in left}
    resumed = score_heads(model, architecture, cut, killed, how)
    assert contents(killed) == content
    assert {name: (killed / name).stat().st_mtime_ns for name in left} == written
    no_model = torch.nn.Module()  # cannot run at all
    again = score_heads(no_model, architecture, cut, partial, how, advance=ticks.append)
    for other in (again, resumed):
        assert torch.equal(other.ships, first.ships) and torch.equal(other.kl, first.kl)
    rows = [len(batch.ids) for batch in cut]
    assert ticks[-3:] == [n * layers_run(architecture, every_head(architecture)) for n in rows]
    assert contents(partial) == content


def test_layers_that_do_not_run_have_no_score(pico_dir, tmp_path):
    """Mllama without images skips its cross-attention."""
    _, model, processor, architecture = truth.opened(pico_dir("mllama"))
    examples = truth.examples("mllama", tmp_path, 3, images=False)
    found = score_heads(
        model,
        architecture,
        [prompt_batch(processor, examples)],
        tmp_path / "p",
        HeadSettings(r_max=2),
    )
    cross = [layer.attention == "cross_attn" for layer in architecture.layers]
    assert found.ships.isnan().all(dim=1).tolist() == cross
    assert found.kl.isnan().all(dim=1).tolist() == cross
    expected = naive_scores(model, processor, architecture, examples, 2, "all", 1e-5)
    expected = [np.where(np.array(cross)[:, None], np.nan, scores) for scores in expected]
    assert_scores(found, expected, 2e-5, "text only")
    ranked = found.ranked("ships")
    assert len(ranked) == 12 and not any(cross[layer] for layer, _ in ranked)


def test_rank_beyond_the_samples_is_refused(pico_dir, tmp_path):
    prompts = Reading("prompts", tuple(truth.examples("llama", tmp_path, 3)))
    dense = open_source(pico_dir("llama"))
    check_r_max(dense, HeadSettings(r_max=2), prompts)
    with pytest.raises(RegraftError, match=r"r_max is 3, but 3 different .* at most 2"):
        check_r_max(dense, HeadSettings(r_max=3), prompts)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        HeadSettings(r_max=0)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_logits_are_the_models_own(family, cap, pico_dir, tmp_path):
    """Also if the config asks for capped logits, which Gemma 3 with images ignores."""
    _, model, processor, _ = truth.opened(pico_dir(family))
    batch = truth.make_batch("single", family, processor, tmp_path)
    config = model.get_decoder().config
    before = getattr(config, "final_logit_softcapping", None)
    with truth.unchanged(model):
        config.final_logit_softcapping = cap
        try:
            states = truth.full_forward(model, batch.inputs)
            found = logits_of(model, states.final)
        finally:
            config.final_logit_softcapping = before
    torch.testing.assert_close(found, states.logits)


def test_capped_logits_are_the_models_own(tmp_path):
    tokenizer = pico.processor("llama")
    settings = {"vocab_size": len(tokenizer), "final_logit_softcapping": 0.5}
    model = Gemma2ForCausalLM(Gemma2Config(**pico._TEXT | settings, head_dim=16)).eval()
    batch = truth.make_batch("single", "llama", tokenizer, tmp_path)
    states = truth.full_forward(model, batch.inputs)
    assert 0.1 < states.logits.abs().max() <= 0.5
    torch.testing.assert_close(logits_of(model, states.final), states.logits)


# The noise of rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_again_moves_by_one_unit_at_most(dtype):
    hidden = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    again = rounded_again(hidden, seed=1)
    assert again.dtype == dtype
    moved = again != hidden
    assert 0.1 < moved.float().mean() < 0.6
    up = torch.nextafter(hidden.abs(), torch.full_like(hidden, math.inf)) - hidden.abs()
    assert ((again - hidden).abs() <= up).all()
    assert torch.equal(again, rounded_again(hidden, seed=1))
    assert not torch.equal(again, rounded_again(hidden, seed=2))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "gemma3"])
def test_noise_floor_of_half_precision(family, pico_dir, tmp_path):
    """Measured only below float32; in bfloat16 it is near the true error of the scores."""
    architecture = truth.opened(pico_dir(family)).architecture
    model, processor = pico.build(family)
    batch = prompt_batch(processor, truth.examples(family, tmp_path, 3))
    exact = score_heads(model, architecture, [batch], tmp_path / "float32", HeadSettings(r_max=2))
    assert exact.noise is None and exact.below_noise("ships") is None
    model.to(torch.bfloat16)
    found = score_heads(model, architecture, [batch], tmp_path / "bfloat16", HeadSettings(r_max=2))
    assert found.noise.shape == (2, len(architecture.layers)) and found.noise.dtype == torch.float64
    floor, largest = found.noise.max(dim=1).values, torch.stack([exact.ships, exact.kl])
    assert (found.noise > 0).all(), "rounding must leave a trace"
    assert (floor < largest.amax(dim=(1, 2)) / 4).all(), "and be far below the best heads"
    error, noise = (found.ships - exact.ships).abs().mean(), found.noise[0].mean()
    assert noise / 5 < error < 5 * noise, "of the size of what bfloat16 does to the scores"


def test_heads_below_the_noise_are_counted():
    scores = torch.tensor([[0.1, 0.3], [0.2, math.nan]], dtype=torch.float64)
    noise = torch.tensor([[0.2, 0.3], [0.05, 0.05]], dtype=torch.float64)
    found = HeadScores(scores, scores, {}, noise=noise)
    assert found.below_noise("ships") == 2 and found.below_noise("kl") == 0
    assert HeadScores(scores, scores, {}).below_noise("ships") is None


# Screening


def test_screening_scores_the_best_exactly(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    cut = [prompt_batch(processor, truth.examples(family, tmp_path, 3))]
    exact = score_heads(model, architecture, cut, tmp_path / "exact", HeadSettings(r_max=2))
    how = HeadSettings(r_max=2, mode="screened", window=3, candidates=4)
    ticks = []
    with truth.unchanged(model):
        found = score_heads(
            model, architecture, cut, tmp_path / "screened", how, advance=ticks.append
        )
    best = {head for one in found.estimate for head in ordered(one)[:4]}
    assert set(map(tuple, found.exact.nonzero().tolist())) == best and 4 <= len(best) <= 8
    again = sum(len(architecture.layers) - layer for layer, _ in best)
    assert sum(ticks) == 3 * (layers_run(architecture, every_head(architecture)) + again)
    for scores, estimate, truly in zip(
        (found.ships, found.kl), found.estimate, (exact.ships, exact.kl), strict=True
    ):
        torch.testing.assert_close(scores[found.exact], truly[found.exact], atol=1e-5, rtol=1e-3)
        assert torch.equal(scores[~found.exact], estimate[~found.exact])
        assert (estimate - truly).abs().max() > 1e-3, "three positions are not the whole prompt"
    ranked = found.ranked("ships")
    assert set(ranked[: len(best)]) == best and len(ranked) == exact.ships.numel()
    assert ranked[: len(best)] == [h for h in ordered(found.ships) if h in best]


def test_a_window_of_the_whole_prompt_is_exact(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    cut = [prompt_batch(processor, truth.examples(family, tmp_path, 3))]
    how = HeadSettings(r_max=2, mode="screened", window=10_000, candidates=1)
    found = score_heads(model, architecture, cut, tmp_path / "screened", how)
    exact = score_heads(model, architecture, cut, tmp_path / "exact", HeadSettings(r_max=2))
    expected = exact.ships.numpy(), exact.kl.numpy()
    assert_scores(HeadScores(*found.estimate, {}), expected, 2e-5, family)


def ordered(scores):
    """(layer, head), largest score first."""
    heads = [(i, j) for i, row in enumerate(scores.tolist()) for j in range(len(row))]
    return sorted(heads, key=lambda head: -scores[head])


# Ranking


grid = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=3, max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=50)
@given(grid)
def test_ranking_is_a_stable_sort_without_the_unscored(rows):
    scores = torch.tensor(rows, dtype=torch.float64)
    heads = [(i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if not math.isnan(x)]
    expected = sorted(heads, key=lambda head: -rows[head[0]][head[1]])
    other = scores.new_zeros(scores.shape)
    assert HeadScores(scores, other, {}).ranked("ships") == expected
    assert HeadScores(other, scores, {}).ranked("kl") == expected


def test_scores_survive_the_disk(pico_dir, tmp_path):
    architecture = truth.opened(pico_dir("llama")).architecture
    scores = HeadScores(torch.rand(4, 4).double(), torch.rand(4, 4).double(), {"eps": 1e-5})
    scores.ships[1, 2] = math.nan
    parts = torch.rand(4, 4) > 0.5, torch.rand(2, 4, 4).double(), torch.rand(2, 4).double()
    save_heads(tmp_path / "all", HeadScores(scores.ships, scores.kl, {}, *parts))
    again = load_heads(tmp_path / "all", architecture)
    found = again.exact, again.estimate, again.noise
    assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
    save_heads(tmp_path / "heads.safetensors", scores)
    loaded = load_heads(tmp_path / "heads.safetensors", architecture)
    assert loaded.exact is loaded.estimate is loaded.noise is None
    torch.testing.assert_close(loaded.ships, scores.ships, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.kl, scores.kl) and loaded.about == {"eps": 1e-5}
    other = truth.opened(pico_dir("mllama")).architecture
    told = r"scores \[4, 4\] layers x heads \(kl\); the model has \[5, 4"
    with pytest.raises(RegraftError, match=told):
        load_heads(tmp_path / "heads.safetensors", other)
