"""Reading data for a model, and finding bad input before any long work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from regraft.data.demo import demo_model, is_demo
from regraft.data.example import Example, Reading, draw, in_drawn_order
from regraft.data.images import check_images
from regraft.data.sources import DataSource, of_split, read
from regraft.errors import RegraftError
from regraft.files import file_digest, read_json
from regraft.heads.ships import most_rank
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import Source, pick_device, stored_dtype
from regraft.provenance import ABOUT_FILE
from regraft.pruning.base import PruneSettings
from regraft.restoration.base import MethodSettings, Needs
from regraft.restoration.selection import all_heads
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.defending import DefenceSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.validation import validation_of


def draw_calibration(source: Source, calibration: CalibrationSettings, *, harmful: bool) -> Reading:
    """Draw D^s or D^u and check that this model can read it.

    Rows need a response unless the dense model is to write them. Those of the data set are what
    the examples hold; a stage that learns from responses takes `stages.calibration_data`.

    Raises:
        RegraftError: see the data readers and `draw`; an image is unreadable, or there are images
            and the model reads text only.
    """
    answered = responses_are_given(calibration, harmful=harmful)
    return _drawn(source, calibration, harmful=harmful, answered=answered)


def draw_prompts(source: Source, calibration: CalibrationSettings, *, harmful: bool) -> Reading:
    """Draw prompts of one kind by the same seed, whether they have a response or not.

    What they have of one is left out.

    Raises:
        RegraftError: see `draw_calibration`.
    """
    reading = _drawn(source, calibration, harmful=harmful, answered=False)
    bare = tuple(replace(one, response=None) for one in reading.examples)
    return replace(reading, examples=bare)


def _drawn(
    source: Source, calibration: CalibrationSettings, *, harmful: bool, answered: bool
) -> Reading:
    reading = draw(
        read(of_split(calibration.source, "train")),
        harmful=harmful,
        samples=calibration.samples,
        seed=calibration.seed,
        answered=answered,
    )
    _check_readable(source, reading)
    return reading


def order_calibration(
    source: Source, calibration: CalibrationSettings, *, harmful: bool
) -> Reading:
    """All prompts of one kind in the order in which they are drawn, as `draw_calibration`."""
    whole = read(of_split(calibration.source, "train"))
    reading = in_drawn_order(
        whole,
        harmful=harmful,
        samples=calibration.samples,
        seed=calibration.seed,
        answered=responses_are_given(calibration, harmful=harmful),
    )
    _check_readable(source, reading)
    return reading


def responses_are_given(calibration: CalibrationSettings, *, harmful: bool) -> bool:
    """Whether the data set's responses to a kind are learned from, not the dense model's own."""
    if calibration.responses != "auto":
        return calibration.responses == "given"
    whole = read(of_split(calibration.source, "train"))
    of_kind = (one for one in whole.examples if one.harmful == harmful)
    return any(one.response and one.response.strip() for one in of_kind)


def read_suites(source: Source, suites: Sequence[DataSource], limit: int | None) -> Reading:
    """Read what is to be evaluated, one suite after the other, at most `limit` a kind of each.

    Ids that suites share get their suite's name in front. A limit counts groups of examples, such
    as the rotations of a question, as one.

    Raises:
        RegraftError: as `draw_calibration`; there is nothing to evaluate.
    """
    joined = join_suites(suites, limit)
    if not joined.examples:
        raise RegraftError(f"{joined.source}: there are no examples to evaluate.")
    _check_readable(source, joined)
    return joined


def join_suites(suites: Sequence[DataSource], limit: int | None) -> Reading:
    """`read_suites` without a look at the images.

    A prompt that is in a suite before, with the same image, is left out: it would count twice in
    rates over all. What a suite holds twice itself stays as its authors have it.

    Raises:
        RegraftError: see the data readers; a suite has no prompt that is in none before it.
    """
    if twice := [suite for i, suite in enumerate(suites) if suite in suites[:i]]:
        raise RegraftError(f"{twice[0]} is named twice: its prompts would count twice.")
    readings = [read(of_split(suite, "test")) for suite in suites]
    examples: list[Example] = []
    skipped: dict[str, int] = {}
    taken: set[str] = set()
    known: set[Any] = set()
    for suite, reading in zip(suites, readings, strict=True):
        new = [one for one in reading.examples if _shown(one) not in known]
        if not new:
            raise RegraftError(
                f"{suite}: all of its prompts are in suites named before, and would count twice. "
                "Leave it out."
            )
        known.update(map(_shown, new))
        kept = _first(new, limit)
        for example in kept:
            unique = next(name for name in _names(suite, example) if name not in taken)
            taken.add(unique)
            examples.append(replace(example, id=unique, suite=str(suite)))
        left_out = {
            "beyond the limit": len(new) - len(kept),
            "in a suite named before": len(reading.examples) - len(new),
        }
        for reason, rows in [*reading.skipped.items(), *left_out.items()]:
            if rows:
                skipped[reason] = skipped.get(reason, 0) + rows
    return Reading(", ".join(reading.source for reading in readings), tuple(examples), skipped)


def _shown(example: Example) -> tuple[Any, ...]:
    """What a model is shown; of images the file, since copies tell apart what was meant to be."""
    image = None if example.image is None else example.image.resolve()
    return example.instruction, image, example.harmful, example.references, example.choices


def _names(suite: DataSource, example: Example) -> Iterator[str]:
    """What an example may be called, as long as the name is taken."""
    yield example.id
    yield f"{suite.name}:{example.id}"
    yield from (f"{suite.name}-{i}:{example.id}" for i in count(2))


def _first(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """Those of the first `limit` groups of each kind; an example without one is its own."""
    if limit is None:
        return examples
    groups = dict.fromkeys((one.harmful, one.group or one.id) for one in examples)
    kept = {
        one
        for kind in (True, False)
        for one in islice((group for group in groups if group[0] == kind), limit)
    }
    return [one for one in examples if (one.harmful, one.group or one.id) in kept]


def read_validation(source: Source, settings: DefenceSettings) -> Reading:
    """Read the prompts on which a refusal direction's layer and strength are chosen.

    Raises:
        RegraftError: as `draw_calibration`; a kind is missing.
    """
    reading = read(of_split(validation_of(settings), "train"))
    limit = settings.validation_limit
    kept: list[Example] = []
    for harmful, kind in ((True, "harmful"), (False, "harmless")):
        found = [one for one in reading.examples if one.harmful == harmful]
        if not found:
            raise RegraftError(
                f"{reading.source}: no {kind} examples; choosing layer and strength of a refusal "
                "direction needs both kinds. Name another --validation, or give --layer and "
                "--strength."
            )
        kept += found[:limit]
    beyond = len(reading.examples) - len(kept)
    skipped = dict(reading.skipped) | ({"beyond the limit": beyond} if beyond else {})
    chosen = Reading(reading.source, tuple(kept), skipped)
    _check_readable(source, chosen)
    return chosen


def seen_before(
    evaluated: Reading, used: Mapping[str, Reading], purpose: str = "evaluated"
) -> list[str]:
    """One line on each reading some of whose prompts are evaluated too.

    Prompts are the same if their text and the bytes of their image are; another rendering of the
    same words is not found.

    Args:
        evaluated: The prompts that rates are of.
        used: What is learnt or chosen from, by its role.
        purpose: What is done with the rates' prompts, "evaluated" or "chosen on".
    """
    tested = {_content(example) for example in evaluated.examples}
    found = {
        role: [one for one in reading.examples if _content(one) in tested]
        for role, reading in used.items()
    }
    return [
        f"{len(same)} of the {len(used[role].examples)} {role} prompts are among those {purpose} "
        f"(first {same[0].id!r}): rates on these say nothing about new ones"
        for role, same in found.items()
        if same
    ]


def _content(example: Example) -> tuple[str, str | None]:
    image = None if example.image is None else file_digest(example.image)
    return example.instruction, image


def warn_of_bundled(source: Source, data: DataSource, note: Callable[[str], None]) -> None:
    """Say where a model of one's own goes by prompts made for the bundled one."""
    if data.name == "demo" and not (is_demo(source.folder) or _made_from_demo(source.folder)):
        note(
            f"Warning: {data} are the bundled images, made for the bundled model; what is learnt "
            "from them or measured on them says little about this one. Name data of your own."
        )


