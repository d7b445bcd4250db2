"""Copying and editing checkpoints: whatever is not edited stays the same to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import pico
from disk import differing, equal_bytes, rewrite, tree
from regraft.data.collate import prompt_batch
from regraft.errors import RegraftError
from regraft.models import checkpoint
from regraft.models.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from regraft.models.checkpoint_copy import Edit, write_edited
from regraft.models.load import open_source
from regraft.progress import Advance, Progress

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def halve(tensor: Tensor) -> Tensor:
    return tensor.mul_(0.5)


def _edits(folder: Path) -> dict[str, Edit]:
    linears = [linear.tensor for linear in open_source(folder).architecture.linears]
    return dict.fromkeys(linears[::5], halve)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [None, "100KB"], ids=["single", "sharded"])
def test_everything_is_kept(tmp_path: Path, dtype: torch.dtype, size: str | None) -> None:
    folder = pico.save("qwen2_5_vl", tmp_path / "model", dtype, size)
    before = open_checkpoint(folder)
    assert (len(before.shards) > 3) == (size is not None)
    edits = _edits(folder)
    after = write_edited(before, tmp_path / "out", edits, files={"note.json": "{}"})
    assert differing(before, after) == edits.keys(), "other tensors than the edited ones changed"
    for name in edits:
        assert equal_bytes(after.read(name), before.read(name) * 0.5)
        assert after.record(name) == before.record(name), f"{name} moved"
    there, here = tree(folder), tree(tmp_path / "out")
    assert here.pop("note.json")
    assert here.keys() == there.keys(), "files were lost or added"
    touched = {before.record(name).shard for name in edits}
    assert {name for name in here if here[name] != there[name]} == touched


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_output_loads_and_answers(tmp_path: Path, family: str, sharded: bool) -> None:
    """The Auto classes load it as it is, every tensor has its value, the dtype is kept."""
    size = "100KB" if sharded else None
    folder = pico.save(family, tmp_path / "model", torch.bfloat16, size)
    written = write_edited(open_checkpoint(folder), tmp_path / "out", _edits(folder))
    vision = family in pico.VLM_FAMILIES
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model, info = auto.from_pretrained(written.folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(written.folder)
    examples = pico.write_examples(tmp_path / "images", 2, images=vision)
    batch = prompt_batch(processor, examples).to("cpu", torch.bfloat16)
    answer = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] > batch.inputs["input_ids"].shape[1]


def test_all_parts_of_a_vision_model_are_in_the_file(tmp_path: Path) -> None:
    folder = pico.save("llava", tmp_path / "model", torch.bfloat16)
    names = write_edited(open_checkpoint(folder), tmp_path / "out", {}).tensors
    for part in ("vision_tower", "multi_modal_projector", "embed_tokens", "lm_head", "norm"):
        assert any(part in name for name in names), f"{part} is missing"


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    model, processor = pico.build("qwen2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert "lm_head.weight" not in checkpoint.tensors
    out = write_edited(checkpoint, tmp_path / "out", _edits(tmp_path / "model"))
    assert out.tensors.keys() == checkpoint.tensors.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Not a model: two shards, an index, a config and other files found in such folders."""
    folder = tmp_path / "small"
    folder.mkdir()
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.tensor(7),
        "c": torch.zeros(0, 4),
        "d": torch.full((3,), -0.0, dtype=torch.float16),
        "e": torch.tensor([True, False]),
    }
    save_file({n: tensors[n] for n in "ab"}, folder / "x-1.safetensors", metadata={"k": "v"})
    save_file({n: tensors[n] for n in "cde"}, folder / "x-2.safetensors")
    weight_map = dict.fromkeys("ab", "x-1.safetensors") | dict.fromkeys("cde", "x-2.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type":   "odd", "kept": 1}')
    return folder


