"""Applying a patch to a sharded checkpoint, compared with `cp -r` of the same files.

    python benchmarks/apply.py                          # 4 GiB, q, k, v and o of four layers
    python benchmarks/apply.py --all-linears --json apply.json

The checkpoint has random weights in the shapes of a 7B model, half of them zero. Both ways copy the
same files to the same disk, in alternating order, from the same state of the page cache: warm, or
dropped before each copy with `--cold`. The result is the ratio of the two throughputs, durable (all
data on disk at the end: apply does this anyway, cp's files are fsynced after the copy) and not
durable (fsync does nothing in our process). Peak memory is that of a separate process that only
applies the patch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measuring import GIB, host_bytes, in_child, save, timed, whole
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from regraft import stages
from regraft.models.checkpoint import INDEX_FILE
from regraft.patch.format import Patch, TensorPatch, save_patch

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
ATTENTION = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
LAYER = ATTENTION | {
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
WAYS = ("cp", "apply", "cp, synced", "apply, synced")


def layout(size: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of weights with a total of about `size` bytes in bfloat16."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    per_layer = 2 * sum(a * b for a, b in LAYER.values())
    for layer in range(max(1, round((size - 4 * VOCABULARY * HIDDEN) / per_layer))):
        for name, shape in LAYER.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


class Writer:
    """Writes a pruned checkpoint shard by shard and collects a patch for it."""

    def __init__(self, folder: Path, shard_bytes: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(2**25, generator=self._generator).bfloat16()
        self._folder, self._limit = folder, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._shards = 0
        folder.mkdir()

    def add(self, name: str, shape: tuple[int, int], share: float) -> TensorPatch | None:
        """Prune one weight at random; returns a patch that restores `share` of it, or None."""
        size = shape[0] * shape[1]
        start = int(torch.randint(2**16, (1,), generator=self._generator))
        pool = self._normal[start:]
        dense = pool.repeat(-(-size // len(pool)))[:size]
        draws = torch.randint(256, (size,), dtype=torch.uint8, generator=self._generator)
        self._held[name] = pruned = dense.masked_fill(draws < 128, 0).view(shape)
        if sum(tensor.nbytes for tensor in self._held.values()) >= self._limit:
            self.flush()
        if not share:
            return None
        chosen = (draws < 128).nonzero().flatten()
        chosen = chosen[torch.rand(len(chosen), generator=self._generator) < 2 * share]
        chosen = chosen[dense[chosen] != 0]
        return TensorPatch.of(pruned, chosen, dense[chosen])

    def flush(self) -> None:
        """Write the collected weights as one shard."""
        self._shards += 1
        shard = f"model-{self._shards:05d}.safetensors"
        save_file(self._held, self._folder / shard, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(self._held, shard)
        self._held = {}

    def close(self) -> None:
        """Write the last shard and the index."""
        if self._held:
            self.flush()
        index = {"metadata": {}, "weight_map": self._weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index))


def build(folder: Path, options: argparse.Namespace) -> Patch:
    """Write the pruned checkpoint and its patch into `folder`."""
    writer = Writer(folder / "pruned", int(options.shard_gib * GIB))
    tensors = {}
    for name, shape in layout(int(options.gib * GIB)):
        layer = int(name.split(".")[2]) if ".layers." in name else None
        attention = "self_attn" in name and layer is not None and layer < options.layers
        touched = layer is not None if options.all_linears else attention
        restored = writer.add(name, shape, options.share if touched else 0.0)
        if restored is not None:
            tensors[name] = restored
    writer.close()
    (folder / "pruned" / "config.json").write_text("{}")
    patch = Patch(tensors, {})
    save_patch(folder / "patch.safetensors", patch)
    return patch


def copy(folder: Path, durable: bool) -> None:
    """`cp -r`; with `durable`, wait until everything is on disk."""
    subprocess.run(["cp", "-r", folder / "pruned", folder / "out"], check=True)
    if durable:
        for path in (folder / "out").iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def prepare(folder: Path, cold: bool) -> None:
    """Bring the page cache to the same state before every measurement."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    for path in [*(folder / "pruned").iterdir(), folder / "patch.safetensors"]:
        with path.open("rb", buffering=0) as handle:
            if cold:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.read(2**20):
                    pass


def one(folder: Path, way: str, cold: bool) -> dict[str, float]:
    """One measurement: seconds, and the peak memory in bytes before and after."""
    durable = way.endswith("synced")
    if not durable:
        os.fsync = lambda fd: None
    prepare(folder, cold)
    before = host_bytes("VmHWM")

    def work() -> None:
        if way.startswith("cp"):
            copy(folder, durable)
            return
        stages.patch_checkpoint(
            "apply", folder / "pruned", folder / "patch.safetensors", folder / "out"
        )

    seconds, _ = timed(torch.device("cpu"), work)
    return {"seconds": seconds, "before": before, "peak": host_bytes("VmHWM")}


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of each way in each round; memory before applying and its peak, in bytes.

    Each is measured in a new process, which imports everything before the preparation.
    """
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    memory = [0, 0]
    for number in range(options.rounds + 1):
        for way in WAYS if number % 2 else reversed(WAYS):
            found = in_child(one=way, scratch=folder)
            if number:  # the first round warms up the disk
                seconds[way].append(found["seconds"])
            if way.startswith("apply"):
                memory = [max(memory[0], found["before"]), max(memory[1], found["peak"])]
    return seconds, memory


def main() -> None:
    """Build, measure, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--shard-gib", type=float, default=1.0, help="size of a shard")
    parser.add_argument(
        "--layers", type=whole, default=4, help="layers whose q, k, v, o are patched"
    )
    parser.add_argument("--all-linears", action="store_true", help="patch every linear instead")
    parser.add_argument("--share", type=float, default=0.01, help="share of weights restored")
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--cold", action="store_true", help="read from the disk every time")
    parser.add_argument("--scratch", type=Path, default=None, help="disk to work on")
    parser.add_argument("--json", type=Path, default=None, help="save the figures here")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.scratch, options.one, options.cold)))
        return

    with TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        patch = build(folder, options)
        shards = list((folder / "pruned").glob("*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        seconds, memory = measure(folder, options)
    ratios = {
        f"apply_to_cp{suffix}": [
            a / b for a, b in zip(seconds[f"cp{label}"], seconds[f"apply{label}"], strict=True)
        ]
        for suffix, label in (("", ""), ("_synced", ", synced"))
    }
    figures = {
        "gib": size / GIB,
        "shards": len(shards),
        "cpus": os.cpu_count(),
        "cache": "cold" if options.cold else "warm",
        "patched_tensors": len(patch.tensors),
        "patched_gib": sum(2 * torch.Size(t.shape).numel() for t in patch.tensors.values()) / GIB,
        "restored_weights": patch.restored,
        **{name: statistics.median(values) for name, values in ratios.items()},
        **{f"{name}_worst": min(values) for name, values in ratios.items()},
        "peak_memory_gib": memory[1] / GIB,
        "of_which_imports_gib": memory[0] / GIB,
    }
    table = Table("figure", "value", title="Applying a patch: throughput over that of cp -r")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    save(options.json, figures | {"seconds": seconds})


if __name__ == "__main__":
    main()
