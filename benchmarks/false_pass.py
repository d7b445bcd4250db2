"""How often `regraft check` passes a model that is worse by the margin, and one that is not worse.

    python benchmarks/false_pass.py [--json FILE]

Rates of yes/no outcomes are exact: the verdict of every possible sample of n prompts, weighted by
its probability. Those of scores and of clustered prompts are simulated, 2,000 samples each.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import whole
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import binom, norm

from regraft.disk.files import write_json
from regraft.evaluation.noninferiority import LEVEL, Rises, exact_p, gaffke_p, score

PROMPTS = (50, 100, 200, 300, 500)
MARGINS = (0.02, 0.05, 0.1)
BASES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CORRELATIONS = (0.0, 0.3, 0.6, 0.9)
DIFFERING = (0.02, 0.05, 0.1, 0.2)  # share of prompts on which two equally good models differ
DRAWS = 2_000

Floats = NDArray[np.float64]
Passes = Callable[[int, int, int, float], bool]


def by_exact(more: int, less: int, n: int, margin: float) -> bool:
    """The test of `regraft check`."""
    return exact_p(more, less, n, margin) <= LEVEL


def by_normal(more: int, less: int, n: int, margin: float) -> bool:
    """Tango's score test with the normal distribution, for comparison."""
    return float(score(more, less, n, margin)) <= float(norm.ppf(LEVEL))


def passing(n: int, margin: float, passes: Passes = by_exact) -> NDArray[np.int64]:
    """For 0, 1, 2 ... prompts that got worse: how many must have got better to pass.

    Ends where too few prompts are left. The number never falls as more prompts get worse, so each
    search starts from the last result.
    """
    found: list[int] = []
    better = 0
    for worse in range(n + 1):
        while better <= n - worse and not passes(worse, better, n, margin):
            better += 1
        if better > n - worse:
            break
        found.append(better)
    return np.array(found, dtype=np.int64)


def chances(least: NDArray[np.int64], n: int, worse: Floats, better: Floats) -> Floats:
    """The probability of passing, for each pair of chances that a prompt gets worse, or better."""
    counts, worse, better = np.arange(len(least)), worse[:, None], better[:, None]
    left = binom.sf(least - 1, n - counts, np.minimum(1, better / (1 - worse)))
    passed: Floats = (binom.pmf(counts, n, worse) * left).sum(1)
    return passed


def worst(least: NDArray[np.int64], n: int, margin: float) -> float:
    """The highest such probability over all pairs of models that differ by the margin."""
    better = np.sin(np.linspace(0, np.pi / 2, 3001)) ** 2 * (1 - margin) / 2
    return float(np.max(chances(least, n, margin + better, better)))


def discordances(margin: float, base: float, correlation: float) -> tuple[float, float] | None:
    """The probabilities that an event appears and disappears from one model to the other.

    Its rate is `base` with the first model and higher by the margin with the other, and the
    outcomes have this correlation. None if no such pair of outcomes exists.
    """
    after = base + margin
    if after > 1:
        return None
    spread = math.sqrt(base * (1 - base) * after * (1 - after))
    both = base * after + correlation * spread
    comes, goes = after - both, base - both
    return (comes, goes) if min(comes, goes, 1 - after - base + both) >= 0 else None


def on_grid(least: NDArray[np.int64], n: int, margin: float) -> Iterator[tuple[float, float]]:
    """(base rate, highest probability over correlations) of passing at the margin."""
    for base in BASES:
        pairs = [discordances(margin, base, one) for one in CORRELATIONS]
        if possible := [pair for pair in pairs if pair]:
            yield base, float(np.max(chances(least, n, *np.array(possible).T)))


Draw = Callable[[np.random.Generator, int, float], Rises]


def _losing_all(random: np.random.Generator, n: int, margin: float) -> Rises:
    """A few prompts lose their whole score, the others keep theirs."""
    before = random.uniform(0.5, 1, n)
    lost = random.random(n) < margin / 0.75
    return Rises.of(1 - before, 1 - np.where(lost, 0, before), range(n))


def _losing_all_in_noise(random: np.random.Generator, n: int, margin: float) -> Rises:
    """The same, and all others move a little either way."""
    before = random.uniform(0.3, 0.7, n)
    moved = before + random.uniform(-0.2, 0.2, n)
    lost = random.random(n) < margin / 0.5
    return Rises.of(1 - before, 1 - np.where(lost, 0, moved), range(n))


