"""Pruning compared with llm-compressor's one-shot: same text decoder, data, device and dtype.

    python benchmarks/against_llm_compressor.py --python VENV/bin/python --layers 4 --scale 0.25
    python benchmarks/against_llm_compressor.py --python VENV/bin/python --json versus.json

VENV is a separate environment with `pip install llmcompressor`. The model has the shape of
LLaVA-NeXT-Vicuna-7B's text decoder and random weights. The data are random tokens, which all count,
in batches of one sequence, as llm-compressor does. Each run is a process of its own, and loading
and writing are not timed. The same matrices get 50 % zeros, row by row for Wanda and block by block
for SparseGPT. Memory is the peak during the work, of the device on a GPU, otherwise of the process.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import device_name, device_peak, host_peak, in_child, reset_peak, save, timed, whole

RUNS = [
    ("wanda", "llm-compressor"),
    ("wanda", "resident"),
    ("wanda", "streamed"),
    ("sparsegpt", "llm-compressor"),
    ("sparsegpt", "resident"),
    ("sparsegpt", "streamed"),
]
VICUNA = {"hidden": 4096, "intermediate": 11008, "heads": 32, "layers": 32, "vocabulary": 32064}


def write_model(folder: Path, layers: int, scale: float, device: torch.device) -> None:
    """Write a Llama of Vicuna-7B's shape in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, round(VICUNA["heads"] * scale))
    config = LlamaConfig(
        hidden_size=128 * heads,
        intermediate_size=round(VICUNA["intermediate"] * scale),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        vocab_size=VICUNA["vocabulary"],
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def sequences(samples: int, length: int) -> torch.Tensor:
    """Random token ids, `[samples, length]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VICUNA["vocabulary"], (samples, length), generator=generator)


def run_theirs(options: argparse.Namespace) -> float:
    """Seconds of llm-compressor's sequential one-shot."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(options.folder / "dense", dtype=torch.bfloat16)
    model.to(options.device)
    ids = sequences(options.samples, options.length).tolist()
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    modifiers = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
    modifier = modifiers[options.method](
        sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    begin_peak(options.device)
    work = partial(
        oneshot,
        model=model,
        processor=unused,
        dataset=Dataset.from_dict(rows),
        recipe=modifier,
        num_calibration_samples=options.samples,
        max_seq_length=options.length,
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    return timed(options.device, work)[0]


def run_ours(options: argparse.Namespace) -> float:
    """Seconds of regraft's sequential pruning."""
    from regraft.data.collate import Batch
    from regraft.models.layerwise import LayerwisePass
    from regraft.models.load import load_placed, open_source
    from regraft.pruning.base import prune_settings
    from regraft.pruning.prune import LayerPruning
    from regraft.pruning.results import LayerResults

    source = open_source(options.folder / "dense")
    model = load_placed(
        source, dtype="bfloat16", device=str(options.device), placement=options.runner
    )
    batches = [
        Batch(
            {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}, ids[None], ("",)
        )
        for ids in sequences(options.samples, options.length)
    ]
    settings = prune_settings(method=options.method, sparsity=0.5)
    begin_peak(options.device)

    def work() -> None:
        patterns = settings.patterns(source.architecture.linears)
        with TemporaryDirectory(dir=options.folder) as scratch:
            layers, results = LayerwisePass(model, batches), LayerResults(Path(scratch))
            LayerPruning(settings, source, layers, patterns, results).run()

    return timed(options.device, work)[0]


def begin_peak(device: torch.device) -> None:
    """Reset the peak memory, of the process too."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    reset_peak(device)


def main() -> None:
    """Run everything one after the other, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True, help="an interpreter with llm-compressor")
    parser.add_argument("--layers", type=whole, default=VICUNA["layers"])
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the widths")
    parser.add_argument("--samples", type=whole, default=128)
    parser.add_argument("--length", type=whole, default=1024, help="tokens of a sequence")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, type=torch.device)
    parser.add_argument("--json", type=Path, default=None)
    for name in ("--folder", "--method", "--runner"):  # of a child process
        parser.add_argument(name, type=Path if name == "--folder" else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        theirs = options.runner == "llm-compressor"
        seconds = run_theirs(options) if theirs else run_ours(options)
        print(
            json.dumps({"seconds": seconds, "peak_gib": device_peak(options.device) or host_peak()})
        )
        return
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        write_model(Path(scratch) / "dense", options.layers, options.scale, options.device)
        for method, runner in RUNS:
            python = options.python if runner == "llm-compressor" else sys.executable
            found = in_child(python, folder=scratch, method=method, runner=runner)
            rows.append({"method": method, "runner": runner, **found})
    show(rows, options)
    about = {"layers": options.layers, "scale": options.scale}
    save(options.json, {"device": device_name(options.device), "rows": rows, **about})


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "by", "time / llm-compressor's", "peak GiB", "peak / theirs")
    data = f"{options.samples} x {options.length} tokens"
    shape = f"{options.layers} layers, widths x {options.scale:g}"
    table.title = f"{shape}, {data}, {device_name(options.device)}"
    theirs = {row["method"]: row for row in rows if row["runner"] == "llm-compressor"}
    for row in rows:
        base = theirs[row["method"]]
        table.add_row(
            row["method"],
            row["runner"] if row is base else f"regraft, {row['runner']}",
            f"{row['seconds'] / base['seconds']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['peak_gib'] / base['peak_gib']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
