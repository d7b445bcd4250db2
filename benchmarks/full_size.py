"""Every stage on a checkpoint of full size with random weights: time, and peak memory.

    python benchmarks/full_size.py --layers 4 --scale 0.25      # small, on a CPU
    python benchmarks/full_size.py --samples 32 --json 7b.json  # Qwen2.5-VL-7B's shape, on a GPU

Speed and memory do not depend on the weights. The checkpoint is written to disk in shards, behind
the family's real processor, and every stage is run as a user runs it, on images of `--image`
pixels. Times are given as multiples of one bare forward pass of the text decoder and vision tower
over the same calibration data, measured in the same process; loading and writing are in them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_checkpoint, write_data
from torch import nn

from regraft import stages
from regraft.data.collate import batches, response_batch
from regraft.data.sources import DataSource, read
from regraft.heads.ships import HeadSettings
from regraft.models.key_values import record
from regraft.models.load import Source, load_model, load_processor, open_source, pick_device
from regraft.models.replay import text_inputs
from regraft.pruning.base import prune_settings
from regraft.restoration.methods.hsr import HSRSettings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings

GIB = 2**30


def realign(
    dense: Source, pruned: Source, folder: Path, settings: HSRSettings, data: CalibrationSettings
) -> None:
    """Rank on the CPU and write the patch, from the head scores and statistics in `folder`."""
    inputs = stages.Inputs(folder / "heads", folder / "statistics")
    ranking, compute = folder / "ranking", ComputeSettings(device="cpu")
    stages.write_ranking(stages.Setup(dense, data, compute), pruned, ranking, settings, inputs)
    stages.write_patch(dense, pruned, folder / "patch", settings, ranking)


def main() -> None:
    """Build, run every stage, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int, default=None, help="default: the shape's own")
    parser.add_argument("--scale", type=float, default=1.0, help="of the widths")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image", type=int, default=560, help="pixels a side; 28x28 a token")
    parser.add_argument("--head-samples", type=int, default=8)
    parser.add_argument("--tokens-per-pass", type=int, default=None, help="default: what fits")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = pick_device(options.device)
    compute = ComputeSettings(
        device=options.device, dtype="bfloat16", batch_size=options.batch_size
    )
    measured: dict[str, dict[str, Any]] = {}

    def measure(name: str, run: Callable[[], Any]) -> Any:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        measured[name] = {"seconds": seconds, "device_gib": peak, "host_gib_so_far": host}
        return result

    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "dense", options.shape, options.layers, options.scale, device)
        data = write_data(folder, options.samples, options.image)
        calibration = CalibrationSettings(
            data=DataSource.model_validate(f"jsonl:{data}"), samples=options.samples
        )
        few = calibration.model_copy(update={"samples": options.head_samples})
        dense = open_source(folder / "dense")
        heads = sum(layer.heads for layer in dense.architecture.layers)
        model = load_model(dense, dtype="bfloat16", device=options.device)
        harmless = [e for e in read(calibration.data).examples if not e.harmful]
        prompts = [
            response_batch(load_processor(dense), chunk).to(device, torch.bfloat16)
            for chunk in batches(harmless, options.batch_size)
        ]

        def bare(network: nn.Module) -> None:
            for batch in prompts:
                record(network, text_inputs(network, batch.inputs), ())

        bare(model)
        measure("bare forward", partial(bare, model))
        tokens = sum(batch.inputs["input_ids"].numel() for batch in prompts)
        del model
        pruned = measure(
            "prune (sequential)",
            lambda: stages.prune_checkpoint(
                stages.Setup(dense, calibration, compute), folder / "pruned", prune_settings()
            ),
        )
        measure(
            f"heads ({options.head_samples} samples)",
            lambda: stages.write_head_scores(
                stages.Setup(dense, few, compute),
                folder / "heads",
                HeadSettings(r_max=2, tokens_per_pass=options.tokens_per_pass),
            ),
        )
        measure(
            "statistics",
            lambda: stages.write_statistics(
                stages.Setup(dense, calibration, compute), folder / "statistics"
            ),
        )
        measure(
            "realign (HSR, on the CPU)",
            lambda: realign(
                dense, pruned, folder, HSRSettings(top_heads=min(10, heads)), calibration
            ),
        )
        measure(
            "apply",
            lambda: stages.patch_checkpoint(
                "apply", pruned.folder, folder / "patch", folder / "out"
            ),
        )
        size = dense.checkpoint.bytes / GIB
    unit = measured["bare forward"]["seconds"]
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "checkpoint_gib": size,
        "heads": heads,
        "samples": options.samples,
        "tokens": tokens,
        "stages": {
            name: row | {"bare_forwards": row["seconds"] / unit} for name, row in measured.items()
        },
    }
    table = Table(
        "stage",
        "bare forwards",
        "device peak GiB",
        "host peak so far GiB",
        title=f"{size:.1f} GiB checkpoint, {tokens} calibration tokens, {about['device']}",
    )
    for name, row in measured.items():
        peak = "" if row["device_gib"] is None else f"{row['device_gib']:.1f}"
        table.add_row(name, f"{row['seconds'] / unit:.2f}", peak, f"{row['host_gib_so_far']:.1f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