def test_side_files(small: Path, tmp_path: Path) -> None:
    kept = ["README.md", "chat_template.jinja", "generation_config.json", "own_code.py"]
    kept += ["templates/tool.jinja", "vocab.txt", "tokenizer.model"]
    dropped = ["pytorch_model.bin", "pytorch_model.bin.index.json", "original/params.json"]
    dropped += ["consolidated.safetensors", "optimizer.pt", "model.gguf", "onnx/model.onnx"]
    dropped += [".cache/huggingface/x.json", ".gitattributes", "tf_model.h5"]
    for name in kept + dropped:
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).write_text(f"content of {name}")
    write_edited(open_checkpoint(small), tmp_path / "out", {})
    files = {name for name, value in tree(tmp_path / "out").items() if value}
    own = {"x-1.safetensors", "x-2.safetensors", INDEX_FILE, "config.json"}
    assert files == own | set(kept)
    assert (tmp_path / "out" / "config.json").read_bytes() == (small / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1, "sparsity_config": {"format": "dense"}}, {"a": 1}),
        ({"quantization_config": {"sparsity_config": {}, "config_groups": {}}, "a": 1}, {"a": 1}),
        (
            {"quantization_config": {"sparsity_config": {}, "config_groups": {"g": 1}}},
            {"quantization_config": {"config_groups": {"g": 1}}},
        ),
        ({"quantization_config": {"bits": 4}}, {"quantization_config": {"bits": 4}}),
    ],
)
def test_sparsity_config_is_dropped(
    small: Path, tmp_path: Path, config: object, expected: object
) -> None:
    (small / "config.json").write_text(json.dumps(config))
    write_edited(open_checkpoint(small), tmp_path / "out", {})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def test_edits_see_every_dtype(small: Path, tmp_path: Path) -> None:
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Edit:
        def edit(tensor: Tensor) -> Tensor:
            seen[name] = tensor.clone()
            return tensor

        return edit

    source = open_checkpoint(small)
    out = write_edited(source, tmp_path / "out", {name: look(name) for name in source.tensors})
    assert not differing(source, out)
    stored = load_file(small / "x-1.safetensors") | load_file(small / "x-2.safetensors")
    assert seen.keys() == stored.keys()
    assert all(equal_bytes(seen[name], stored[name]) for name in stored)
    assert all(equal_bytes(source.read(name), stored[name]) for name in stored)


