"""Make data: `regraft data`, answers to calibration prompts and prompts as images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from regraft.cli.options import Compute, Model, OutFile, OutFolder
from regraft.console import live_progress
from regraft.models.load import open_answering
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import Prompts, TextPrompts

app = App(name="data", help="Make data: the model's answers to prompts, or prompts as images.")


@app.command(name="respond")
def respond(
    model: Model,
    *,
    data: Prompts,
    out: OutFile,
    max_response_tokens: Annotated[int, Parameter(help="Maximum length of an answer.")] = 64,
    compute: Compute = ComputeSettings(),
) -> None:
    """Make calibration data from prompts: the dense model answers them greedily.

    Refusals of harmful prompts and answers to harmless ones are kept; other prompts are dropped.
    All answers are saved in the folder OUT.responses.

    Example: regraft data respond MODEL --data prompts.jsonl --out calibration.jsonl
    """
    from regraft.stages.answering import write_responses

    progress = live_progress()
    source = open_answering(model, trust_remote_code=compute.trust_remote_code)
    reading = write_responses(source, data, out, max_response_tokens, compute, progress)
    kinds = Counter(one.harmful for one in reading.examples)
    progress.note(reading.describe("Answers"))
    progress.note(
        f"{out}: {kinds[True]} harmful and {kinds[False]} harmless prompts with answers. "
        f"Use it with --data {out}."
    )


@app.command(name="render")
def render(prompts: TextPrompts, *, out: OutFolder, font: Path | None = None) -> None:
    """Render text prompts as typographic images, as FigStep does.

    Example: regraft data render prompts:advbench.csv --out advbench-images

    Parameters
    ----------
    font
        Font file, of FreeMono Bold or another font.
    """
    from regraft.data.sources import read
    from regraft.data.typographic import write_typographic

    progress = live_progress()
    reading = read(prompts)
    drawn = write_typographic(reading, out, progress, font)
    for ids, why in (
        (drawn.left_out, "they do not fit into an image"),
        (drawn.unwritten, "the font lacks some of their letters (choose another with --font)"),
    ):
        if ids:
            count = f"{len(ids)} of {len(reading.examples)}"
            progress.note(f"{count} left out, as {why}: {', '.join(ids)}")
    progress.note(
        f"{len(drawn.images)} images; evaluate them with --suite {out / 'examples.jsonl'}"
    )
