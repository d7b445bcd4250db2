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
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from head_agreement import agreement, largest_difference
from measuring import device_name, device_peak, reset_peak, save, timed, whole
from naive_heads import Head, multiplications, naive
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_checkpoint, write_data
from torch import Tensor

from regraft.data.collate import Batch, batches, prompt_batch
from regraft.data.example import Example
from regraft.data.readers.demo import read_demo
from regraft.data.sources import DataSource, read
from regraft.heads.score import HeadScores, score_heads
from regraft.heads.ships import HeadSettings, Mode
from regraft.heads.states import ablate_heads
from regraft.models.architecture import text_decoder
from regraft.models.load import load_model, load_processor, open_source, pick_device


@dataclass(frozen=True)
class Timing:
    """Seconds, extrapolated to all heads and prompts, and peak device memory."""

    name: str
    seconds: float
    heads: int
    prompts: int
    device_gib: float | None


class Clock:
    """Times runs on one device and records them."""

    def __init__(self, device: torch.device, repeats: int, scratch: Path) -> None:
        self.device, self.repeats, self.scratch = device, repeats, scratch
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
    ) -> tuple[Any, Path]:
        """Run a job in empty folders, `repeats` times; the quickest, times `times`, counts.

        Returns:
            (the job's result, the folder of its last run)
        """
        if self.device.type == "cuda":  # kernels are chosen and compiled on first use
            (warm or job)(self.folder())
        reset_peak(self.device)
        found = []
        for _ in range(self.repeats):
            folder = self.folder()
            found.append((*timed(self.device, partial(job, folder)), folder))
        seconds, peak = min(seconds for seconds, *_ in found), device_peak(self.device)
        self.timings.append(Timing(name, seconds * times, heads, prompts, peak))
        return found[-1][1:]

    def folder(self) -> Path:
        """A new, empty folder."""
        return Path(mkdtemp(dir=self.scratch))


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


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="folder; default: the bundled one")
    parser.add_argument("--shape", choices=SHAPES, default=None, help="random weights instead")
    parser.add_argument("--layers", type=whole, default=None, help="default: those of the shape")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the shape's widths")
    parser.add_argument("--image", type=whole, default=560, help="side in pixels, with --shape")
    parser.add_argument("--samples", type=whole, default=16)
    parser.add_argument("--draws", type=whole, default=1, help="draws of samples, for agreement")
    parser.add_argument("--batch-size", type=whole, default=8)
    parser.add_argument("--naive-heads", type=whole, default=64, help="heads measured, even spread")
    parser.add_argument("--paper-prompts", type=int, default=1, help="0 leaves it out")
    parser.add_argument("--paper-heads", type=whole, default=8)
    parser.add_argument("--window", type=whole, default=HeadSettings().window)
    parser.add_argument("--candidates", type=whole, default=HeadSettings().candidates)
    parser.add_argument("--top", type=whole, default=10, help="number of best heads for the recall")
    parser.add_argument("--r-max", type=whole, default=5)
    parser.add_argument("--tokens-per-pass", type=whole, default=None, help="default: what fits")
    parser.add_argument("--repeats", type=whole, default=1, help="runs, of which the best counts")
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
    save(chosen.json, figures)


