"""Time of HSR's selection of weights for all heads of a 7B model.

    python benchmarks/selection.py --layers 2            # a CPU; extrapolated to all layers
    python benchmarks/selection.py --json selection.json # all layers
    python benchmarks/selection.py --shape vicuna-7b --scope matrix --device cuda

It covers every q, k, v and o projection of the shape, with random weights pruned by Wanda at 50 %,
both scores by Wanda, p = 0.5, p_max = 0.7 and q = 0.5. The time includes the mask of restorable
weights, both scores, their rankings and the positions, as in `regraft realign`, without reading and
writing. The unit is one pass over the same weights that only computes both scores, in the same
process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regraft.models.architecture import LayerArchitecture, LinearArchitecture
from regraft.models.load import pick_device
from regraft.patch.pair import restorable
from regraft.pruning.masks import Pattern
from regraft.pruning.pruners.wanda import PLUGIN as WANDA
from regraft.restoration.importance import Band, hsr_scores
from regraft.restoration.selection import blocks_of

HEAD = 128
SHAPES = {"qwen2.5-vl-7b": (28, 28, 4), "vicuna-7b": (32, 32, 32)}  # layers, heads, kv heads


def layer_of(heads: int, kv_heads: int) -> LayerArchitecture:
    """The attention weights of one layer; the hidden size is heads * 128."""
    width, narrow = heads * HEAD, kv_heads * HEAD
    shapes = {"q_proj": (width, width), "k_proj": (narrow, width), "v_proj": (narrow, width)}
    shapes["o_proj"] = (width, width)
    linears = tuple(LinearArchitecture(0, f"self_attn.{r}", "", "", s) for r, s in shapes.items())
    return LayerArchitecture(0, "self_attn", heads, kv_heads, HEAD, linears)


def main() -> None:
    """Time the selection, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--scope", choices=("row", "matrix", "head"), default="row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = pick_device(options.device)
    own_layers, heads, kv_heads = SHAPES[options.shape]
    layers = options.layers or own_layers
    layer = layer_of(heads, kv_heads)
    band = Band(0.5, 0.5, 0.7, options.scope)
    selecting = scoring = 0.0
    restored = weights = 0
    for index in range(-1, layers):  # the first one warms up
        for linear in layer.linears:
            generator = torch.Generator(device).manual_seed(index + 1)
            weight = torch.randn(
                linear.shape, generator=generator, device=device, dtype=torch.bfloat16
            )
            squares = torch.rand(2, linear.shape[1], generator=generator, device=device)
            pruned = weight.masked_fill(Pattern(0.5).mask(WANDA.score(weight, squares[1])), 0)
            blocks = blocks_of(layer, linear, range(heads))

            def scored(rows: slice, weight: Tensor = weight, by: Tensor = squares[0]) -> Tensor:
                return WANDA.score(weight[rows], by)

            def useful(rows: slice, weight: Tensor = weight, by: Tensor = squares[1]) -> Tensor:
                return WANDA.score(weight[rows], by)

            start = _now(device)
            scores = hsr_scores(restorable(weight, pruned), scored, useful, blocks, band)
            found = (scores > -torch.inf).reshape(-1).nonzero().flatten()
            middle = _now(device)
            scored(slice(None)), useful(slice(None))
            end = _now(device)
            if index >= 0:
                selecting, scoring = selecting + middle - start, scoring + end - middle
                restored, weights = restored + len(found), weights + weight.numel()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    figures = {
        "shape": options.shape,
        "scope": options.scope,
        "device": card,
        "threads": torch.get_num_threads(),
        "layers": layers,
        "weights": weights,
        "restored": restored,
        "ratio_to_scoring": selecting / scoring,
        "seconds_all_layers": selecting * own_layers / layers,
    }
    table = Table("", "", title=f"Selection for all heads, {options.shape}, {card}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
