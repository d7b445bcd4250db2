"""Head scoring compared with naive full forwards on the same prompts: time, memory, agreement.

    python benchmarks/heads.py                          # the bundled model, 16 prompts, all heads
    python benchmarks/heads.py --samples 128 --draws 3  # also its screening, over three draws
    python benchmarks/heads.py MODEL --samples 8 --json heads.json
    python benchmarks/heads.py --shape vicuna-7b --layers 4 --scale 0.125   # random weights

- naive: one full forward, vision tower included, per head and batch; same dtype and batch size.
- exact: `regraft analyse heads`, suffix replay.
- paper's manner: float32, eager attention, one full forward per head and prompt, as in the code
  published with HSR; measured on few heads and prompts.
- estimate and rescoring: the two steps of `regraft analyse heads --mode screened`.

Times are ratios to naive, all measured in this process. Naive and paper's manner cost the same for
every head, so they may be measured on some heads and extrapolated (both columns say how many).
Recall is the share of the exact ranking's best heads that the estimate finds. Below the table are
the ratios by counting the decoder's multiplications, without the vision tower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from shapes import SHAPES, write_checkpoint, write_data
from torch import Tensor, nn

from regraft.data.collate import Batch, batches, prompt_batch
from regraft.data.demo import demo_model
from regraft.data.example import Example
from regraft.data.readers.demo import read_demo
from regraft.data.sources import DataSource, read
from regraft.heads.score import HeadScores, score_heads
from regraft.heads.ships import HeadSettings, Mode
from regraft.heads.states import States, ablate_heads
from regraft.models.architecture import (
    Architecture,
    LayerArchitecture,
    attention_of,
    decoder_layers,
    text_decoder,
)
from regraft.models.load import load_model, load_processor, open_source, pick_device

GIB = 2**30
Head = tuple[int, int]


@dataclass(frozen=True)
class Timing:
    """Seconds, extrapolated to all heads and prompts, and peak device memory."""

    name: str
    seconds: float
    heads: int
    prompts: int
    device_gib: float | None


# Jobs that are measured


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
def naive(
    model: nn.Module,
    architecture: Architecture,
    prompts: Sequence[Batch],
    heads: Sequence[Head],
    eps: float,
) -> dict[Head, Tensor]:
    """Last-token final states, head -> `[samples, d]`, one full forward per head and batch."""
    seen: list[Tensor] = []
    hook = text_decoder(model).register_forward_hook(
        lambda _m, _a, out: seen.append(out.last_hidden_state)
    )
    states = {}
    try:
        for layer, head in heads:
            rows = []
            for batch in prompts:
                with scaled_head(model, layer, head, architecture.layers[layer].head_dim, eps):
                    model(**batch.inputs, use_cache=False, logits_to_keep=1)
                rows.append(seen.pop()[:, -1].float().cpu())
            states[layer, head] = torch.cat(rows)
    finally:
        hook.remove()
    return states


class Clock:
    """Times runs on one device and records them."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.cuda, self.repeats = device.type == "cuda", repeats
        self.timings: list[Timing] = []

    def run(
        self,
        name: str,
        job: Callable[[Path], Any],
        *,
        heads: int,
        prompts: int,
        times: float = 1.0,
        warm: Callable[[Path], Any] | None = None,
    ) -> Any:
        """Run a job in empty folders, `repeats` times; the quickest, times `times`, counts."""
        if self.cuda:  # kernels are chosen and compiled on first use
            with TemporaryDirectory() as folder:
                (warm or job)(Path(folder))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.repeats):
            with TemporaryDirectory() as folder:
                self._synchronize()
                start = time.perf_counter()
                result = job(Path(folder))
                self._synchronize()
                seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else None
        self.timings.append(Timing(name, min(seconds) * times, heads, prompts, peak))
        return result

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


# Counting multiplications


