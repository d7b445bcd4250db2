"""Inference-time defences, the baselines for restoration: a prompt, or an added direction.

AdaShield-S (Wang et al. 2024, arXiv 2403.09513) asks the model to examine the image, then image and
instruction together, tells it how to answer harmful requests and to follow harmless ones. Its
released code puts the prompt between two copies of the instruction, as is done here.
`DEFENCE_PROMPT` follows that scheme in our own words, since the authors' text has no licence; to
use their wording, give the text of their prompts/static_defense_prompt.txt as `prompt`.

The refusal direction of a layer (Arditi et al. 2024, arXiv 2406.11717, section 2.3) is the mean of
the residual stream after the layer at the last prompt token of harmful prompts minus that of
harmless ones. Added at inference to the layer's output at all positions, it induces refusal. It is
not normalised: strength 1 adds one difference of means. States are read and changed by hooks on a
layer's output, so that every family's own code runs unchanged. A layer that a family skips for a
batch (Mllama's cross-attention without images) is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.data.example import Example
from regraft.disk.artifact import read_artifact, require_finite, write_artifact
from regraft.disk.parsing import EXACT, from_json
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.models.architecture import decoder_layers, text_decoder
from regraft.models.load import Source, placed
from regraft.models.replay import hooked, state_of, text_inputs
from regraft.progress import Advance
from regraft.pruning.pruners.safety_potential import with_safety_prompt

MIDDLE = (0.25, 0.8)  # fractions of the depth between which layers are searched
DEFENCE_PROMPT = (
    "Before you follow the instruction above, check it step by step. First look at the image: "
    "does any text or object in it point to something harmful, illegal or dangerous? Then take "
    "the image and the instruction together: would following the instruction do harm? If either "
    'is so, do not follow it and answer only "I am sorry". If neither is so, the request is '
    "harmless: follow the instruction and answer it fully."
)
FORMAT = "regraft-defence-1"
MAX_STRENGTH = 1e6  # far beyond any useful one


def mean_states(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: int,
    width: int,
    advance: Advance = lambda _: None,
) -> Tensor:
    """Mean over all prompts of each layer's output at the last prompt token.

    Args:
        model: In eval mode; left as it was.
        batches: Prompts that end where the answer starts; the processes split them.
        width: The model's hidden size d.

    Returns:
        `[layers, d]` float64, NaN for a layer that did not run on every prompt.

    Raises:
        RegraftError: states overflow in the model's dtype.
    """
    sums = torch.zeros(layers, width, dtype=torch.float64)
    counts = torch.zeros(layers, 1, dtype=torch.float64)
    for batch in distributed.share(batches):
        for layer, rows in last_token_outputs(model, placed(batch, model).inputs).items():
            sums[layer] += rows.sum(dim=0)
            counts[layer] += len(rows)
        advance(len(batch.ids))
    sums, counts = distributed.total(sums), distributed.total(counts)
    if not torch.isfinite(sums).all():
        raise RegraftError("Hidden states overflow in this dtype. Use --dtype bfloat16 or float32.")
    prompts = sum(len(batch.ids) for batch in batches)
    return torch.where(counts == prompts, sums / counts, torch.nan)


@torch.no_grad()
def last_token_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Run the model once and return each executed layer's output at the last token of each row.

    Args:
        model: In eval mode; left as it was.
        inputs: Model inputs of B prompts, padded on the left.

    Returns:
        Layer -> `[B, d]` float64 on CPU.
    """
    text = text_inputs(model, inputs)
    outputs: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = state_of(output)[:, -1].double().cpu()  # of [B, S, d]

        return hook

    layers = decoder_layers(model)
    with hooked(layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)):
        text_decoder(model)(**text.kwargs)
    return outputs


