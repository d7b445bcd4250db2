"""Patches for other tools: every weight is the one that `apply` writes, to the bit."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pico
import regraft
from commands import exit_code
from disk import equal_bytes, tree
from regraft import stages
from regraft.data.readers.demo import demo_model
from regraft.disk.files import write_json
from regraft.disk.locks import locked
from regraft.errors import RegraftError
from regraft.models.checkpoint import Checkpoint, TensorRecord, bits, open_checkpoint
from regraft.models.checkpoint_copy import write_edited
from regraft.models.load import load_model, open_source
from regraft.patch.apply import Change
from regraft.patch.format import Patch, TensorPatch, save_patch
from regraft.patch.peft import exact_delta, shira

# PEFT 0.21 asks transformers 5.24 by a name that will go
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def _prune(tensor: torch.Tensor) -> torch.Tensor:
    """Half of it to 0, of negative weights to -0.0, as a mask that is multiplied does."""
    return tensor * (torch.arange(tensor.numel()).reshape(tensor.shape) % 2).to(tensor.dtype)


def _write_pair(dense: Path, pruned: Path) -> tuple[Checkpoint, Checkpoint]:
    source = open_source(dense)
    names = [linear.tensor for linear in source.architecture.linears]
    return source.checkpoint, write_edited(source.checkpoint, pruned, dict.fromkeys(names, _prune))


def _patch(dense: Checkpoint, pruned: Checkpoint, names: list[str], *, swap: bool) -> Patch:
    """Some pruned weights of some tensors, more of one than of others; or swaps with kept ones."""
    tensors = {}
    for i, name in enumerate(names):
        after, before = pruned.read(name), dense.read(name).reshape(-1)
        count = 3 + 40 * (i == 1)
        zeros = (after.reshape(-1) == 0).nonzero().flatten()[i::7][:count]
        kept = (after.reshape(-1) != 0).nonzero().flatten()[i::5][: count if swap else 0]
        positions, order = torch.cat([zeros, kept]).sort()
        values = torch.cat([before[zeros], torch.zeros_like(before[kept])])[order]
        tensors[name] = TensorPatch.of(after, positions, values)
    return Patch(tensors, {"made": "by a test"})


class World(NamedTuple):
    """A pruned checkpoint, a patch for it, and what `apply` makes of both."""

    pruned: Path
    patch: Path
    realigned: Path


def _world(root: Path, dense: Path, *, swap: bool = False) -> World:
    before, after = _write_pair(dense, root / "pruned")
    names = [linear.tensor for linear in open_source(dense).architecture.linears][::4]
    save_patch(root / "patch.safetensors", _patch(before, after, names, swap=swap))
    stages.patch_checkpoint(
        "apply", root / "pruned", root / "patch.safetensors", root / "realigned"
    )
    return World(root / "pruned", root / "patch.safetensors", root / "realigned")


def _export(world: World, to: Any) -> Path:
    return regraft.export(world.pruned, world.patch, world.pruned.with_name(to), to=to)


def _lines(page: Path) -> str:
    """The Python that a page shows."""
    return "".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))


def _merged(adapter: Path, pruned: Path) -> torch.nn.Module:
    """The model that the README's own lines make."""
    text = _lines(adapter / "README.md")
    names: dict[str, Any] = {}
    exec(text.replace("PRUNED", str(pruned)).replace("FOLDER", str(adapter)), names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    return model


def _require_equal(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not equal_bytes(found[name], wanted[name])] == []


@pytest.mark.parametrize("swap", [False, True], ids=["restored", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_merges_to_what_apply_writes(tmp_path: Path, dtype: torch.dtype, swap: bool) -> None:
    world = _world(tmp_path, pico.save("llava", tmp_path / "dense", dtype), swap=swap)
    model = _merged(_export(world, "peft"), world.pruned)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    _require_equal(model, load_model(open_source(world.realigned), dtype=_name(dtype)))
    unpatched = load_model(open_source(world.pruned), dtype=_name(dtype)).state_dict()
    changed = [k for k, one in model.state_dict().items() if not equal_bytes(one, unpatched[k])]
    assert len(changed) == 7


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


_QUICK = ("qwen2_5_vl", "mllama", "qwen3")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=() if one in _QUICK else pytest.mark.slow)
        for one in (*pico.FAMILIES, "qwen3_5", "lfm2_vl", "gemma4", "phi4_multimodal")
    ],
)
def test_peft_of_other_families(tmp_path: Path, name: str) -> None:
    world = _world(tmp_path, pico.save(name, tmp_path / "dense", torch.bfloat16))
    model = _merged(_export(world, "peft"), world.pruned)
    _require_equal(model, load_model(open_source(world.realigned), dtype="bfloat16"))


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_either_layout_on_disk_gives_the_names_in_memory(tmp_path: Path, layout: str) -> None:
    folder = pico.save("llava", tmp_path / "dense", torch.bfloat16)
    if layout.startswith("model."):  # as in memory; transformers still writes the older one
        state = load_model(open_source(folder), dtype="bfloat16").state_dict()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    world = _world(tmp_path, folder)
    adapter = _export(world, "peft")
    assert all(name.startswith(f"{layout}layers.") for name in _patched(world))
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    model = _merged(adapter, world.pruned)
    _require_equal(model, load_model(open_source(world.realigned), dtype="bfloat16"))