def multiplications(architecture: Architecture, length: int, window: int) -> dict[str, float]:
    """Multiplications of replay and of the estimate as shares of naive full forwards.

    For one prompt of `length` tokens, decoder layers only: projections, attention, MLP. A head of
    layer l costs o_proj and MLP of l and the layers after it; in the last layer queries, keys and
    values of all tokens, and the rest for one token. The estimate costs the same at `window`
    positions, which attend to all keys.
    """

    def size(layer: LayerArchitecture, *roles: str) -> int:
        return sum(li.shape[0] * li.shape[1] for li in layer.linears if li.role in roles)

    def scores(layer: LayerArchitecture, keys: float) -> float:
        return 2 * keys * layer.heads * layer.head_dim

    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers, last = architecture.layers, architecture.layers[-1]
    whole = [sum(li.shape[0] * li.shape[1] for li in layer.linears) for layer in layers]
    full = [length * (w + scores(la, length / 2)) for w, la in zip(whole, layers, strict=True)]
    rest = [w - size(la, *attention[:3]) for w, la in zip(whole, layers, strict=True)]
    last_run = length * size(last, *attention[:3]) + rest[-1] + scores(last, length)
    within = [window * (w + scores(la, length)) for w, la in zip(whole, layers, strict=True)]
    heads = sum(layer.heads for layer in layers)
    exact = estimate = 0.0
    for index, layer in enumerate(layers):
        after = sum(full[index + 1 : -1]) + last_run if layer is not last else 0
        positions = length if layer is not last else 1
        exact += layer.heads * (positions * rest[index] + after)
        estimate += layer.heads * (window * rest[index] + sum(within[index + 1 :]))
    total = heads * sum(full)
    return {"exact": exact / total, "estimate": estimate / total}


# The benchmark


def evenly(heads: Sequence[Head], count: int) -> list[Head]:
    """`count` of the heads, spread evenly; all if there are no more."""
    if count >= len(heads):
        return list(heads)
    return [heads[i * len(heads) // count] for i in range(count)]


def draw(examples: Sequence[Example], samples: int, seed: int) -> list[Example]:
    """`samples` harmful examples."""
    harmful = [example for example in examples if example.harmful]
    order = torch.randperm(len(harmful), generator=torch.Generator().manual_seed(seed))
    return [harmful[int(i)] for i in order[:samples]]


def agreement(estimate: HeadScores, exact: HeadScores, top: int) -> dict[str, float]:
    """Recall of the exact ranking's best heads, and rank correlation over all heads."""
    found = {}
    assert estimate.estimate is not None
    for name, one, other in zip(
        ("ships", "kl"), estimate.estimate, (exact.ships, exact.kl), strict=True
    ):
        scored = ~other.isnan()
        found[f"recall_{name}"] = recall(one, other, top)
        found[f"spearman_{name}"] = float(spearmanr(one[scored], other[scored]).statistic)
    return found


def recall(estimate: Tensor, exact: Tensor, k: int) -> float:
    """Share of the `k` best heads by `exact` that are among the `k` best by `estimate`.

    Both are `[layers, heads]`, NaN for heads without a score.
    """
    k = min(k, int((~exact.isnan()).sum()))
    first, second = (
        set(one.nan_to_num(-torch.inf).flatten().topk(k).indices.tolist())
        for one in (estimate, exact)
    )
    return len(first & second) / k


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=None, help="folder; default: the bundled one")
    parser.add_argument("--shape", choices=SHAPES, default=None, help="random weights instead")
    parser.add_argument("--layers", type=int, default=None, help="default: those of the shape")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the shape's widths")
    parser.add_argument("--image", type=int, default=560, help="side in pixels, with --shape")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--draws", type=int, default=1, help="draws of samples, for the agreement")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--naive-heads", type=int, default=64, help="heads measured, spread evenly")
    parser.add_argument("--paper-prompts", type=int, default=1, help="0 leaves it out")
    parser.add_argument("--paper-heads", type=int, default=8)
    parser.add_argument("--window", type=int, default=HeadSettings().window)
    parser.add_argument("--candidates", type=int, default=HeadSettings().candidates)
    parser.add_argument("--top", type=int, default=10, help="number of best heads for the recall")
    parser.add_argument("--r-max", type=int, default=5)
    parser.add_argument("--tokens-per-pass", type=int, default=None, help="default: what fits")
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which the fastest counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, default=None, help="save the results here")
    return parser.parse_args()


