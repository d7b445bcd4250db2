"""Wanda: scores, masks, statistics and the pruner against loops over single weights and tokens."""

from __future__ import annotations

import copy

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import truth
from regraft.data.collate import batches, response_batch
from regraft.errors import RegraftError
from regraft.pruning import masks as masks_module
from regraft.pruning.base import PRUNERS, prune_settings
from regraft.pruning.masks import (
    Pattern,
    count_of,
    kth_smallest,
    smallest,
)
from regraft.pruning.pruners.wanda import PLUGIN as WANDA
from regraft.pruning.results import LayerResults, PrunedWeight
from regraft.pruning.statistics import (
    ImportanceStatistics,
    SavedStatistics,
    gather,
    load_statistics,
    save_statistics,
)

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 1.0, 1.5, 2.0, 3e38]),  # ties and extremes
)
distinct = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(0, 1e6, width=32),
)


# Masks


def smallest_by_loops(score, count):
    """Mark the `count` smallest of a list; of equal ones the first goes first."""
    order = sorted(range(len(score)), key=lambda i: (score[i], i))
    marked = set(order[: max(0, count)])
    return [i in marked for i in range(len(score))]


def mask_by_loops(score, pattern):
    """Pattern.mask, one scope at a time."""
    if pattern.n_m:
        n, m = pattern.n_m
        groups = [smallest_by_loops(group, m - n) for group in score.reshape(-1, m)]
        return np.array(groups).reshape(score.shape)
    scopes = score if pattern.scope == "row" else score.reshape(1, -1)
    floor = int(np.floor(round(pattern.sparsity * scopes.shape[1], 6)))
    return np.array([smallest_by_loops(row, floor) for row in scopes]).reshape(score.shape)


@pytest.mark.parametrize("chunk", [2**22, 5])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@given(score=matrices | distinct, data=st.data())
@settings(max_examples=60)
def test_smallest_equals_a_sort(scope, chunk, score, data):
    n = score.shape[1] if scope == "row" else score.size
    count = data.draw(st.integers(-1, n + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks_module, "_CHUNK", chunk)
        found = smallest(torch.from_numpy(score), count, scope).numpy()
    scopes = score if scope == "row" else score.reshape(1, -1)
    expected = np.array([smallest_by_loops(row, count) for row in scopes]).reshape(score.shape)
    np.testing.assert_array_equal(found, expected)


@given(matrices | distinct, st.floats(0.01, 0.99), st.sampled_from(["row", "matrix"]))
def test_mask_by_sparsity_equals_loops(score, sparsity, scope):
    pattern = Pattern(sparsity, scope)
    expected = mask_by_loops(score, pattern)
    np.testing.assert_array_equal(pattern.mask(torch.from_numpy(score)).numpy(), expected)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 5), st.data())
def test_n_m_mask_equals_loops(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    values = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    score = data.draw(hnp.arrays(np.float32, (rows, groups * m), elements=values))
    pattern = Pattern.parse_n_m(f"{n}:{m}")
    found = pattern.mask(torch.from_numpy(score))
    np.testing.assert_array_equal(found.numpy(), mask_by_loops(score, pattern))
    assert (found.view(rows, groups, m).sum(dim=2) == m - n).all()
    assert pattern.sparsity == pytest.approx(1 - n / m)


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=50), st.data())
def test_kth_smallest_equals_a_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    array = np.abs(np.array(values, dtype=np.float32))  # -0.0 has a sign bit, scores have none
    found = kth_smallest(torch.from_numpy(array), k)
    assert found.dtype == torch.float32
    assert float(found) == np.sort(array)[k - 1]


def test_kth_smallest_takes_minus_zero_for_zero() -> None:
    values = torch.tensor([2.0, -0.0, 1.0, 0.0])
    assert [float(kth_smallest(values, k)) for k in (1, 2, 3, 4)] == [0, 0, 1, 2]