def _made_from_demo(folder: Path) -> bool:
    """Whether a checkpoint is the bundled model pruned by regraft, patched since or not."""
    path = folder / ABOUT_FILE
    about = read_json(path) if path.is_file() else None
    while isinstance(about, dict) and "before" in about:
        about = about["before"]
    if not isinstance(about, dict):
        return False
    demo = open_checkpoint(demo_model()).fingerprint
    return bool(about.get("inputs", {}).get("dense") == demo)


def describe_data(role: str, reading: Reading) -> str:
    """One line on what became of every row that was read."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in reading.skipped.items())
    used = f"{len(reading.examples)} used of {reading.read} read"
    return f"{role} ({reading.source}): {used}" + (f"; {left_out}" if left_out else "")


def loaded_dtype(source: Source, compute: ComputeSettings) -> str:
    """The dtype that a model will be loaded in, such as "bfloat16"."""
    if compute.dtype != "auto":
        return compute.dtype
    return "float32" if pick_device(compute.device).type == "cpu" else stored_dtype(source)


def check_gradients(source: Source, compute: ComputeSettings, what: str) -> None:
    """Raise where the dtype that a model will be loaded in is one in which gradients vanish."""
    if loaded_dtype(source, compute) == "float16":
        raise RegraftError(
            f"{what} needs gradients, which vanish in float16, the dtype of {source.folder} or the "
            "one asked for. Use --dtype bfloat16 (in a recipe compute.dtype), or float32."
        )


def check_pattern(dense: Source, settings: PruneSettings) -> None:
    """Raise unless every weight to be pruned can have its pattern."""
    settings.patterns(dense.architecture.linears)


def distinct(reading: Reading) -> int:
    """How many different prompts there are, with their images: copies span no more than one."""
    return len({_content(example) for example in reading.examples})


def check_r_max(dense: Source, settings: HeadSettings, prompts: Reading) -> None:
    """Raise unless subspaces of rank `r_max` of these prompts' states can differ."""
    count = distinct(prompts)
    limit = most_rank(count, dense.architecture.hidden_size)
    if settings.r_max > limit:
        raise RegraftError(
            f"r_max is {settings.r_max}, but {count} different prompts and states of "
            f"{dense.architecture.hidden_size} features allow at most {limit}. Lower r_max or use "
            "more prompts."
        )


