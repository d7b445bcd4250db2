"""Quantised checkpoints are evaluated with their dequantised weights, and never pruned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pico
from disk import write_data
from regraft import stages
from regraft.cli import main
from regraft.data.sources import DataSource
from regraft.defence import Direction, save_defence
from regraft.errors import RegraftError
from regraft.models.checkpoint import SINGLE_FILE
from regraft.models.load import load_model, open_answering, open_source
from regraft.runs import comparing
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings

pytest.importorskip("compressed_tensors")

GROUP = 16
# bits, group size (None: a scale a row), the format that it is saved in
SCHEMES: dict[str, tuple[int, int | None, str | None]] = {
    "int4 in groups, packed": (4, GROUP, "pack-quantized"),
    "int8 by row, packed": (8, None, "pack-quantized"),
    "int8 by row": (8, None, "int-quantized"),
    "int8 by row, naive": (8, None, "naive-quantized"),
}


def rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Symmetric rounding by hand: scales `[out, groups]` and the rounded weight."""
    size = group or weight.shape[1]
    cut = weight.unflatten(1, (-1, size))  # [out, groups, size]
    most = 2 ** (bits - 1)
    scale = (cut.abs().amax(-1, keepdim=True) * 2 / (2 * most - 1)).clamp(min=1e-8)
    whole = (cut / scale).round().clamp(-most, most - 1)
    return scale[..., 0], (whole * scale).flatten(1)


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of the text decoder."""
    layers = model.get_decoder().layers  # type: ignore[operator, union-attr]
    found = layers.named_modules()
    return [(name, one) for name, one in found if isinstance(one, nn.Linear)]


def save_quantised(scheme: str, folder: Path) -> Path:
    """Write a pico LLaVA whose decoder is quantised, as compressed-tensors saves it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    bits, group, layout = SCHEMES[scheme]
    model, processor = pico.build("llava")
    how = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    how |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {"all": {"targets": ["Linear"], "weights": how}},
            "ignore": ["lm_head", "re:.*vision.*", "re:.*projector.*"],
            "quantization_status": "frozen",
        }
    )
    apply_quantization_config(model, config)
    for _, linear in linears(model):
        scale, _ = rounded(linear.weight.data, bits, group)
        linear.weight_scale.data.copy_(scale)  # type: ignore[operator, union-attr]
    compressor = ModelCompressor.from_pretrained_model(model, layout)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    processor.save_pretrained(folder)
    return folder


def save_dequantised(scheme: str, folder: Path) -> Path:
    """Write the same model in floats, rounded by hand."""
    bits, group, _ = SCHEMES[scheme]
    model, processor = pico.build("llava")
    for _, linear in linears(model):
        linear.weight.data.copy_(rounded(linear.weight.data, bits, group)[1])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("quantised")
    return cache(lambda scheme: save_quantised(scheme, root / scheme.replace(" ", "-")))