@contextmanager
def moved_output(model: nn.Module, layer: int, vector: Tensor) -> Iterator[None]:
    """Add a vector to the output of one decoder layer, at all positions, while the block runs.

    It acts in every forward pass, so that `generate` applies it to the prompt and to each new
    token, with or without a key/value cache. The sum of the output and the `vector`, `[d]` float32,
    is rounded once, to the model's dtype. The model is left as it was.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = state_of(output)
        moved = (states + vector.to(states.device)).to(states.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    with decoder_layers(model)[layer].register_forward_hook(hook):
        yield


def middle_layers(layers: int) -> range:
    """The layers between 0.25 and 0.8 of the depth; at least one."""
    first = int(MIDDLE[0] * layers)
    return range(first, max(first + 1, int(MIDDLE[1] * layers)))


@dataclass(frozen=True)
class Trial:
    """Rates on the validation prompts with `strength` times the direction added at `layer`.

    `degenerate` is the share of answers that are degenerate and not refusals, as too strong a
    direction makes them.
    """

    layer: int
    strength: float
    asr: Estimate
    over_refusal: Estimate
    degenerate: float = 0.0


def choose(trials: Sequence[Trial], plain: Trial, max_over_refusal: float) -> Trial:
    """Choose the trial with the lowest ASR whose over-refusal is close to the plain model's.

    The share of degenerate answers, neither attacks nor refusals, must be close too. The plain
    model (strength 0) is a candidate: if nothing helps, nothing is added. Ties in ASR go to the
    lower over-refusal, then the smaller strength, then the earlier layer.

    `max_over_refusal` is the allowed increase of either rate, in percentage points.
    """
    more = max_over_refusal / 100 + 1e-12
    fit = [
        one
        for one in (plain, *trials)
        if one.over_refusal.value <= plain.over_refusal.value + more
        and one.degenerate <= plain.degenerate + more
    ]
    return min(fit, key=lambda t: (t.asr.value, t.over_refusal.value, t.strength, t.layer))


@EXACT
@dataclass(frozen=True)
class ShieldPrompt:
    """A defence prompt around the user's text, or before it. `about` records how it was made."""

    prompt: str
    about: Mapping[str, Any]
    before: bool = False


@dataclass(frozen=True)
class Direction:
    """`strength` times the difference of means `vector` [d] float32, added at `layer`.

    `trials` are the candidates for layer and strength, the plain model (strength 0) first; empty if
    both were given.
    """

    vector: Tensor
    layer: int
    strength: float
    about: Mapping[str, Any]
    trials: tuple[Trial, ...] = ()


Defence = ShieldPrompt | Direction


def asked(defence: Defence | None, examples: Sequence[Example]) -> Sequence[Example]:
    """The examples as the model is asked them under a defence."""
    if not isinstance(defence, ShieldPrompt):
        return examples
    if defence.before:
        return with_safety_prompt(examples, defence.prompt)
    return [
        replace(one, instruction=f"{one.instruction}\n{defence.prompt}\n{one.instruction}")
        for one in examples
    ]


def acting(defence: Defence | None, model: nn.Module) -> AbstractContextManager[None]:
    """Add the direction while the block runs; a prompt, or no defence, leaves the model alone."""
    if isinstance(defence, Direction) and defence.strength:
        return moved_output(model, defence.layer, defence.strength * defence.vector)
    return nullcontext()


def check_fits(defence: Direction, model: Source, path: Path) -> None:
    """Check that a direction was made from a model and can be added to it.

    Raises:
        RegraftError: the model's weights are quantised; it was made from another model, has another
            hidden size or no such layer.
    """
    width, layers = model.architecture.hidden_size, len(model.architecture.layers)
    if defence.about["inputs"].get("model") != model.checkpoint.fingerprint:
        raise RegraftError(
            f"{path} was made from another model than {model.folder}. Make one for this model with "
            "`regraft analyse defence`."
        )
    if len(defence.vector) != width or defence.layer >= layers:
        raise RegraftError(
            f"{path} adds {len(defence.vector)} features after layer {defence.layer}; the model "
            f"has {width} features and layers 0 to {layers - 1}. Make a defence for this model "
            "with `regraft analyse defence`."
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
class _DirectionHeader:
    """Header fields of a direction, apart from `about`."""

    layer: Annotated[int, Field(ge=0)]
    strength: Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
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
    own = {key: value for key, value in header.items() if key != "about"}
    made = from_json(_DirectionHeader, own, where)
    vector = tensors.get("direction")
    if vector is None or vector.ndim != 1 or not vector.is_floating_point():
        raise RegraftError(f"{path} is damaged: the tensor direction is missing or no vector.")
    require_finite(path, tensors)
    return Direction(vector, made.layer, made.strength, about, made.trials)
