"""All pruners on all families: SNIP against autograd, streamed against resident, patterns."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import truth
from regraft import distributed
from regraft.data.collate import batches, response_batch
from regraft.errors import RegraftError
from regraft.models.architecture import decoder_layers
from regraft.models.placement import PlacedModel
from regraft.pruning.base import PRUNERS, prune_settings
from regraft.pruning.gradients import BOTH_WAYS
from regraft.pruning.masks import Pattern, assign_patterns
from regraft.pruning.prune import edits_without_data
from regraft.pruning.statistics import ImportanceStatistics, gather


def gradients_by_autograd(model, processor, architecture, examples):
    """Mean over samples of |dL/dW|, whole forward and backward passes of single rows."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    weights = {li.key: modules[li.module].weight.requires_grad_() for li in architecture.linears}
    sums = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for example in examples:
        batch = response_batch(processor, [example])
        logits = model(**batch.inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), batch.labels[0, 1:], ignore_index=-100)
        for (_, total), gradient in zip(
            sums.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            total += gradient.abs()
    return {key: total / len(examples) for key, total in sums.items()}


def calibration(opened, family, folder, n=5, size=2):
    examples = truth.examples(family, folder, n, harmful=False)
    return examples, [response_batch(opened.processor, rows) for rows in batches(examples, size)]


def test_snip_equals_autograd_on_the_whole_model(family, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    _, model, processor, architecture = opened
    examples, cut = calibration(opened, family, tmp_path, 3)
    expected = gradients_by_autograd(model, processor, architecture, examples)
    ticks = []
    with truth.unchanged(model):
        layerwise = truth.layerwise(model, cut)
        found = gather(
            layerwise, architecture, PRUNERS.get("snip"), tmp_path / "work", ticks.append
        )
    assert sum(ticks) == BOTH_WAYS * 3 * len(architecture.layers)
    assert found.keys() == {li.key for li in architecture.linears if PRUNERS.get("snip").keeps(li)}
    for key, gradient in found.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=2e-5 * scale)
    assert not list((tmp_path / "work" / "states").iterdir()), "layer inputs are left behind"


def test_snip_masks_are_the_smallest_products(pico_dir, tmp_path):
    family = "qwen2_5_vl"
    opened = truth.opened(pico_dir(family))
    _, model, processor, architecture = opened
    examples, cut = calibration(opened, family, tmp_path, 3)
    pattern = Pattern(0.5, "matrix")
    with truth.unchanged(model):
        results = truth.prune(
            opened, model, cut, pattern, tmp_path / "r", settings=prune_settings("snip")
        )
    expected = gradients_by_autograd(model, processor, architecture, examples)
    modules = dict(model.named_modules())
    for layer in architecture.layers:
        for key, result in results.load(layer).items():
            linear = next(li for li in layer.linears if li.key == key)
            score = modules[linear.module].weight.abs() * expected[key]
            wrong = int((result.mask ^ pattern.mask(score)).sum())
            assert wrong <= 2, f"{key}: {wrong} of {score.numel()} differ from autograd's"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip"])
def test_streamed_equals_resident(family, method, pico_dir, tmp_path):
    """One layer at a time gives the same bits, and leaves the model alone."""
    opened = truth.opened(pico_dir(family))
    _, model, _, architecture = opened
    _, cut = calibration(opened, family, tmp_path, 3)
    pattern, pruner = Pattern(0.5), prune_settings(method)
    folders = tmp_path / "resident", tmp_path / "streamed"
    resident = truth.prune(opened, copy.deepcopy(model), cut, pattern, folders[0], settings=pruner)
    homes = [[p.data_ptr() for p in layer.parameters()] for layer in decoder_layers(model)]
    held = []

    def look(*_):
        held.append(
            [
                i
                for i, layer in enumerate(decoder_layers(model))
                if [p.data_ptr() for p in layer.parameters()] != homes[i]
            ]
        )

    hooks = [layer.register_forward_hook(look) for layer in decoder_layers(model)]
    try:
        with truth.unchanged(model):
            streamed = truth.prune(
                opened, model, cut, pattern, folders[1], settings=pruner, streamed=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    assert held and all(len(layers) <= 1 for layers in held)
    assert {i for layers in held for i in layers} == {layer.index for layer in architecture.layers}
    for layer in architecture.layers:
        one, other = resident.load(layer), streamed.load(layer)
        assert one.keys() == other.keys() == {li.key for li in layer.linears}
        for key in one:
            kind = "weight" if method == "sparsegpt" else "mask"
            assert torch.equal(getattr(one[key], kind), getattr(other[key], kind)), key


def test_sparsegpt_stores_what_the_file_holds(pico_dir, tmp_path):
    """Exact zeros at the sparsity, survivors updated, in the checkpoint's dtype."""
    opened = truth.opened(pico_dir("llava_next-mistral"))
    _, model, _, architecture = opened
    _, cut = calibration(opened, "llava_next-mistral", tmp_path, 4)
    results = truth.prune(
        opened,
        copy.deepcopy(model),
        cut,
        Pattern.parse_n_m("2:4"),
        tmp_path / "r",
        settings=prune_settings("sparsegpt"),
    )
    edits = results.edits(architecture)
    for linear in architecture.linears:
        dense = opened.source.checkpoint.read(linear.tensor)
        new = edits[linear.tensor](dense.clone())
        assert new.dtype == dense.dtype
        kept = new.reshape(-1, 4) != 0
        assert (kept.sum(dim=1) == 2).all(), linear.key
        survivors = new[new != 0], dense[new != 0]
        assert not torch.equal(*survivors), f"{linear.key}: no survivor was updated"


def test_growing_damping_is_told(pico_dir, tmp_path):
    """Few tokens and almost no damping: the factorisation fails until the damping has grown."""
    opened = truth.opened(pico_dir("llama"))
    _, cut = calibration(opened, "llama", tmp_path, 1)
    said = []
    truth.prune(
        opened,
        copy.deepcopy(opened.model),
        cut,
        Pattern(0.5),
        tmp_path / "r",
        settings=prune_settings("sparsegpt", damp=1e-9),
        note=said.append,
    )
    assert any("the damping had to grow from 1e-09 to" in line for line in said)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip"])
def test_ignored_weights_stay_dense(method, pico_dir, tmp_path):
    family = "qwen2_vl"
    opened = truth.opened(pico_dir(family))
    architecture = opened.architecture
    _, cut = calibration(opened, family, tmp_path, 3)
    settings = prune_settings(
        method=method,
        sparsity=0.5,
        scope="row",
        ignore=("layers.1.*", "*.down_proj"),
    )
    patterns = settings.patterns(architecture.linears)
    model = copy.deepcopy(opened.model)
    results = truth.prune(
        opened, model, cut, patterns, tmp_path / "r", settings=settings, streamed=True
    )
    edits = results.edits(architecture)
    for linear in architecture.linears:
        dense = opened.source.checkpoint.read(linear.tensor)
        new = edits[linear.tensor](dense.clone())
        zeros = (new == 0).float().mean(dim=1)  # [out]
        if fnmatchcase(linear.key, "layers.1.*") or linear.role == "down_proj":
            assert torch.equal(new, dense), linear.key
        else:
            assert (zeros == 0.5).all(), linear.key


def test_magnitude_needs_no_model(pico_dir):
    opened = truth.opened(pico_dir("qwen2_vl"))
    patterns = assign_patterns(opened.architecture.linears, Pattern(0.3, "matrix"), ["*.o_proj"])
    edits = edits_without_data(prune_settings("magnitude"), patterns)
    assert len(edits) == 6 * len(opened.architecture.layers)
    for linear in patterns:
        dense = opened.source.checkpoint.read(linear.tensor)
        new = edits[linear.tensor](dense.clone())
        gone = new == 0
        assert int(gone.sum()) == int(0.3 * dense.numel())
        assert dense[gone].abs().max() <= dense[~gone].abs().min()
        assert torch.equal(new[~gone], dense[~gone])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignore": ("layers.99.*",)}, r"'layers.99.\*' matches no prunable weight; they are"),
        ({"ignore": ("*",)}, "nothing to prune"),
        ({"n_m": "3:5"}, r"3:5 needs rows of a multiple of 5 weights; layers.0"),
    ],
)
def test_impossible_patterns_are_refused(fields, message, pico_dir):
    opened = truth.opened(pico_dir("llama"))
    with pytest.raises((RegraftError, ValueError), match=message):
        prune_settings(**fields).patterns(opened.architecture.linears)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip", "magnitude"])
