"""Exact head scoring by suffix replay against naive full forwards, on the same prompts.

    python benchmarks/heads.py                       # the bundled model, 16 prompts
    python benchmarks/heads.py MODEL --samples 8 --json heads.json

Naive is one full forward (vision tower included) a head and batch, in the same dtype and batch
size. The result is the ratio of the two times, measured in turn in one process, next to the bound
that counting decoder layers gives, and the largest difference between the two final states.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from regraft.data.collate import Batch, batches, prompt_batch
from regraft.data.demo import demo_model, read_demo
from regraft.heads.score import score_heads
from regraft.models.ablation import EPS
from regraft.models.anatomy import Anatomy, attention_of, decoder_layers, text_decoder
from regraft.models.load import load_model, load_processor, open_source, pick_device
from regraft.models.replay import last_positions


@contextmanager
def scaled_head(model: nn.Module, layer: int, head: int, size: int, eps: float) -> Iterator[None]:
    """Scale one head's output by eps (its value, that is) during full forwards."""
    _, attention = attention_of(decoder_layers(model)[layer])

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., head * size : (head + 1) * size] *= eps
        return (z,)

    handle = attention.o_proj.register_forward_pre_hook(hook)  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def naive(model: nn.Module, anatomy: Anatomy, prompts: list[Batch]) -> dict[int, Tensor]:
    """Final states of the last token, layer -> `[heads, samples, d]`, one full forward a head."""
    seen: list[Tensor] = []
    hook = text_decoder(model).register_forward_hook(
        lambda _m, _a, out: seen.append(out.last_hidden_state)
    )
    states: dict[int, list[Tensor]] = {}
    for layer in anatomy.layers:
        for head in range(layer.heads):
            rows = []
            for batch in prompts:
                with scaled_head(model, layer.index, head, layer.head_dim, EPS):
                    model(**batch.inputs, use_cache=False, logits_to_keep=1)
                final = seen.pop()
                row = torch.arange(len(final), device=final.device)
                last = last_positions(batch.inputs, final.shape[1])
                rows.append(final[row, last].float().cpu())
            states.setdefault(layer.index, []).append(torch.cat(rows))
    hook.remove()
    return {layer: torch.stack(rows) for layer, rows in states.items()}


def replayed(
    model: nn.Module, anatomy: Anatomy, prompts: list[Batch], tokens_per_pass: int
) -> dict[int, Tensor]:
    """The same states by suffix replay, as `regraft heads` computes them."""
    from safetensors.torch import load_file

    with TemporaryDirectory() as folder:
        score_heads(
            model,
            anatomy,
            prompts,
            Path(folder),
            r_max=1,
            target="v",
            tokens_per_pass=tokens_per_pass,
        )
        parts = [load_file(path) for path in sorted(Path(folder).iterdir())]
    return {
        layer.index: torch.cat([part[f"states.{layer.index}"] for part in parts], dim=1)
        for layer in anatomy.layers
        if f"states.{layer.index}" in parts[0]
    }


def main() -> None:
    """Run both, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=None, help="folder; default: the bundled one")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens-per-pass", type=int, default=16384)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, default=None, help="save the figures here")
    options = parser.parse_args()

    source = open_source(options.model or demo_model())
    model = load_model(source, dtype=options.dtype, device=options.device)
    processor = load_processor(source)
    parameter = next(model.parameters())
    examples = read_demo("test").examples[: options.samples]
    prompts = [
        prompt_batch(processor, chunk).to(parameter.device, parameter.dtype)
        for chunk in batches(examples, options.batch_size)
    ]
    seconds, states = {}, {}
    for name, run in (
        ("naive", lambda: naive(model, source.anatomy, prompts)),
        ("replay", lambda: replayed(model, source.anatomy, prompts, options.tokens_per_pass)),
    ):
        if parameter.device.type == "cuda":
            run()  # kernels are chosen and compiled on first use
            torch.cuda.synchronize()
        start = time.perf_counter()
        states[name] = run()
        seconds[name] = time.perf_counter() - start
    difference = max(
        float((states["naive"][layer] - states["replay"][layer]).abs().max())
        for layer in states["replay"]
    )
    layers = len(source.anatomy.layers)
    device = pick_device(options.device)
    figures = {
        "model": source.folder.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "samples": len(examples),
        "heads": sum(layer.heads for layer in source.anatomy.layers),
        "replay_to_naive": seconds["replay"] / seconds["naive"],
        "decoder_layers_bound": (layers + 1) / (2 * layers),
        "largest_difference": difference,
    }
    table = Table("figure", "value", title="Head scoring: suffix replay against naive forwards")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
