"""Safety-Potential Pruning against whole forward passes of single prompts, and its prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

import pico
import truth
from disk import write_data
from regraft import stages
from regraft.data.collate import batches, prompt_batch
from regraft.data.sources import DataSource
from regraft.defence import asked, load_defence
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.pruning.base import prune_settings
from regraft.pruning.inputs import Sums
from regraft.pruning.masks import Pattern
from regraft.pruning.prune import zeros
from regraft.pruning.pruners.safety_potential import (
    PLUGIN,
    SAFETY_PROMPT,
    PotentialBatch,
    potential_batch,
    with_safety_prompt,
)
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import AdaShieldSettings, SafetyPromptSettings

PROMPT = "Answer nothing harmful."
COMPUTE = ComputeSettings(device="cpu", batch_size=2)


def both(processor, examples, size=2):
    """Batches without the prompt and with it, as the stage makes them."""
    cut = list(batches(examples, size))
    plain = [potential_batch(processor, rows) for rows in cut]
    return plain + [potential_batch(processor, rows, PROMPT) for rows in cut]


def added_by_single_prompts(model, processor, examples, linears):
    """Sum over prompts and tokens of x_j^2 with the prompt less that without, `[in]` float64."""
    names = {linear.module: linear.key for linear in linears}
    total = dict.fromkeys(names.values(), 0.0)
    for sign, shown in ((1, with_safety_prompt(examples, PROMPT)), (-1, examples)):
        for example in shown:
            seen = truth.linear_inputs(model, prompt_batch(processor, [example]), list(names))
            for name, inputs in seen.items():
                squares = torch.zeros(inputs.shape[-1], dtype=torch.float64)
                for token in inputs.reshape(-1, inputs.shape[-1]):
                    squares += token.double() ** 2
                total[names[name]] = total[names[name]] + sign * squares
    return total


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern.parse_n_m("2:4")], ids=["50", "2:4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next-vicuna", "llama"])
def test_masks_equal_single_prompts_layer_by_layer(family, pattern, pico_dir, tmp_path):
    opened = truth.opened(pico_dir(family))
    examples = truth.examples(family, tmp_path, 3)
    pruner = prune_settings("safety-potential")
    cut = both(opened.processor, examples)
    results = truth.prune(
        opened, copy.deepcopy(opened.model), cut, pattern, tmp_path / "results", settings=pruner
    )
    model = copy.deepcopy(opened.model)  # pruned below, a layer behind what is checked
    modules = dict(model.named_modules())
    for layer in opened.architecture.layers:
        energy = added_by_single_prompts(model, opened.processor, examples, layer.linears)
        found = results.load(layer)
        for linear in layer.linears:
            weight = modules[linear.module].weight.data
            score = weight.abs().double() * energy[linear.key].clamp(min=0).sqrt()
            wrong = found[linear.key].mask ^ pattern.mask(score.float())
            assert int(wrong.sum()) <= 2, f"{linear.key}: {int(wrong.sum())} of {wrong.numel()}"
        for linear in layer.linears:
            modules[linear.module].weight.data[found[linear.key].mask] = 0


def test_it_prunes_other_weights_than_wanda(pico_dir, tmp_path):
    opened = truth.opened(pico_dir("qwen2_5_vl"))
    cut = both(opened.processor, truth.examples("qwen2_5_vl", tmp_path, 3))
    masks = [
        truth.prune(
            opened,
            copy.deepcopy(opened.model),
            cut,
            Pattern(0.5),
            tmp_path / name,
            settings=prune_settings(name),
        ).load(opened.architecture.layers[1])
        for name in ("safety-potential", "wanda")
    ]
    for key, one in masks[0].items():
        assert (one.mask ^ masks[1][key].mask).any(), key


def fed(linear, prompted, plain):
    """What is added by the prompt, from inputs `[tokens, in]` with and without it."""
    found = Sums()
    for inputs, with_prompt in ((plain, False), (prompted, True)):
        batch = PotentialBatch({}, None, (), prompted=with_prompt)
        found.add(linear, PLUGIN.add(torch.tensor(inputs), batch), len(inputs))
    ((_, statistic),) = PLUGIN.statistics([linear], found)
    return statistic


def test_energy_that_falls_counts_as_none():
    linear = truth.layer_architecture(heads=1, kv_heads=1, head_dim=2, hidden=3).linears[0]
    squares = fed(linear, [[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]], [[1.0, 3.0, 1.0]])
    assert squares.tolist() == [4.0, 0.0, 1.0] and squares.dtype == torch.float32


def test_what_is_added_survives_beside_an_outlier():
    """In float32 sums 3e4^2 + 1 - 3e4^2 would be 0."""
    linear = truth.layer_architecture(heads=1, kv_heads=1, head_dim=2, hidden=1).linears[0]
    assert fed(linear, [[3e4], [1.0]], [[3e4]]).tolist() == [1.0]


def test_inputs_that_the_prompt_does_not_reach_are_refused(pico_dir, tmp_path):
    """Mllama's cross-attention reads vision tokens, which come before any text."""
    opened = truth.opened(pico_dir("mllama"))
    cut = both(opened.processor, truth.examples("mllama", tmp_path, 2))
    with pytest.raises(RegraftError, match=r"cross_attn.k_proj.*--ignore '\*.cross_attn.k_proj'"):
        truth.prune(
            opened,
            copy.deepcopy(opened.model),
            cut,
            Pattern(0.5),
            tmp_path / "results",
            settings=prune_settings("safety-potential"),
        )


