"""What `regraft defend` writes: a prompt or a direction, how it acts, and its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regraft.artifact import read_artifact, write_artifact
from regraft.data.example import Example
from regraft.defence.direction import Trial, moved_output
from regraft.defence.prompt import shielded
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.models.architecture import Architecture
from regraft.pruning.pruners.safety_potential import with_safety_prompt

FORMAT = "regraft-defence-1"


@dataclass(frozen=True)
class ShieldPrompt:
    """A defence prompt around the user's text, or before it. `about` says what made it."""

    prompt: str
    about: Mapping[str, Any]
    before: bool = False


@dataclass(frozen=True)
class Direction:
    """`strength` times the difference of means `vector` [d] float32, added at `layer`.

    `trials` are those that layer and strength were chosen from, the plain model (strength 0) first;
    none where both were given.
    """

    vector: Tensor
    layer: int
    strength: float
    about: Mapping[str, Any]
    trials: tuple[Trial, ...] = ()


Defence = ShieldPrompt | Direction


def asked(defence: Defence | None, examples: Sequence[Example]) -> Sequence[Example]:
    """The examples as the model gets them."""
    if not isinstance(defence, ShieldPrompt):
        return examples
    placed = with_safety_prompt if defence.before else shielded
    return placed(examples, defence.prompt)


@contextmanager
def acting(defence: Defence | None, model: nn.Module) -> Iterator[None]:
    """Add the direction while the block runs; a prompt, or no defence, leaves the model alone."""
    if isinstance(defence, Direction) and defence.strength:
        with moved_output(model, defence.layer, defence.strength * defence.vector):
            yield
    else:
        yield


def check_fits(defence: Defence, architecture: Architecture, path: Path) -> None:
    """Check that a direction can be added to a model.

    Raises:
        RegraftError: the model has another hidden size or no such layer.
    """
    if not isinstance(defence, Direction):
        return
    width, layers = architecture.hidden_size, len(architecture.layers)
    if len(defence.vector) != width or defence.layer >= layers:
        raise RegraftError(
            f"{path} adds {len(defence.vector)} features behind layer {defence.layer}; the model "
            f"has {width} features and layers 0 to {layers - 1}. Make one for this model with "
            "`regraft defend`."
        )


def save_defence(path: Path, defence: Defence) -> None:
    """Write a defence to a safetensors file; the direction is its tensor."""
    if isinstance(defence, ShieldPrompt):
        content = {"about": defence.about, "prompt": defence.prompt, "before": defence.before}
        write_artifact(path, FORMAT, content, {})
        return
    header = {
        "about": defence.about,
        "layer": defence.layer,
        "strength": defence.strength,
        "trials": [asdict(trial) for trial in defence.trials],
    }
    write_artifact(path, FORMAT, header, {"direction": defence.vector})


def load_defence(path: Path) -> Defence:
    """Read what `save_defence` wrote.

    Raises:
        RegraftError: the file is missing, damaged, or something else.
    """
    header, tensors = read_artifact(path, FORMAT, "a defence")
    if "prompt" in header:
        return ShieldPrompt(header["prompt"], header["about"], header["before"])
    trials = tuple(_trial(one) for one in header["trials"])
    return Direction(
        tensors["direction"], header["layer"], header["strength"], header["about"], trials
    )


def _trial(value: Mapping[str, Any]) -> Trial:
    rates = {name: Estimate(**value[name]) for name in ("asr", "over_refusal")}
    return Trial(**{**value, **rates})
