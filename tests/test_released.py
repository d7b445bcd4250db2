"""HSR as released against an independent reading of its code, in loops over Python lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

import pico
import truth
from disk import write_data
from methods import method, restored
from regraft import stages
from regraft.data.collate import prompt_batch
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.heads.score import load_heads, score_heads
from regraft.heads.ships import HeadSettings, first_feature_angles
from regraft.models.load import open_source
from regraft.patch.format import load_patch
from regraft.pruning.base import prune_settings
from regraft.pruning.statistics import load_statistics
from regraft.restoration.importance import Band
from regraft.restoration.methods.hsr_released import (
    P_MAX,
    released_block,
    released_scores,
)
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.restoring import plan_restoration

COMPUTE = ComputeSettings(device="cpu", batch_size=4)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = truth.layer_architecture(heads=4, kv_heads=2, head_dim=2, hidden=9)


def restored_by_loops(safety, utility, role, heads, of_heads, p, q):
    """(row, column) of one matrix that the release removes from its mask.

    `of_heads` are the chosen heads of this layer, of `heads`; scores are nested lists.
    """
    rows, columns = len(safety), len(safety[0])
    flat = [(i, j) for i in range(rows) for j in range(columns)]

    def largest(score, share):
        ranked = sorted(flat, key=lambda at: (score[at[0]][at[1]], at), reverse=True)
        return set(ranked[: int(share * columns * rows)])

    found = (largest(safety, q) & largest(utility, 0.7)) - largest(utility, p)
    taken = set()
    if role not in ATTENTION:
        return taken
    for head in of_heads:
        size = columns // heads
        for row, column in found:
            if role == "o_proj" or head * size <= column < (head + 1) * size:
                taken.add((row, column))
    return taken


def pruned_by_loops(utility, sparsity):
    """(row, column) of one matrix that the release prunes: the smallest of each row."""
    taken = set()
    for i, row in enumerate(utility):
        ranked = sorted(range(len(row)), key=lambda j: (row[j], j))
        taken |= {(i, j) for j in ranked[: int(len(row) * sparsity)]}
    return taken


@st.composite
def cases(draw):
    linear = draw(st.sampled_from(LAYER.linears))
    whole = st.integers(0, 40).map(np.float32)  # ties are likely
    scores = hnp.arrays(np.float32, linear.shape, elements=whole)
    return (
        linear,
        draw(st.sets(st.integers(0, 3))),
        draw(scores),
        draw(scores),
        draw(hnp.arrays(np.bool_, linear.shape)),
        draw(st.sampled_from((0.0, 0.25, 0.5, 0.625))),
        draw(st.sampled_from((0.125, 0.5, 1.0))),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_selection_equals_loops(case):
    linear, heads, safety, utility, free, p, q = case
    blocks = [released_block(LAYER, linear, head) for head in sorted(heads)]
    blocks = [block for block in blocks if block is not None]
    scorers = [lambda rows, s=s: torch.from_numpy(s.copy())[rows] for s in (safety, utility)]
    band = Band(q, p, P_MAX, "matrix")

    def wanted(share):
        by_loops = restored_by_loops(
            safety.tolist(), utility.tolist(), linear.role, 4, heads, p, share
        )
        return sorted(at for at in by_loops if free[at])

    def positions(mask):
        return [divmod(int(at), linear.shape[1]) for at in mask.nonzero().flatten()]

    found = released_scores(torch.from_numpy(free), *scorers, blocks, band).reshape(-1)
    assert positions(found > -torch.inf) == wanted(q)
    q_open = Band(1.0, p, P_MAX, "matrix")
    scores = released_scores(torch.from_numpy(free), *scorers, blocks, q_open).reshape(-1)
    assert positions(scores > -torch.inf) == wanted(1.0)
    best = scores.double() > 1 - int(q * len(scores)) / len(scores) + 1e-6
    assert positions(best) == wanted(q), "a budget takes the same order"


@given(data=st.data(), samples=st.integers(2, 6), hidden=st.integers(1, 4), heads=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_angle_is_that_of_feature_0_alone(data, samples, hidden, heads):
    floats = st.floats(-4, 4, width=32).filter(lambda x: abs(x) > 1e-3)
    base = data.draw(hnp.arrays(np.float64, (samples, hidden), elements=floats))
    ablated = data.draw(hnp.arrays(np.float64, (heads, samples, hidden), elements=floats))
    found = first_feature_angles(torch.from_numpy(base), torch.from_numpy(ablated))
    for one, angle in zip(ablated, found.tolist(), strict=True):
        a, b = base[:, 0], one[:, 0]
        cosine = abs(a @ b) / np.sqrt((a @ a) * (b @ b))
        assert angle == pytest.approx(np.arccos(min(1.0, cosine)), abs=3e-8)
        assert angle <= np.pi / 2 + 1e-12


def test_a_feature_0_of_zeros_has_no_angle():
    """As where the final norm's first weight is 0: the other scores are still wanted."""
    states, none = torch.ones(3, 2), torch.tensor([[0.0, 1.0]] * 3)
    angles = first_feature_angles(states, torch.stack([states, none]))
    assert angles[0] < 1e-12 and angles[1].isnan()
    assert first_feature_angles(none, torch.stack([states, none])).isnan().all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next-vicuna"])