def _losing_a_little(random: np.random.Generator, n: int, margin: float) -> Rises:
    """Every prompt loses up to twice the margin."""
    before = random.uniform(0.5, 1, n)
    return Rises.of(1 - before, 1 - before + random.uniform(0, 2 * margin, n), range(n))


def _threes(random: np.random.Generator, n: int, margin: float) -> Rises:
    """Yes or no on requests in three forms, which mostly have the same outcome."""
    return _in_clusters(random, np.repeat(np.arange(n // 3), 3), margin)


def _uneven(random: np.random.Generator, n: int, margin: float) -> Rises:
    """Yes or no on requests in one to six forms, which mostly have the same outcome."""
    sizes = random.integers(1, 7, n)
    return _in_clusters(random, np.repeat(np.arange(n), sizes)[:n], margin)


def _in_clusters(
    random: np.random.Generator, request: NDArray[np.int64], margin: float, alike: float = 0.8
) -> Rises:
    requests = int(np.max(request)) + 1
    shared, own = (random.random(size) for size in (requests, len(request)))
    of_request = random.random(requests) < alike
    luck = np.where(of_request[request], shared[request], own)
    before = luck < 0.2
    after = before ^ (luck > 1 - margin - 0.05) ^ (before & (luck < 0.05))  # 5 points disappear
    return Rises.of(before, after, request.tolist())


DRAWN: dict[str, Draw] = {
    "scores: few prompts lose all": _losing_all,
    "scores: few lose all, the others move": _losing_all_in_noise,
    "scores: all lose a little": _losing_a_little,
    "yes or no, requests in three forms": _threes,
    "yes or no, requests in one to six forms": _uneven,
}


def drawn(draw: Draw, n: int, margin: float, draws: int = DRAWS, seed: int = 0) -> float:
    """The fraction of simulated samples that pass at the margin."""
    random = np.random.default_rng(seed)
    passed = 0
    for _ in range(draws):
        rises = draw(random, n, margin)
        size = rises.values.size
        passed += gaffke_p(rises.values, size, rises.most, margin) <= LEVEL
    return passed / draws


def counted(n: int, margin: float) -> dict[str, Any]:
    """The exact probabilities of passing for yes/no outcomes of n prompts."""
    least, halves = passing(n, margin), np.array(DIFFERING) / 2
    return {
        "margin": margin,
        "n": n,
        "at the margin, by base rate": dict(on_grid(least, n, margin)),
        "at the margin, worst": worst(least, n, margin),
        "the same by the normal distribution": worst(passing(n, margin, by_normal), n, margin),
        "unchanged, by prompts that differ": dict(
            zip(DIFFERING, chances(least, n, halves, halves).tolist(), strict=True)
        ),
    }


def main() -> None:
    """Compute, simulate, print tables, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--prompts", type=whole, nargs="+", default=PROMPTS)
    parser.add_argument("--draws", type=whole, default=DRAWS)
    given = parser.parse_args()
    console = Console(width=120)
    rows = [counted(n, margin) for margin in MARGINS for n in given.prompts]
    heads = ("margin", "n", "worst", *(f"base {one:g}" for one in BASES), "normal")
    shown = Table(*heads, title="Passed at the margin, %: yes or no")
    for row in rows:
        bases = row["at the margin, by base rate"]
        values = [row["at the margin, worst"], *(bases.get(one) for one in BASES)]
        values.append(row["the same by the normal distribution"])
        shown.add_row(f"{100 * row['margin']:g}", str(row["n"]), *map(_percent, values))
    console.print(shown)
    shown = Table("margin", "n", *(f"{100 * one:g} % differ" for one in DIFFERING))
    shown.title = "Passed though unchanged, %"
    for row in rows:
        values = list(row["unchanged, by prompts that differ"].values())
        shown.add_row(f"{100 * row['margin']:g}", str(row["n"]), *map(_percent, values))
    console.print(shown)
    others = {
        name: {n: drawn(draw, n, 0.05, given.draws) for n in given.prompts}
        for name, draw in DRAWN.items()
    }
    title = f"Passed at a margin of 5 points, %: {given.draws:,} samples each"
    shown = Table("", *(f"n = {n}" for n in given.prompts), title=title)
    for name, rates in others.items():
        shown.add_row(name, *map(_percent, rates.values()))
    console.print(shown)
    if given.json:
        write_json(given.json, {"counted": rows, "drawn": others})


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2f}"


if __name__ == "__main__":
    main()