def test_importance_of_rows_is_the_rows_of_importance(method, pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_vl"))
    _, cut = calibration(opened, "qwen2_vl", tmp_path, 2)
    layerwise = truth.layerwise(opened.model, cut)
    values = gather(
        layerwise, opened.architecture, PRUNERS.get(method), tmp_path / "work", lambda _: None
    )
    statistics = ImportanceStatistics(method, values, 2)
    linear = opened.architecture.layers[1].linear("q_proj")
    weight = opened.source.checkpoint.read(linear.tensor)
    importance = statistics.scorer(linear, weight)
    whole = importance(slice(0, len(weight)))
    assert whole.shape == weight.shape and whole.dtype == torch.float32 and (whole >= 0).all()
    assert torch.equal(importance(slice(5, 9)), whole[5:9])


def test_one_process_says_what_is_finished(pico_dir, tmp_path, monkeypatch):
    """The others' disk may not show a file yet; whatever they see, all do the same."""
    opened = truth.opened(pico_dir("llama"))
    _, cut = calibration(opened, "llama", tmp_path, 2)
    model = copy.deepcopy(opened.model)
    results = truth.prune(opened, model, cut, Pattern(0.5), tmp_path / "r")
    layer = opened.architecture.layers[0]
    assert results.load(layer)
    monkeypatch.setattr(distributed, "decided", lambda _question: False)
    assert results.load(layer) is None
    monkeypatch.setattr(distributed, "decided", lambda _question: True)
    layerwise, wanda = truth.layerwise(model, cut), PRUNERS.get("wanda")
    with pytest.raises(RegraftError, match="unfinished work, is damaged"):
        gather(layerwise, opened.architecture, wanda, tmp_path / "none", lambda _: None)


def test_one_shot_holds_each_layer_once(pico_dir, tmp_path, monkeypatch):
    """A streamed layer stays on the device from its statistics to its masks."""
    opened = truth.opened(pico_dir("llama"))
    _, cut = calibration(opened, "llama", tmp_path, 2)
    held, hold = [], PlacedModel.layer
    monkeypatch.setattr(
        PlacedModel, "layer", lambda self, index: held.append(index) or hold(self, index)
    )
    settings = prune_settings("wanda", order="one-shot")
    truth.prune(
        opened, opened.model, cut, Pattern(0.5), tmp_path / "r", settings=settings, streamed=True
    )
    assert held == list(range(len(opened.architecture.layers)))


def test_snip_in_float16_is_refused(pico_dir, tmp_path):
    """Its gradients would vanish silently."""
    opened = truth.opened(pico_dir("llama"))
    _, cut = calibration(opened, "llama", tmp_path, 2)
    model = copy.deepcopy(opened.model).half()
    with pytest.raises(RegraftError, match="too small for float16"):
        truth.prune(
            opened, model, cut, Pattern(0.5), tmp_path / "r", settings=prune_settings("snip")
        )