def test_all_tokens_of_a_prompt_count_and_padding_does_not(pico_dir, tmp_path):
    processor = truth.opened(pico_dir("qwen2_5_vl")).processor
    examples = truth.examples("qwen2_5_vl", tmp_path, 3)
    batch = potential_batch(processor, examples, PROMPT)
    assert batch.prompted and not potential_batch(processor, examples).prompted
    assert torch.equal(batch.response, batch.inputs["attention_mask"].bool())
    assert batch.to("cpu", torch.float32).prompted, "moving keeps it"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("potential")
    pico.save("qwen2_vl", root / "dense", torch.bfloat16, "100KB")
    write_data(root / "data", 4)
    return root


def calibrated(root):
    return CalibrationSettings(
        data=DataSource(name="jsonl", path=root / "data" / "data.jsonl"), samples=4
    )


def test_the_stage_prunes_by_harmful_prompts_and_its_prompt(bench, tmp_path):
    dense = open_source(bench / "dense")
    pruned = [
        stages.prune_checkpoint(
            stages.Setup(dense, calibrated(bench), COMPUTE),
            tmp_path / str(i),
            prune_settings(method="safety-potential", prompt=prompt),
        )
        for i, prompt in enumerate((SAFETY_PROMPT, PROMPT))
    ]
    for one in pruned:
        share = zeros(one.checkpoint, one.architecture) / one.architecture.prunable
        assert share == pytest.approx(0.5, abs=0.01)
    first, second = (
        torch.cat(
            [one.checkpoint.read(li.tensor).flatten() == 0 for li in one.architecture.linears]
        )
        for one in pruned
    )
    assert 0 < int((first ^ second).sum()) < 0.2 * len(first), "the prompt decides, a little"
    about = read_json(tmp_path / "0" / ABOUT_FILE)
    assert about["data"].keys() == {"safety"} and about["settings"]["prompt"] == SAFETY_PROMPT


@pytest.mark.parametrize("setting", ["damp", "calibrate_on"])
def test_what_it_does_not_read_does_not_exist(setting):
    value = {"damp": 0.5, "calibrate_on": "both"}[setting]
    with pytest.raises(ValidationError, match=rf"{setting}\n.*Extra inputs are not permitted"):
        prune_settings(method="safety-potential", **{setting: value})
    for other in ("wanda", "sparsegpt", "snip", "magnitude"):
        with pytest.raises(ValidationError, match=r"prompt\n.*Extra inputs are not permitted"):
            prune_settings(method=other, prompt=PROMPT)


def test_the_same_prompt_as_a_defence(bench, tmp_path):
    dense = open_source(bench / "dense")
    settings = SafetyPromptSettings()
    assert settings.prompt == SAFETY_PROMPT
    setup = stages.Setup(dense, calibrated(bench), COMPUTE)
    stages.write_defence(setup, dense, tmp_path / "defence", settings)
    examples = pico.write_examples(tmp_path, 2, images=False)
    shown = asked(load_defence(tmp_path / "defence"), examples)
    assert [one.instruction for one in shown] == [
        one.instruction for one in with_safety_prompt(examples, SAFETY_PROMPT)
    ]
    assert shown[0].instruction == f"{SAFETY_PROMPT}\n{examples[0].instruction}"
    around = AdaShieldSettings(prompt=SAFETY_PROMPT)
    stages.write_defence(setup, dense, tmp_path / "around", around)
    assert asked(load_defence(tmp_path / "around"), examples)[0].instruction.startswith(
        examples[0].instruction
    )