def _patched(world: World) -> set[str]:
    with safe_open(world.patch, "pt") as file:
        return set(json.loads(file.metadata()["regraft"])["tensors"])


def test_peft_of_the_bundled_model(tmp_path: Path) -> None:
    world = _world(tmp_path, demo_model())
    adapter = _export(world, "peft")
    model = _merged(adapter, world.pruned)
    stored = _name(next(model.parameters()).dtype)
    _require_equal(model, load_model(open_source(world.realigned), dtype=stored))
    again = tree(adapter)
    assert _export(world, "peft") == adapter
    assert tree(adapter) == again


def test_restored_weights_are_exact_in_another_dtype_too(tmp_path: Path) -> None:
    """Those that were 0: the sum is the value itself, however it is rounded before."""
    world = _world(tmp_path, pico.save("qwen2", tmp_path / "dense", torch.float32))
    adapter = _export(world, "peft")
    text = _lines(adapter / "README.md").replace('"auto"', "torch.bfloat16")
    names: dict[str, Any] = {"torch": torch}
    exec(text.replace("PRUNED", str(world.pruned)).replace("FOLDER", str(adapter)), names)
    _require_equal(names["model"], load_model(open_source(world.realigned), dtype="bfloat16"))


_FINITE = {
    dtype: st.floats(width=width, allow_nan=False, allow_infinity=False)
    for dtype, width in ((torch.float32, 32), (torch.float16, 16), (torch.float64, 64))
} | {
    torch.bfloat16: st.integers(-(2**15), 2**15 - 1)
    .map(lambda n: float(torch.tensor(n, dtype=torch.int16).view(torch.bfloat16)))
    .filter(lambda value: abs(value) < 3e38)
}


