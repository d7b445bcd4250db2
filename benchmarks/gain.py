"""One step of restoration by gain: time against forward and backward passes, and peak memory.

    python benchmarks/gain.py --shape demo                               # the bundled model
    python benchmarks/gain.py --layers 2 --scale 0.25 --samples 8        # small, on a CPU
    python benchmarks/gain.py --samples 128 --json gain.json             # Qwen2.5-VL-7B's shape
    python benchmarks/gain.py --shape vicuna-7b --samples 128            # LLaVA-NeXT-Vicuna-7B's
    python benchmarks/gain.py --samples 2 --image 112 --skip resident --device cpu # without a GPU

A step takes the gradients of `--samples` harmful and as many harmless prompts, ranks all pruned
weights of all linears, asks which of the best ones suit each other on every prompt and puts those
back, a twelfth of 5 per 10,000. Candidates are those of a step before, which looks for its own and
so takes longer; its seconds are `first_seconds`. With `swap` it also takes the squares of gradients
and pairs what comes back with what goes. `bare` is one forward and backward pass of the whole model
over the same data by autograd, weight gradients included and thrown away one by one (resident only:
it needs room for the model). Every row is a process of its own. The vision tower and the embeddings
are in `bare` and in `step`, which runs them where new prompts are drawn for it.

On a CPU `own` is the peak of the process' memory but for pages of files. Of a streamed model whose
checkpoint has the dtype of the computation these pages are the weights, and what is about to run is
copied as to a device: a device needs no more than `own`, in which the libraries are too, and what a
run on a GPU keeps on the host. In another dtype (float32) all weights are in it as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import shapes
import torch
from prune import GIB, host_bytes, peak_host, timed
from rich.console import Console
from rich.table import Table

from regraft.data.collate import Batch, batches, response_batch
from regraft.data.demo import demo_model
from regraft.data.sources import DataSource, read
from regraft.importance.hard import final_states
from regraft.importance.losses import DecisionLoss
from regraft.models.checkpoint import write_edited
from regraft.models.load import Source, load_placed, load_processor, open_source, pick_device
from regraft.models.placement import PlacedModel
from regraft.models.walk import Walk
from regraft.pruning.pruner import magnitude_edits, zeros
from regraft.restoration.gain import Objective
from regraft.restoration.iterative import Problem, Step, step
from regraft.restoration.ranking import Ranking, empty
from regraft.settings.pruning import PruneSettings

SHARE = 5 / 10_000 / 12  # of the pruned weights in a step: a budget of 5 per 10,000 in 12
KINDS = ("safety", "utility")


def bare(model: PlacedModel, source: Source, data: list[Batch]) -> None:
    """Forward and backward over all data by autograd, with weight gradients."""
    modules = dict(model.network.named_modules())
    weights = [modules[linear.module].weight for linear in source.anatomy.linears]
    hooks = []
    for weight in weights:
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(_throw_away))
    for batch in data:
        placed = model.place(batch)
        model.network(**placed.inputs, labels=placed.labels, use_cache=False).loss.backward()
    for weight, hook in zip(weights, hooks, strict=True):
        weight.requires_grad_(False)
        hook.remove()


def _throw_away(weight: torch.Tensor) -> None:
    weight.grad = None


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    demo = options.shape == "demo"
    source = open_source(demo_model() if demo else options.folder / "dense")
    pruned = open_source(options.folder / "pruned")
    data_set = "demo:calibration" if demo else f"jsonl:{options.folder / 'data.jsonl'}"
    examples = read(DataSource.model_validate(data_set)).examples
    device = pick_device(options.device)
    dtype = "auto" if demo else options.dtype
    processor = load_processor(source)
    data = {
        kind: [
            response_batch(processor, chunk)
            for chunk in batches(
                [e for e in examples if e.harmful == (kind == "safety")][: options.samples],
                options.batch_size,
            )
        ]
        for kind in KINDS
    }
    place = "resident" if options.what == "bare" else options.placement
    model = load_placed(pruned, dtype=dtype, device=options.device, placement=place)
    if options.what == "bare":
        together = [batch for batches_ in data.values() for batch in batches_]
        bare(model, source, together[:1])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = timed(device, lambda: bare(model, source, together))
        return _row(options, seconds, device)
    dense = load_placed(source, dtype=dtype, device=options.device, placement=place)
    losses = {
        kind: DecisionLoss(final_states(Walk(dense, batches_), lambda _: None))
        for kind, batches_ in data.items()
    }
    del dense
    swap = options.what == "swap"
    problem = Problem(model, source, pruned, lambda _layer, _linear: True, swap)
    objective = Objective(trust=1e9)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    count = int(SHARE * zeros(pruned.checkpoint, pruned.anatomy))

    def one_step(so_far: Ranking, candidates: Ranking | None) -> Step:
        walks = {kind: Walk(model, batches_) for kind, batches_ in data.items()}
        safety, utility = ((walks[kind], losses[kind]) for kind in KINDS)
        with TemporaryDirectory(dir=options.folder) as work:
            place, silent = Path(work), lambda _: None
            return step(
                problem, objective, safety, utility, count, so_far, place, silent, candidates
            )

    with own_memory() as seen:
        first_seconds, first = timed(device, lambda: one_step(empty(), None))
        print(f"first step: {first_seconds:.0f} s", file=sys.stderr, flush=True)
        seconds, _ = timed(device, lambda: one_step(first.ranking, first.candidates))
    assert len(first.ranking)
    row = _row(options, seconds, device) | {"first_seconds": first_seconds}
    if device.type == "cpu" and options.placement == "streamed":
        row |= {"own_peak_gib": max(seen) / GIB}
    return row


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Bytes of this process that are no pages of files, looked at fifty times a second."""
    seen, ended = [host_bytes("RssAnon")], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            seen.append(host_bytes("RssAnon"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()


def _row(options: argparse.Namespace, seconds: float, device: torch.device) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    print(f"{options.what}, {options.placement}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "what": options.what,
        "placement": options.placement,
        "seconds": seconds,
        "device_peak_gib": peak,
        "host_peak_gib": peak_host(),
    }


def main() -> None:
    """Run every row in its own process, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("demo", *shapes.SHAPES), default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--scale", type=float, default=1.0, help="of the widths")
    parser.add_argument("--samples", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image", type=int, default=560, help="pixels a side")
    parser.add_argument(
        "--skip",
        nargs="*",
        choices=("bare", "resident", "swap"),
        default=(),
        help="rows, such as those for which the model is too large",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="not of demo"
    )
    parser.add_argument("--scratch", type=Path, default=None, help="disk for checkpoint and states")
    parser.add_argument("--json", type=Path, default=None)
    for name in ("--folder", "--what", "--placement"):  # of a child process
        parser.add_argument(name, type=Path if name == "--folder" else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(run_one(options)))
        return
    device = pick_device(options.device)
    rows = []
    with TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        if options.shape == "demo":
            source = open_source(demo_model())
        else:
            shapes.write_checkpoint(
                folder / "dense", options.shape, options.layers, options.scale, device
            )
            shapes.write_data(folder, options.samples, options.image)
            source = open_source(folder / "dense")
        patterns = PruneSettings(method="magnitude").patterns(source.anatomy.linears)
        write_edited(source.checkpoint, folder / "pruned", magnitude_edits(patterns))
        runs = [("bare", "resident"), ("step", "resident"), ("step", "streamed")]
        for what, placement in [*runs, ("swap", "streamed")]:
            if what in options.skip or (what == "step" and placement in options.skip):
                continue
            child = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder)]
            child += ["--what", what, "--placement", placement]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        size = source.checkpoint.bytes / GIB
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    dtype = "auto" if options.shape == "demo" else options.dtype
    show(rows, f"{options.shape}, {size:.2f} GiB, 2 x {options.samples} prompts, {dtype}, {name}")
    if options.json:
        about = {"shape": options.shape, "checkpoint_gib": size, "dtype": dtype, "device": name}
        about["rows"] = rows
        options.json.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    columns = ("", "placement", "time / bare", "device GiB", "own GiB", "host GiB")
    table = Table(*columns, title=title)
    bare_seconds = rows[0]["seconds"] if rows[0]["what"] == "bare" else None
    for row in rows:
        peak = row["device_peak_gib"]
        table.add_row(
            row["what"],
            row["placement"],
            "" if bare_seconds is None else f"{row['seconds'] / bare_seconds:.2f}",
            "" if peak is None else f"{peak:.2f}",
            f"{row['own_peak_gib']:.2f}" if "own_peak_gib" in row else "",
            f"{row['host_peak_gib']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
