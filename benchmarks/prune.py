"""Pruning at full size with random weights: time in bare forward passes, and peak memory.

    python benchmarks/prune.py --shape demo                              # the bundled model
    python benchmarks/prune.py --layers 2 --scale 0.25 --samples 8       # small, on a CPU
    python benchmarks/prune.py --samples 128 --json prune.json           # Qwen2.5-VL-7B's shape
    python benchmarks/prune.py --shape vicuna-7b --samples 128           # LLaVA-NeXT-Vicuna-7B's

Every method runs resident and streamed, each in a process of its own, as in `regraft prune` but
without loading and writing. `bare` is the time of the forward passes that the method needs on the
same data, measured in the same process: the vision tower once, and the decoder as often as the
method runs it (almost twice in sequential order, once in one-shot, twice for SNIP, whose backward
pass is not in `bare`). For a streamed model `bare` also fetches each layer. Host memory includes
the checkpoint's pages that are in memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import shapes
import torch
from measuring import (
    GIB,
    device_name,
    device_peak,
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
from regraft.data.sources import DataSource, read
from regraft.models.architecture import text_decoder
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import load_placed, load_processor, open_source, pick_device
from regraft.models.placement import PlacedModel
from regraft.models.replay import text_inputs
from regraft.pruning.base import prune_settings
from regraft.pruning.prune import LayerPruning
from regraft.pruning.results import LayerResults

RUNS = [
    ("wanda", "one-shot"),
    ("wanda", "sequential"),
    ("sparsegpt", "sequential"),
    ("snip", "one-shot"),
]


def bare_passes(model: PlacedModel, data: list[Batch]) -> tuple[float, float]:
    """Seconds of the vision tower and embeddings, and of the decoder, over all data."""
    if not model.streamed:
        placed = [model.place(batch) for batch in data]
        network = model.network
        vision, texts = timed(
            model.device, lambda: [text_inputs(network, batch.inputs) for batch in placed]
        )
        run = text_decoder(network)
        with torch.no_grad():
            return vision, timed(model.device, lambda: [run(**text.kwargs) for text in texts])[0]
    vision, layerwise = timed(model.device, lambda: LayerwisePass(model, data))

    def decoder() -> None:
        for layer in range(layerwise.layers):
            with model.layer(layer):
                layerwise.run_layer(layer, lambda _: None)

    return vision, timed(model.device, decoder)[0]


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """One method in one placement."""
    demo = options.shape == "demo"
    source = open_source("demo" if demo else options.folder / "dense")
    data_set = "demo:calibration" if demo else f"jsonl:{options.folder / 'data.jsonl'}"
    harmless = [e for e in read(DataSource.model_validate(data_set)).examples if not e.harmful]
    examples = harmless[: options.samples]
    device = pick_device(options.device)
    model = load_placed(
        source,
        dtype="auto" if demo else "bfloat16",
        device=options.device,
        placement=options.placement,
    )
    processor = load_processor(source)
    data = [response_batch(processor, chunk) for chunk in batches(examples, options.batch_size)]
    bare_passes(model, data[:1])  # kernels are chosen on first use
    vision, decoder = bare_passes(model, data)
    reset_peak(device)
    layers = len(source.architecture.layers)
    settings = prune_settings(method=options.method, order=options.order, n_m=options.n_m)
    with TemporaryDirectory(dir=options.folder) as work:
        seconds, _ = timed(
            device,
            lambda: LayerPruning(
                settings,
                source,
                LayerwisePass(model, data),
                settings.patterns(source.architecture.linears),
                LayerResults(Path(work)),
            ).run(),
        )
    passes = {"one-shot": 1.0, "sequential": 2 - 1 / layers}[options.order]
    passes = 2.0 if options.method == "snip" else passes
    return {
        "method": options.method,
        "order": options.order,
        "placement": options.placement,
        "seconds": seconds,
        "bare_seconds": vision + passes * decoder,
        "ratio": seconds / (vision + passes * decoder),
        "device_peak_gib": device_peak(device),
        "host_peak_gib": host_peak(),
        "tokens": sum(batch.inputs["input_ids"].numel() for batch in data),
    }


def main() -> None:
    """Run every method and placement in its own process, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("demo", *shapes.SHAPES), default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=whole, default=None)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the widths")
    parser.add_argument("--samples", type=whole, default=128)
    parser.add_argument("--batch-size", type=whole, default=4)
    parser.add_argument("--image", type=whole, default=560, help="side in pixels")
    parser.add_argument("--n-m", default=None, help="such as 2:4, instead of 50 %%")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scratch", type=Path, default=None, help="disk for the checkpoint")
    parser.add_argument("--json", type=Path, default=None)
    for name in ("--folder", "--method", "--order", "--placement"):  # of a child process
        parser.add_argument(name, type=Path if name == "--folder" else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(run_one(options)))
        return
    device = pick_device(options.device)
    with TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        if options.shape != "demo":
            shapes.write_checkpoint(
                folder / "dense", options.shape, options.layers, options.scale, device
            )
            shapes.write_data(folder, options.samples, options.image)
        dense = "demo" if options.shape == "demo" else folder / "dense"
        size = open_source(dense).checkpoint.bytes / GIB
        rows = [
            in_child(folder=folder, method=method, order=order, placement=placement)
            for method, order in RUNS
            for placement in ("resident", "streamed")
        ]
    name = device_name(device)
    show(rows, f"{options.shape}, {size:.2f} GiB, {rows[0]['tokens']} tokens, {name}")
    about = {"shape": options.shape, "checkpoint_gib": size, "device": name, "rows": rows}
    save(options.json, about)


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table("method", "order", "placement", "time / bare", "device GiB", "host GiB")
    table.title = title
    for row in rows:
        peak = row["device_peak_gib"]
        table.add_row(
            row["method"],
            row["order"],
            row["placement"],
            f"{row['ratio']:.2f}",
            "" if peak is None else f"{peak:.2f}",
            f"{row['host_peak_gib']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
