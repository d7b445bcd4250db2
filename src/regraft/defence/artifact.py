"""What `regraft analyse defence` writes: a prompt or a direction, how it acts, and its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from regraft.data.example import Example
from regraft.defence.direction import Trial, moved_output
from regraft.defence.prompt import shielded
from regraft.disk.artifact import read_artifact, require_finite, write_artifact
from regraft.disk.parsing import EXACT, from_json
from regraft.errors import RegraftError
from regraft.models.architecture import Architecture
from regraft.pruning.pruners.safety_potential import with_safety_prompt

FORMAT = "regraft-defence-1"
_MOST = 1e6  # of a strength; states have no such lengths


@EXACT
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
            "`regraft analyse defence`."
        )


def save_defence(path: Path, defence: Defence) -> None:
    """Write a defence to a safetensors file; the direction is its tensor."""
    if isinstance(defence, ShieldPrompt):
        write_artifact(path, FORMAT, vars(defence), {})
        return
    header = {
        "about": defence.about,
        "layer": defence.layer,
        "strength": defence.strength,
        "trials": [asdict(trial) for trial in defence.trials],
    }
    write_artifact(path, FORMAT, header, {"direction": defence.vector})


@EXACT
@dataclass(frozen=True)
class _Moved:
    """What a direction's header holds beside `about`."""

    layer: Annotated[int, Field(ge=0)]
    strength: Annotated[float, Field(ge=-_MOST, le=_MOST)]
    trials: tuple[Trial, ...]


def load_defence(path: Path) -> Defence:
    """Read what `save_defence` wrote.

    Raises:
        RegraftError: the file is missing, damaged, or something else.
    """
    header, tensors = read_artifact(path, FORMAT, "a defence")
    about, where = header["about"], f"{path}: its header"
    if "prompt" in header:
        return replace(from_json(ShieldPrompt, header, where), about=about)
    moved = from_json(_Moved, {key: header[key] for key in header.keys() - {"about"}}, where)
    vector = tensors.get("direction")
    if vector is None or vector.ndim != 1 or not vector.is_floating_point():
        raise RegraftError(f"{path} is damaged: the tensor direction is missing, or no vector.")
    require_finite(path, tensors)
    return Direction(vector, moved.layer, moved.strength, about, moved.trials)