def test_head_scores_equal_one_forward_per_head(family, pico_dir, tmp_path):
    _, model, processor, architecture = truth.opened(pico_dir(family))
    examples = truth.examples(family, tmp_path, 3)
    cut = [prompt_batch(processor, examples)]
    found = score_heads(model, architecture, cut, tmp_path / "partial", HeadSettings(r_max=2))
    rows = [prompt_batch(processor, [example]).inputs for example in examples]

    def feature_0():
        return np.array([float(truth.full_forward(model, row).final[0, -1, 0]) for row in rows])

    base = feature_0()
    for layer in architecture.layers:
        for head in range(layer.heads):
            with truth.ablated(model, layer.index, head, "all", 1e-5):
                after = feature_0()
            cosine = abs(base @ after) / np.linalg.norm(base) / np.linalg.norm(after)
            angle = np.arccos(min(1.0, cosine))
            assert float(found.released[layer.index, head]) == pytest.approx(angle, abs=1e-3)
    assert found.released.std() > 1e-2, "heads must differ"
    assert found.ranked("released") != found.ranked("ships")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A dense model, one-shot Wanda at 50 % on D^u, and what HSR reads, on the same samples."""
    root = tmp_path_factory.mktemp("released")
    dense = open_source(pico.save("qwen2_vl", root / "dense", torch.bfloat16, "100KB"))
    write_data(root / "data", 4)
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    calibration = CalibrationSettings(data=data, samples=4)
    stages.write_head_scores(
        stages.Setup(dense, calibration, COMPUTE, scoring=HeadSettings(r_max=2)), root / "heads"
    )
    stages.write_statistics(stages.Setup(dense, calibration, COMPUTE), root / "statistics")
    one_shot = prune_settings(order="one-shot")
    stages.prune_checkpoint(stages.Setup(dense, calibration, COMPUTE), root / "pruned", one_shot)
    return root


def scores_of(root: Path, kind: str, linear, weight) -> list[list[float]]:
    squares = getattr(load_statistics(root / "statistics"), kind).of(linear)
    return (weight.float().abs() * squares.sqrt()).tolist()


def test_one_shot_pruning_and_the_patch_are_the_release_to_the_bit(bench, tmp_path):
    """The release prunes and restores at once, by the dense model's activations."""
    dense, pruned = open_source(bench / "dense"), open_source(bench / "pruned")
    settings = method(method="hsr-released", top_heads=3, p=0.5)
    assert settings.criterion == "released"
    files = bench / "heads", bench / "statistics"
    restored(dense, pruned, tmp_path / "patch", settings, *files)
    stages.patch_checkpoint("apply", pruned.folder, tmp_path / "patch", tmp_path / "out")
    out = open_source(tmp_path / "out")
    scores = load_heads(bench / "heads", dense.architecture).released
    ranked = sorted(
        ((float(scores[i, h]), i, h) for i in range(len(scores)) for h in range(scores.shape[1])),
        reverse=True,
    )
    counts = {}
    for layer in dense.architecture.layers:
        of_heads = [head for _, index, head in ranked[:3] if index == layer.index]
        for linear in layer.linears:
            weight = dense.checkpoint.read(linear.tensor)
            utility = scores_of(bench, "utility", linear, weight)
            gone = pruned_by_loops(utility, 0.5)
            if of_heads and linear.role in ATTENTION:
                safety = scores_of(bench, "safety", linear, weight)
                back = restored_by_loops(
                    safety, utility, linear.role, layer.heads, of_heads, 0.5, 0.5
                )
                counts[linear.role] = counts.get(linear.role, 0) + len(gone & back)
                gone -= back
            for at in gone:
                weight[at] = 0
            assert torch.equal(out.checkpoint.read(linear.tensor), weight), linear.key
    assert min(counts.values()) > 0 and counts.keys() == set(ATTENTION)
    assert load_patch(tmp_path / "patch").restored == sum(counts.values())