@pytest.mark.parametrize("dtype", _FINITE)
@given(data=st.data())
def test_deltas(dtype: torch.dtype, data: Any) -> None:
    """Exact ones give the value; of others no neighbour does, and sums grow with the delta."""
    before, value = (torch.tensor([data.draw(_FINITE[dtype])], dtype=dtype) for _ in range(2))
    delta, exact = exact_delta(before, value)
    assert delta.dtype == torch.promote_types(dtype, torch.float32)

    def merged(added: torch.Tensor) -> torch.Tensor:
        weight = before.clone().reshape(1, 1)
        weight += torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int), added, (1, 1))
        return weight.flatten()

    if exact:
        assert torch.equal(bits(merged(delta)), bits(value))
        return
    assert before != 0 or value == 0  # a pruned weight takes any value, but for a zero's sign
    if value != 0:
        low, high = (torch.nextafter(delta, torch.full_like(delta, s)) for s in (-3.4e38, 3.4e38))
        assert merged(low) < value or merged(high) > value
        assert not torch.equal(merged(low), value)
        assert not torch.equal(merged(high), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_base_is_undone_exactly(dtype: torch.dtype) -> None:
    """What is rounded to the nearest level is 0 or within a factor of two: Sterbenz's lemma."""
    dense = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    level = torch.tensor(0.1234).to(dtype)
    _, exact = exact_delta((dense / level).round() * level, dense)
    assert exact.all()
    _, exact = exact_delta(dense.flip(0), dense)
    assert exact.all() == (dtype == torch.bfloat16), "float32 has no bits to spare"


def _change(name: str, shape: tuple[int, ...], values: list[float]) -> Change:
    record = TensorRecord(name, "model.safetensors", "F32", shape, 0, 0)
    return Change(record, torch.arange(len(values)), torch.tensor(values))


def test_what_peft_cannot_have() -> None:
    held, modules = [torch.tensor([1e8, 1e8])], {"a.weight": "a"}
    with pytest.raises(RegraftError, match=r"^2 of 2 weights cannot be reached .* 0 of a\.weight"):
        shira([_change("a.weight", (8, 8), [0.1, 0.3])], held, modules)
    with pytest.raises(RegraftError, match=r"changes experts of shape \[4, 8, 8\].* --to vllm"):
        shira([_change("experts", (4, 8, 8), [1.0])], [torch.zeros(1)], {"experts": "a"})
    with pytest.raises(RegraftError, match=r"changes b\.weight, which is no linear layer"):
        shira([_change("b.weight", (8, 8), [1.0])], [torch.zeros(1)], modules)
    changes = [_change("a.weight", (8, 8), [1.0] * 64), _change("b.weight", (2, 8), [1.0])]
    zeros = [torch.zeros(64), torch.zeros(1)]
    modules["b.weight"] = "b"
    with pytest.raises(RegraftError, match=r"64 weights of a\.weight.* r = 4, .* b\.weight, 2 x 8"):
        shira(changes, zeros, modules)
    assert shira(changes[:1], zeros[:1], modules).config["r"] == 4


class WeightPatch(NamedTuple):
    """As documented of vllm.model_executor.model_loader.checkpoint_weight_patch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def test_weight_patches_assign_what_apply_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the README's lines, with a stand-in that assigns: every weight, swaps among them."""
    dense = pico.save("qwen2_vl", tmp_path / "dense", torch.bfloat16, "100KB")
    world = _world(tmp_path, dense, swap=True)
    folder = _export(world, "vllm")
    pruned, realigned = (open_checkpoint(one) for one in (world.pruned, world.realigned))
    held = {name: pruned.read(name) for name in pruned.tensors}
    seen: list[WeightPatch] = []

    def load(model: Any, patches: list[WeightPatch]) -> None:
        for one in patches:
            seen.append(one)
            assert one.indices is not None
            assert one.dtype == one.values.dtype == model[one.name].dtype
            assert one.shape == tuple(model[one.name].shape)
            assert one.indices.dtype == torch.int32
            model[one.name].view(-1)[one.indices.long()] = one.values

    name = "vllm.model_executor.model_loader.checkpoint_weight_patch"
    module = ModuleType(name)
    module.__dict__.update(CheckpointWeightPatch=WeightPatch, load_checkpoint_weight_patches=load)
    for i in range(4):
        monkeypatch.setitem(sys.modules, name.rsplit(".", i)[0], module)
    module.__dict__["checkpoint_weight_patch"] = module  # of its own package too
    engine = ModuleType("llm")
    engine.__dict__["apply_model"] = lambda function: function(held)
    exec(_lines(folder / "README.md").replace("FOLDER", str(folder)), {"llm": engine})
    assert {one.name for one in seen} == _patched(world)
    assert [n for n in held if not equal_bytes(held[n], realigned.read(n))] == []
    assert set(held) == set(realigned.tensors)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = _world(tmp_path, pico.save("qwen2", tmp_path / "dense"))

    def refused(*words: object) -> str:
        assert exit_code("export", *words) == 2
        return " ".join(capsys.readouterr().err.split())

    out = tmp_path / "out"
    to_peft = ("--to", "peft", "--out", out)
    assert "already has the patch" in refused(world.realigned, world.patch, *to_peft)
    assert "not the base of this patch" in refused(tmp_path / "dense", world.patch, *to_peft)
    assert "No patch is named" in refused(world.pruned, *to_peft)
    assert "--to" in refused(world.pruned, world.patch, "--to", "gguf", "--out", out)
    assert not out.exists()
    (lock := tmp_path / ".out.regraft-work" / "lock").parent.mkdir()
    with locked(lock, out):
        assert "Another regraft process" in refused(world.pruned, world.patch, *to_peft)
    assert exit_code("export", world.pruned, world.patch, *to_peft) == 0
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="levels of symbolic links"):
        regraft.apply(world.pruned, world.patch, tmp_path / "loop" / "out")
    other = replace(
        _patch(
            *(open_checkpoint(p) for p in (tmp_path / "dense", world.pruned)),
            sorted(_patched(world))[:1],
            swap=False,
        ),
        about={},
    )
    save_patch(tmp_path / "other", other)
    assert "was made with something else" in refused(world.pruned, tmp_path / "other", *to_peft)


def test_experts_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    """Of a family that is not prunable here, by the shape of its tensor."""
    save_file({"experts": torch.zeros(4, 8, 8)}, _folder(tmp_path) / "model.safetensors")
    tensor = TensorPatch.of(torch.zeros(4, 8, 8), torch.tensor([3]), torch.tensor([1.0]))
    save_patch(tmp_path / "patch", Patch({"experts": tensor}, {}))
    world = World(tmp_path / "moe", tmp_path / "patch", tmp_path)
    with pytest.raises(RegraftError, match=r"experts of shape \[4, 8, 8\]"):
        _export(world, "peft")
    held = load_file(_export(world, "vllm") / "weight_patches.safetensors")
    assert held["experts.indices"].tolist() == [3]