def check_heads(dense: Source, needs: Needs, scoring: HeadSettings | None) -> None:
    """Raise unless the model has as many heads as are to be chosen, and they will be scored.

    `scoring` is None where scores are given.
    """
    count = len(all_heads(dense.architecture))
    if needs.some_heads > count:
        raise RegraftError(f"top_heads is {needs.some_heads}; the model has {count} heads.")
    if scoring is None or needs.heads is None:
        return
    if needs.heads.criterion == "released" and scoring.mode != "exact":
        raise RegraftError(
            f"The criterion `released` needs every head scored exactly, and `mode` is "
            f"{scoring.mode}. Leave it out, or rank heads by ships or kl."
        )
    if scoring.mode == "screened" and scoring.candidates < needs.heads.count:
        raise RegraftError(
            f"top_heads is {needs.heads.count}, but of the screened heads only the "
            f"{scoring.candidates} best will be scored exactly. Give --candidates "
            f"{needs.heads.count} or more."
        )


def check_budget(dense: Source, settings: MethodSettings) -> None:
    """Raise where a budget is less than one weight even if all had been pruned."""
    if settings.how_many(dense.architecture.prunable) == 0:
        raise _less_than_one(settings, f"{dense.architecture.prunable:,} prunable")


def check_restorable(settings: MethodSettings, restorable: int) -> None:
    """Raise where none of the weights that pruning took would be restored."""
    if not restorable:
        raise RegraftError(
            "No weight is zero now that was not before: there is nothing to restore. Give the "
            "dense checkpoint first and the pruned one second."
        )
    if settings.how_many(restorable) == 0:
        raise _less_than_one(settings, f"{restorable:,} pruned")


def _less_than_one(settings: MethodSettings, weights: str) -> RegraftError:
    """Make the error for a budget by which none of so many weights is restored."""
    budget = getattr(settings, "budget", None)
    return RegraftError(
        f"A budget of {budget} per 10,000 of {weights} weights is less than one weight. "
        "Raise it, or give a count."
    )


def check_direction_layer(source: Source, settings: DefenceSettings) -> None:
    """Raise unless the model has the layer that a refusal direction is to be added at."""
    count = len(source.architecture.layers)
    if settings.layer is not None and settings.layer >= count:
        raise RegraftError(f"layer is {settings.layer}; the model has layers 0 to {count - 1}.")


def _check_readable(source: Source, reading: Reading) -> None:
    check_images(reading)
    if source.architecture.has_vision:
        return
    for example in reading.examples:
        if example.image is not None:
            raise RegraftError(
                f"{reading.source}: example {example.id!r} has an image, but {source.folder} reads "
                "text only. Use a vision-language model, or examples without images."
            )
