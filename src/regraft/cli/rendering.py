"""Text prompts to typographic images: `regraft render`."""

from __future__ import annotations

from pathlib import Path

from regraft.cli.options import OutFolder, watching
from regraft.settings.data import TextPrompts


def render(prompts: TextPrompts, *, out: OutFolder, font: Path | None = None) -> None:
    """Draw prompts as FigStep's typographic images: a data set of images from one of text.

    Example: regraft render prompts:advbench.csv --out advbench-images

    Parameters
    ----------
    font
        The file of FreeMono Bold, or of another font.
    """
    from regraft.data.sources import read
    from regraft.data.typographic import write_typographic

    with watching() as watch:
        reading = read(prompts)
        drawn = write_typographic(reading, out, watch, font)
        if drawn.left_out:
            watch.note(
                f"{len(drawn.left_out)} of {len(reading.examples)} left out, as they do not fit "
                f"into an image: {', '.join(drawn.left_out)}"
            )
        if drawn.unwritten:
            watch.note(
                f"{len(drawn.unwritten)} of {len(reading.examples)} left out, as the font has not "
                f"all of their letters (--font names another): {', '.join(drawn.unwritten)}"
            )
        watch.note(
            f"{len(drawn.images)} images; evaluate them by the name {out / 'examples.jsonl'}"
        )