def test_edit_that_reads_after_a_transpose(small: Path, tmp_path: Path) -> None:
    """An edit may return a tensor that is not contiguous."""
    out = write_edited(
        open_checkpoint(small), tmp_path / "out", {"a": lambda t: t.flip(0).T.contiguous().T}
    )
    assert out.read("a").tolist() == [[3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize("edit", [lambda t: t.float(), lambda t: t.view(3, 2)])
def test_edit_must_keep_shape_and_dtype(small: Path, tmp_path: Path, edit: Edit) -> None:
    with pytest.raises(ValueError, match="a: an edit changed shape or dtype"):
        write_edited(open_checkpoint(small), tmp_path / "out", {"a": edit})
    assert not (tmp_path / "out").exists()


def test_output_is_refused(small: Path, tmp_path: Path) -> None:
    source = open_checkpoint(small)
    before = tree(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(small)
    cases = {
        small / "out": "inside the checkpoint",
        small: "is not empty",
        tmp_path / "gone" / ".." / "small" / "out": "inside the checkpoint",
        link / "out": "inside the checkpoint",
        small / "config.json": "is a file",
    }
    for target, message in cases.items():
        with pytest.raises(RegraftError, match=message):
            write_edited(source, target, {})
    with pytest.raises(RegraftError, match="no tensor nothing"):
        write_edited(source, tmp_path / "out", {"nothing": halve})
    link.unlink()
    assert tree(tmp_path) == before


def test_a_source_that_changes_while_it_is_copied_is_told(small: Path, tmp_path: Path) -> None:
    source = open_checkpoint(small)

    def meddle(tensor: Tensor) -> Tensor:
        (small / source.shards[0]).touch()
        return tensor

    with pytest.raises(RegraftError, match="changed while it was copied"):
        write_edited(source, tmp_path / "out", {"a": meddle})
    assert not (tmp_path / "out").exists()


def test_weights_that_are_there_and_no_file(small: Path) -> None:
    for shard in small.glob("*.safetensors"):
        shard.unlink()
    (small / "model.safetensors.index.json").unlink(missing_ok=True)
    (small / "model.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(RegraftError, match=r"model.safetensors does not exist"):
        open_checkpoint(small)
    (small / "model.safetensors").unlink()
    (small / "model.safetensors").mkdir()
    with pytest.raises(RegraftError, match=r"model.safetensors is a folder; a file is needed"):
        open_checkpoint(small)


def test_symlinked_shards_are_copied_as_files(small: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to blobs."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/0"
    shutil.copytree(small, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    write_edited(open_checkpoint(snapshot), tmp_path / "out", {})
    assert tree(tmp_path / "out") == tree(blobs)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_out_of_a_model_are_not_followed(small: Path, tmp_path: Path) -> None:
    """A copy of the model would contain their targets: any file of this machine."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (small / "inside.txt").symlink_to("config.json")
    (small / "notes").mkdir()
    open_checkpoint(small)
    for target in (secret, Path("..", "..", "secret"), tmp_path / "gone"):
        link = small / "notes" / "README.md"
        link.symlink_to(target)
        with pytest.raises(RegraftError, match=r"README\.md is a link out of the model folder"):
            write_edited(open_checkpoint(small), tmp_path / "out", {})
        link.unlink()
    assert not (tmp_path / "out").exists()


def test_fingerprint(small: Path, tmp_path: Path) -> None:
    """It depends on every byte of weights, config and template, not on the folder."""
    first = open_checkpoint(small).fingerprint
    moved = Path(shutil.copytree(small, tmp_path / "elsewhere"))
    assert open_checkpoint(moved).fingerprint == first
    (moved / "README.md").write_text("words")
    assert open_checkpoint(moved).fingerprint == first
    (moved / "chat_template.jinja").write_text("{{ bos_token }}")
    template = open_checkpoint(moved).fingerprint
    assert template != first
    shard = bytearray((moved / "x-2.safetensors").read_bytes())
    shard[-1] ^= 1
    (moved / "x-2.safetensors").write_bytes(shard)
    assert open_checkpoint(moved).fingerprint not in (first, template)


class Tasks(Progress):
    """Records (what, announced units, units done) of every task."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    @contextmanager
    def task(self, what: str, total: int, unit: str = "") -> Iterator[Advance]:
        done: list[int] = []
        yield lambda units: done.append(units)
        self.seen.append((what, total, sum(done)))


def test_only_reading_a_large_checkpoint_is_shown(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    fingerprint = open_checkpoint(small).fingerprint_shown(tasks)
    assert fingerprint == open_checkpoint(small).fingerprint
    assert not tasks.seen
    monkeypatch.setattr(checkpoint, "_LARGE", 1)
    found = open_checkpoint(small)
    assert [found.fingerprint_shown(tasks) for _ in range(2)] == [fingerprint] * 2
    ((what, announced, done),) = tasks.seen
    assert str(small) in what and announced == found.bytes == done
    known = open_checkpoint(small)
    assert known.fingerprint == known.fingerprint_shown(tasks)
    assert len(tasks.seen) == 1


def test_outline(small: Path, tmp_path: Path) -> None:
    """It depends on layout, first bytes and settings, not on the folder or what `without` names."""
    first = open_checkpoint(small).outline()
    moved = Path(shutil.copytree(small, tmp_path / "elsewhere"))
    assert open_checkpoint(moved).outline() == first
    without = open_checkpoint(moved).outline(without={"a", "config.json"})
    assert without != first
    rewrite(moved, "x-1.safetensors", {"a": torch.ones(2, 3, dtype=torch.bfloat16)})
    (moved / "config.json").write_text("{}")
    changed = open_checkpoint(moved)
    assert changed.outline(without={"config.json"}) != open_checkpoint(small).outline(
        without={"config.json"}
    )
    assert changed.outline(without={"a", "config.json"}) != without, "x-1 lost its metadata"
    same = Path(shutil.copytree(small, tmp_path / "same"))
    record = open_checkpoint(same).record("a")
    with (same / record.shard).open("r+b") as handle:
        handle.seek(record.start)
        handle.write(b"1234")
    assert open_checkpoint(same).outline() != first
    assert open_checkpoint(same).outline(without={"a"}) == open_checkpoint(small).outline(
        without={"a"}
    )
    (same / "chat_template.jinja").write_text("x")
    assert open_checkpoint(same).outline(without={"a"}) != open_checkpoint(small).outline(
        without={"a"}
    )


def _header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"\x80\x02}q\x00." * 20, "truncated or not safetensors"),
        (_header(b"{"), "safetensors header"),
        (_header(b"[]"), "safetensors header"),
        (_header(b'{"a": 1}'), "safetensors header"),
        (_header(b'{"a": {"dtype": "F32", "shape": [1]}}'), "safetensors header"),
        (
            _header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + b"1234",
            "tensor a ends at byte",
        ),
        (_header(b"{}") + b"1234", "4 bytes follow the last tensor"),
        (
            _header(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}') + b"1234",
            "safetensors header",
        ),
        (
            _header(b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 4]}}') + b"1234",
            r"tensor a of shape \[2, 3\] and dtype F32 takes 24 bytes, the header says 4",
        ),
        (
            _header(b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}') + b"1234",
            "tensor a begins at byte 2 of the data, the one before it ends at 0",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_damaged_shards(small: Path, content: bytes, message: str) -> None:
    (small / "x-2.safetensors").write_bytes(content)
    with pytest.raises(RegraftError, match=message) as caught:
        open_checkpoint(small)
    assert "x-2.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "weight_map is missing"),
        ('{"weight_map": {}}', "weight_map is missing or empty"),
        ('{"weight_map": {"a": 1}}', "shard of .a. in weight_map is 1"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "name of a file in the folder"),
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            "listed in model.*json for .a.",
        ),
        ('{"weight_map": {"a": "x-1.safetensors"}}', "field metadata is missing"),
        ('{"metadata": {}, "weight_map": {"z": "x-1.safetensors"}}', "lists tensor .z."),
    ],
)
def test_damaged_index(small: Path, index: str, message: str) -> None:
    (small / INDEX_FILE).write_text(index)
    with pytest.raises(RegraftError, match=message):
        open_checkpoint(small)


def test_tensor_in_two_shards(small: Path) -> None:
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, small / "x-2.safetensors")
    with pytest.raises(RegraftError, match="tensor a is in two shards"):
        open_checkpoint(small)


def test_sample(small: Path) -> None:
    """From the middle; all of a small tensor."""
    long = torch.arange(5000, dtype=torch.float32).view(50, 100)
    rewrite(small, "x-2.safetensors", {"long": long})
    checkpoint = open_checkpoint(small)
    assert equal_bytes(checkpoint.sample("long"), long.flatten()[1988 : 1988 + 1024])
    for name in "abcde":
        assert equal_bytes(checkpoint.sample(name), checkpoint.read(name).flatten())


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match=r"gone does not exist.*not a hub id or the word demo"):
        open_checkpoint(tmp_path / "gone")