@pytest.mark.parametrize("kind", ["random", "ties", "sorted", "misleading sample"])
def test_kth_smallest_of_many(kind):
    """More values than one chunk or sample holds, and values that a strided sample misjudges."""
    n = 2**22 + 7
    values = torch.rand(n, generator=torch.Generator().manual_seed(0))
    if kind == "random":
        values[:1000] = values[-1]
    elif kind == "ties":
        values = (values * 3).floor()
    elif kind == "sorted":
        values = values.sort().values
    else:
        values[:: int(n ** (1 / 3))] = 0.999
    ordered = values.sort().values
    for k in (1, 2, 1000, n // 2, n - 1, n):
        assert kth_smallest(values, k) == ordered[k - 1], k


@given(st.integers(1, 99), st.integers(0, 10**6))
@hypothesis.example(29, 100)
def test_count_is_the_floor_of_the_exact_product(percent, n):
    """0.29 * 100 is 28.999999999999996 in floats."""
    assert count_of(percent / 100, n) == percent * n // 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pattern(0), "sparsity is 0; it must be between 0 and 1"),
        (lambda: Pattern(1.0), "sparsity is 1.0; it must be between 0 and 1"),
        (lambda: Pattern.parse_n_m("4:2"), "4:2 is no N:M pattern: N must be at least 1"),
        (lambda: Pattern.parse_n_m("0:4"), "0:4 is no N:M pattern"),
        (lambda: Pattern.parse_n_m("2:2"), "2:2 is no N:M pattern"),
        (lambda: Pattern.parse_n_m("2:0"), "'2:0' is no N:M pattern"),
        (lambda: Pattern.parse_n_m("2/4"), "'2/4' is no N:M pattern; write it like 2:4"),
        (lambda: Pattern.parse_n_m("\u0662:\u0664"), "'\u0662:\u0664' is no N:M pattern"),
        (lambda: Pattern.parse_n_m(f"2:{'9' * 5000}"), "'2:999"),
        (lambda: Pattern.parse_n_m("2:4").fits((8, 6), "q"), "2:4 needs rows of a multiple of 4"),
    ],
)
def test_impossible_pattern_is_refused(make, message):
    with pytest.raises(RegraftError, match=message):
        make()