def main() -> None:
    """Run everything, print the table, save JSON."""
    chosen = options()
    with TemporaryDirectory() as scratch:
        figures = measure(chosen, Path(scratch))
    show(figures)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


class Bench:
    """A loaded model and what the jobs share."""

    def __init__(self, chosen: argparse.Namespace, scratch: Path) -> None:
        self.chosen = chosen
        self.device = pick_device(chosen.device)
        if chosen.shape:
            write_checkpoint(
                scratch / "model", chosen.shape, chosen.layers, chosen.scale, self.device
            )
            data = write_data(scratch, chosen.samples, chosen.image)
            self.examples = read(DataSource.model_validate(f"jsonl:{data}")).examples
        else:
            self.examples = read_demo().examples
        source = open_source(scratch / "model" if chosen.shape else chosen.model or demo_model())
        self.name = source.folder.name
        if chosen.shape:
            self.name = f"{chosen.shape} with random weights, widths x {chosen.scale:g}"
        self.architecture = source.architecture
        self.model = load_model(source, dtype=chosen.dtype, device=chosen.device)
        self.processor = load_processor(source)
        self.dtype = next(self.model.parameters()).dtype
        self.heads = [
            (la.index, head) for la in self.architecture.layers for head in range(la.heads)
        ]
        self.settings = HeadSettings(
            r_max=chosen.r_max,
            target="v",
            window=chosen.window,
            candidates=chosen.candidates,
            tokens_per_pass=chosen.tokens_per_pass,
        )

    def prompts(self, seed: int, size: int, samples: int, dtype: torch.dtype) -> list[Batch]:
        """Batches of a draw of samples, on the device."""
        cut = batches(draw(self.examples, samples, seed), size)
        return [prompt_batch(self.processor, chunk).to(self.device, dtype) for chunk in cut]

    def score(self, prompts: Sequence[Batch], mode: Mode, folder: Path) -> HeadScores:
        """Scores of all heads, in an empty folder or in one with finished layers."""
        how = self.settings.model_copy(update={"mode": mode})
        return score_heads(self.model, self.architecture, prompts, folder, how)

    def estimate(self, prompts: Sequence[Batch], folder: Path) -> None:
        """The first step of screening, written where the second step reads it."""
        every = {layer.index: range(layer.heads) for layer in self.architecture.layers}
        how = self.settings.model_copy(update={"mode": "screened"})
        ablate_heads(
            self.model, self.architecture, prompts, folder / "estimate", how, every, _silent
        )

    def agreement(self, prompts: Sequence[Batch]) -> dict[str, float]:
        """Agreement of the estimate with the exact scores, on other prompts."""
        with TemporaryDirectory() as folder:
            screened = self.score(prompts, "screened", Path(folder))
            exact = self.score(prompts, "exact", Path(folder))
        return agreement(screened, exact, self.chosen.top)


