"""The refusal direction and the choice of where and how strongly to add it (Arditi et al. 2024).

The direction of a layer is the mean of the residual stream behind it at the last prompt token of
harmful prompts minus that of harmless ones (arXiv 2406.11717, section 2.3). Added at inference to
the same layer's output at all positions it induces refusal. It is kept raw: strength 1 adds one
difference of means.

States are read and moved by hooks on a layer's output, so that every family's own code runs in
between. A layer that a family skips for a batch (Mllama's cross-attention without images) is
neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.models.architecture import decoder_layers, text_decoder
from regraft.models.load import placed
from regraft.models.replay import hooked, last_positions, state_of, text_inputs
from regraft.progress import Advance

MIDDLE = (0.25, 0.8)  # of the depth: where layers are searched


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
        batches: Prompts that end where the answer starts; processes share them.
        layers: How many decoder layers the model has.
        width: Its hidden size d.
        advance: Called with the number of prompts just run.

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
    """Run the model once and keep what each executed layer gives at each row's last token.

    Args:
        model: In eval mode; left as it was.
        inputs: Of a batch of B prompts, padded on either side.

    Returns:
        Layer -> `[B, d]` float64 on CPU.
    """
    text = text_inputs(model, inputs)
    ids = inputs["input_ids"]
    at = last_positions(inputs, ids.shape[1])
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states = state_of(output)  # [B, S, d]
            where = at.to(states.device)
            rows = states[torch.arange(len(where), device=states.device), where]
            found[index] = rows.double().cpu()

        return hook

    layers = decoder_layers(model)
    with hooked(layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)):
        text_decoder(model)(**text.kwargs)
    return found


@contextmanager
def moved_output(model: nn.Module, layer: int, vector: Tensor) -> Iterator[None]:
    """Add a vector to the output of one decoder layer, at all positions, while the block runs.

    It acts in every forward pass, so in `generate` on the prompt and on each new token, with a
    key/value cache or without. The sum is rounded once, to the model's dtype.

    Args:
        model: Left as it was.
        layer: Index of the decoder layer.
        vector: `[d]` float32.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = state_of(output)
        moved = (states + vector.to(states.device)).to(states.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    with decoder_layers(model)[layer].register_forward_hook(hook):
        yield


def middle_layers(layers: int) -> range:
    """Those between 0.25 and 0.8 of the depth; at least one."""
    first = int(MIDDLE[0] * layers)
    return range(first, max(first + 1, int(MIDDLE[1] * layers)))


@dataclass(frozen=True)
class Trial:
    """Rates on the validation prompts with `strength` times the direction added at `layer`.

    `degenerate` is the share of all degenerate answers, as those of too strong a direction.
    """

    layer: int
    strength: float
    asr: Estimate
    over_refusal: Estimate
    degenerate: float = 0.0


def choose(trials: Sequence[Trial], plain: Trial, max_over_refusal: float) -> Trial:
    """The trial of lowest ASR whose over-refusal is near enough to that of the plain model.

    So must be the share of degenerate answers, which are neither attacks nor refusals.
    The plain model, of strength 0, is a choice too: nothing is added where nothing helps. Of equal
    ASR the lower over-refusal counts, then the smaller strength, then the earlier layer.

    Args:
        trials: What was tried.
        plain: The same without an addition.
        max_over_refusal: How much more of either is allowed, in percentage points.
    """
    more = max_over_refusal / 100 + 1e-12
    fit = [
        one
        for one in (plain, *trials)
        if one.over_refusal.value <= plain.over_refusal.value + more
        and one.degenerate <= plain.degenerate + more
    ]
    return min(fit, key=lambda t: (t.asr.value, t.over_refusal.value, t.strength, t.layer))
