"""Describe a checkpoint: `regraft analyse model`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from regraft.cli.options import Model, Trust
from regraft.console import live_progress
from regraft.disk.files import readable_size
from regraft.models.architecture import Architecture, LayerArchitecture
from regraft.models.load import Source, open_source
from regraft.patch.pair import check_pair, survey


def describe(
    model: Model,
    *,
    dense: str | None = None,
    trust_remote_code: Trust = False,
    names: bool = False,
) -> None:
    """Show layers, heads, prunable weights and names on disk; loads no weights.

    Parameters
    ----------
    dense
        Dense checkpoint that it was made from, a folder or hub id: also show what compression
        changed and what can be restored. Reads all weights.
    names
        List the names on disk of all prunable weights.
    """
    source = open_source(model, trust_remote_code=trust_remote_code)
    console = Console(emoji=False)
    about = Table.grid(padding=(0, 2))
    about.add_column()
    about.add_column(overflow="fold")
    for row in _facts(source):
        about.add_row(*row)
    if dense is not None:
        other = open_source(dense, trust_remote_code=trust_remote_code)
        about.add_row("compared", _compared(other, source))
    console.print(about)
    _show_layers(console, source.architecture)
    linears = list(source.architecture.linears)
    console.print("names on disk" if names else "names on disk, first and last:")
    for linear in linears if names else (linears[0], linears[-1]):
        record = source.checkpoint.record(linear.tensor)
        console.print(f"  {linear.tensor}  {record.dtype}  {record.shard}", highlight=False)


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    architecture, checkpoint = source.architecture, source.checkpoint
    tied = " (tied head)" if architecture.tied else ""
    yield "folder", str(source.folder)
    yield "family", architecture.family
    yield "vision", "yes" if source.has_vision else "no"
    yield "parameters", f"{architecture.parameters:,}"
    yield "prunable", f"{architecture.prunable:,} in {len(list(architecture.linears))} linears"
    yield "hidden size", str(architecture.hidden_size)
    yield "vocabulary", f"{architecture.vocabulary:,}{tied}"
    yield "on disk", f"{readable_size(checkpoint.bytes)} in {len(checkpoint.shards)} file(s)"


def _show_layers(console: Console, architecture: Architecture) -> None:
    layers = Table("layers", "attention", "query heads", "kv heads", "head size", "linears")
    for first, last, layer in _runs(architecture.layers):
        layers.add_row(
            f"{first}" if first == last else f"{first}-{last}",
            layer.attention,
            *(str(one or "-") for one in (layer.heads, layer.kv_heads, layer.head_dim)),
            ", ".join(_linears(layer)),
        )
    console.print(layers)
    if architecture.headless:
        console.print(f"no heads to score: {architecture.headless}", highlight=False)
    if architecture.left_dense:
        console.print(f"never pruned: {', '.join(architecture.left_dense)}", highlight=False)


def _compared(dense: Source, compressed: Source) -> str:
    """Describe what compression changed, with the N:M pattern and any doubt."""
    check_pair(dense, compressed)
    found = survey(dense, compressed, live_progress())
    text = found.described
    if found.grouping is not None:
        text += f"; {found.grouping.n_m} in {found.grouping.groups:,} groups"
    return f"{text}. {found.doubt}" if found.doubt else text


def _linears(layer: LayerArchitecture) -> list[str]:
    """ "q_proj 64x64" for each linear; "gate_proj 24x64 x 128" for one that 128 experts have."""
    found = Counter(
        (li.role, f"{li.shape[0]}x{li.shape[1]}", li.expert is not None) for li in layer.linears
    )
    return [
        f"{role} {shape} x {count}" if count > 1 else f"{role} {shape}"
        for (role, shape, _), count in found.items()
    ]


def _runs(layers: Sequence[LayerArchitecture]) -> Iterator[tuple[int, int, LayerArchitecture]]:
    """Runs of neighbouring layers of equal shape: (first index, last index, first layer)."""

    def shape(layer: LayerArchitecture) -> Any:
        shapes = tuple((linear.name, linear.shape) for linear in layer.linears)
        return layer.attention, layer.heads, layer.kv_heads, layer.head_dim, shapes

    for _, equal in groupby(layers, shape):
        first, *others = equal
        yield first.index, (others or [first])[-1].index, first
