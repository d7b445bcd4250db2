"""Data from data: `regraft data`, answers to calibration prompts and prompts as images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from regraft.checks import describe_data
from regraft.cli.options import Compute, Model, OutFile, OutFolder, open_model, watching
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import Prompts, TextPrompts

app = App(name="data", help="Make data: answers to calibration prompts, prompts as images.")


@app.command(name="respond")
def respond(
    model: Model,
    *,
    data: Prompts,
    out: OutFile,
    max_response_tokens: Annotated[int, Parameter(help="Length of an answer.")] = 64,
    compute: Compute = ComputeSettings(),
) -> None:
    """Write calibration data from prompts, by the dense model's own greedy answers.

    Kept are refusals of harmful prompts and what refuses nothing of harmless ones. All answers stay
    in the folder OUT.responses.

    Example: regraft data respond MODEL --data prompts.jsonl --out calibration.jsonl
    """
    from regraft import stages

    with watching() as progress:
        source = open_model(model, compute.trust_remote_code)
        reading = stages.respond(source, data, out, max_response_tokens, compute, progress)
        kinds = Counter(one.harmful for one in reading.examples)
        progress.note(describe_data("Answers", reading))
        progress.note(
            f"{out}: {kinds[True]} harmful and {kinds[False]} harmless prompts with answers. "
            f"Use it with --data {out}."
        )


@app.command(name="render")
def render(prompts: TextPrompts, *, out: OutFolder, font: Path | None = None) -> None:
    """Draw prompts as FigStep's typographic images: a data set of images from one of text.

    Example: regraft data render prompts:advbench.csv --out advbench-images

    Parameters
    ----------
    font
        The file of FreeMono Bold, or of another font.
    """
    from regraft.data.sources import read
    from regraft.data.typographic import write_typographic

    with watching() as progress:
        reading = read(prompts)
        drawn = write_typographic(reading, out, progress, font)
        if drawn.left_out:
            progress.note(
                f"{len(drawn.left_out)} of {len(reading.examples)} left out, as they do not fit "
                f"into an image: {', '.join(drawn.left_out)}"
            )
        if drawn.unwritten:
            progress.note(
                f"{len(drawn.unwritten)} of {len(reading.examples)} left out, as the font has not "
                f"all of their letters (--font names another): {', '.join(drawn.unwritten)}"
            )
        progress.note(
            f"{len(drawn.images)} images; evaluate them by the name {out / 'examples.jsonl'}"
        )