# Scores


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_score_equals_loops(rows, tokens, columns, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    inputs = rng.standard_normal((tokens, columns)).astype(np.float32)
    found = WANDA.score(torch.from_numpy(weight), WANDA.accumulate(torch.from_numpy(inputs)))
    for i in range(rows):
        for j in range(columns):
            norm = sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5
            assert float(found[i, j]) == pytest.approx(abs(float(weight[i, j])) * norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_score_is_float32_and_leaves_the_weight_alone(dtype):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    score = WANDA.score(weight, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert score.dtype == torch.float32 and torch.equal(weight, before)
    assert torch.equal(score, before.float().abs() * torch.tensor([0.0, 1.0, 2.0, 3.0]))


# Statistics


def squares_by_rows(model, processor, architecture, examples):
    """Sums over response tokens, one example at a time, no padding, whole forwards: key -> [in]."""
    sums = {}
    for example in examples:
        batch = response_batch(processor, [example])
        names = {linear.module: linear for linear in architecture.linears}
        for name, inputs in truth.linear_inputs(model, batch, list(names)).items():
            linear = names[name]
            if linear.reads_vision:  # [tiles, patches, in]; the image's tiles, not the padding
                tokens = inputs[batch.inputs["aspect_ratio_mask"].flatten().bool()]
            else:  # [1, S, in]
                tokens = inputs[0, batch.labels[0] != -100]
            tokens = tokens.reshape(-1, inputs.shape[-1]).double()
            sums[linear.key] = sums.get(linear.key, 0) + tokens.square().sum(dim=0)
    return sums


def test_statistics_are_sums_over_response_tokens(family, pico_dir, tmp_path):
    """Batched and padded against single rows: no padding, prompt or image token counts."""
    _, model, processor, architecture = truth.opened(pico_dir(family))
    examples = truth.examples(family, tmp_path, 5)
    ticks = []
    with truth.unchanged(model):
        cut = [response_batch(processor, rows) for rows in batches(examples, 3)]
        found = gather(
            truth.layerwise(model, cut),
            architecture,
            PRUNERS.get("wanda"),
            tmp_path / "work",
            ticks.append,
        )
    assert ticks == [3, 2] * len(architecture.layers)
    expected = squares_by_rows(model, processor, architecture, examples)
    assert found.keys() == expected.keys() and len(expected) == 7 * len(architecture.layers)
    for key, total in expected.items():
        torch.testing.assert_close(
            found[key].double(), total, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: k + m
        )


def test_layers_that_do_not_run_have_no_statistics(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("mllama"))
    _, model, processor, architecture = opened
    examples = truth.examples("mllama", tmp_path, 2, images=False)
    batch = response_batch(processor, examples)
    layerwise = truth.layerwise(model, [batch])
    found = gather(layerwise, architecture, PRUNERS.get("wanda"), tmp_path / "work", lambda _: None)
    assert {key.split(".")[1] for key in found} == {"0", "2", "4"}
    missing = architecture.layers[1].linear("q_proj")
    with pytest.raises(RegraftError, match=r"no wanda statistics for layers.1.cross_attn.q_proj"):
        ImportanceStatistics("wanda", found, 2).of(missing)
    with pytest.raises(RegraftError, match=r"snip keeps those of attention only"):
        ImportanceStatistics("snip", {}, 2).of(architecture.layers[0].linear("up_proj"))
    for method in ("wanda", "sparsegpt", "snip"):
        with pytest.raises(RegraftError, match=r"layers.[13].cross_attn.[qv]_proj was never used"):
            truth.prune(
                opened,
                copy.deepcopy(model),
                [batch],
                Pattern(0.5),
                tmp_path / method,
                settings=prune_settings(method),
            )


def test_overflow_is_told(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("llama"))
    model = copy.deepcopy(opened.model)
    model.get_decoder().layers[2].input_layernorm.weight.fill_(1e30)
    batch = response_batch(opened.processor, truth.examples("llama", tmp_path, 2))
    for method in ("wanda", "sparsegpt", "snip"):
        with pytest.raises(RegraftError, match=r"layers.\d.\S+ overflow in this dtype"):
            truth.prune(
                opened,
                copy.deepcopy(model),
                [batch],
                Pattern(0.5),
                tmp_path / method,
                settings=prune_settings(method),
            )


def test_statistics_survive_the_disk(tmp_path):
    safety = ImportanceStatistics("wanda", {"layers.0.q": torch.rand(4)}, 3)
    utility = ImportanceStatistics("wanda", {"layers.0.q": torch.rand(4)}, 5)
    save_statistics(tmp_path / "stats.safetensors", SavedStatistics(safety, utility, {"seed": 7}))
    loaded = load_statistics(tmp_path / "stats.safetensors")
    assert loaded.about == {"seed": 7}
    for found, expected in ((loaded.safety, safety), (loaded.utility, utility)):
        assert found.samples == expected.samples
        assert found.method == "wanda"
        assert torch.equal(found.values["layers.0.q"], expected.values["layers.0.q"])


# The pruner


def prune_by_loops(model, processor, architecture, examples, pattern, order):
    """Masks key -> [out, in]: whole forwards, single rows, sums in float64, loops over weights.

    "sequential": the statistics of a layer come from the model with all layers before it pruned.
    """
    found = {}
    dense = squares_by_rows(model, processor, architecture, examples)
    for layer in architecture.layers:
        sums = dense
        if order == "sequential":
            sums = squares_by_rows(model, processor, architecture, examples)
        for linear in layer.linears:
            weight = dict(model.named_modules())[linear.module].weight
            score = weight.abs().numpy() * np.sqrt(sums[linear.key].numpy())
            found[linear.key] = torch.from_numpy(mask_by_loops(score, pattern))
        for linear in layer.linears:
            dict(model.named_modules())[linear.module].weight[found[linear.key]] = 0
    return found


def assert_pruned(model, architecture, masks, expected, dense):
    """Masks on disk, zeros in memory, all other weights untouched."""
    for layer in architecture.layers:
        loaded = masks.load(layer)
        for linear in layer.linears:
            wrong = int((loaded[linear.key].mask ^ expected[linear.key]).sum())
            assert wrong == 0, f"{linear.key}: {wrong} weights differ from brute force"
    for name, weight in model.state_dict().items():
        linear = next((li for li in architecture.linears if f"{li.module}.weight" == name), None)
        kept = dense[name] if linear is None else dense[name].masked_fill(expected[linear.key], 0)
        assert torch.equal(weight, kept), name


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("mllama", Pattern(0.5)),
        ("qwen3_vl", Pattern(0.5)),
        ("qwen2_5_vl", Pattern(0.3, "matrix")),
        ("llava_next-vicuna", Pattern.parse_n_m("2:4")),
        ("gemma3", Pattern.parse_n_m("4:8")),
        ("mistral_sw", Pattern(0.6)),
    ],
)
def test_sequential_pruner_equals_brute_force(family, pattern, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    _, model, processor, architecture = opened
    examples = truth.examples(family, tmp_path, 5, harmful=False)
    cut = [response_batch(processor, rows) for rows in batches(examples, 2)]
    dense, pruned = state(model), copy.deepcopy(model)
    ticks = []
    masks = truth.prune(opened, pruned, cut, pattern, tmp_path / "masks", advance=ticks.append)
    assert sum(ticks) == 2 * 5 * len(architecture.layers)
    naive = copy.deepcopy(model)
    expected = prune_by_loops(naive, processor, architecture, examples, pattern, "sequential")
    assert_pruned(pruned, architecture, masks, expected, dense)
    zeros = sum(int(mask.sum()) for mask in expected.values()) / architecture.prunable
    assert zeros == pytest.approx(pattern.sparsity, abs=0.01)

    pruner, folder = prune_settings(order="one-shot"), tmp_path / "one-shot"
    with truth.unchanged(model):
        one_shot = truth.prune(opened, model, cut, pattern, folder, settings=pruner)
    naive = copy.deepcopy(model)
    at_once = prune_by_loops(naive, processor, architecture, examples, pattern, "one-shot")
    assert_pruned(naive, architecture, one_shot, at_once, dense)
    for linear in architecture.linears:
        same = torch.equal(at_once[linear.key], expected[linear.key])
        independent = linear.layer == 0 or linear.reads_vision
        assert same == independent, f"{linear.key}: pruned layers before it must change its inputs"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["qwen3_vl", "mllama"])
def test_killed_pruner_goes_on(family, method, pico_dir, tmp_path):
    """Layers with masks are applied, not calibrated; the rest come out as without a kill."""
    opened = truth.opened(pico_dir(family))
    _, model, processor, architecture = opened
    examples = truth.examples(family, tmp_path, 3, harmful=False)
    cut = [response_batch(processor, examples)]
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"pattern": Pattern(0.5), "settings": prune_settings(method)}
    whole = truth.prune(opened, first, cut, folder=tmp_path / "whole", **settings)
    place, resumed = tmp_path / "resumed", LayerResults(tmp_path / "resumed")

    class Killed(Exception):  # noqa: N818
        pass

    seen = []

    def kill(samples):
        seen.append(samples)
        if len(seen) == 4:  # two layers, of one batch each, run dense and pruned
            raise Killed

    with pytest.raises(Killed):
        truth.prune(opened, copy.deepcopy(model), cut, folder=place, **settings, advance=kill)
    assert [resumed.load(layer) is None for layer in architecture.layers][:3] == [
        False,
        False,
        True,
    ]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "resumed").iterdir()}
    assert len(times) == 2
    truth.prune(opened, second, cut, folder=place, **settings)
    for path, time in times.items():
        assert path.stat().st_mtime_ns == time, f"{path.name} was written again"
    for layer in architecture.layers:
        one, other = whole.load(layer), resumed.load(layer)
        for linear in layer.linears:
            for kind in ("mask", "weight"):
                pair = [getattr(each[linear.key], kind) for each in (one, other)]
                assert (pair[0] is None and pair[1] is None) or torch.equal(*pair)
    assert all(torch.equal(first.state_dict()[n], t) for n, t in second.state_dict().items())


def test_mask_of_any_size_survives_the_disk(tmp_path):
    """One bit a weight: sizes that fill no byte."""
    layer = truth.layer_architecture(heads=2, kv_heads=1, head_dim=3, hidden=5)
    generator = torch.Generator().manual_seed(0)
    masks = {li.key: torch.rand(li.shape, generator=generator) < 0.5 for li in layer.linears}
    disk = LayerResults(tmp_path)
    assert disk.load(layer) is None
    disk.save(layer, {key: PrunedWeight(mask=mask) for key, mask in masks.items()})
    loaded = disk.load(layer)
    assert all(torch.equal(loaded[key].mask, mask) for key, mask in masks.items())