class Bench:
    """A loaded model, its prompts, and the jobs, each of which is timed."""

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
        source = open_source(scratch / "model" if chosen.shape else chosen.model)
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
            mode="screened",
            r_max=chosen.r_max,
            target="v",
            window=chosen.window,
            candidates=chosen.candidates,
            tokens_per_pass=chosen.tokens_per_pass,
        )
        self.clock = Clock(self.device, chosen.repeats, scratch)
        self.prompts = self.drawn(0, chosen.batch_size, chosen.samples, self.dtype)
        self.samples = sum(len(batch.ids) for batch in self.prompts)

    def drawn(self, seed: int, size: int, samples: int, dtype: torch.dtype) -> list[Batch]:
        """Batches of a draw of samples, on the device."""
        cut = batches(draw(self.examples, samples, seed), size)
        return [prompt_batch(self.processor, chunk).to(self.device, dtype) for chunk in cut]

    def score(self, prompts: Sequence[Batch], mode: Mode, folder: Path) -> HeadScores:
        """Scores of all heads, in an empty folder or in one with finished layers."""
        how = self.settings.model_copy(update={"mode": mode})
        return score_heads(self.model, self.architecture, prompts, folder, how)

    def estimate(self, folder: Path) -> None:
        """The first step of screening, written where the second step reads it."""
        every = {layer.index: range(layer.heads) for layer in self.architecture.layers}
        out = folder / "estimate"
        ablate_heads(
            self.model, self.architecture, self.prompts, out, self.settings, every, _silent
        )

    def naively(
        self, name: str, prompts: Sequence[Batch], heads: Sequence[Head]
    ) -> dict[Head, Tensor]:
        """States by naive forwards, whose time is extrapolated to all heads and prompts."""
        eps, count = self.settings.eps, sum(len(batch.ids) for batch in prompts)

        def states(prompts: Sequence[Batch], heads: Sequence[Head]) -> dict[Head, Tensor]:
            return naive(self.model, self.architecture, prompts, heads, eps)

        found: dict[Head, Tensor]
        found, _ = self.clock.run(
            name,
            lambda _: states(prompts, heads),
            heads=len(heads),
            prompts=count,
            times=len(self.heads) / len(heads) * self.samples / count,
            warm=lambda _: states(prompts[:1], heads[:1]),
        )
        return found

    def exactly(self) -> tuple[HeadScores, Path]:
        """Scores by exact replay, and the folder of the states."""
        scores, folder = self.clock.run(
            "exact replay",
            partial(self.score, self.prompts, "exact"),
            heads=len(self.heads),
            prompts=self.samples,
        )
        return scores, folder / "exact"

    def screened(self) -> HeadScores:
        """Scores by screening, whose two steps are timed apart."""
        heads, prompts = len(self.heads), self.samples
        _, kept = self.clock.run("screening: estimate", self.estimate, heads=heads, prompts=prompts)

        def rescored(folder: Path) -> HeadScores:
            shutil.copytree(kept / "estimate", folder / "estimate")
            return self.score(self.prompts, "screened", folder)

        few = 2 * self.chosen.candidates
        found: HeadScores
        found, _ = self.clock.run("screening: rescoring", rescored, heads=few, prompts=prompts)
        assert found.exact is not None  # since it was screened
        self.clock.timings[-1] = replace(self.clock.timings[-1], heads=int(found.exact.sum()))
        return found

    def in_the_papers_manner(self) -> None:
        """Naive forwards of single prompts in float32 with eager attention."""
        self.model.float()
        text_decoder(self.model).set_attn_implementation("eager")  # type: ignore[operator]
        singly = self.drawn(0, 1, self.chosen.paper_prompts, torch.float32)
        self.naively("paper's manner", singly, evenly(self.heads, self.chosen.paper_heads))

    def agreement(self, seed: int) -> dict[str, float]:
        """Agreement of the estimate with the exact scores, on another draw of prompts."""
        prompts = self.drawn(seed, self.chosen.batch_size, self.chosen.samples, self.dtype)
        screened, exact = (
            self.score(prompts, mode, self.clock.folder()) for mode in ("screened", "exact")
        )
        return agreement(screened, exact, self.chosen.top)


def measure(chosen: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All results as JSON values."""
    bench = Bench(chosen, scratch)
    few = evenly(bench.heads, chosen.naive_heads)
    truth = bench.naively("naive full forwards", bench.prompts, few)
    exact, states = bench.exactly()
    agreements = [agreement(bench.screened(), exact, chosen.top)]
    agreements += [bench.agreement(seed) for seed in range(1, chosen.draws)]
    if chosen.paper_prompts:
        bench.in_the_papers_manner()
    length = bench.prompts[0].inputs["input_ids"].shape[1]
    return {
        "model": bench.name,
        "device": device_name(bench.device),
        "threads": torch.get_num_threads(),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "layers": len(bench.architecture.layers),
        "heads": len(bench.heads),
        "samples": bench.samples,
        "batch_size": chosen.batch_size,
        "tokens": length,
        "window": chosen.window,
        "timings": [asdict(timing) for timing in bench.clock.timings],
        "multiplications": multiplications(bench.architecture, length, chosen.window),
        "largest_difference": largest_difference(truth, states),
        "largest_state": max(float(state.abs().max()) for state in truth.values()),
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