def suite(folder: Path) -> list[DataSource]:
    return [DataSource(name="jsonl", path=write_data(folder, 4))]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_weights_that_the_numbers_stand_for(
    scheme: str, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_answering(quantised(scheme))
    stored = {record.dtype for record in source.checkpoint.tensors.values()}
    assert stored & {"I8", "I32"}, "nothing is quantised"
    model = load_model(source, device="cpu")
    truth = load_model(open_source(save_dequantised(scheme, tmp_path / "floats")), device="cpu")
    ids = torch.randint(40, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (one(input_ids=ids).logits for one in (model, truth))
        dense = pico.build("llava")[0](input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found - dense).abs().max() > 1e-2  # rounding is seen


def test_fp8_in_blocks_is_what_its_numbers_stand_for(
    pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """In the form of DeepSeek-V3's checkpoints, by hand."""
    stated = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}
    folder = stating(pico_dir("llama"), tmp_path / "model", stated)
    model, _ = pico.build("llama")
    tensors = load_file(folder / SINGLE_FILE)
    for name, linear in linears(model):
        blocks = linear.weight.data.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
        scale = blocks.abs().amax((1, 3)) / 448  # [out / GROUP, in / GROUP]
        eight = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[f"model.layers.{name}.weight"] = eight.flatten(2).flatten(0, 1).contiguous()
        tensors[f"model.layers.{name}.weight_scale_inv"] = scale
        linear.weight.data = (eight.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    ids = torch.arange(40, 52)[None]
    found = load_model(open_answering(folder), device="cpu")(input_ids=ids).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def in_words(numbers: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """Pack eight 4-bit numbers along a dimension into each 32-bit word."""
    eight = numbers.long().unflatten(dim, (-1, 8)).movedim(dim + 1, -1)[..., list(order)]
    return (eight << (4 * torch.arange(8))).sum(-1).to(torch.int32)


def packed(method: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What GPTQ or AWQ stores for a weight `[out, in]`, and the dequantised weight."""
    cut = weight.T.unflatten(0, (-1, PACKED_GROUP))  # [groups, group, out]
    least, most = cut.amin(1), cut.amax(1)
    scales = ((most - least) / 15).half()  # [groups, out]
    zeros = (-least / scales).round().clamp(1, 15)
    step, zero = scales[:, None].float(), zeros[:, None]
    whole = (cut / step + zero).round().clamp(0, 15)
    rounded = ((whole - zero) * step).flatten(0, 1).T.contiguous()
    numbers = whole.flatten(0, 1)  # [in, out]
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        stored = {"qweight": in_words(numbers, 1, order), "qzeros": in_words(zeros, 1, order)}
    else:
        group = torch.arange(weight.shape[1], dtype=torch.int32) // PACKED_GROUP
        stored = {"qweight": in_words(numbers, 0), "qzeros": in_words(zeros - 1, 1), "g_idx": group}
    return {**stored, "scales": scales}, rounded


PACKED_GROUP = 32
PACKED: dict[str, dict[str, Any]] = {  # as config.json says it, in transformers' own names
    "gptq": {"sym": False, "desc_act": False, "checkpoint_format": "gptq"},
    "awq": {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["model.visual"]},
}


@pytest.mark.slow  # gptqmodel compiles a kernel the first time
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("method", PACKED)
def test_gptq_and_awq_are_what_their_numbers_stand_for(
    method: str, family: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel and some twenty packages are needed")
    pytest.importorskip("optimum", reason="transformers loads GPTQ with optimum")
    stated = {"quant_method": method, "bits": 4, "group_size": PACKED_GROUP, **PACKED[method]}
    folder = stating(pico_dir(family), tmp_path / "model", stated)
    model, _ = pico.build(family)
    tensors, ids = load_file(folder / SINGLE_FILE), torch.arange(40, 52)[None]
    dense = model(input_ids=ids).logits
    for name, linear in linears(model):
        (weight,) = (one for one in tensors if one.endswith(f"layers.{name}.weight"))
        del tensors[weight]
        stored, linear.weight.data = packed(method, linear.weight.data)
        tensors |= {f"{weight.removesuffix('weight')}{part}": one for part, one in stored.items()}
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    source, expected = open_answering(folder), model(input_ids=ids).logits
    found = load_model(source, device="cpu")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)  # weights in float16
    assert (found - dense).abs().max() > 0.5
    target, prompts = stages.Target(source, ComputeSettings(device="cpu")), tmp_path / "data"
    suites = suite(prompts) if family != "llama" else [written(prompts)]
    done = stages.evaluate_target(target, tmp_path / "out", suites, EvalSettings(max_new_tokens=6))
    assert len({one.answer for one in done.result.answers}) > 1
    scales = next(name for name in tensors if name.endswith("scales"))
    tensors[scales][0, 0] = torch.nan
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(RegraftError, match=r"the tensor .*scales holds numbers that are NaN"):
        load_model(open_answering(folder), device="cpu")


def written(folder: Path) -> DataSource:
    """Prompts without images."""
    folder.mkdir()
    rows = ({"instruction": f"prompt {i}", "harmful": i < 2, "response": "a"} for i in range(4))
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return DataSource(name="jsonl", path=folder / "data.jsonl")


def test_an_evaluation_from_end_to_end(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    scheme = "int4 in groups, packed"
    floats, compute = save_dequantised(scheme, tmp_path / "model"), ComputeSettings(device="cpu")
    settings, prompts = EvalSettings(max_new_tokens=6), suite(tmp_path / "data")
    done = {}
    for name, folder in (("floats", floats), ("packed", quantised(scheme))):
        target = stages.Target(open_answering(folder), compute)
        done[name] = stages.evaluate_target(target, tmp_path / name, prompts, settings)
    texts = [[a.answer for a in one.result.answers] for one in done.values()]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert "prunable" in done["floats"].about and "prunable" not in done["packed"].about
    comparing.report_evaluations([tmp_path / "floats", tmp_path / "packed"], tmp_path / "page")
    comparing.report_evaluations([], tmp_path / "pair", tuple(tmp_path / n for n in done))
    for page in ("page", "pair"):
        assert "packed" in (tmp_path / page / "report.md").read_text()


def package_config(package: str) -> Any:
    """transformers' config for 8-bit weights and unquantised activations."""
    pytest.importorskip(package)
    if package == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_what_other_packages_save_answers(package: str, tmp_path: Path) -> None:
    config = package_config(package)
    dense = pico.save("qwen2_5_vl", tmp_path / "dense", torch.bfloat16)
    how = {"dtype": torch.bfloat16, "device_map": "cpu"}
    model, plain = (
        transformers.AutoModelForImageTextToText.from_pretrained(dense, **how, **more)
        for more in ({"quantization_config": config}, {})
    )
    model.save_pretrained(tmp_path / "model")
    pico.processor("qwen2_5_vl").save_pretrained(tmp_path / "model")
    source, ids = open_answering(tmp_path / "model"), torch.arange(40, 52)[None]
    with torch.no_grad():
        expected, unrounded = (one(input_ids=ids).logits for one in (model, plain))
        found = load_model(source, device="cpu", dtype="bfloat16")(input_ids=ids).logits
    assert torch.equal(found, expected) and not torch.equal(found, unrounded)
    target = stages.Target(source, ComputeSettings(device="cpu", dtype="bfloat16"))
    prompts = suite(tmp_path / "data")
    done = stages.evaluate_target(target, tmp_path / "out", prompts, EvalSettings(max_new_tokens=6))
    assert len({one.answer for one in done.result.answers}) > 1


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "{model}", "--data", "{data}", "--out", "{out}"],
        ["realign", "gain", "{model}", "{model}", "--data", "{data}", "--out", "{out}"],
        ["analyse", "heads", "{model}", "--data", "{data}", "--out", "{out}"],
        ["analyse", "model", "{model}"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_needs_weights_says_at_once_that_they_are_quantised(
    command: list[str],
    quantised: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = {
        "model": quantised("int8 by row"),
        "data": suite(tmp_path / "data")[0].path,
        "out": tmp_path / "out",
    }
    with pytest.raises(SystemExit, match="2"):
        main([word.format(**named) for word in command])
    assert "is quantised (compressed-tensors): it can be evaluated" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data"]


def test_a_direction_for_quantised_weights_is_refused_for_these(
    quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    """Advice to make one for this model would lead nowhere."""
    of_another = {"inputs": {"model": "0" * 64}}
    save_defence(tmp_path / "direction", Direction(torch.ones(64), 1, 1.0, of_another))
    source, compute = open_answering(quantised("int8 by row")), ComputeSettings(device="cpu")
    target = stages.Target(source, compute, defence=tmp_path / "direction")
    with pytest.raises(RegraftError, match="is quantised"):
        target.inputs()


def stating(folder: Path, target: Path, quantization: dict[str, Any]) -> Path:
    """A copy whose config.json states this quantisation."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return target


@pytest.mark.parametrize(
    ("package", "quantization"),
    [
        ("gptqmodel", {"quant_method": "awq", "bits": 4, "group_size": 16}),
        ("optimum", {"quant_method": "gptq", "bits": 4, "group_size": 16}),
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("bitsandbytes", {"load_in_8bit": True}),
        ("torchao", {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8"}}}),
        ("hqq", {"quant_method": "hqq", "nbits": 4}),
        ("aqlm", {"quant_method": "aqlm"}),
    ],
)
def test_a_package_that_is_missing_is_named_before_any_work(
    package: str, quantization: dict[str, Any], pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    try:
        __import__(package)
    except ImportError:
        pass
    else:
        pytest.skip(f"{package} is installed")
    folder = stating(pico_dir("llama"), tmp_path / "model", quantization)
    with pytest.raises(RegraftError, match=rf"quantised .* cannot be run here: .*{package}"):
        open_answering(folder)
    with pytest.raises(RegraftError, match="it can be evaluated, but"):
        open_source(folder)


@pytest.mark.parametrize("stated", [{"quant_method": "mine"}, {"bits": 4}])
def test_an_unknown_method_is_refused_and_not_skipped(
    stated: dict[str, Any], pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers warns and loads such a checkpoint as if it were not quantised."""
    folder = stating(pico_dir("llama"), tmp_path / "model", stated)
    with pytest.raises(RegraftError, match=r"which transformers cannot run: it knows .*awq"):
        open_answering(folder)


def test_packed_weights_that_are_missing_are_named(
    quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantised("int4 in groups, packed"), folder)
    tensors = load_file(folder / SINGLE_FILE)
    lost = next(name for name in tensors if name.endswith("q_proj.weight_packed"))
    del tensors[lost]
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(RegraftError, match=r"holds no weights for .*q_proj\.weight_packed"):
        load_model(open_answering(folder), device="cpu")
