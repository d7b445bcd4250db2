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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import device_name, save, timed, whole
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


@dataclass(frozen=True)
class Drawn:
    """A matrix with random weights before and after pruning, and its mean squared inputs.

    `squares` is `[2, in]`: on harmful and on harmless prompts.
    """

    weight: Tensor
    pruned: Tensor
    squares: Tensor

    @classmethod
    def of(cls, linear: LinearArchitecture, seed: int, device: torch.device) -> Drawn:
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.randn(linear.shape, generator=generator, device=device, dtype=torch.bfloat16)
        squares = torch.rand(2, linear.shape[1], generator=generator, device=device)
        pruned = weight.masked_fill(Pattern(0.5).mask(WANDA.score(weight, squares[1])), 0)
        return cls(weight, pruned, squares)

    def safety(self, rows: slice) -> Tensor:
        return WANDA.score(self.weight[rows], self.squares[0])

    def utility(self, rows: slice) -> Tensor:
        return WANDA.score(self.weight[rows], self.squares[1])

    def both(self) -> tuple[Tensor, Tensor]:
        """The unit of time: both scores of all weights."""
        return self.safety(slice(None)), self.utility(slice(None))

    def selected(self, blocks: Any, band: Band) -> Tensor:
        """Flat positions of the weights that HSR restores."""
        free = restorable(self.weight, self.pruned)
        scores = hsr_scores(free, self.safety, self.utility, blocks, band)
        return (scores > -torch.inf).reshape(-1).nonzero().flatten()


def measured(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Select in every layer, after a warm-up in one."""
    own_layers, heads, kv_heads = SHAPES[options.shape]
    layers = options.layers or own_layers
    layer = layer_of(heads, kv_heads)
    band = Band(0.5, 0.5, 0.7, options.scope)
    selecting = scoring = 0.0
    restored = weights = 0
    for index in range(-1, layers):
        for linear in layer.linears:
            drawn = Drawn.of(linear, index + 1, device)
            blocks = blocks_of(layer, linear, range(heads))
            seconds, found = timed(device, partial(drawn.selected, blocks, band))
            unit, _ = timed(device, drawn.both)
            if index >= 0:
                selecting, scoring = selecting + seconds, scoring + unit
                restored, weights = restored + len(found), weights + drawn.weight.numel()
    return {
        "shape": options.shape,
        "scope": options.scope,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "layers": layers,
        "weights": weights,
        "restored": restored,
        "ratio_to_scoring": selecting / scoring,
        "seconds_all_layers": selecting * own_layers / layers,
    }


def main() -> None:
    """Time the selection, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=whole, default=None)
    parser.add_argument("--scope", choices=("row", "matrix", "head"), default="row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    figures = measured(options, pick_device(options.device))
    title = f"Selection for all heads, {options.shape}, {figures['device']}"
    table = Table("", "", title=title)
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
    save(options.json, figures)


if __name__ == "__main__":
    main()
