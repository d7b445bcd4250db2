"""Read data sets for a model: calibration prompts, test suites, validation prompts.

Every function checks that the model can read all prompts, before long work starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.data.example import KINDS, Reading, draw, in_drawn_order
from regraft.data.images import check_images
from regraft.data.readers.demo import demo_model, is_demo
from regraft.data.sources import DataSource, join_suites, read
from regraft.data.storage import kept_if_read
from regraft.disk.artifact import about_in
from regraft.errors import RegraftError
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import Source
from regraft.settings.data import CalibrationSettings


def draw_calibration(source: Source, calibration: CalibrationSettings, kind: str) -> Reading:
    """Draw D^s (kind "safety") or D^u ("utility") and check that this model can read it.

    Rows need a response, unless the dense model is to write them. The examples have the data set's
    responses; a stage that learns from responses calls `answering.calibration_data` instead.

    Raises:
        RegraftError: see the data readers and `draw`; an image is unreadable, or there are images
            and the model reads text only.
    """
    return _read_calibration(draw, source, calibration, kind)


def draw_prompts(source: Source, calibration: CalibrationSettings, kind: str) -> Reading:
    """Draw prompts of one kind by the same seed, with or without responses, which are dropped."""
    reading = _read_calibration(draw, source, calibration, kind, answered=False)
    bare = tuple(replace(one, response=None) for one in reading.examples)
    return replace(reading, examples=bare)


def order_calibration(source: Source, calibration: CalibrationSettings, kind: str) -> Reading:
    """All prompts of one kind, in the order in which `draw_calibration` draws them."""
    return _read_calibration(in_drawn_order, source, calibration, kind)


@kept_if_read()
def _read_calibration(
    take: Callable[..., Reading],
    source: Source,
    calibration: CalibrationSettings,
    kind: str,
    *,
    answered: bool | None = None,
) -> Reading:
    """Apply `take`, which is `draw` or `in_drawn_order`, to the calibration data.

    Rows need a response if `answered`, by default if `responses_are_given`.
    """
    if "data" not in calibration.model_fields_set and not _made_for_bundled(source):
        raise RegraftError(
            "No calibration prompts are named, and the bundled ones are for the bundled model: "
            "give harmful and harmless ones with --data (in a recipe calibration.data)."
        )
    whole = read(calibration.source, "train")
    if answered is None:
        answered = responses_are_given(calibration, kind, whole)
    samples, seed, harmful = calibration.samples, calibration.seed, kind == "safety"
    reading = take(whole, harmful=harmful, samples=samples, seed=seed, answered=answered)
    return _readable(source, reading)


def note_prompts(note: Callable[[str], None], readings: Mapping[str, Reading]) -> None:
    """Note how many prompts were used of each kind, or role, and how many were skipped and why."""
    for kind, reading in readings.items():
        note(reading.describe(f"{KINDS.get(kind, kind).capitalize()} prompts"))


def warn_of_bundled(source: Source | None, data: DataSource, note: Callable[[str], None]) -> None:
    """Note if a model other than the bundled one is given prompts made for that one.

    `source` is None for a model behind a server, which may be any.
    """
    if data.name == "demo" and not (source and _made_for_bundled(source)):
        note(
            f"Warning: {data} are the bundled images, made for the bundled model; what is learnt "
            "from them or measured on them says little about this one. Use your own data."
        )


def _made_for_bundled(source: Source) -> bool:
    return is_demo(source.folder) or _made_from_demo(source.folder)


def _made_from_demo(folder: Path) -> bool:
    """Whether a checkpoint is the bundled model pruned by regraft, with or without patches."""
    about: Any = about_in(folder)
    while about and "before" in about:
        about = about["before"]
    if not about:
        return False
    dense = about.get("inputs", {}).get("dense")
    return dense is not None and dense == open_checkpoint(demo_model()).fingerprint


def responses_are_given(
    calibration: CalibrationSettings, kind: str, whole: Reading | None = None
) -> bool:
    """Whether responses to a kind are the data set's, and not written by the dense model.

    `whole` is the data set, which is read if it is needed and not given.
    """
    if calibration.responses != "auto":
        return calibration.responses == "given"
    whole = whole or read(calibration.source, "train")
    rows = whole.of_kind(harmful=kind == "safety").examples
    return any(one.has_response for one in rows)


@kept_if_read()
def read_suites(source: Source | None, suites: Sequence[DataSource], limit: int | None) -> Reading:
    """Read the prompts of suites as `join_suites`, for a checkpoint or (None) a model on a server.

    Raises:
        RegraftError: as `draw_calibration`; there is nothing to evaluate.
    """
    if not suites:
        raise RegraftError(
            "No suite is named. Name prompts to evaluate, such as demo:test or a .jsonl file."
        )
    return _readable(source, join_suites(suites, limit))


def _readable(source: Source | None, reading: Reading) -> Reading:
    check_images(reading)
    if source is None:
        return reading
    with_image = next((one for one in reading.examples if one.image is not None), None)
    if with_image is not None and not source.has_vision:
        raise RegraftError(
            f"{reading.source}: example {with_image.id!r} has an image, but {source.folder} reads "
            "text only. Use a vision-language model, or examples without images."
        )
    return reading
