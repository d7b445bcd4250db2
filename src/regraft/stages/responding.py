"""Calibration data from prompts: the dense model's own answers, as a data set of one's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from regraft import distributed
from regraft.data.example import Example, Reading
from regraft.data.sources import DataSource, of_split, read
from regraft.disk.files import write_text
from regraft.disk.paths import read_text
from regraft.errors import RegraftError
from regraft.models.load import Source
from regraft.progress import SILENT, Progress
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.answering import beside, calibration_data
from regraft.stages.setup import Setup


def write_responses(
    dense: Source,
    data: DataSource,
    out: Path,
    max_response_tokens: int,
    compute: ComputeSettings,
    progress: Progress = SILENT,
) -> Reading:
    """Answer every prompt greedily; writes the answers that are kept to the JSONL file `out`.

    Which answers are kept is that of `calibration_data` with the dense model's responses: refusals
    of harmful prompts, and what refuses nothing of harmless ones. All answers are in the folder
    `OUT.responses`, where finished ones survive a kill. A line has `id`, `instruction`, `response`,
    `harmful`, `category` and, where there is one, `image`, relative to the file; lines are in the
    order of the data.

    Returns:
        The prompts with their answers, and an account of all others.

    Raises:
        RegraftError: `out` holds something else, an image does not lie below its folder, or see
            `calibration_data`.
    """
    prompts = read(of_split(data, "train"))
    _check_output(out, prompts)
    answered: dict[str, Example] = {}
    skipped = Counter(prompts.skipped)
    wanted = CalibrationSettings(
        data=data, responses="self", max_response_tokens=max_response_tokens
    )
    counts = Counter(one.harmful for one in prompts.examples)
    for harmful, count in sorted(counts.items(), reverse=True):  # harmful ones first
        settings = wanted.model_copy(update={"samples": count})
        setup = Setup(dense, settings, compute, progress)
        reading = calibration_data(setup, beside(out), harmful=harmful)
        answered |= {one.id: one for one in reading.examples}
        left = reading.skipped.items()
        skipped.update({why: n for why, n in left if why.startswith("answered and not kept")})
    kept = tuple(answered[one.id] for one in prompts.examples if one.id in answered)
    if distributed.first():
        _write(out, "".join(_line(example, out) for example in kept))
    return Reading(f"{prompts.source}, answered by {dense.folder}", kept, dict(skipped))


def _check_output(out: Path, prompts: Reading) -> None:
    """Find before long work that the file could not be written."""
    for example in prompts.examples:
        _image(example, out)
    if out.exists() and not beside(out).exists():
        raise _other(out)


def _line(example: Example, out: Path) -> str:
    image = _image(example, out)
    row = {
        "id": example.id,
        "instruction": example.instruction,
        "response": example.response,
        "harmful": example.harmful,
        "category": example.category,
        **({} if image is None else {"image": image}),
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _image(example: Example, out: Path) -> str | None:
    """Its path from the folder of `out`, below which data sets of one's own have their images."""
    if example.image is None:
        return None
    image, folder = example.image.resolve(), out.resolve().parent
    if not image.is_relative_to(folder):
        raise RegraftError(
            f"The image {example.image} of example {example.id!r} does not lie below {folder}, "
            "where the file to be written could name it. Choose an --out in a folder above the "
            "images."
        )
    return str(image.relative_to(folder))


def _write(out: Path, text: str) -> None:
    if out.exists() and read_text(out) != text:
        raise _other(out)
    write_text(out, text)


def _other(out: Path) -> RegraftError:
    return RegraftError(
        f"{out} holds something else than these answers. Remove it or choose another --out."
    )