def test_no_weights(small: Path) -> None:
    for path in small.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(RegraftError, match=f"neither {SINGLE_FILE} nor"):
        open_checkpoint(small)
    (small / "weights.gguf").write_text("")
    with pytest.raises(RegraftError, match=r"only as weights\.gguf.*never unpickles"):
        open_checkpoint(small)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 2**19 - 1, 2**19, -1])  # a piece has 2**19 numbers
def test_what_is_not_finite_is_found_while_it_is_copied(
    small: Path, tmp_path: Path, value: float, place: int
) -> None:
    weight = torch.ones(2**20 + 5, dtype=torch.bfloat16)
    weight[place] = value
    save_file({"a": torch.ones(3), "b": weight}, small / "x-1.safetensors")
    before, counted = tree(tmp_path), []
    with pytest.raises(RegraftError, match="the tensor b holds numbers that are NaN or infinite"):
        write_edited(open_checkpoint(small), tmp_path / "out", {}, advance=counted.append)
    assert tree(tmp_path) == before
    size = (small / "x-1.safetensors").stat().st_size
    assert sum(counted) < size  # no second look at what was copied already
    bounds = {"unbounded": lambda name: name == "b"}
    if value == value:
        copied = write_edited(
            open_checkpoint(small), tmp_path / "out", {}, advance=counted.append, **bounds
        )
        assert equal_bytes(copied.read("b"), weight)
