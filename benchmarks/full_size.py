"""Every stage on a full-size checkpoint with random weights: time and peak memory.

    python benchmarks/full_size.py --layers 4 --scale 0.25      # small, on a CPU
    python benchmarks/full_size.py --samples 32 --json 7b.json  # Qwen2.5-VL-7B's shape, on a GPU

Speed and memory do not depend on the weights. The checkpoint is written to disk in shards, with
the family's real processor, and every stage is run as a user runs it, on images of `--image`
pixels. Times are multiples of one bare forward pass of the text decoder and vision tower over the
same calibration data, measured in the same process; they include loading and writing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import GIB, device_name, device_peak, host_peak, reset_peak, save, timed, whole
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_checkpoint, write_data

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


class Meter:
    """Measures seconds and peak memory of named jobs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a job and record its time and memory; returns its result."""
        reset_peak(self.device)
        seconds, result = timed(self.device, work)
        peaks = {"device_gib": device_peak(self.device), "host_gib_so_far": host_peak()}
        self.rows[name] = {"seconds": seconds, **peaks}
        return result


def bare_forward(
    meter: Meter, dense: Source, data: DataSource, compute: ComputeSettings
) -> dict[str, int]:
    """Run decoder and vision tower over the harmless prompts, after one warm-up pass."""
    model = load_model(dense, dtype=compute.dtype, device=compute.device)
    harmless = [e for e in read(data).examples if not e.harmful]
    prompts = [
        response_batch(load_processor(dense), chunk).to(meter.device, torch.bfloat16)
        for chunk in batches(harmless, compute.batch_size)
    ]

    def bare() -> None:
        for batch in prompts:
            record(model, text_inputs(model, batch.inputs), ())

    bare()
    meter.run("bare forward", bare)
    return {
        "heads": sum(layer.heads for layer in dense.architecture.layers),
        "samples": len(harmless),
        "tokens": sum(batch.inputs["input_ids"].numel() for batch in prompts),
    }


def all_stages(meter: Meter, setup: stages.Setup, folder: Path, head_samples: int) -> None:
    """Every stage as a user runs it, from the dense checkpoint to the realigned one."""
    heads = sum(layer.heads for layer in setup.dense.architecture.layers)
    hsr = HSRSettings(top_heads=min(10, heads))
    fewer = setup.calibration.model_copy(update={"samples": head_samples})
    few = replace(setup, calibration=fewer)
    pruned = meter.run(
        "prune (sequential)",
        lambda: stages.prune_checkpoint(setup, folder / "pruned", prune_settings()),
    )
    meter.run(
        f"heads ({head_samples} samples)",
        lambda: stages.write_head_scores(few, folder / "heads"),
    )
    meter.run("statistics", lambda: stages.write_statistics(setup, folder / "statistics"))
    meter.run("realign (HSR, on the CPU)", lambda: realign(setup, pruned, folder, hsr))
    meter.run(
        "apply",
        lambda: stages.patch_checkpoint("apply", pruned.folder, folder / "patch", folder / "out"),
    )


def realign(setup: stages.Setup, pruned: Source, folder: Path, settings: HSRSettings) -> None:
    """Rank on the CPU and write the patch, from the head scores and statistics in `folder`."""
    inputs = stages.Inputs(folder / "heads", folder / "statistics")
    on_cpu = stages.Setup(setup.dense, setup.calibration, ComputeSettings(device="cpu"))
    ranking = folder / "ranking"
    stages.write_ranking(on_cpu, pruned, ranking, settings, inputs)
    stages.write_patch(setup.dense, pruned, folder / "patch", settings, ranking)


def show(about: dict[str, Any]) -> None:
    """Print the table."""
    size, tokens = f"{about['checkpoint_gib']:.1f} GiB checkpoint", f"{about['tokens']} tokens"
    title = f"{size}, {tokens} of calibration, {about['device']}"
    columns = ("stage", "bare forwards", "device peak GiB", "host peak so far GiB")
    table = Table(*columns, title=title)
    for name, row in about["stages"].items():
        peak = "" if row["device_gib"] is None else f"{row['device_gib']:.1f}"
        table.add_row(name, f"{row['bare_forwards']:.2f}", peak, f"{row['host_gib_so_far']:.1f}")
    Console().print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=whole, default=None, help="default: the shape's own")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the widths")
    parser.add_argument("--samples", type=whole, default=16)
    parser.add_argument("--batch-size", type=whole, default=4)
    parser.add_argument("--image", type=whole, default=560, help="side in pixels; 28x28 per token")
    parser.add_argument("--head-samples", type=whole, default=8)
    parser.add_argument("--tokens-per-pass", type=whole, default=None, help="default: what fits")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    """Build, run every stage, print the table, save JSON."""
    options = arguments()
    meter = Meter(pick_device(options.device))
    compute = ComputeSettings(
        device=options.device, dtype="bfloat16", batch_size=options.batch_size
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = options.shape, options.layers, options.scale
        write_checkpoint(folder / "dense", *shape, meter.device)
        data = write_data(folder, options.samples, options.image)
        calibration = CalibrationSettings(
            data=DataSource.model_validate(f"jsonl:{data}"), samples=options.samples
        )
        dense = open_source(folder / "dense")
        sizes = bare_forward(meter, dense, calibration.data, compute)
        scoring = HeadSettings(r_max=2, tokens_per_pass=options.tokens_per_pass)
        setup = stages.Setup(dense, calibration, compute, scoring=scoring)
        all_stages(meter, setup, folder, options.head_samples)
        size = dense.checkpoint.bytes / GIB
    unit = meter.rows["bare forward"]["seconds"]
    about = {
        "device": device_name(meter.device),
        "checkpoint_gib": size,
        **sizes,
        "stages": {
            name: row | {"bare_forwards": row["seconds"] / unit} for name, row in meter.rows.items()
        },
    }
    show(about)
    save(options.json, about)


if __name__ == "__main__":
    main()