def test_parts_of_tensors_are_refused(tmp_path: Path) -> None:
    """Molmo2's q, k and v are rows of one tensor: an adapter of v would have rows it has not."""
    dense = pico.save("molmo2", tmp_path / "dense")
    before, after = _write_pair(dense, tmp_path / "pruned")
    name = next(li.tensor for li in open_source(dense).architecture.linears if li.stored)
    save_patch(tmp_path / "patch", _patch(before, after, [name], swap=False))
    world = World(tmp_path / "pruned", tmp_path / "patch", tmp_path)
    with pytest.raises(RegraftError, match="att_proj"):
        _export(world, "peft")
    assert not (tmp_path / "peft").exists()


def test_a_dtype_that_is_no_weight_of_a_model(tmp_path: Path) -> None:
    weight = torch.ones(4, 8)
    weight[0, 3] = 0
    tensor = TensorPatch.of(weight, torch.tensor([3]), torch.ones(1))
    save_patch(tmp_path / "patch", Patch({"a.weight": tensor}, {}))
    stored = {"a.weight": weight.to(torch.float8_e4m3fn)}
    save_file(stored, _folder(tmp_path) / "model.safetensors")
    with pytest.raises(RegraftError, match=r"a\.weight is stored as F8_E4M3; tensors of F32, BF16"):
        _export(World(tmp_path / "moe", tmp_path / "patch", tmp_path), "vllm")


def _folder(root: Path) -> Path:
    (root / "moe").mkdir()
    write_json(root / "moe" / "config.json", {"model_type": "none"})
    return root / "moe"


DOCS = Path(__file__).resolve().parents[1] / "docs" / "sharing.md"
QWEN = {  # layers, hidden and intermediate size, that of keys and values
    "0.5 B": (24, 896, 4864, 128),
    "7 B": (28, 3584, 18944, 512),
    "72 B": (80, 8192, 29568, 1024),
}


def _computed() -> list[tuple[str, float, int, int, float]]:
    """Rows of the table: (model, per 10,000, weights, matrices, bytes)."""
    row = r"\| ([\d.]+ B), computed \| ([\d.]+) \| ([\d,]+) in all (\d+) matrices \| ([\d.]+) (\w+)"
    found = re.findall(row, DOCS.read_text())
    units = {"kB": 1e3, "MB": 1e6}
    return [
        (name, float(rate), int(weights.replace(",", "")), int(matrices), float(size) * units[unit])
        for name, rate, weights, matrices, size, unit in found
    ]


@pytest.mark.parametrize("row", _computed(), ids=lambda row: f"{row[0]} {row[1]}")
def test_sizes_in_the_docs_are_those_of_the_format(
    tmp_path: Path, row: tuple[str, float, int, int, float]
) -> None:
    name, rate, weights, matrices, size = row
    layers, hidden, inner, keys = QWEN[name]
    attention = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    shapes = {f"self_attn.{role}": (out, hidden) for role, out in attention.items()}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes["mlp.down_proj"] = (hidden, inner)
    tensors = {}
    for layer in range(layers):
        for role, (out, columns) in shapes.items():
            count = max(1, round(out * columns / 2 * rate / 10_000))
            values = torch.ones(count, dtype=torch.bfloat16)
            tensors[f"model.layers.{layer}.{role}.weight"] = TensorPatch(
                (out, columns), torch.arange(count), values, "0" * 64, torch.zeros_like(values)
            )
    patch = Patch(tensors, {"settings": {"method": "gain"}, "inputs": {"dense": "0" * 64}})
    save_patch(tmp_path / "patch", patch)
    assert len(tensors) == matrices
    assert patch.restored == pytest.approx(weights, rel=0.001)
    assert (tmp_path / "patch").stat().st_size == pytest.approx(size, rel=0.02)


def test_the_lines_in_the_docs_are_those_of_the_export(tmp_path: Path) -> None:
    world = _world(tmp_path, pico.save("llava", tmp_path / "dense"))
    page = DOCS.read_text()
    assert len(_computed()) == 4
    for to, folder in (("peft", "adapter"), ("vllm", "patches")):
        lines = _lines(_export(world, to) / "README.md")
        assert lines.replace("PRUNED", "pruned").replace("FOLDER", folder) in page