def measure(chosen: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All results as JSON values."""
    bench = Bench(chosen, scratch)
    model, architecture, heads, eps = (
        bench.model,
        bench.architecture,
        bench.heads,
        bench.settings.eps,
    )
    clock = Clock(bench.device, chosen.repeats)
    prompts = bench.prompts(0, chosen.batch_size, chosen.samples, bench.dtype)
    samples = sum(len(batch.ids) for batch in prompts)
    few = evenly(heads, chosen.naive_heads)
    truly = clock.run(
        "naive full forwards",
        lambda _: naive(model, architecture, prompts, few, eps),
        heads=len(few),
        prompts=samples,
        times=len(heads) / len(few),
        warm=lambda _: naive(model, architecture, prompts[:1], few[:1], eps),
    )
    done = scratch / "exact"

    def exactly(folder: Path) -> HeadScores:
        scores = bench.score(prompts, "exact", folder)
        shutil.copytree(folder / "exact", done, dirs_exist_ok=True)
        return scores

    exact = clock.run("exact replay", exactly, heads=len(heads), prompts=samples)
    states = States(tuple(sorted(done.iterdir())))
    layers = {index: states.layer(index) for index in {index for index, _ in few}}
    differences = [
        float((truly[index, head] - found.ablated[head]).abs().max())
        for index, head in few
        if (found := layers[index]) is not None
    ]
    clock.run(
        "screening: estimate",
        lambda folder: bench.estimate(prompts, folder),
        heads=len(heads),
        prompts=samples,
    )
    with TemporaryDirectory() as folder:
        bench.estimate(prompts, Path(folder))

        def rescore(own: Path) -> HeadScores:
            shutil.copytree(Path(folder) / "estimate", own / "estimate")
            return bench.score(prompts, "screened", own)

        screened = clock.run(
            "screening: rescoring", rescore, heads=2 * chosen.candidates, prompts=samples
        )
    clock.timings[-1] = replace(clock.timings[-1], heads=int(screened.exact.sum()))
    agreements = [agreement(screened, exact, chosen.top)]
    for seed in range(1, chosen.draws):
        other = bench.prompts(seed, chosen.batch_size, chosen.samples, bench.dtype)
        agreements.append(bench.agreement(other))
    if chosen.paper_prompts:
        model.float()
        text_decoder(model).set_attn_implementation("eager")  # type: ignore[operator]
        singly = bench.prompts(0, 1, chosen.paper_prompts, torch.float32)
        some = evenly(heads, chosen.paper_heads)
        clock.run(
            "paper's manner",
            lambda _: naive(model, architecture, singly, some, eps),
            heads=len(some),
            prompts=len(singly),
            times=len(heads) / len(some) * samples / len(singly),
            warm=lambda _: naive(model, architecture, singly[:1], some[:1], eps),
        )
    length = prompts[0].inputs["input_ids"].shape[1]
    cuda = bench.device.type == "cuda"
    return {
        "model": bench.name,
        "device": torch.cuda.get_device_name(bench.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "layers": len(architecture.layers),
        "heads": len(heads),
        "samples": samples,
        "batch_size": chosen.batch_size,
        "tokens": length,
        "window": chosen.window,
        "timings": [asdict(timing) for timing in clock.timings],
        "multiplications": multiplications(architecture, length, chosen.window),
        "largest_difference": max(differences),
        "largest_state": max(float(state.abs().max()) for state in truly.values()),
        "top": chosen.top,
        "agreement": agreements,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    title = (
        f"{figures['model']}: {figures['heads']} heads, {figures['samples']} prompts of "
        f"{figures['tokens']} tokens, {figures['dtype']}, {figures['device']}"
    )
    counted = {
        "exact replay": figures["multiplications"]["exact"],
        "screening: estimate": figures["multiplications"]["estimate"],
    }
    naively, exactly = (figures["timings"][i]["seconds"] for i in (0, 1))
    columns = ("", "of naive", "by count", "of exact", "heads run", "prompts run", "device GiB")
    table = Table(*columns, title=title)
    for row in figures["timings"]:
        name, memory = row["name"], row["device_gib"]
        table.add_row(
            name,
            f"{row['seconds'] / naively:.3f}",
            f"{counted[name]:.3f}" if name in counted else "",
            f"{row['seconds'] / exactly:.3f}",
            str(row["heads"]),
            str(row["prompts"]),
            "" if memory is None else f"{memory:.1f}",
        )
    console.print(table)
    console.print(
        f"Final states of exact replay and naive forwards differ by "
        f"{figures['largest_difference']:.2g} at most (the largest is "
        f"{figures['largest_state']:.3g})."
    )
    top = figures["top"]
    found = Table(
        "draw",
        f"Ships: recall of {top}",
        "Spearman",
        f"KL: recall of {top}",
        "Spearman",
        title=f"Estimate at {figures['window']} positions against exact scores",
    )
    names = ("recall_ships", "spearman_ships", "recall_kl", "spearman_kl")
    for seed, row in enumerate(figures["agreement"]):
        found.add_row(str(seed), *(f"{row[name]:.2f}" for name in names))
    console.print(found)


def _silent(_: int) -> None:
    return None


if __name__ == "__main__":
    main()