def test_a_budget_takes_the_highest_by_safety(bench, tmp_path):
    dense, pruned = open_source(bench / "dense"), open_source(bench / "pruned")
    files = bench / "heads", bench / "statistics"
    calibration = CalibrationSettings(
        data=DataSource(name="jsonl", path=bench / "data" / "data.jsonl"), samples=4
    )
    whole = method(method="hsr-released", top_heads=3, q=1.0)
    everything = restored(dense, pruned, tmp_path / "all", whole, *files)
    settings = method(method="hsr-released", top_heads=3, count=20)
    inputs, out = stages.Inputs(*files), tmp_path / "ranking"
    ranking = stages.write_ranking(
        stages.Setup(dense, calibration, COMPUTE), pruned, out, settings, inputs
    )
    assert len(ranking) == 20 < everything.restored
    by_tensor = {linear.tensor: (i, linear) for i, linear in enumerate(dense.architecture.linears)}
    shares = {}
    for name, one in everything.tensors.items():
        index, linear = by_tensor[name]
        weight = dense.checkpoint.read(name)
        score = torch.tensor(scores_of(bench, "safety", linear, weight)).flatten()
        for position in one.positions.tolist():
            less = int((score <= score[position]).sum())
            shares[index, position] = less / len(score)
    best = sorted(shares.values(), reverse=True)[:20]
    chosen = zip(ranking.linear.tolist(), ranking.position.tolist(), strict=True)
    assert [shares[at] for at in chosen] == pytest.approx(best, abs=1e-3)


def test_it_differs_from_the_paper_in_all_four_matrices(bench, tmp_path):
    dense, pruned = open_source(bench / "dense"), open_source(bench / "pruned")
    files = bench / "heads", bench / "statistics"
    patches = [
        restored(
            dense,
            pruned,
            tmp_path / name,
            method(name, top_heads=3, p=0.5, criterion="released"),
            *files,
        )
        for name in ("hsr", "hsr-released")
    ]
    for name in patches[0].tensors.keys() | patches[1].tensors.keys():
        a, b = (set(patch.tensors[name].positions.tolist()) for patch in patches)
        assert a != b, name


def test_screened_heads_and_old_files_lack_its_criterion(bench, tmp_path):
    dense, pruned = open_source(bench / "dense"), open_source(bench / "pruned")
    calibration = CalibrationSettings(
        data=DataSource(name="jsonl", path=bench / "data" / "data.jsonl"), samples=4
    )
    screened = HeadSettings(r_max=2, mode="screened", candidates=4)
    stages.write_head_scores(
        stages.Setup(dense, calibration, COMPUTE, scoring=screened), tmp_path / "heads"
    )
    settings = method(method="hsr-released", top_heads=3)
    files = tmp_path / "heads", bench / "statistics"
    with pytest.raises(RegraftError, match="mode exact"):
        restored(dense, pruned, tmp_path / "patch", settings, *files)
    with pytest.raises(RegraftError, match="needs every head scored exactly"):
        setup = stages.Setup(dense, calibration, COMPUTE, scoring=screened)
        plan_restoration(setup, pruned, settings, stages.ArtifactPaths.beside(tmp_path / "patch"))
    assert not (tmp_path / "patch").exists()


@pytest.mark.parametrize("setting", [{"p_max": 0.6}, {"scope": "head"}, {"passes": 4}])
def test_what_the_release_does_not_read_is_refused(setting):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        method("hsr-released", **setting)


def test_a_pruner_that_keeps_more_than_p_max_leaves_nothing(bench, tmp_path):
    dense, pruned = open_source(bench / "dense"), open_source(bench / "pruned")
    settings = method(method="hsr-released", top_heads=3, p=0.8)
    files = bench / "heads", bench / "statistics"
    assert not restored(dense, pruned, tmp_path / "patch", settings, *files).restored
