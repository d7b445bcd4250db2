"""One step of gain: time as a multiple of forward and backward passes, and peak memory.

    python benchmarks/gain.py --shape demo                               # the bundled model
    python benchmarks/gain.py --layers 2 --scale 0.25 --samples 8        # small, on a CPU
    python benchmarks/gain.py --samples 128 --json gain.json             # Qwen2.5-VL-7B's shape
    python benchmarks/gain.py --shape vicuna-7b --samples 128            # LLaVA-NeXT-Vicuna-7B's
    python benchmarks/gain.py --samples 2 --image 112 --skip resident --device cpu # without a GPU

A step takes the gradients of three quarters of `--samples` harmful and as many harmless prompts,
ranks all pruned weights, and tries up to seven numbers of the best ones on the other quarter, the
held-out prompts. With `swap` it also takes squared gradients and pairs restored weights with kept
ones to prune.

`bare` is one forward and backward pass of the whole model over all these prompts by autograd, with
weight gradients, which are discarded one by one (resident only: the model must fit). Every row is a
process of its own. Only `bare` includes the vision tower and the embeddings, since on a path they
run once for all steps. With enough prompts for the work on them to outweigh the work on weights, a
step should take at most 3 times as long as `bare`.

On a CPU `own` is the peak of the process's memory without file pages. For a streamed model whose
checkpoint has the dtype of the computation the file pages are the weights, and weights about to run
are copied as to a device. So a device needs no more than `own`, which also includes the libraries
and what a run on a GPU keeps on the host. In another dtype (float32) `own` includes all weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import shapes
import torch
from measuring import (
    GIB,
    device_name,
    device_peak,
    host_bytes,
    host_peak,
    in_child,
    reset_peak,
    save,
    timed,
    whole,
)
from rich.console import Console
from rich.table import Table

from regraft.data.collate import Batch, batches, response_batch
from regraft.data.example import Example, hold_out
from regraft.data.sources import DataSource, read
from regraft.models.checkpoint_copy import write_edited
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import (
    DTypeName,
    Source,
    load_placed,
    load_processor,
    open_source,
    pick_device,
)
from regraft.models.placement import PlacedModel
from regraft.pruning.base import prune_settings
from regraft.pruning.prune import edits_without_data, zeros
from regraft.restoration.methods.gain.method import HELD_OUT, path_limit
from regraft.restoration.methods.gain.path import Room, StepRecord
from regraft.restoration.methods.gain.step import Problem, Prompts, held_out_losses, step
from regraft.restoration.ranking import empty
from regraft.restoration.teacher import DecisionLoss, final_states


def bare(model: PlacedModel, source: Source, data: list[Batch]) -> None:
    """Forward and backward pass over all data by autograd, with weight gradients."""
    modules = dict(model.network.named_modules())
    weights = [modules[linear.module].weight for linear in source.architecture.linears]
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
    """Run one row of the table."""
    demo = options.shape == "demo"
    source = open_source("demo" if demo else options.folder / "dense")
    pruned = open_source(options.folder / "pruned")
    device = pick_device(options.device)
    parts = [hold_out(examples, HELD_OUT, 0) for examples in drawn(options)]
    dtype: DTypeName = "auto" if demo else options.dtype
    if options.what == "bare":
        model = load_placed(pruned, dtype=dtype, device=options.device, placement="resident")
        processor = load_processor(source)
        every = [one for pair in parts for part in pair for one in part]
        data = collated(processor, every, options.batch_size)
        bare(model, source, data[:1])
        reset_peak(device)
        seconds, _ = timed(device, lambda: bare(model, source, data))
        return _row(options, seconds, device)
    model, sides = taught(options, source, pruned, parts)
    room = Room(path_limit(zeros(pruned.checkpoint, pruned.architecture)), "weights")
    reset_peak(device)
    start = held_out_losses(sides)  # a path begins with this; also a warm-up

    def one_step() -> StepRecord:
        with TemporaryDirectory(dir=options.folder) as work:
            problem = Problem(model, source, pruned, sides, Path(work), options.what == "swap")
            return step(problem, room, empty(), start, lambda _: None)[1]

    with own_memory() as seen:
        seconds, found = timed(device, one_step)
    row = _row(options, seconds, device) | {
        "candidates": found.candidates,
        "tries": len(found.tries),
        "restored": found.restored,
    }
    if device.type == "cpu" and options.placement == "streamed":
        row |= {"own_peak_gib": max(seen) / GIB}
    return row


def drawn(options: argparse.Namespace) -> list[list[Example]]:
    """`--samples` harmful and as many harmless examples."""
    demo = options.shape == "demo"
    data_set = "demo:calibration" if demo else f"jsonl:{options.folder / 'data.jsonl'}"
    examples = read(DataSource.model_validate(data_set)).examples
    return [
        [one for one in examples if one.harmful == harmful][: options.samples]
        for harmful in (True, False)
    ]


def collated(processor: Any, examples: Sequence[Example], size: int) -> list[Batch]:
    """Batches of examples with their responses."""
    return [response_batch(processor, chunk) for chunk in batches(examples, size)]


def taught(
    options: argparse.Namespace,
    source: Source,
    pruned: Source,
    parts: Sequence[tuple[Sequence[Example], Sequence[Example]]],
) -> tuple[PlacedModel, tuple[Prompts, Prompts]]:
    """The pruned model, and both kinds of prompts with the dense model's predictions."""
    demo = options.shape == "demo"
    dtype = "auto" if demo else options.dtype
    given = {"dtype": dtype, "device": options.device, "placement": options.placement}
    dense = load_placed(source, **given)
    processor = load_processor(source)

    def embedded(model: PlacedModel) -> list[list[LayerwisePass]]:
        return [
            [LayerwisePass(model, collated(processor, part, options.batch_size)) for part in pair]
            for pair in parts
        ]

    losses = [
        DecisionLoss(
            {name: one for layerwise in pair for name, one in final_states(layerwise).items()}
        )
        for pair in embedded(dense)
    ]
    dense.network.to("meta")  # one model in memory at a time
    model = load_placed(pruned, **given)
    safety, utility = (
        Prompts(fit, held_out, loss)
        for (fit, held_out), loss in zip(embedded(model), losses, strict=True)
    )
    return model, (safety, utility)


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Memory of this process without file pages, in bytes, sampled fifty times a second."""
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
    print(f"{options.what}, {options.placement}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "what": options.what,
        "placement": options.placement,
        "seconds": seconds,
        "device_peak_gib": device_peak(device),
        "host_peak_gib": host_peak(),
    }


def arguments() -> argparse.Namespace:
    """The command line; options without help are for the child processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("demo", *shapes.SHAPES), default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=whole, default=None)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the widths")
    parser.add_argument("--samples", type=whole, default=64, help="prompts of each kind")
    parser.add_argument("--batch-size", type=whole, default=4)
    parser.add_argument("--image", type=whole, default=560, help="side in pixels")
    parser.add_argument(
        "--skip",
        nargs="*",
        choices=("bare", "resident", "swap"),
        default=(),
        help="rows to leave out, such as those for which the model is too large",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="ignored for demo"
    )
    parser.add_argument("--scratch", type=Path, default=None, help="disk for checkpoint and states")
    parser.add_argument("--json", type=Path, default=None)
    for name in ("--folder", "--what", "--placement"):
        parser.add_argument(name, type=Path if name == "--folder" else str, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_models(folder: Path, options: argparse.Namespace, device: torch.device) -> Source:
    """Write the dense model and the pruned one, and for random weights also the prompts."""
    if options.shape == "demo":
        source = open_source("demo")
    else:
        shapes.write_checkpoint(
            folder / "dense", options.shape, options.layers, options.scale, device
        )
        shapes.write_data(folder, options.samples, options.image)
        source = open_source(folder / "dense")
    settings = prune_settings(method="magnitude")
    patterns = settings.patterns(source.architecture.linears)
    write_edited(source.checkpoint, folder / "pruned", edits_without_data(settings, patterns))
    return source


def measured(folder: Path, skip: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each run that is not skipped, each in its own process."""
    runs = [("bare", "resident"), ("step", "resident"), ("step", "streamed"), ("swap", "streamed")]
    rows = []
    for what, placement in runs:
        if what in skip or (what == "step" and placement in skip):
            continue
        rows.append(in_child(folder=folder, what=what, placement=placement))
    return rows


def main() -> None:
    """Run every row in its own process, print the table, save JSON."""
    options = arguments()
    if options.folder is not None:
        print(json.dumps(run_one(options)))
        return
    device = pick_device(options.device)
    with TemporaryDirectory(dir=options.scratch) as scratch:
        source = write_models(Path(scratch), options, device)
        rows = measured(Path(scratch), options.skip)
        size = source.checkpoint.bytes / GIB
    name = device_name(device)
    dtype = "auto" if options.shape == "demo" else options.dtype
    show(rows, f"{options.shape}, {size:.2f} GiB, 2 x {options.samples} prompts, {dtype}, {name}")
    about = {"shape": options.shape, "checkpoint_gib": size, "dtype": dtype, "device": name}
    save(options.json, {**about, "rows": rows})


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    columns = ("", "placement", "time / bare", "tries", "device GiB", "own GiB", "host GiB")
    table = Table(*columns, title=title)
    bare_seconds = rows[0]["seconds"] if rows[0]["what"] == "bare" else None
    for row in rows:
        peak = row["device_peak_gib"]
        table.add_row(
            row["what"],
            row["placement"],
            "" if bare_seconds is None else f"{row['seconds'] / bare_seconds:.2f}",
            str(row.get("tries", "")),
            "" if peak is None else f"{peak:.2f}",
            f"{row['own_peak_gib']:.2f}" if "own_peak_gib" in row else "",
            f"{row['host_peak_gib']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
